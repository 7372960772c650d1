use std::time::Duration;

use tokio::time::Instant;

use super::simulation::{DEFAULT_BOUNDS, Distribution, Disturbance, Simulation};
use crate::limit::gradient::{Bounds, End, Gradient};
use crate::limit::window::{Accepted, Window, as_f64};

/// Calls that are served one after the other, or all at once, as far as the controller sees.
struct Calls {
    gradient: Gradient,
    now: Instant,
    accepted: usize,
}

impl Calls {
    fn new(bounds: Bounds) -> Self {
        let now = Instant::now();
        Self {
            gradient: Gradient::new(bounds, now),
            now,
            accepted: 0,
        }
    }

    fn accept(&mut self, in_flight: usize) -> Accepted {
        self.accepted += 1;
        Accepted {
            number: self.accepted - 1,
            at: self.now,
            in_flight,
        }
    }

    fn end(&mut self, call: &Accepted, end: End) {
        self.gradient.on_end(call, end, self.now, self.accepted);
    }

    /// Serves a call while some calls are in flight.
    fn serve(&mut self, latency: Duration, in_flight: usize, end: End) {
        let call = self.accept(in_flight);
        self.now += latency;
        self.end(&call, end);
    }

    /// Accepts as many calls as the limit permits, and ends all of them at once.
    fn fill(&mut self, latency: Duration, end: End) {
        let limit = self.gradient.limit();
        let calls: Vec<_> = (0..limit).map(|_| self.accept(limit)).collect();
        self.now += latency;
        for call in &calls {
            self.end(call, end);
        }
    }

    fn baseline(&self) -> Duration {
        self.gradient.baseline().unwrap()
    }
}

const MILLI: Duration = Duration::from_millis(1);
const SERVICE: Duration = Duration::from_millis(10);

/// The latency that one of hundred calls exceeds on an idle server.
const UNLOADED: Duration = Duration::from_millis(11);

#[test]
fn a_server_at_twice_its_capacity_keeps_its_goodput_and_its_latency() {
    for (workers, seconds) in [(1, 120), (2, 60), (3, 40), (8, 20), (64, 6)] {
        for seed in 0..10 {
            let simulation = Simulation {
                seconds,
                ..Simulation::overloaded(workers, SERVICE)
            };
            let outcome = simulation.run(DEFAULT_BOUNDS, seed);
            assert!(outcome.goodput >= 0.9);
            assert!(outcome.p99 <= 2 * UNLOADED);
        }
    }
}

/// The calls last much longer than the interval at which the limit changes.
#[test]
fn a_server_with_calls_of_seconds_keeps_its_goodput_and_its_latency() {
    for seed in 0..10 {
        let simulation = Simulation {
            seconds: 200,
            ..Simulation::overloaded(64, 200 * SERVICE)
        };
        let outcome = simulation.run(DEFAULT_BOUNDS, seed);
        assert!(outcome.goodput >= 0.9);
        assert!(outcome.p99 <= 2 * 200 * UNLOADED);
    }
}

#[test]
fn service_times_that_differ_widely_cost_little_goodput() {
    for distribution in [Distribution::Exponential, Distribution::Bimodal] {
        for (workers, seconds) in [(2, 60), (8, 20), (64, 6)] {
            for seed in 0..10 {
                let simulation = Simulation {
                    distribution,
                    seconds,
                    ..Simulation::overloaded(workers, SERVICE)
                };
                let outcome = simulation.run(DEFAULT_BOUNDS, seed);
                assert!(outcome.goodput >= 0.75);
            }
        }
    }
}

#[test]
fn a_server_below_its_capacity_refuses_nothing() {
    for workers in [1, 2, 8, 16] {
        for seed in 0..10 {
            let simulation = Simulation {
                loads: &[0.5],
                seconds: 20,
                ..Simulation::overloaded(workers, SERVICE)
            };
            assert_eq!(simulation.run(DEFAULT_BOUNDS, seed).refused, 0);
        }
    }
}

