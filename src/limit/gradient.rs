//! The limit of the concurrency, derived from latencies. It is a gradient controller, as in Envoy's filter for adaptive concurrency: the
//! limit is multiplied by the ratio of the latency without a queue (the baseline) to the current latency.
//!
//! Envoy measures the baseline at a concurrency of three. For a server with many workers, this wastes its capacity, and with one worker, it
//! measures a queue. This controller instead halves the limit until the latency does not fall any more (a *probe*). If the baseline was
//! right, that is at half of the limit, at which a server that is somewhat above its capacity has no queue, and still does most of its work.

use std::time::Duration;

use tokio::time::Instant;

use super::window::{Accepted, Measurement, Window, as_f64};

/// The limits between which the controller may choose.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) min: usize,
    pub(super) max: usize,
}

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Its response began.
    Success,
    /// It was dropped, or its deadline passed, before its response began. Without that, it would have taken longer.
    Overrun,
    /// Its latency is not comparable with that of other calls.
    Unsampled,
}

/// The controller.
#[derive(Debug)]
pub(super) struct Gradient {
    bounds: Bounds,
    limit: f64,
    window: Window,
    /// The latency without a queue.
    baseline: Option<f64>,
    /// When the latency was last compared with that without a queue: at the last window that was not loaded, or at the end of the last probe.
    checked: Instant,
    /// The interval between probes. It grows from [`FIRST_PROBE`] to [`LAST_PROBE`] while the server is loaded, because a probe costs some
    /// goodput, and the mean of several probes is more accurate than each of them.
    probe_interval: Duration,
    /// The interval before a probe that begins because the limit has reached half of `probed_limit`. It grows while only such probes follow
    /// each other, because latencies that vary widely reach that bound often.
    urgent_interval: Duration,
    /// When the last loaded window ended.
    loaded: Instant,
    /// The largest limit since the last probe with a result. Without a probe, the limit does not fall below half of it: a latency that has
    /// another cause than a queue, such as a slow database, does not fall with the limit.
    probed_limit: f64,
    /// The number of late windows since the last one that was not late.
    late_windows: u32,
    /// The current probe, if any.
    probe: Option<Probe>,
}

/// A measurement of the baseline.
#[derive(Clone, Copy, Debug)]
struct Probe {
    limit: f64,
    /// The latency at twice this limit. It is infinite if it is unknown.
    before: f64,
    /// Whether it began because the limit could not fall without it.
    is_urgent: bool,
    /// The part of the calls that did not end by themselves before the probe, if that was at least half. Otherwise, it is 0.
    late_share: f64,
    /// The goodput before the probe.
    goodput: f64,
    /// The latency at the last limit, if the calls were as late there as before.
    late_latency: Option<f64>,
    expires: Instant,
}

impl Gradient {
    pub(super) fn new(bounds: Bounds, now: Instant) -> Self {
        let limit = as_f64(INITIAL_LIMIT.clamp(bounds.min, bounds.max));
        Self {
            bounds,
            limit,
            window: Window::new(0, now),
            baseline: None,
            checked: now,
            probe_interval: FIRST_PROBE,
            urgent_interval: FIRST_PROBE,
            loaded: now,
            probed_limit: limit,
            late_windows: 0,
            probe: None,
        }
    }

