//! Tests of the limit on the requests that resolvers send at the same time.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::fake::Fake;
use crate::etcd::concurrency_limit::{ACQUIRE_TIMEOUT, PERMITS};
use crate::keyspace::Keyspace;
use crate::resolver::ResolverBuilder;
use tonic_balance::AddressPolicy;

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

/// etcd responds after 20 ms, so that the requests of many services overlap.
#[tokio::test(start_paused = true)]
async fn the_service_configs_of_many_services_are_watched_and_read_within_the_limit() {
    const SERVICES: usize = 150;
    let fake = Fake::new(1, 0);
    let etcd = fake.etcd(1);
    for service in 0..SERVICES {
        let key = format!("/gRPC.control/service{service}/config").into_bytes();
        fake.store().apply(vec![(key, Some((b"{}".to_vec(), 0)))]);
    }
    fake.script().delay = Duration::from_millis(20);
    let keyspace = Keyspace::new("/gRPC/");
    let resolvers: Vec<_> = (0..SERVICES)
        .map(|service| {
            let name = format!("service{service}");
            let policy = AddressPolicy::default();
            ResolverBuilder::service(etcd.clone(), &keyspace, &name, policy)
                .watch_service_config("/gRPC.control/")
                .start()
        })
        .collect();
    let all_apply = async {
        let applies = |resolver: &crate::Resolver| {
            let status = resolver.service_config();
            status.is_some_and(|status| status.config.is_some())
        };
        while !resolvers.iter().all(applies) {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(Duration::from_secs(30), all_apply)
        .await
        .expect("every service config applies");
    let in_flight = fake.script().in_flight.clone();
    for kind in ["read", "watcher of a service config"] {
        let peak = in_flight[kind].peak;
        assert!((2..=PERMITS).contains(&peak), "{kind}: {in_flight:?}");
    }
    assert!(
        etcd.watch_streams() <= 2,
        "{} streams",
        etcd.watch_streams()
    );
}