#[test]
fn the_limit_of_a_server_that_can_serve_more_calls_at_once_grows() {
    for seed in 0..10 {
        let simulation = Simulation {
            loads: &[0.5],
            seconds: 20,
            ..Simulation::overloaded(256, 10 * SERVICE)
        };
        let outcome = simulation.run(DEFAULT_BOUNDS, seed);
        // The initial limit is a quarter of the load.
        assert!(outcome.refused <= 2_500);
        assert_eq!(outcome.refused_later, 0);
    }
}

#[test]
fn a_server_whose_calls_all_exceed_their_deadline_recovers() {
    // With the initial limit, a call of one worker waits 31 service times. The deadlines permit 5, 10 or 20.
    for deadline in [50_000, 100_000, 200_000] {
        for seed in 0..10 {
            let simulation = Simulation {
                deadline: Some(deadline),
                ..Simulation::overloaded(1, SERVICE)
            };
            let outcome = simulation.run(DEFAULT_BOUNDS, seed);
            assert!(outcome.goodput >= 0.9);
            assert!(outcome.limit <= 6.0);
        }
    }
}

/// The deadline is also the latency without a queue, as far as the first calls show.
#[test]
fn a_server_whose_first_calls_exceed_their_deadline_recovers_within_seconds() {
    for deadline in [250, 500, 1_000] {
        let outcomes = (0..20).map(|seed| {
            let simulation = Simulation {
                deadline: Some(deadline * 1_000),
                seconds: 12,
                ..Simulation::overloaded(1, 50 * MILLI)
            };
            simulation.run(DEFAULT_BOUNDS, seed).goodput
        });
        let goodput: Vec<_> = outcomes.collect();
        assert!(goodput.iter().all(|goodput| *goodput >= 0.45));
        assert!(goodput.iter().sum::<f64>() >= 0.78 * 20.0);
    }
}

/// A server that can serve all calls at once, but depends on others.
fn disturbed(disturbance: Disturbance, deadline: Option<u64>, seconds: u64) -> Simulation {
    Simulation {
        loads: &[0.0002],
        deadline,
        disturbance,
        seconds,
        ..Simulation::overloaded(10_000, SERVICE)
    }
}

#[test]
fn a_slow_database_without_a_queue_does_not_reduce_the_limit_below_half() {
    for factor in [3, 5, 20] {
        for seed in 0..10 {
            // 20 of 32 calls are in flight before, and then all of them.
            let simulation = Simulation {
                loads: &[0.002],
                ..disturbed(Disturbance::Slower(factor), None, 40)
            };
            let outcome = simulation.run(DEFAULT_BOUNDS, seed);
            assert!(outcome.smallest_limit >= 16);
            assert!(outcome.limit >= 16.0);
        }
    }
}

#[test]
fn a_quarter_of_the_calls_over_their_deadline_does_not_pin_the_limit() {
    // Four or five calls are in flight.
    for percent in [20, 25, 40, 100] {
        for seed in 0..10 {
            let simulation = disturbed(Disturbance::SlowShare(percent), Some(50_000), 60);
            let outcome = simulation.run(DEFAULT_BOUNDS, seed);
            // Of 9 000 calls, only the measurements of the latency without a queue refuse some.
            assert!(outcome.refused_later <= 1_200);
        }
    }
}

/// The part of the calls that is late differs by chance between the measurements.
#[test]
fn less_than_half_of_the_calls_over_their_deadline_neither_pins_nor_reduces_the_limit() {
    // 2, 4 and 15 calls are in flight before, and up to 36 then. The limit is 32 at first.
    let loads: [&[f64]; 3] = [&[0.0002], &[0.0004], &[0.0015]];
    for percent in [30, 35, 40, 45] {
        for load in loads {
            let refused = (0..20).map(|seed| {
                let simulation = Simulation {
                    loads: load,
                    ..disturbed(Disturbance::SlowShare(percent), Some(50_000), 60)
                };
                let outcome = simulation.run(DEFAULT_BOUNDS, seed);
                assert!(outcome.limit >= 16.0);
                as_f64(outcome.refused_later) / (load[0] * 1e6 * 45.0)
            });
            let refused: Vec<_> = refused.collect();
            assert!(refused.iter().all(|refused| *refused <= 0.05));
            assert!(refused.iter().sum::<f64>() <= 0.01 * 20.0);
        }
    }
}

