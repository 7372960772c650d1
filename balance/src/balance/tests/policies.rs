//! Compares the policies in virtual time. The channels of many clients share the servers, and each channel has its own estimates.
//!
//! A server has a number of workers and one queue. `make bench-policies` prints all combinations as a table of
//! comma-separated values; the tests below run a few of them.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use tokio::time::Instant;

use super::simulation::Connection;
use crate::balance::estimate::Ticks;
use crate::balance::latencies::Latencies;
use crate::balance::picker::{LbPolicy, Pick, Picker, SCAN_LIMIT};
use crate::balance::ready_set::{ReadySet, ReadySetBuilder};

/// What is wrong with the servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// All servers are equal.
    None,
    /// One server takes fifty times as long.
    Slow,
    /// One server takes fifty times as long for five seconds, and is as fast as the others for the next five seconds.
    Flapping,
    /// In each second, each server takes ten times as long with a probability of one tenth.
    Antagonist,
    /// Every second server has half of the workers. The weights of the servers are equal.
    HalfCapacity,
    /// One server fails every call at once.
    Fails,
}

const FAULTS: [Fault; 6] = [
    Fault::None,
    Fault::Slow,
    Fault::Flapping,
    Fault::Antagonist,
    Fault::HalfCapacity,
    Fault::Fails,
];

/// How the callers of each client make calls. Times are in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Callers {
    /// A call starts after a random time since the start of the previous one. The value is the mean time.
    EachAfter(u64),
    /// Each of this number of callers starts a call when its previous call has ended.
    Closed(u32),
}

#[derive(Clone, Copy, Debug)]
struct Case {
    fault: Fault,
    servers: usize,
    clients: usize,
    callers: Callers,
    policy: LbPolicy,
    seed: u64,
    /// The measured time, in microseconds. The same time passes before the measurement begins.
    time: u64,
}

/// What the callers of all clients have observed.
#[derive(Debug)]
struct Outcome {
    calls: usize,
    failed: usize,
    /// The share of the calls at a server that was slow, failing or weak when the call was sent.
    bad: f64,
    /// The latencies of the calls that did not fail, sorted, in microseconds.
    latencies: Vec<u64>,
}

impl Outcome {
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an index of a short list"
    )]
    fn percentile(&self, share: f64) -> f64 {
        let last = self.latencies.len().saturating_sub(1);
        let index = ((self.latencies.len() as f64 * share) as usize).min(last);
        self.latencies.get(index).copied().unwrap_or_default() as f64 / 1_000.0
    }
}

struct Client {
    connections: Vec<Connection>,
    latencies: Latencies,
    set: ReadySet<Connection>,
    picker: Picker,
}

impl Client {
    fn new(policy: LbPolicy, servers: usize, seed: u64) -> Self {
        let takes_turns = policy == LbPolicy::WeightedRoundRobin;
        let (mut latencies, mut builder) = (Latencies::new(), ReadySetBuilder::new(takes_turns));
        let mut connections = Vec::new();
        for server in 0..servers {
            let load = latencies.begin(None);
            load.set_limit(usize::MAX);
            let connection = Connection { server, load };
            connections.push(connection.clone());
            builder.insert(server, connection, 1);
        }
        Self {
            connections,
            latencies,
            set: builder.freeze(),
            picker: Picker::new(policy, Some(seed)),
        }
    }
}

/// What happens at a time. The order of the variants has no meaning; it makes the queue of events total.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Start {
        client: usize,
    },
    End {
        client: usize,
        server: usize,
        start: u64,
        failed: bool,
    },
    Refresh {
        client: usize,
    },
}

struct World {
    case: Case,
    clients: Vec<Client>,
    /// For each server, when each of its workers is idle.
    workers: Vec<BinaryHeap<Reverse<u64>>>,
    /// For each second, whether each server is disturbed.
    disturbed: Vec<Vec<bool>>,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    /// Makes the order of simultaneous events that of their creation.
    created: u64,
    rng: fastrand::Rng,
    epoch: Instant,
}

/// The time of a call at an idle server, in microseconds; the time of each call is up to 20 % longer or shorter.
const SERVICE_TIME: u64 = 5_000;
/// Calls that a server works on at the same time.
const WORKERS: usize = 16;
const SECOND: u64 = 1_000_000;
/// The time of a call that fails at once.
const FAILURE_TIME: u64 = 200;
/// The refresh intervals of the driver.
const REFRESH: u64 = 200_000;
const IDLE_REFRESH: u64 = 2_000_000;

