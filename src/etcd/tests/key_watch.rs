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