/// Each measurement refuses some calls until it has shown that there is no queue.
#[test]
fn half_of_the_calls_over_their_deadline_costs_few_other_calls() {
    for percent in [50, 55, 60] {
        let refused = (0..20).map(|seed| {
            let simulation = Simulation {
                loads: &[0.0004],
                ..disturbed(Disturbance::SlowShare(percent), Some(50_000), 60)
            };
            let outcome = simulation.run(DEFAULT_BOUNDS, seed);
            as_f64(outcome.refused_later) / (400.0 * 45.0)
        });
        let refused: Vec<_> = refused.collect();
        assert!(refused.iter().all(|refused| *refused <= 0.05));
        assert!(refused.iter().sum::<f64>() <= 0.01 * 20.0);
    }
}

/// A measurement lasts longer, so it refuses more calls.
#[test]
fn half_of_the_calls_over_a_long_deadline_costs_a_part_of_the_other_calls() {
    for (percent, worst, mean) in [(40, 0.4, 0.2), (55, 0.5, 0.35)] {
        let refused = (0..10).map(|seed| {
            // 60 calls per second. 25 and 34 of them are in flight.
            let simulation = Simulation {
                loads: &[0.0006],
                deadline: Some(1_000_000),
                disturbance: Disturbance::SlowShare(percent),
                seconds: 240,
                ..Simulation::overloaded(10_000, 101 * MILLI)
            };
            let outcome = simulation.run(DEFAULT_BOUNDS, seed);
            as_f64(outcome.refused_later) / (59.4 * 180.0)
        });
        let refused: Vec<_> = refused.collect();
        assert!(
            refused.iter().all(|refused| *refused <= worst),
            "{refused:?}"
        );
        assert!(refused.iter().sum::<f64>() <= mean * 10.0, "{refused:?}");
    }
}

#[test]
fn calls_that_are_all_late_without_a_queue_keep_the_limit() {
    for percent in [90, 100] {
        for seed in 0..10 {
            // 10 calls are in flight before, and 46 to 50 then.
            let simulation = Simulation {
                loads: &[0.001],
                ..disturbed(Disturbance::SlowShare(percent), Some(50_000), 60)
            };
            let outcome = simulation.run(DEFAULT_BOUNDS, seed);
            assert!(outcome.refused_later <= 45_000 * 3 / 10);
            assert!(outcome.limit >= 32.0);
        }
    }
}

#[test]
fn early_drops_do_not_keep_the_limit_at_one() {
    for percent in [40, 50, 60, 80] {
        for seed in 0..10 {
            let simulation = disturbed(Disturbance::EarlyDrops(percent), None, 20);
            let outcome = simulation.run(DEFAULT_BOUNDS, seed);
            assert_eq!(outcome.refused, 0);
            assert!(outcome.limit >= 32.0);
        }
    }
}

#[test]
fn after_a_stall_the_limit_returns_in_a_calm() {
    for seed in 0..10 {
        let simulation = Simulation {
            loads: &[0.0004],
            ..disturbed(Disturbance::Stall, None, 20)
        };
        let outcome = simulation.run(DEFAULT_BOUNDS, seed);
        assert!(outcome.smallest_limit < 32);
        assert!(outcome.limit >= 32.0);
    }
}

/// As for a garbage collection. The server works for seven tenths of the time.
#[test]
fn pauses_of_the_process_do_not_keep_the_limit_low() {
    for workers in [4, 16] {
        for seed in 0..10 {
            let simulation = Simulation {
                disturbance: Disturbance::Pauses(300_000),
                seconds: 40,
                ..Simulation::overloaded(workers, SERVICE)
            };
            assert!(simulation.run(DEFAULT_BOUNDS, seed).goodput >= 0.6);
        }
    }
}