impl World {
    fn new(case: Case) -> Self {
        let mut rng = fastrand::Rng::with_seed(case.seed);
        let seconds = usize::try_from(2 * case.time / SECOND + 2).expect("few seconds");
        let workers = |server: usize| {
            let weak = case.fault == Fault::HalfCapacity && server.is_multiple_of(2);
            let workers = if weak { WORKERS / 2 } else { WORKERS };
            std::iter::repeat_n(Reverse(0), workers).collect()
        };
        let mut world = Self {
            clients: (0..case.clients)
                .map(|_| Client::new(case.policy, case.servers, rng.u64(..)))
                .collect(),
            workers: (0..case.servers).map(workers).collect(),
            disturbed: (0..seconds)
                .map(|_| (0..case.servers).map(|_| rng.u8(..10) == 0).collect())
                .collect(),
            events: BinaryHeap::new(),
            created: 0,
            rng,
            epoch: Instant::now(),
            case,
        };
        for client in 0..case.clients {
            let at = world.rng.u64(..REFRESH);
            world.push(at, Event::Refresh { client });
            let (callers, within) = match case.callers {
                Callers::EachAfter(period) => (1, period),
                Callers::Closed(callers) => (callers, SERVICE_TIME),
            };
            for _ in 0..callers {
                let at = world.rng.u64(..within);
                world.push(at, Event::Start { client });
            }
        }
        world
    }

    fn push(&mut self, at: u64, event: Event) {
        self.created += 1;
        self.events.push(Reverse((at, self.created, event)));
    }

    fn ticks(&self, now: u64) -> Ticks {
        Ticks::at(self.epoch + Duration::from_micros(now), self.epoch)
    }

    /// Returns whether a call that is sent to this server now has a disadvantage.
    fn is_bad(&self, server: usize, now: u64) -> bool {
        match self.case.fault {
            Fault::None => false,
            Fault::Slow | Fault::Fails => server == 0,
            Fault::Flapping => server == 0 && (now / (5 * SECOND)).is_multiple_of(2),
            Fault::Antagonist => {
                let second = usize::try_from(now / SECOND).expect("few seconds");
                self.disturbed.get(second).is_some_and(|all| all[server])
            }
            Fault::HalfCapacity => server.is_multiple_of(2),
        }
    }

    fn run(mut self) -> Outcome {
        let mut outcome = Outcome {
            calls: 0,
            failed: 0,
            bad: 0.0,
            latencies: Vec::new(),
        };
        let mut bad = 0_u32;
        while let Some(Reverse((now, _, event))) = self.events.pop() {
            // Calls that are in flight at the end are counted as well: the slowest calls are among them.
            if now >= 2 * self.case.time && !matches!(event, Event::End { .. }) {
                continue;
            }
            match event {
                Event::Start { client } => {
                    let server = self.start(client, now);
                    if now >= self.case.time {
                        outcome.calls += 1;
                        bad += u32::from(self.is_bad(server, now));
                    }
                }
                Event::End {
                    client,
                    server,
                    start,
                    failed,
                } => {
                    self.end(client, server, now - start, failed, now);
                    if start >= self.case.time {
                        outcome.failed += usize::from(failed);
                        if !failed {
                            outcome.latencies.push(now - start);
                        }
                    }
                }
                Event::Refresh { client } => self.refresh(client, now),
            }
        }
        outcome.latencies.sort_unstable();
        let calls = u32::try_from(outcome.calls.max(1)).expect("fewer than 2^32 calls");
        outcome.bad = f64::from(bad) / f64::from(calls);
        outcome
    }

    fn start(&mut self, client: usize, now: u64) -> usize {
        let picked =
            self.clients[client]
                .picker
                .pick(&self.clients[client].set, |_| true, SCAN_LIMIT);
        let Pick::Taken(connection) = picked else {
            panic!("a connection without a limit should take the call");
        };
        let server = connection.server;
        let failed = self.case.fault == Fault::Fails && server == 0;
        let end = if failed {
            now + FAILURE_TIME
        } else {
            let Reverse(idle) = self.workers[server].pop().expect("a server has workers");
            let begin = idle.max(now);
            let factor = match self.case.fault {
                Fault::Slow | Fault::Flapping if self.is_bad(server, begin) => 50,
                Fault::Antagonist if self.is_bad(server, begin) => 10,
                _ => 1,
            };
            let end = begin + SERVICE_TIME * factor * self.rng.u64(80..120) / 100;
            self.workers[server].push(Reverse(end));
            end
        };
        self.push(
            end,
            Event::End {
                client,
                server,
                start: now,
                failed,
            },
        );
        if let Callers::EachAfter(period) = self.case.callers {
            let at = now + self.rng.u64(1..2 * period);
            self.push(at, Event::Start { client });
        }
        server
    }

