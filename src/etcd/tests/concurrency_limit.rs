//! Tests of the limit on the requests that resolvers send at the same time.

use std::time::Duration;

use tokio::time::Instant;

use super::fake::Fake;
use crate::etcd::concurrency_limit::{ACQUIRE_TIMEOUT, PERMITS};

#[tokio::test(start_paused = true)]
async fn permits_that_are_never_released_delay_the_next_request_by_a_second() {
    let etcd = Fake::new(1, 0).etcd(1);
    let start = Instant::now();
    let mut permits = Vec::new();
    for _ in 0..PERMITS {
        permits.push(etcd.acquire_permit().await.expect("a free permit"));
    }
    assert_eq!(Instant::now() - start, Duration::ZERO);
    assert!(etcd.acquire_permit().await.is_none());
    assert_eq!(Instant::now() - start, ACQUIRE_TIMEOUT);
    permits.pop();
    assert!(etcd.acquire_permit().await.is_some());
    assert_eq!(Instant::now() - start, ACQUIRE_TIMEOUT);
}
