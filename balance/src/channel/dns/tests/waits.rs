//! The time between two lookups, and changes of attributes, with a lookup that the tests script.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::StreamExt;
use tower::discover::Change;

use crate::address::AddressPolicy;
use crate::channel::dns::task::{self, Found, Lookup};

type Outcome = Result<Found<u32>, String>;

/// Returns the outcomes in their order, and reports the time of each lookup. The last one is repeated.
struct Scripted {
    outcomes: VecDeque<Outcome>,
    lookups: mpsc::UnboundedSender<Instant>,
}

impl Lookup for Scripted {
    type Attributes = u32;

    async fn lookup(&mut self) -> Outcome {
        // The test may have ended.
        let _ = self.lookups.send(Instant::now());
        let next = self.outcomes.pop_front();
        next.unwrap_or_else(|| Err("the script has ended".to_owned()))
    }
}

#[allow(
    clippy::unnecessary_wraps,
    reason = "most outcomes of a script are answers"
)]
fn found(endpoints: &[(&str, u32)], ttl: Option<u64>) -> Outcome {
    let parsed = endpoints
        .iter()
        .map(|(address, weight)| (address.parse().expect("an address"), *weight));
    Ok(Found {
        endpoints: parsed.collect(),
        ttl: ttl.map(Duration::from_secs),
        trouble: None,
    })
}

/// Returns the waits in seconds after the outcomes.
async fn waits(outcomes: Vec<Outcome>) -> Vec<u64> {
    let count = outcomes.len();
    let (lookups, mut started) = mpsc::unbounded_channel();
    let lookup = Scripted {
        outcomes: outcomes.into(),
        lookups,
    };
    let interval = Duration::from_secs(30);
    let policy = AddressPolicy::default();
    let _endpoints = task::start("greeter.test".to_owned(), lookup, interval, policy);
    let mut last = started.recv().await.expect("the first lookup");
    let mut waits = Vec::new();
    for _ in 0..count {
        let next = started.recv().await.expect("another lookup");
        waits.push((next - last).as_secs());
        last = next;
    }
    waits
}

#[tokio::test(start_paused = true)]
async fn the_time_to_live_of_the_records_shortens_the_wait_within_limits() {
    let with_ttl = |ttl| found(&[("10.0.0.1:80", 1)], ttl);
    let outcomes = [Some(10), Some(0), Some(3_600), None].map(with_ttl);
    assert_eq!(waits(outcomes.into()).await, [10, 5, 30, 30]);
}

#[tokio::test(start_paused = true)]
async fn a_lookup_that_fails_in_part_is_applied_and_repeated_with_a_backoff() {
    let partial = || {
        let Ok(mut found) = found(&[("10.0.0.1:80", 1)], Some(20)) else {
            unreachable!("the outcome is a success");
        };
        found.trouble = Some("the target a.test cannot be looked up".to_owned());
        Ok(found)
    };
    let whole = found(&[("10.0.0.1:80", 1)], Some(20));
    let outcomes = vec![
        partial(),
        partial(),
        Err("no answer".to_owned()),
        whole,
        partial(),
    ];
    assert_eq!(waits(outcomes).await, [1, 2, 4, 20, 1]);
}

#[tokio::test(start_paused = true)]
async fn a_changed_attribute_inserts_the_endpoint_again_without_a_removal() {
    let (lookups, _started) = mpsc::unbounded_channel();
    let outcomes = [
        found(&[("10.0.0.1:80", 1), ("10.0.0.2:80", 1)], None),
        found(&[("10.0.0.1:80", 1), ("10.0.0.2:80", 7)], None),
        found(&[("10.0.0.2:80", 7)], None),
    ];
    let lookup = Scripted {
        outcomes: outcomes.into(),
        lookups,
    };
    let policy = AddressPolicy::default();
    let mut endpoints = task::start("greeter.test".to_owned(), lookup, Duration::ZERO, policy);
    let mut changes = Vec::new();
    for _ in 0..4 {
        let change = endpoints.changes.next().await;
        changes.push(match change.expect("a change").expect("no error") {
            Change::Insert(address, weight) => format!("+{address} {weight}"),
            Change::Remove(address) => format!("-{address}"),
        });
    }
    assert_eq!(
        changes,
        [
            "+10.0.0.1:80 1",
            "+10.0.0.2:80 1",
            "+10.0.0.2:80 7",
            "-10.0.0.1:80"
        ]
    );
}

/// Never completes.
struct Stuck(mpsc::UnboundedSender<Instant>);

impl Lookup for Stuck {
    type Attributes = u32;

    async fn lookup(&mut self) -> Outcome {
        // The test may have ended.
        let _ = self.0.send(Instant::now());
        std::future::pending().await
    }
}

#[tokio::test(start_paused = true)]
async fn a_lookup_that_does_not_end_fails_and_is_repeated() {
    let (lookups, mut started) = mpsc::unbounded_channel();
    let interval = Duration::from_secs(30);
    let policy = AddressPolicy::default();
    let mut endpoints = task::start("greeter.test".to_owned(), Stuck(lookups), interval, policy);
    let error = endpoints.source_error.take().expect("a function");
    let first = started.recv().await.expect("the first lookup");
    let second = started.recv().await.expect("another lookup");
    // After the timeout and the first backoff.
    assert_eq!((second - first).as_secs(), 31);
    assert_eq!(
        error().as_deref(),
        Some("the lookup of greeter.test failed: it was not complete after 30 s")
    );
}
