//! Compares the policies in virtual time. `make bench-policies` prints all combinations as a table of comma-separated values; the tests below
//! run a few of them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, ScopedJoinHandle};

use super::client::Policy;
use super::faults::{Fault, SECOND};
use super::world::{Callers, Case, Outcome, World};
use crate::balance::picker::LbPolicy;

const POLICIES: [(LbPolicy, bool, &str); 5] = [
    (LbPolicy::Latency, false, "latency"),
    (LbPolicy::Latency, true, "latency with reports"),
    (LbPolicy::LeastRequest, false, "least request"),
    (LbPolicy::WeightedRoundRobin, false, "round robin"),
    (
        LbPolicy::WeightedRoundRobin,
        true,
        "round robin with reports",
    ),
];

/// Returns the outcome of one case of four servers.
fn outcome(fault: Fault, clients: usize, callers: Callers, policy: LbPolicy) -> Outcome {
    outcome_with(fault, clients, callers, policy, false)
}

fn outcome_with(
    fault: Fault,
    clients: usize,
    callers: Callers,
    policy: LbPolicy,
    load_reports: bool,
) -> Outcome {
    let case = Case {
        fault,
        servers: 4,
        clients,
        callers,
        policy: Policy {
            policy,
            load_reports,
        },
        seed: 17,
        warm_up: 30 * SECOND,
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

#[test]
fn weights_from_reports_follow_the_capacity_of_the_servers() {
    // Two of the four servers have half of the capacity of the others, so their share of it is a third.
    let callers = Callers::EachAfter(100_000);
    let bad = |load_reports| {
        let policy = LbPolicy::WeightedRoundRobin;
        outcome_with(Fault::HalfCapacity, 40, callers, policy, load_reports).bad
    };
    let (without, with) = (bad(false), bad(true));
    assert!((without - 0.5).abs() < 0.01, "{without:.3}");
    assert!((with - 1.0 / 3.0).abs() < 0.02, "{with:.3}");
}

/// Returns the cases of the table, with the names of the callers and of the policy.
fn cases() -> Vec<(Case, &'static str, &'static str)> {
    let seconds = std::env::var("POLICIES_SECONDS").ok();
    let seconds = seconds.map_or(30, |seconds| {
        seconds.parse().expect("POLICIES_SECONDS is a number")
    });
    let mut cases = Vec::new();
    for servers in [4, 50] {
        for clients in [1, 4, 40, 400, 4_000] {
            for (callers, callers_name) in [
                (Callers::EachAfter(SECOND), "1/s"),
                (Callers::EachAfter(100_000), "10/s"),
                (Callers::Closed(1), "closed"),
            ] {
                for fault in Fault::ALL {
                    for (policy, load_reports, policy_name) in POLICIES {
                        let case = Case {
                            fault,
                            servers,
                            clients,
                            callers,
                            policy: Policy {
                                policy,
                                load_reports,
                            },
                            seed: 17,
                            // As in the comparison on processes.
                            warm_up: seconds * SECOND * 2 / 3,
                            time: seconds * SECOND,
                        };
                        cases.push((case, callers_name, policy_name));
                    }
                }
            }
        }
    }
    cases.retain(|(case, ..)| !case.is_overload());
    cases
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
    let (cases, next) = (cases(), AtomicUsize::new(0));
    let work = || {
        let mut lines = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(case) = cases.get(index) else {
                return lines;
            };
            lines.push((index, line(case)));
            eprintln!("case {} of {}", index + 1, cases.len());
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let mut lines: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let threads = threads.into_iter();
        let join = |thread: ScopedJoinHandle<'_, Vec<_>>| thread.join().expect("all cases end");
        threads.flat_map(join).collect()
    });
    lines.sort_unstable();
    for (_, line) in lines {
        println!("{line}");
    }
}

/// Runs a case, and returns its line of the table.
fn line((case, callers, policy): &(Case, &str, &str)) -> String {
    let outcome = World::new(*case).run();
    format!(
        "simulated,{:?},{},{},{callers},{policy},{},{:.2},{:.1},{:.1},{:.1},{}",
        case.fault,
        case.servers,
        case.clients,
        outcome.calls,
        outcome.bad * 100.0,
        outcome.percentile(0.5),
        outcome.percentile(0.99),
        outcome.percentile(0.999),
        outcome.failed
    )
}