    /// Returns the number of calls that may be in flight at once.
    pub(super) fn limit(&self) -> usize {
        let limit = self.probe.map_or(self.limit, |probe| probe.limit);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "the limit is positive and at most `bounds.max`"
        )]
        let limit = limit as usize;
        limit.clamp(self.bounds.min, self.bounds.max)
    }

    /// Returns the latency without a queue, if it is known.
    pub(super) fn baseline(&self) -> Option<Duration> {
        Duration::try_from_secs_f64(self.baseline?).ok()
    }

    #[cfg(test)]
    pub(super) fn is_probing(&self) -> bool {
        self.probe.is_some()
    }

    /// Records that a call ended at `now`. `accepted` is the number of calls accepted so far.
    pub(super) fn on_end(&mut self, call: &Accepted, end: End, now: Instant, accepted: usize) {
        self.expire_probe(now, accepted);
        if self.window.contains(call, accepted) {
            self.record(call, end, now);
        }
        if let Some(calls) = self.window.open_calls(accepted) {
            let is_over = now.saturating_duration_since(self.window.since) >= WINDOW;
            let is_full = match self.probe {
                Some(_) => calls >= PROBE_CALLS,
                None => calls >= MAX_CALLS || (is_over && calls >= MIN_CALLS),
            };
            if is_full {
                self.window.close(accepted);
            }
        }
        if self.window.is_complete(accepted, self.limit()) {
            if self.baseline.is_none() {
                // Otherwise, calls that clients drop early, for example because of hedging, would prevent the first baseline.
                self.window.skip_early_overruns();
            }
            let measured = self.window.measure(now);
            self.window.restart(accepted, now);
            match (measured, self.probe) {
                (None, _) => {}
                (Some(measured), None) => self.end_window(measured, now),
                (Some(measured), Some(probe)) => self.end_level(probe, measured, now),
            }
        }
    }

    /// Records that a call was refused at `now`. `accepted` is the number of calls accepted so far.
    pub(super) fn on_refusal(&mut self, now: Instant, accepted: usize) {
        self.expire_probe(now, accepted);
    }

    fn record(&mut self, call: &Accepted, end: End, now: Instant) {
        let latency = now.saturating_duration_since(call.at).as_secs_f64();
        // The clock may not have advanced during a very short call.
        let latency = latency.max(MIN_LATENCY);
        match end {
            End::Success => self.window.record(call, latency, false),
            // A caller may also drop a call that is not late. Its latency has no meaning then.
            End::Overrun if !self.is_late(latency) => self.window.skip(),
            End::Overrun => self.window.record(call, latency, true),
            End::Unsampled => self.window.skip(),
        }
    }

    fn is_late(&self, latency: f64) -> bool {
        self.baseline
            .is_none_or(|baseline| latency > baseline * EARLY)
    }

    fn end_window(&mut self, measured: Measurement, now: Instant) {
        // If the deadlines are short, they bound the number of calls in flight, and not the limit.
        let is_late = measured.is_late;
        let is_loaded = is_late || as_f64(measured.in_flight) >= self.limit / 2.0;
        let is_first = self.baseline.is_none();
        self.late_windows = if is_late { self.late_windows + 1 } else { 0 };
        if !is_late {
            self.update_baseline(measured, is_loaded, now);
        }
        if !is_loaded {
            // Fewer calls are in flight than the limit allows, so the latency does not depend on the limit.
            if now.saturating_duration_since(self.loaded) >= FIRST_PROBE {
                self.probe_interval = FIRST_PROBE;
                self.urgent_interval = FIRST_PROBE;
            }
            // Otherwise, a server without load would keep the limit of a short stall, and refuse the next burst of calls.
            let initial = as_f64(INITIAL_LIMIT);
            if self.limit < initial {
                self.set_limit((self.limit * TOLERANCE + HEADROOM).min(initial));
                self.probed_limit = self.probed_limit.max(self.limit);
            }
            return;
        }
        self.loaded = now;
        if is_first && !is_late && measured.in_flight >= self.limit() {
            // The server may have been overloaded since its start. Then the queue still grows, so its latency is not compared with the
            // latency at a lower limit.
            self.begin_probe(&measured, f64::INFINITY, false, now);
            return;
        }
        // Without a baseline, the deadlines of the calls are shorter than the queue.
        let gradient = self.baseline.map_or(MIN_GRADIENT, |baseline| {
            TOLERANCE * baseline / measured.latency
        });
        let next = if is_late {
            self.limit * gradient.clamp(MIN_GRADIENT, 1.0)
        } else {
            self.limit * gradient.clamp(MIN_GRADIENT, TOLERANCE) + HEADROOM
        };
        let lowest = self.probed_limit / 2.0;
        self.set_limit(next.max(lowest));
        self.probed_limit = self.probed_limit.max(self.limit);
        // Either there is a queue, or the calls are slower than before without one.
        let is_urgent = next < lowest;
        let interval = if is_urgent {
            self.probe_interval.min(self.urgent_interval)
        } else {
            self.probe_interval
        };
        let age = now.saturating_duration_since(self.checked);
        // A latency that does not reduce the limit needs no explanation by a probe, which might refuse calls of a server without overload.
        let is_slow = if is_late {
            self.late_windows >= LATE_WINDOWS
        } else {
            gradient < 1.0
        };
        if age >= interval && is_slow {
            let before = if is_late {
                f64::INFINITY
            } else {
                measured.latency
            };
            self.begin_probe(&measured, before, is_urgent, now);
        }
    }

    fn update_baseline(&mut self, measured: Measurement, is_loaded: bool, now: Instant) {
        match &mut self.baseline {
            None => {
                self.baseline = Some(measured.latency);
                self.checked = now;
            }
            // At a low load there is no queue, so the baseline follows the latency in both directions.
            Some(baseline) if !is_loaded => {
                *baseline += (measured.latency - *baseline) * FOLLOW;
                self.checked = now;
            }
            // The smallest of many inaccurate latencies would be too small. So the weight is that of an accurate one.
            Some(baseline) if measured.latency < *baseline => {
                let weight = (as_f64(measured.calls) / ACCURATE_CALLS).min(1.0);
                *baseline += (measured.latency - *baseline) * weight;
            }
            Some(_) => {}
        }
    }

    fn begin_probe(&mut self, measured: &Measurement, before: f64, is_urgent: bool, now: Instant) {
        let latencies =
            Duration::try_from_secs_f64(measured.latency.min(MAX_LATENCY) * PROBE_LATENCIES);
        self.probe = Some(Probe {
            limit: self.half(self.limit),
            before,
            is_urgent,
            late_share: if measured.is_late {
                measured.late_share
            } else {
                0.0
            },
            goodput: measured.goodput,
            late_latency: None,
            expires: now + PROBE_TIMEOUT + latencies.unwrap_or_default(),
        });
    }

    /// Ends the measurement at one limit of a probe.
    fn end_level(&mut self, probe: Probe, measured: Measurement, now: Instant) {
        // With few calls, a part of them that is about half is sometimes less by chance.
        let is_as_late = measured.is_late
            || (probe.late_share > 0.0 && measured.late_share > probe.late_share / 2.0);
        let half = self.half(probe.limit);
        let is_in_vain =
            is_as_late && (half >= probe.limit || measured.goodput < probe.goodput * KEPT_GOODPUT);
        if is_in_vain {
            return self.end_in_vain(probe, measured.latency, now);
        }
        let has_queue = is_as_late || measured.latency < probe.before * QUEUED;
        if has_queue && half < probe.limit {
            self.probe = Some(Probe {
                limit: half,
                before: if is_as_late {
                    f64::INFINITY
                } else {
                    measured.latency
                },
                late_latency: is_as_late.then_some(measured.latency),
                ..probe
            });
            return;
        }
        // At twice the limit of the probe, there was no queue, or a short one.
        self.set_limit(self.limit.min(probe.limit * 2.0));
        self.probed_limit = self.limit;
        self.end_probe(probe, now);
        self.learn(measured.latency);
    }

    /// Ends a probe that has shown that the calls are late for another reason than a queue. A lower limit would only refuse calls, and with the
    /// previous baseline, the next late window would halve it.
    fn end_in_vain(&mut self, probe: Probe, latency: f64, now: Instant) {
        self.set_limit(self.probed_limit);
        let urgent_interval = self.urgent_interval;
        self.end_probe(probe, now);
        self.urgent_interval = self.urgent_interval.max(urgent_interval);
        self.learn(latency);
    }

    /// Changes the baseline to the result of a probe.
    fn learn(&mut self, latency: f64) {
        self.baseline = Some(match self.baseline {
            Some(known) if SIMILAR.contains(&(latency / known)) => f64::midpoint(known, latency),
            _ => latency,
        });
    }

    fn end_probe(&mut self, probe: Probe, now: Instant) {
        self.probe = None;
        self.urgent_interval = if probe.is_urgent {
            (self.urgent_interval * PROBE_GROWTH).min(LAST_PROBE)
        } else {
            FIRST_PROBE
        };
        self.probe_interval = (self.probe_interval * PROBE_GROWTH).min(LAST_PROBE);
        self.checked = now;
    }

    /// Ends a probe for which there are too few calls. Otherwise, a burst of calls after it could be refused although the server is idle.
    fn expire_probe(&mut self, now: Instant, accepted: usize) {
        if let Some(probe) = self.probe
            && probe.expires <= now
        {
            match probe.late_latency {
                Some(latency) => self.end_in_vain(probe, latency, now),
                None => self.end_probe(probe, now),
            }
            self.window.restart(accepted, now);
        }
    }

    fn set_limit(&mut self, limit: f64) {
        self.limit = limit.clamp(as_f64(self.bounds.min), as_f64(self.bounds.max));
    }

    fn half(&self, limit: f64) -> f64 {
        (limit / 2.0).max(as_f64(self.bounds.min))
    }
}

