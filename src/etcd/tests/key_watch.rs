//! Tests of the watch of a registration on its own key: when it is opened again, and when its token is renewed.

use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::PREFIX;
use super::fake::Fake;
use crate::keyspace::Keyspace;
use crate::registration::{Registration, RegistrationBuilder};
use tonic_balance::AddressPolicy;

/// Registers a server at a scripted etcd with authentication. The lease is renewed only every 20 s, and the key is read only then.
async fn registered() -> (Fake, Registration) {
    let fake = Fake::new(1, 0);
    fake.script().users.password = Some("secret".to_owned());
    let etcd = fake.etcd(1);
    let keyspace = Keyspace::new("/gRPC/");
    let policy = AddressPolicy::default();
    let registration = RegistrationBuilder::service(etcd, policy, keyspace, "greeter")
        .address("127.0.0.1:1")
        .ttl(Duration::from_secs(60));
    let registration = registration.register().await.expect("no error");
    sleep(Duration::from_secs(1)).await;
    (fake, registration)
}

fn own_key() -> Vec<u8> {
    format!("{PREFIX}127.0.0.1:1").into_bytes()
}

/// Returns whether the key is put back in time.
async fn is_back(fake: &Fake, bound: Duration) -> bool {
    let back = async {
        while !fake.store().keys.contains_key(&own_key()) {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(bound, back).await.is_ok()
}

/// Deletes the key, and returns whether it is put back at once.
async fn detects_a_loss(fake: &Fake) -> bool {
    fake.store().apply(vec![(own_key(), None)]);
    fake.tell();
    is_back(fake, Duration::from_secs(1)).await
}

#[tokio::test(start_paused = true)]
async fn a_registration_that_may_not_watch_its_key_retries_slowly() {
    let (fake, registration) = registered().await;
    fake.script().users.denied = true;
    fake.cut();
    let before = fake.script().watches;
    sleep(Duration::from_secs(600)).await;
    let watches = fake.script().watches - before;
    // One attempt every 15 to 30 s.
    assert!((20..=42).contains(&watches), "{watches} in ten minutes");
    fake.script().users.denied = false;
    sleep(Duration::from_secs(40)).await;
    assert!(detects_a_loss(&fake).await);
    registration.deregister().await.expect("no error");
}

#[tokio::test(start_paused = true)]
async fn a_key_watch_that_was_open_for_a_while_is_opened_again_within_a_second() {
    let (fake, registration) = registered().await;
    for _ in 0..8 {
        sleep(Duration::from_secs(20)).await;
        let before = fake.script().users.authentications;
        fake.cut();
        sleep(Duration::from_secs(2)).await;
        assert!(detects_a_loss(&fake).await);
        let tokens = fake.script().users.authentications - before;
        assert_eq!(tokens, 0, "the token was not rejected");
    }
    registration.deregister().await.expect("no error");
}

#[tokio::test(start_paused = true)]
async fn each_rejection_of_a_key_watch_after_its_opening_renews_the_token() {
    let (fake, registration) = registered().await;
    for _ in 0..3 {
        sleep(Duration::from_secs(20)).await;
        fake.script().users.token += 1;
        fake.cut();
        // The time covers the first two waits of the backoff, of up to 1 s and 2 s, and the password hash.
        sleep(Duration::from_secs(4)).await;
    }
    // The rejection is over, so a watch that ends for another reason needs no new token.
    let before = fake.script().users.authentications;
    fake.cut();
    sleep(Duration::from_secs(4)).await;
    assert_eq!(fake.script().users.authentications, before);
    assert!(detects_a_loss(&fake).await);
    registration.deregister().await.expect("no error");
}

/// etcd cancels a watch whose next events are compacted. The stream stays open.
#[tokio::test(start_paused = true)]
async fn a_cancelled_key_watch_is_opened_again_and_the_key_is_read() {
    let (fake, registration) = registered().await;
    fake.store().apply(vec![(own_key(), None)]);
    fake.store().apply(vec![(b"/other".to_vec(), None)]);
    {
        let mut store = fake.store();
        store.revision += 1;
        store.compacted = store.revision;
    }
    fake.tell();
    assert!(is_back(&fake, Duration::from_secs(3)).await);
    registration.deregister().await.expect("no error");
}

/// A registration does not probe the stream of its watch. It reads its key once a minute at the latest, after a renewal.
#[tokio::test(start_paused = true)]
async fn a_loss_that_a_silent_key_watch_misses_is_found_by_a_read_and_ends_the_watch() {
    let (fake, registration) = registered().await;
    let before = fake.script().watches;
    fake.script().counts.clear();
    sleep(Duration::from_secs(600)).await;
    let probes = fake.script().counts.get("watch request").copied();
    assert_eq!(probes, None, "the watch on the own key must not be probed");
    fake.script().lost_deletes = 1;
    assert!(!detects_a_loss(&fake).await, "the event is lost");
    assert!(is_back(&fake, Duration::from_secs(85)).await);
    sleep(Duration::from_secs(3)).await;
    assert_eq!(fake.script().watches - before, 1);
    assert!(detects_a_loss(&fake).await);
    registration.deregister().await.expect("no error");
}

/// Without `ttl()`, the TTL depends on the number of servers of the service.
#[tokio::test(start_paused = true)]
async fn the_servers_of_a_large_service_renew_less_often() {
    let fake = Fake::new(1, 0);
    let renewals_in_ten_minutes = async |fake: &Fake, port: u16| {
        let builder = RegistrationBuilder::service(
            fake.etcd(1),
            AddressPolicy::default(),
            Keyspace::new("/gRPC/"),
            "greeter",
        );
        let builder = builder.address(format!("127.0.0.1:{port}"));
        let registration = builder.register().await.expect("no error");
        sleep(Duration::from_secs(60)).await;
        fake.script().counts.clear();
        sleep(Duration::from_secs(600)).await;
        let renewals = fake.script().counts.get("renewal").copied();
        (renewals.unwrap_or_default(), registration)
    };
    let (renewals, small) = renewals_in_ten_minutes(&fake, 1).await;
    assert!(
        (119..=121).contains(&renewals),
        "{renewals} with one server"
    );
    small.deregister().await.expect("no error");
    let servers = |count: u32, value: Option<&str>| {
        let key = |server| format!("{PREFIX}10.0.0.1:{server}").into_bytes();
        let value = value.map(|value| (value.as_bytes().to_vec(), 0));
        (1..=count)
            .map(|server| (key(server), value.clone()))
            .collect()
    };
    fake.store().apply(servers(1_000, Some("10.0.0.1:1")));
    let (renewals, large) = renewals_in_ten_minutes(&fake, 2).await;
    assert!(
        (29..=31).contains(&renewals),
        "{renewals} with 1 001 servers"
    );
    // The largest number counts: after a loss of all data, the first servers that register again find few others.
    fake.store().apply(servers(1_000, None));
    let lease = *fake.store().leases.keys().next().expect("a lease");
    fake.store().leases.clear();
    fake.store()
        .apply(vec![(format!("{PREFIX}127.0.0.1:2").into_bytes(), None)]);
    fake.tell();
    sleep(Duration::from_secs(60)).await;
    assert!(!fake.store().leases.contains_key(&lease));
    let ttls: Vec<_> = fake.store().leases.values().map(|(ttl, _)| *ttl).collect();
    assert_eq!(ttls, [Duration::from_secs(60)]);
    large.deregister().await.expect("no error");
}