/// Two seconds with a fifth of the capacity, and two seconds with five times the capacity. The server can serve 0.6 of its capacity.
#[test]
fn bursts_of_seconds_are_served_at_nearly_the_capacity() {
    const LOADS: [f64; 20] = {
        let mut loads = [0.2; 20];
        let mut burst = 1;
        while burst < loads.len() {
            loads[burst] = 5.0;
            burst += 2;
        }
        loads
    };
    for workers in [4, 16] {
        for seed in 0..10 {
            let simulation = Simulation {
                loads: &LOADS,
                seconds: 40,
                ..Simulation::overloaded(workers, SERVICE)
            };
            assert!(simulation.run(DEFAULT_BOUNDS, seed).goodput >= 0.55);
        }
    }
}

#[test]
fn calls_that_are_rejected_at_once_do_not_reduce_the_goodput_of_the_others() {
    for seed in 0..10 {
        let simulation = Simulation {
            rejected: 8,
            seconds: 20,
            ..Simulation::overloaded(8, SERVICE)
        };
        let outcome = simulation.run(DEFAULT_BOUNDS, seed);
        assert!(outcome.goodput >= 0.9);
        assert!(outcome.p99 <= 2 * UNLOADED);
    }
}

#[test]
fn the_baseline_is_measured_at_growing_intervals_that_begin_again_after_a_calm() {
    let simulation = Simulation {
        loads: &[2.0, 0.2, 2.0],
        seconds: 180,
        ..Simulation::overloaded(8, SERVICE)
    };
    let outcome = simulation.run(DEFAULT_BOUNDS, 1);
    // At once, then after 4, 16 and 30 s. After the calm, the first interval is 1 s.
    let expected = [0, 4, 20, 50, 121, 125, 141, 171];
    let probes = outcome.probes;
    assert_eq!(probes.len(), expected.len(), "{probes:?}");
    for (probe, expected) in probes.iter().zip(expected) {
        assert!(probe.abs_diff(expected) <= 2, "{probes:?}");
    }
}

/// Also if it has been idle, or has served other calls before.
#[test]
fn the_baseline_follows_a_change_of_the_service_time() {
    let mut calls = Calls::new(DEFAULT_BOUNDS);
    for latency in [MILLI, 50 * MILLI] {
        // The server is not loaded.
        for _ in 0..2_000 {
            calls.serve(latency, 3, End::Success);
        }
        assert!(calls.baseline().abs_diff(latency) < latency / 100);
    }
}

#[test]
fn the_baseline_follows_a_change_of_the_service_time_under_load() {
    let mut calls = Calls::new(Bounds { min: 1, max: 100 });
    for latency in [500 * MILLI, 100 * MILLI, 500 * MILLI] {
        for _ in 0..1_000 {
            calls.fill(latency, End::Success);
        }
        assert!(calls.baseline().abs_diff(latency) < latency / 100);
        // The latency does not depend on the limit.
        assert_eq!(calls.gradient.limit(), 100);
    }
}

#[test]
fn calls_that_are_dropped_late_reduce_the_limit() {
    let mut calls = Calls::new(Bounds { min: 1, max: 1_000 });
    // Without a baseline.
    for _ in 0..3 {
        calls.fill(1_000 * MILLI, End::Overrun);
    }
    assert!(calls.gradient.limit() <= 8, "{:?}", calls.gradient);
    assert_eq!(calls.gradient.baseline(), None);
    for _ in 0..200 {
        calls.fill(100 * MILLI, End::Success);
    }
    let limit = calls.gradient.limit();
    assert_eq!(limit, 1_000);
    // With a baseline.
    for _ in 0..3 {
        calls.fill(1_000 * MILLI, End::Overrun);
    }
    assert!(calls.gradient.limit() <= limit / 4);
    assert!(calls.baseline().abs_diff(100 * MILLI) < MILLI);
}

