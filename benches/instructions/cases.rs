//! The list of cases.

use tonic_etcd::LbPolicy;

use super::calls::{self, Channel, Options};
use super::{changes, picks};

/// Performs the work of a case, as often as [`repetitions`] returns.
pub fn run(name: &str) {
    let (_, case) = find(name);
    let repetitions = repetitions(name);
    // All code runs on this thread, so its random numbers are the same in each run.
    fastrand::seed(7);
    match case {
        Case::Call(channel, callers, options) => {
            calls::run(channel, callers, options, repetitions);
        }
        Case::Pick(policy, endpoints) => picks::run(policy, endpoints, repetitions),
        Case::HashedPick(endpoints) => picks::run_hashed(endpoints, repetitions),
        Case::Join => changes::join(repetitions),
        Case::Removal => changes::remove(repetitions),
    }
}

pub fn names() -> impl Iterator<Item = &'static str> {
    CASES.iter().map(|(name, _)| *name)
}

pub fn is_call(name: &str) -> bool {
    matches!(find(name).1, Case::Call(..))
}

pub fn repetitions(name: &str) -> usize {
    match find(name).1 {
        Case::Call(..) => 3_200,
        Case::Pick(..) | Case::HashedPick(..) => 20_000,
        Case::Join | Case::Removal => 50,
    }
}

fn find(name: &str) -> (&'static str, Case) {
    let case = CASES.iter().find(|(case, _)| *case == name);
    *case.unwrap_or_else(|| panic!("there is no case {name:?}"))
}

#[derive(Clone, Copy)]
enum Case {
    /// A unary call, and the number of callers that call at the same time.
    Call(Channel, usize, Options),
    /// A pick among a number of endpoints.
    Pick(LbPolicy, usize),
    /// A pick by hash among a number of endpoints.
    HashedPick(usize),
    Join,
    Removal,
}

const PLAIN: Options = Options {
    deadline: false,
    metadata: 0,
    selects: false,
};
const SELECTS: Options = Options {
    deadline: false,
    metadata: 0,
    selects: true,
};
const DEADLINE: Options = Options {
    deadline: true,
    metadata: 0,
    selects: false,
};
const PRODUCTION: Options = Options {
    deadline: true,
    metadata: 3,
    selects: false,
};

const CASES: &[(&str, Case)] = &[
    ("call", Case::Call(Channel::Balanced, 1, PLAIN)),
    ("call, deadline", Case::Call(Channel::Balanced, 1, DEADLINE)),
    (
        "call, other calls have a selection",
        Case::Call(Channel::Balanced, 1, SELECTS),
    ),
    (
        "call, 2 metadata entries",
        Case::Call(Channel::Balanced, 1, PLAIN.with_metadata(2)),
    ),
    (
        "call, 3 metadata entries",
        Case::Call(Channel::Balanced, 1, PLAIN.with_metadata(3)),
    ),
    (
        "call, deadline and 3 metadata entries",
        Case::Call(Channel::Balanced, 1, PRODUCTION),
    ),
    (
        "call of 64 callers",
        Case::Call(Channel::Balanced, 64, PLAIN),
    ),
    (
        "call of 64 callers, deadline and 3 metadata entries",
        Case::Call(Channel::Balanced, 64, PRODUCTION),
    ),
    (
        "call of 64 callers, metrics",
        Case::Call(Channel::Measured, 64, PLAIN),
    ),
    (
        "call of 64 callers, metrics that are discarded",
        Case::Call(Channel::Discarded, 64, PLAIN),
    ),
    (
        "call of 64 callers, traces without a subscriber",
        Case::Call(Channel::Traced, 64, PLAIN),
    ),
    ("call over bare h2", Case::Call(Channel::BareH2, 1, PLAIN)),
    (
        "call over bare h2, deadline and 3 metadata entries",
        Case::Call(Channel::BareH2, 1, PRODUCTION),
    ),
    (
        "call over bare h2 of 64 callers",
        Case::Call(Channel::BareH2, 64, PLAIN),
    ),
    (
        "call over bare h2 of 64 callers, deadline and 3 metadata entries",
        Case::Call(Channel::BareH2, 64, PRODUCTION),
    ),
    (
        "pick, latency, 10 endpoints",
        Case::Pick(LbPolicy::Latency, 10),
    ),
    (
        "pick, latency, 10 000 endpoints",
        Case::Pick(LbPolicy::Latency, 10_000),
    ),
    (
        "pick, round robin, 10 endpoints",
        Case::Pick(LbPolicy::WeightedRoundRobin, 10),
    ),
    (
        "pick, round robin, 10 000 endpoints",
        Case::Pick(LbPolicy::WeightedRoundRobin, 10_000),
    ),
    ("pick, ring hash, 1 000 endpoints", Case::HashedPick(1_000)),
    ("join of an endpoint, 1 000 endpoints", Case::Join),
    ("removal of an endpoint, 1 000 endpoints", Case::Removal),
];