    fn end(&mut self, client: usize, server: usize, elapsed: u64, failed: bool, now: u64) {
        let (elapsed, ticks) = (Duration::from_micros(elapsed), self.ticks(now));
        let load = &self.clients[client].connections[server].load;
        load.release();
        if failed {
            load.on_failure(elapsed, ticks);
        } else {
            load.on_head(elapsed, ticks);
        }
        if matches!(self.case.callers, Callers::Closed(_)) && now < 2 * self.case.time {
            self.push(now, Event::Start { client });
        }
    }

    /// Updates the estimates of a channel as its driver does.
    fn refresh(&mut self, client: usize, now: u64) {
        let ticks = self.ticks(now);
        let channel = &mut self.clients[client];
        let loads = || {
            channel
                .connections
                .iter()
                .map(|connection| &*connection.load)
        };
        let in_use = channel.latencies.refresh(loads(), loads(), ticks);
        let next = now + if in_use { REFRESH } else { IDLE_REFRESH };
        self.push(next, Event::Refresh { client });
    }
}

const POLICIES: [(LbPolicy, &str); 3] = [
    (LbPolicy::Latency, "latency"),
    (LbPolicy::LeastRequest, "least request"),
    (LbPolicy::WeightedRoundRobin, "round robin"),
];

/// Returns the outcome of one case of four servers.
fn outcome(fault: Fault, clients: usize, callers: Callers, policy: LbPolicy) -> Outcome {
    let case = Case {
        fault,
        servers: 4,
        clients,
        callers,
        policy,
        seed: 17,
        time: 30 * SECOND,
    };
    World::new(case).run()
}

#[test]
fn the_default_policy_avoids_a_slow_server_with_few_and_with_many_calls() {
    // A random choice sends a quarter of the calls to the slow server.
    for (clients, callers, limit) in [
        (40, Callers::EachAfter(SECOND), 0.04),
        (40, Callers::EachAfter(100_000), 0.02),
        (4, Callers::Closed(4), 0.01),
    ] {
        let latency = outcome(Fault::Slow, clients, callers, LbPolicy::Latency);
        assert!(latency.bad < limit, "{callers:?}: {:.4}", latency.bad);
    }
}

#[test]
fn the_default_policy_is_not_worse_than_the_others_without_a_fault() {
    let callers = Callers::Closed(4);
    let p99 = |policy| outcome(Fault::None, 4, callers, policy).percentile(0.99);
    let latency = p99(LbPolicy::Latency);
    let others = p99(LbPolicy::LeastRequest).min(p99(LbPolicy::WeightedRoundRobin));
    assert!(latency <= others * 1.1, "{latency} ms, {others} ms");
}

/// Returns whether the calls need more than about half of the workers: the queues of the servers would hide the policies.
fn is_overload(servers: usize, clients: usize, callers: Callers) -> bool {
    let busy = match callers {
        Callers::EachAfter(period) => clients as u64 * SERVICE_TIME / period,
        Callers::Closed(callers) => clients as u64 * u64::from(callers),
    };
    busy * 2 > (servers * WORKERS) as u64
}

/// Prints the table of all cases, if `TEST_POLICIES` is set.
#[test]
fn the_policies_in_virtual_time() {
    if std::env::var_os("TEST_POLICIES").is_none() {
        println!("left out: the table of all policies, which TEST_POLICIES=1 prints");
        return;
    }
    println!(
        "source,fault,servers,clients,callers,policy,calls,bad_percent,p50_ms,p99_ms,p999_ms,failed"
    );
    for servers in [4, 50] {
        for clients in [1, 4, 40, 400, 4_000] {
            for (callers, name) in [
                (Callers::EachAfter(SECOND), "1/s"),
                (Callers::EachAfter(100_000), "10/s"),
                (Callers::Closed(1), "closed"),
            ] {
                if is_overload(servers, clients, callers) {
                    continue;
                }
                for fault in FAULTS {
                    for (policy, policy_name) in POLICIES {
                        let case = Case {
                            fault,
                            servers,
                            clients,
                            callers,
                            policy,
                            seed: 17,
                            time: 30 * SECOND,
                        };
                        let outcome = World::new(case).run();
                        println!(
                            "simulated,{fault:?},{servers},{clients},{name},{policy_name},{},{:.2},{:.1},{:.1},{:.1},{}",
                            outcome.calls,
                            outcome.bad * 100.0,
                            outcome.percentile(0.5),
                            outcome.percentile(0.99),
                            outcome.percentile(0.999),
                            outcome.failed
                        );
                    }
                }
            }
        }
    }
}