/// The limit of a server that has just started. A smaller value would refuse calls of a server that is not loaded.
const INITIAL_LIMIT: usize = 32;
/// The limit changes at most this often, as in Envoy.
const WINDOW: Duration = Duration::from_millis(100);
/// A window of fewer calls is too short for a percentile.
const MIN_CALLS: usize = 20;
/// A window of more calls is closed early, which bounds the memory.
const MAX_CALLS: usize = 1_000;
/// The number of calls at each limit of a probe.
const PROBE_CALLS: usize = 30;
const FIRST_PROBE: Duration = Duration::from_secs(1);
const LAST_PROBE: Duration = Duration::from_secs(30);
const PROBE_GROWTH: u32 = 4;
/// A probe at a limit of one takes the time of [`PROBE_CALLS`] calls at each of its limits.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);
const PROBE_LATENCIES: f64 = 64.0;
/// A probe because of late calls begins after so many late windows in a row. In a single window, half of the few calls may be late by chance.
const LATE_WINDOWS: u32 = 2;
/// If half of the calls or more are late because of a queue, a lower limit does not reduce the goodput: the server is as busy as before.
/// Without a queue, half of the limit halves the goodput. The value is smaller than a half because the goodput of 30 calls is inaccurate.
const KEPT_GOODPUT: f64 = 0.45;
/// One minute.
const MAX_LATENCY: f64 = 60.0;
/// With a queue at half of the limit too, half of the limit halves the latency. Without one, the latency is at least this part.
const QUEUED: f64 = 0.6;
/// The ratios of two baselines whose difference may be by chance. Their mean is more accurate.
const SIMILAR: std::ops::Range<f64> = 0.6..1.6;
/// The weight of a latency at a low load.
const FOLLOW: f64 = 0.25;
/// The latency of so many calls is accurate.
const ACCURATE_CALLS: f64 = 1_000.0;
/// The latency may be a quarter above the baseline before the limit is reduced, as in Envoy (`min_rtt_calc_params.buffer`).
const TOLERANCE: f64 = 1.25;
/// A call that is dropped before this part of the baseline is not late. If the baseline is the deadline of the calls, timers would otherwise
/// decide which of them are late.
const EARLY: f64 = 0.9;
/// The limit is at most halved at once, as in Envoy.
const MIN_GRADIENT: f64 = 0.5;
/// A server with `n` workers gets a limit of about `TOLERANCE * n + HEADROOM`. With one worker, that is one call that is served and one that
/// waits: fewer would waste capacity, and more would make the latency more than twice the baseline. Envoy's headroom is `sqrt(limit)`, which
/// is too large for few workers.
const HEADROOM: f64 = 0.75;
/// One microsecond.
const MIN_LATENCY: f64 = 1e-6;
