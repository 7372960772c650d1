//! Tests of expired tokens and changed passwords. They also count the exchanges of a password for a token, because the server has to
//! compute a password hash for each of them.

use std::pin::pin;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::PREFIX;
use super::fake::Fake;
use crate::error::EtcdErrorKind;
use crate::etcd::Etcd;
use crate::keyspace::{Key, Keyspace};
use crate::registration::RegistrationBuilder;
use crate::resolver::{Resolver, ResolverBuilder};
use tonic_balance::AddressPolicy;

/// Creates a scripted etcd with authentication, and a client for it.
fn protected() -> (Fake, Etcd) {
    let fake = Fake::new(1, 0);
    fake.script().users.password = Some("secret".to_owned());
    let etcd = fake.etcd(2);
    (fake, etcd)
}

fn resolver(etcd: Etcd) -> Resolver {
    let keyspace = Keyspace::new("/gRPC/");
    ResolverBuilder::service(etcd, &keyspace, "greeter", AddressPolicy::default()).start()
}

/// Adds an instance, and returns whether the resolver receives it within `bound`.
async fn arrives(fake: &Fake, resolver: &Resolver, bound: Duration) -> bool {
    let before = resolver.instances().len();
    let key = format!("{PREFIX}{before}").into_bytes();
    let value = format!("127.0.0.1:{}", before + 1).into_bytes();
    fake.store().apply(vec![(key, Some((value, 0)))]);
    fake.tell();
    let known = async {
        while resolver.instances().len() == before {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(bound, known).await.is_ok()
}

#[tokio::test(start_paused = true)]
async fn many_rejected_requests_fetch_one_token() {
    let (fake, etcd) = protected();
    let key = Key::from("/a");
    etcd.read(&key).await.expect("a read with a new token");
    assert_eq!(fake.script().users.authentications, 1);
    fake.script().users.token += 1;
    let mut reads = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let (etcd, key) = (etcd.clone(), key.clone());
        reads.spawn(async move { etcd.read(&key).await.map(drop) });
    }
    for outcome in reads.join_all().await {
        outcome.expect("a read with a new token");
    }
    assert_eq!(fake.script().users.authentications, 2);
}

/// Only the member that issued a token accepts it at once. The other members accept it a moment later, when the cluster's log has reached
/// them.
#[tokio::test(start_paused = true)]
async fn a_new_token_is_used_at_the_member_that_issued_it() {
    let (fake, _) = protected();
    fake.script().users.lag = Duration::from_millis(200);
    let key = Key::from("/a");
    for round in 1..=20 {
        let etcd = fake.etcd(3);
        etcd.read(&key).await.expect("a read with a new token");
        assert_eq!(fake.script().users.authentications, round);
        sleep(Duration::from_secs(1)).await;
    }
}

/// After a change of the store's users, etcd rejects the tokens of all clients at the same time.
#[tokio::test(start_paused = true)]
async fn clients_rejected_at_the_same_time_spread_their_token_requests() {
    const CLIENTS: u32 = 40;
    let (fake, _) = protected();
    let key = Key::from("/a");
    let clients: Vec<_> = (0..CLIENTS).map(|_| fake.etcd(1)).collect();
    for etcd in &clients {
        etcd.read(&key).await.expect("a read with a new token");
    }
    fake.script().users.token += 1;
    let start = Instant::now();
    let mut reads = tokio::task::JoinSet::new();
    for etcd in clients {
        let key = key.clone();
        reads.spawn(async move { etcd.read(&key).await.map(drop) });
    }
    let mut most = 0;
    let mut before = fake.script().users.authentications;
    while before < 2 * CLIENTS {
        let took = Instant::now().saturating_duration_since(start);
        assert!(
            took < Duration::from_secs(1),
            "only {before} exchanges after {took:?}"
        );
        sleep(Duration::from_millis(20)).await;
        let now = fake.script().users.authentications;
        most = most.max(now - before);
        before = now;
    }
    for outcome in reads.join_all().await {
        outcome.expect("a read with a new token");
    }
    assert!(
        most <= CLIENTS / 2,
        "{most} of {CLIENTS} exchanges within 20 ms"
    );
}

/// etcd continues to hash a password after the caller has timed out. A client that abandoned each request and sent a new one would never
/// get a token.
#[tokio::test(start_paused = true)]
async fn a_server_that_is_busy_hashing_passwords_gets_few_requests() {
    let (fake, etcd) = protected();
    let key = Key::from("/a");
    etcd.read(&key).await.expect("a read with a new token");
    fake.script().users.token += 1;
    fake.script().users.overloaded = true;
    let start = Instant::now();
    while etcd.read(&key).await.is_err() {
        sleep(Duration::from_millis(100)).await;
    }
    let took = Instant::now().saturating_duration_since(start);
    // The overloaded server takes 60 s for a hash.
    assert!(took < Duration::from_secs(65), "{took:?}");
    let asked = fake.script().users.authentications - 1;
    assert!((1..=3).contains(&asked), "{asked} requests");
}

/// etcd rejects an invalid token in the first message of a watch. Older servers report it with the text for a missing permission.
#[tokio::test(start_paused = true)]
async fn a_rejected_watch_continues_with_a_new_token() {
    let (fake, etcd) = protected();
    let resolver = resolver(etcd);
    resolver.ready().await;
    let refusals = [
        "etcdserver: invalid auth token",
        "etcdserver: permission denied",
    ];
    for refusal in refusals {
        let before = fake.script().users.authentications;
        fake.script().users.refusal = Some(refusal);
        fake.script().users.token += 1;
        fake.cut();
        assert!(
            arrives(&fake, &resolver, Duration::from_secs(5)).await,
            "{refusal}: {:?}",
            resolver.status()
        );
        let after = fake.script().users.authentications;
        assert_eq!(after, before + 1, "{refusal}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_changed_password_is_reported_and_retried_slowly() {
    let (fake, etcd) = protected();
    let resolver = resolver(etcd);
    resolver.ready().await;
    assert!(arrives(&fake, &resolver, Duration::from_secs(1)).await);
    fake.script().users.password = Some("another".to_owned());
    fake.script().users.token += 1;
    fake.cut();
    let before = fake.script().users.authentications;
    sleep(Duration::from_secs(600)).await;
    let asked = fake.script().users.authentications - before;
    // The client makes one attempt every 15 to 30 s.
    assert!(
        (10..=42).contains(&asked),
        "{asked} exchanges in ten minutes"
    );
    assert_eq!(resolver.instances().len(), 1, "an instance is missing");
    let error = resolver.status().last_error.expect("an error");
    assert_eq!(error.kind(), EtcdErrorKind::BadCredentials);
    fake.script().users.password = Some("secret".to_owned());
    assert!(arrives(&fake, &resolver, Duration::from_secs(40)).await);
}

#[tokio::test(start_paused = true)]
async fn a_client_without_permission_retries_slowly_until_it_has_permission() {
    let (fake, etcd) = protected();
    fake.script().users.denied = true;
    let resolver = resolver(etcd);
    sleep(Duration::from_secs(600)).await;
    let error = resolver.status().last_error.expect("an error");
    assert_eq!(error.kind(), EtcdErrorKind::PermissionDenied);
    // The client requests one list every 15 to 30 s. Older servers report an expired token with the text for a missing permission, so the
    // client fetches a new token, but only when the previous one may have expired.
    let asked = fake.script().users.authentications;
    assert!((2..=4).contains(&asked), "{asked} exchanges in ten minutes");
    let pages = fake.script().pages;
    assert!((20..=42).contains(&pages), "{pages} lists in ten minutes");
    fake.script().users.denied = false;
    let ready = timeout(Duration::from_secs(40), resolver.ready()).await;
    ready.expect("a ready resolver");
}

/// After two rejections of its watch in a row, the resolver assumes that it lacks a permission. It must still replace its token if etcd
/// later rejects a watch because of the token.
#[tokio::test(start_paused = true)]
async fn a_resolver_recovers_when_a_permission_returns_and_the_old_token_is_invalid() {
    let (fake, etcd) = protected();
    let resolver = resolver(etcd);
    resolver.ready().await;
    assert!(arrives(&fake, &resolver, Duration::from_secs(1)).await);
    fake.script().users.denied = true;
    fake.cut();
    sleep(Duration::from_secs(60)).await;
    assert_eq!(resolver.instances().len(), 1, "an instance is missing");
    // A change of the store's users invalidates every token.
    fake.script().users.token += 1;
    fake.script().users.denied = false;
    assert!(arrives(&fake, &resolver, Duration::from_secs(40)).await);
}

/// In the first round, the server renews leases whatever the token is, as older servers do. So only the reads of the registered key and the
/// watch on that key fail. In the second round, the renewals fail as well.
#[tokio::test(start_paused = true)]
async fn a_registration_with_a_changed_password_retries_slowly() {
    let (fake, etcd) = protected();
    let ttl = Duration::from_secs(15);
    let keyspace = Keyspace::new("/gRPC/");
    let policy = AddressPolicy::default();
    let registration = RegistrationBuilder::service(etcd, policy, keyspace, "greeter");
    let registration = registration
        .address("127.0.0.1:1")
        .ttl(ttl)
        .register()
        .await;
    let registration = registration.expect("no error");
    for renewals_are_checked in [false, true] {
        fake.script().users.renewals_are_checked = renewals_are_checked;
        fake.script().users.password = Some("another".to_owned());
        fake.script().users.token += 1;
        fake.cut();
        let before = fake.script().users.authentications;
        let watches = fake.script().watches;
        sleep(Duration::from_secs(600)).await;
        let asked = fake.script().users.authentications - before;
        let watches = fake.script().watches - watches;
        assert!(watches <= 50, "{watches} watches in ten minutes");
        // The registration makes at most two attempts per TTL for requests on the key, and one every 15 s for the watch.
        let most = if renewals_are_checked { 160 } else { 130 };
        assert!(
            (20..most).contains(&asked),
            "{asked} exchanges in ten minutes"
        );
        fake.script().users.password = Some("secret".to_owned());
        sleep(ttl * 3).await;
        assert!(
            registration.state().is_registered(),
            "{:?}",
            registration.state()
        );
    }
    registration.deregister().await.expect("no error");
}

/// The watch on the registered key fetches a new token itself, and does not wait until a read fetches one.
#[tokio::test(start_paused = true)]
async fn a_rejected_watch_of_a_registration_continues_with_a_new_token() {
    let (fake, etcd) = protected();
    let keyspace = Keyspace::new("/gRPC/");
    let policy = AddressPolicy::default();
    let registration = RegistrationBuilder::service(etcd, policy, keyspace, "greeter");
    // With this TTL, the registration renews its lease, and reads its key, only every 20 s.
    let ttl = Duration::from_secs(60);
    let registration = registration.address("127.0.0.1:1").ttl(ttl);
    let registration = registration.register().await.expect("no error");
    sleep(Duration::from_secs(1)).await;
    fake.script().users.token += 1;
    fake.cut();
    // The time covers the first two waits of the backoff, of up to 1 s and 2 s, and the password hash.
    sleep(Duration::from_secs(4)).await;
    let key = format!("{PREFIX}127.0.0.1:1").into_bytes();
    fake.store().apply(vec![(key.clone(), None)]);
    fake.tell();
    let back = async {
        while !fake.store().keys.contains_key(&key) {
            sleep(Duration::from_millis(10)).await;
        }
    };
    let back = timeout(Duration::from_secs(1), back).await;
    back.expect("the key must be written again within 1 s");
    registration.deregister().await.expect("no error");
}

/// A registration on its own thread must work while the application's runtime is busy. So it must not wait for an exchange that the
/// application's runtime has started.
#[tokio::test(start_paused = true)]
async fn a_detached_client_fetches_its_own_token() {
    let (fake, etcd) = protected();
    let key = Key::from("/a");
    etcd.read(&key).await.expect("a read with a new token");
    let detached = etcd.detached();
    detached.read(&key).await.expect("a read with the token");
    assert_eq!(fake.script().users.authentications, 1);
    fake.script().users.token += 1;
    // The request starts to fetch a token and is then not polled, as on a busy runtime.
    let mut busy = pin!(etcd.read(&key));
    while fake.script().users.authentications == 1 {
        let step = timeout(Duration::from_millis(1), busy.as_mut()).await;
        assert!(step.is_err(), "the request has already ended");
    }
    let start = Instant::now();
    detached.read(&key).await.expect("a read with a new token");
    let took = Instant::now().saturating_duration_since(start);
    assert!(took < Duration::from_secs(1), "{took:?}");
    busy.await.expect("a read with a new token");
}
