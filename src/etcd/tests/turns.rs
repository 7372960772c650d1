//! Tests of the limit on the requests that resolvers send at the same time.

use std::time::Duration;

use tokio::time::Instant;

use super::fake::Fake;
use crate::etcd::turns::{TURN_TIMEOUT, TURNS};

#[tokio::test(start_paused = true)]
async fn turns_that_are_never_returned_delay_the_next_request_by_a_second() {
    let etcd = Fake::new(1, 0).etcd(1);
    let start = Instant::now();
    let mut turns = Vec::new();
    for _ in 0..TURNS {
        turns.push(etcd.turn().await.expect("a free turn"));
    }
    assert_eq!(Instant::now() - start, Duration::ZERO);
    assert!(etcd.turn().await.is_none());
    assert_eq!(Instant::now() - start, TURN_TIMEOUT);
    turns.pop();
    assert!(etcd.turn().await.is_some());
    assert_eq!(Instant::now() - start, TURN_TIMEOUT);
}