#[test]
fn calls_that_are_dropped_early_or_fail_change_nothing() {
    for end in [End::Overrun, End::Unsampled] {
        let mut calls = Calls::new(DEFAULT_BOUNDS);
        for _ in 0..100 {
            calls.serve(10 * MILLI, 3, End::Success);
        }
        let baseline = calls.baseline();
        for _ in 0..1_000 {
            calls.serve(MILLI, 30, end);
        }
        assert_eq!(calls.baseline(), baseline);
        assert_eq!(calls.gradient.limit(), 32);
    }
}

/// A probe of calls that are all late ends with a verdict, or else it would begin again at once.
#[test]
fn the_limit_returns_if_a_probe_of_late_calls_does_not_reach_the_smallest_limit() {
    let mut calls = Calls::new(DEFAULT_BOUNDS);
    for _ in 0..200 {
        calls.fill(10 * MILLI, End::Success);
    }
    let limit = calls.gradient.limit();
    while !calls.gradient.is_probing() {
        calls.fill(1_000 * MILLI, End::Overrun);
    }
    while calls.gradient.limit() > limit / 8 {
        calls.fill(1_000 * MILLI, End::Overrun);
    }
    assert!(calls.gradient.is_probing());
    calls.now += Duration::from_secs(100);
    calls.gradient.on_refusal(calls.now, calls.accepted);
    assert!(!calls.gradient.is_probing());
    assert_eq!(calls.gradient.limit(), limit);
    assert!(calls.baseline() >= 900 * MILLI);
}

#[test]
fn a_dropped_call_is_late_from_nine_tenths_of_the_baseline() {
    for (latency, is_late) in [(89, false), (91, true)] {
        let mut calls = Calls::new(DEFAULT_BOUNDS);
        for _ in 0..100 {
            calls.serve(100 * MILLI, 3, End::Success);
        }
        let limit = calls.gradient.limit();
        for _ in 0..100 {
            calls.serve(latency * MILLI, 32, End::Overrun);
        }
        let has_changed = calls.gradient.is_probing() || calls.gradient.limit() != limit;
        assert_eq!(has_changed, is_late, "{latency} ms");
    }
}

#[test]
fn calls_that_never_end_do_not_stop_the_controller() {
    let mut calls = Calls::new(DEFAULT_BOUNDS);
    for _ in 0..20 {
        calls.accept(1);
    }
    for _ in 0..300 {
        calls.serve(10 * MILLI, 21, End::Success);
    }
    assert!(calls.baseline().abs_diff(10 * MILLI) < MILLI);
}

#[test]
fn a_probe_without_enough_calls_ends() {
    let mut calls = Calls::new(DEFAULT_BOUNDS);
    while !calls.gradient.is_probing() {
        calls.fill(MILLI, End::Success);
    }
    assert!(calls.gradient.limit() <= 16);
    calls.now += Duration::from_secs(2);
    calls.gradient.on_refusal(calls.now, calls.accepted);
    assert!(calls.gradient.limit() >= 32);
}

#[test]
fn the_limit_stays_within_its_bounds() {
    let mut calls = Calls::new(Bounds { min: 4, max: 40 });
    for number in 0..10_000 {
        // The latency grows without end at first, and is then constant.
        calls.fill(Duration::from_micros(number.min(5_000)), End::Success);
        assert!((4..=40).contains(&calls.gradient.limit()));
    }
    assert_eq!(calls.gradient.limit(), 40);
}

#[test]
fn the_numbers_of_calls_may_wrap_around() {
    let now = Instant::now();
    let first = usize::MAX - 2;
    let mut window = Window::new(first, now);
    let call = |number| Accepted {
        number,
        at: now,
        in_flight: 1,
    };
    let accepted = first.wrapping_add(5);
    assert!(!window.contains(&call(first - 1), accepted));
    for offset in 0..5 {
        let call = call(first.wrapping_add(offset));
        assert!(window.contains(&call, accepted));
        window.record(&call, 1.0, false);
    }
    assert_eq!(window.open_calls(accepted), Some(5));
    window.close(accepted);
    assert!(window.is_complete(accepted, 1));
    assert!(!window.contains(&call(accepted), accepted.wrapping_add(1)));
    assert_eq!(window.measure(now).unwrap().calls, 5);
}
