//! Tests of single rules that the random histories of the parent module may not exercise.

use std::io::ErrorKind;
use std::time::Duration;

use tokio::io::DuplexStream;
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::StreamExt;
use tower::discover::Change;

use super::fake::Fake;
use super::{PREFIX, TTL};
use crate::error::{EtcdErrorKind, RegisterError};
use crate::etcd::Etcd;
use crate::instance::Instance;
use crate::keyspace::{Key, Keyspace, LeaseId, Range};
use crate::registration::{RegistrationBuilder, RegistrationState};
use crate::resolver::{ResolverBuilder, ResolverState};
use tonic_balance::AddressPolicy;
use tonic_balance::BalancedChannel;

const DEADLINE: Duration = Duration::from_secs(1);

fn since(start: Instant) -> Duration {
    Instant::now().saturating_duration_since(start)
}

fn registration(etcd: Etcd) -> RegistrationBuilder {
    let keyspace = Keyspace::new("/gRPC/");
    RegistrationBuilder::service(etcd, AddressPolicy::default(), keyspace, "greeter")
        .address("127.0.0.1:1")
        .ttl(TTL)
}

fn own_key() -> Vec<u8> {
    format!("{PREFIX}127.0.0.1:1").into_bytes()
}

/// Returns the lease of the test's own key in the store, or 0 if the key does not exist.
fn lease(fake: &Fake) -> i64 {
    let store = fake.store();
    store.keys.get(&own_key()).map_or(0, |kv| kv.lease)
}

/// Waits until the condition holds, and returns how long that took. Fails the test if it takes longer than `bound`.
pub(super) async fn until(bound: Duration, what: &str, condition: impl Fn() -> bool) -> Duration {
    let start = Instant::now();
    while !condition() {
        assert!(since(start) < bound, "not within {bound:?}: {what}");
        sleep(Duration::from_millis(10)).await;
    }
    since(start)
}

#[tokio::test(start_paused = true)]
async fn a_concurrent_write_between_read_and_put_is_not_overwritten() {
    let fake = Fake::new(1, 0);
    let registered = registration(fake.etcd(2)).register().await;
    let registered = registered.expect("no error");
    let other = 77;
    let long = Duration::from_secs(1_000);
    let leased = (long, Instant::now() + long);
    fake.store().leases.insert(other, leased);
    fake.script().usurped = Some((own_key(), other));
    let outcome = registered.set_weight(2).await;
    assert!(
        matches!(outcome, Err(RegisterError::Superseded { .. })),
        "{outcome:?}"
    );
    assert!(
        fake.script().usurped.is_none(),
        "the other write did not happen between read and put"
    );
    sleep(TTL * 3).await;
    assert_eq!(lease(&fake), other);
}

#[tokio::test(start_paused = true)]
async fn a_renewal_from_an_old_raft_term_is_retried_at_another_member() {
    let fake = Fake::new(1, 0);
    for round in 1..20 {
        let etcd = fake.etcd(2);
        let lease = LeaseId::new(round);
        etcd.grant(lease, TTL, DEADLINE).await.expect("a lease");
        let term = fake.store().term;
        fake.script().stale_renewals = 2;
        let mut refused_at = Vec::new();
        for _ in 0..2 {
            let stale = etcd.keep_alive(lease, term, DEADLINE).await;
            let error = stale.expect_err("a stale term");
            assert_eq!(error.kind(), EtcdErrorKind::StaleTerm);
            refused_at.push(error.endpoint().expect("a member").to_owned());
        }
        assert_ne!(refused_at[0], refused_at[1]);
        etcd.keep_alive(lease, term, DEADLINE)
            .await
            .expect("a renewal");
    }
}

/// The raft terms of a restored store start again, and the leases in its backup remain valid.
#[tokio::test(start_paused = true)]
async fn a_store_that_was_restored_keeps_its_registrations() {
    let fake = Fake::new(1, 0);
    fake.store().term = 7;
    let registered = registration(fake.etcd(2)).register().await;
    let registered = registered.expect("no error");
    let backup = fake.store().clone();
    registered.set_weight(9).await.expect("no error");
    let before = lease(&fake);
    fake.store().restore(&backup, Instant::now());
    fake.tell();
    sleep(TTL * 3).await;
    let state = registered.state();
    let RegistrationState::Registered { last_error, .. } = state else {
        panic!("{state:?}");
    };
    assert!(last_error.is_none(), "{last_error:?}");
    assert_eq!(lease(&fake), before, "the lease has changed");
    let kv = fake.store().keys[&own_key()].clone();
    let value = String::from_utf8(kv.value).expect("UTF-8");
    assert!(value.contains("\"weight\":9"), "{value}");
    // After the restore, the registration must still detect that its key is deleted.
    fake.store().apply(vec![(own_key(), None)]);
    fake.tell();
    until(TTL, "the key is restored", || lease(&fake) == before).await;
}

#[tokio::test(start_paused = true)]
async fn a_deleted_key_is_restored_although_its_watch_has_lost_the_deletion() {
    let fake = Fake::new(1, 0);
    let registered = registration(fake.etcd(2)).register().await;
    let registered = registered.expect("no error");
    sleep(Duration::from_secs(1)).await;
    fake.script().lost_deletes = 1;
    fake.store().apply(vec![(own_key(), None)]);
    fake.tell();
    sleep(Duration::from_millis(100)).await;
    assert_eq!(
        fake.script().lost_deletes,
        0,
        "the scripted etcd has not dropped the deletion"
    );
    assert_eq!(lease(&fake), 0, "the key has already been restored");
    let bound = Duration::from_secs(65);
    until(bound, "the key is restored", || lease(&fake) != 0).await;
    assert!(registered.state().is_registered());
}

#[tokio::test(start_paused = true)]
async fn a_renewal_leaves_no_stream_open() {
    let fake = Fake::new(1, 0);
    let etcd = fake.etcd(1);
    let lease = LeaseId::new(42);
    etcd.grant(lease, TTL, DEADLINE).await.expect("a lease");
    for _ in 0..5 {
        etcd.keep_alive(lease, 0, DEADLINE)
            .await
            .expect("a renewal");
    }
    let closed = || fake.script().renewing == 0;
    until(DEADLINE, "the streams are closed", closed).await;
}

#[tokio::test(start_paused = true)]
async fn a_renewal_that_ends_without_a_response_does_not_end_the_lease() {
    let fake = Fake::new(1, 0);
    let etcd = fake.etcd(1);
    let lease = LeaseId::new(42);
    etcd.grant(lease, TTL, DEADLINE).await.expect("a lease");
    fake.script().closed_renewals = 1;
    let error = etcd.keep_alive(lease, 0, DEADLINE).await;
    let error = error.expect_err("an error");
    assert_eq!(error.kind(), EtcdErrorKind::Unavailable);
    etcd.keep_alive(lease, 0, DEADLINE)
        .await
        .expect("a renewal");
}

#[tokio::test(start_paused = true)]
async fn a_grant_whose_response_was_lost_can_be_repeated() {
    let fake = Fake::new(1, 0);
    fake.script().lost_grants = 1;
    let start = Instant::now();
    let registered = registration(fake.etcd(2)).register().await;
    let _registered = registered.expect("no error");
    assert!(since(start) < TTL / 2, "{:?}", since(start));
    assert_eq!(fake.store().leases.len(), 1, "a second lease was granted");
}

#[tokio::test(start_paused = true)]
async fn no_key_is_written_if_the_store_ignores_the_requested_lease_id() {
    let fake = Fake::new(1, 0);
    fake.script().chooses_leases = true;
    let error = registration(fake.etcd(1)).register().await;
    let error = error.expect_err("a rejected lease id");
    let text = error.to_string();
    assert!(text.contains("in place of"), "{text}");
    assert!(fake.store().keys.is_empty(), "a key was written");
}

/// Watches that share a stream receive only their own events, whether the server uses the requested watch ids or its own.
#[tokio::test(start_paused = true)]
async fn watches_on_one_stream_receive_their_own_events() {
    for numbers_watchers in [false, true] {
        let fake = Fake::new(1, 0);
        fake.script().numbers_watchers = numbers_watchers;
        let etcd = fake.etcd(1);
        let services = ["a", "b", "c", "d"];
        let mut watches = Vec::new();
        for service in services {
            let range = Range::prefix(&format!("/gRPC/{service}/"));
            watches.push(etcd.watch(&range, None).await.expect("a watch"));
        }
        for watch in &mut watches {
            watch.created().await.expect("created watchers");
        }
        assert_eq!(etcd.watch_streams(), 1);
        // A dropped watch does not affect the others.
        drop(watches.remove(1));
        for service in ["a", "c", "d"] {
            let key = format!("/gRPC/{service}/1").into_bytes();
            fake.store()
                .apply(vec![(key, Some((b"10.0.0.1:80".to_vec(), 0)))]);
        }
        fake.tell();
        for (watch, service) in watches.iter_mut().zip(["a", "c", "d"]) {
            let message = watch.message().await.expect("a message");
            let keys: Vec<_> = message
                .events
                .iter()
                .map(|event| event.key().to_string())
                .collect();
            assert_eq!(keys, [format!("/gRPC/{service}/1")]);
        }
        drop(watches);
        until(DEADLINE, "the stream is closed", || {
            etcd.watch_streams() == 0
        })
        .await;
    }
}

/// The client has a single address, as behind a load balancer, so a renewal can succeed only on a new connection. The client replaces the
/// frozen connection after two requests without a response.
#[tokio::test(start_paused = true)]
async fn frequent_changes_of_the_weight_do_not_let_the_lease_expire() {
    let fake = Fake::new(1, 0);
    let registered = registration(fake.etcd(1)).register().await;
    let registered = registered.expect("no error");
    let before = lease(&fake);
    {
        let mut script = fake.script();
        script.frozen = script.connections;
    }
    let start = Instant::now();
    let mut weight = 1;
    while since(start) < TTL * 3 {
        weight += 1;
        let change = registered.set_weight(weight);
        drop(timeout(Duration::from_millis(300), change).await);
        sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(lease(&fake), before, "the lease has changed");
    assert!(registered.state().is_registered());
}

#[tokio::test(start_paused = true)]
async fn a_detached_client_uses_separate_connections() {
    let fake = Fake::new(1, 0);
    let etcd = fake.etcd(1);
    let key = Key::from("/a");
    etcd.read(&key).await.expect("no error");
    etcd.detached().read(&key).await.expect("no error");
    assert_eq!(fake.script().connections, 2);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_ends_cleanly_is_reopened_within_three_seconds() {
    let fake = Fake::new(1, 0);
    let keyspace = Keyspace::new("/gRPC/");
    let policy = AddressPolicy::default();
    let resolver = ResolverBuilder::service(fake.etcd(2), &keyspace, "greeter", policy).start();
    resolver.ready().await;
    for round in 1..5 {
        sleep(Duration::from_millis(500)).await;
        fake.cut();
        let key = format!("{PREFIX}{round}").into_bytes();
        let value = format!("127.0.0.1:{round}").into_bytes();
        fake.store().apply(vec![(key, Some((value, 0)))]);
        fake.tell();
        let known = || resolver.instances().len() == round;
        until(Duration::from_secs(3), "the change is applied", known).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_resolver_moves_from_a_member_whose_watch_is_silent() {
    for seed in 0..20 {
        let fake = Fake::new(seed, 0);
        fake.script().mute = Some("member0:1");
        let long = Duration::from_secs(1_000);
        let leased = (long, Instant::now() + long);
        fake.store().leases.insert(7, leased);
        let known = format!("{PREFIX}0").into_bytes();
        let value = b"127.0.0.1:79".to_vec();
        fake.store().apply(vec![(known, Some((value, 7)))]);
        let keyspace = Keyspace::new("/gRPC/");
        let policy = AddressPolicy::default();
        let resolver = ResolverBuilder::service(fake.etcd(2), &keyspace, "greeter", policy).start();
        resolver.ready().await;
        let change = b"127.0.0.1:80".to_vec();
        let key = format!("{PREFIX}1").into_bytes();
        fake.store().apply(vec![(key, Some((change, 0)))]);
        fake.tell();
        // The bound covers the 2 s in which the first watch waits for its first message, and a backoff. It does not cover a second watch on
        // the mute member, which would take another 2 s.
        let bound = Duration::from_millis(3_500);
        let known = || resolver.instances().len() == 2;
        until(bound, "the change is applied", known).await;
    }
}

/// A registration that finds a loss by a read opens its watch again. The silent member does not create the watch within 8 s, so the next
/// attempt uses another member.
#[tokio::test(start_paused = true)]
async fn a_registration_moves_from_a_member_whose_watch_becomes_silent() {
    for seed in 0..20 {
        let fake = Fake::new(seed, 0);
        // With this TTL, the registration reads its key only at its renewals, every 20 s, and only if the last read was 30 s to 60 s ago.
        let registered = registration(fake.etcd(2)).ttl(TTL * 10).register().await;
        let registered = registered.expect("no error");
        sleep(Duration::from_millis(100)).await;
        fake.script().mute = Some("member0:1");
        for bound in [Duration::from_secs(85), DEADLINE] {
            fake.store().apply(vec![(own_key(), None)]);
            fake.tell();
            until(bound, "the key is restored", || lease(&fake) != 0).await;
            sleep(Duration::from_secs(15)).await;
        }
        drop(registered);
    }
}

/// If a member renews leases but does not serve watches, the registrations of a fleet must not retry their watches every second.
#[tokio::test(start_paused = true)]
async fn a_key_watch_that_cannot_be_opened_is_retried_slowly() {
    let fake = Fake::new(1, 0);
    let registered = registration(fake.etcd(1)).register().await;
    let registered = registered.expect("no error");
    fake.script().mute = Some("member0:1");
    let before = fake.script().watches;
    sleep(Duration::from_secs(600)).await;
    let watches = fake.script().watches - before;
    assert!(
        (30..=80).contains(&watches),
        "{watches} watches in ten minutes"
    );
    assert!(registered.state().is_registered());
}

/// If a consumer polls the stream only from time to time, it receives only the last change of each address.
#[tokio::test(start_paused = true)]
async fn repeated_changes_of_an_address_are_merged() {
    let fake = Fake::new(1, 0);
    let keyspace = Keyspace::new("/gRPC/");
    let policy = AddressPolicy::default();
    let mut resolver = ResolverBuilder::service(fake.etcd(1), &keyspace, "greeter", policy).start();
    resolver.ready().await;
    for weight in 1..=50 {
        let value = format!(r#"{{"Addr":"127.0.0.1:1","Metadata":{{"weight":{weight}}}}}"#);
        let put = (own_key(), Some((value.into_bytes(), 0)));
        fake.store().apply(vec![put]);
        fake.tell();
        let known = || {
            resolver
                .instances()
                .iter()
                .any(|one| one.weight() == weight)
        };
        until(DEADLINE, "the change is applied", known).await;
    }
    let Some(Ok(Change::Insert(_, instance))) = resolver.next().await else {
        panic!("no instance is listed");
    };
    assert_eq!(instance.weight(), 50);
    let more = timeout(DEADLINE, resolver.next()).await;
    assert!(more.is_err(), "{more:?}");
}

/// A page of 400 values takes 24 MB, which exceeds the limit for one message.
#[tokio::test(start_paused = true)]
async fn a_page_larger_than_sixteen_mib_is_listed_in_two_halves() {
    let fake = Fake::new(1, 0);
    for number in 0..400 {
        let key = format!("{PREFIX}{number}").into_bytes();
        let filler = "x".repeat(60_000);
        let value = format!(
            r#"{{"Addr":"127.0.0.1:{}","Metadata":{{"x":"{filler}"}}}}"#,
            number + 1
        );
        let put = (key, Some((value.into_bytes(), 0)));
        fake.store().apply(vec![put]);
    }
    let keyspace = Keyspace::new("/gRPC/");
    let policy = AddressPolicy::default();
    let resolver = ResolverBuilder::service(fake.etcd(1), &keyspace, "greeter", policy).start();
    resolver.ready().await;
    assert_eq!(resolver.instances().len(), 400);
    assert_eq!(
        fake.script().pages,
        3,
        "one full page must fail, and two halves must follow"
    );
}

/// The registration has more keys (151) than one transaction of etcd can write.
#[tokio::test(start_paused = true)]
async fn every_key_is_marked_as_leaving_before_its_deletion() {
    let fake = Fake::new(1, 0);
    let mut builder = registration(fake.etcd(2));
    for number in 0..150 {
        builder = builder.additional_service(format!("service{number}"));
    }
    let registered = builder.register().await.expect("no error");
    let goodbyes = |fake: &Fake| {
        let store = fake.store();
        let events = store.history.iter().flat_map(|(_, events)| events);
        let values = events.filter_map(|event| event.kv.as_ref().map(|kv| &kv.value));
        let leaving = values.filter(|value| String::from_utf8_lossy(value).contains("leaving"));
        leaving.count()
    };
    let one = registered.deregister_service("service7").await;
    one.expect("no error");
    assert_eq!(goodbyes(&fake), 1);
    registered.deregister().await.expect("no error");
    assert_eq!(goodbyes(&fake), 151);
}

/// If an endpoint refuses connections, its key may already be deleted. So the channel makes the resolver read the key.
#[tokio::test(start_paused = true)]
async fn a_refused_connection_makes_the_resolver_read_the_key() {
    let fake = Fake::new(1, 0);
    let keyspace = Keyspace::new("/gRPC/");
    let policy = AddressPolicy::default();
    let refusing = b"127.0.0.1:1".to_vec();
    let key = format!("{PREFIX}1").into_bytes();
    fake.store().apply(vec![(key, Some((refusing, 0)))]);
    let resolver = ResolverBuilder::service(fake.etcd(1), &keyspace, "greeter", policy);
    // The connector itself refuses the connection. In paused time, the test would not wait until the kernel refuses it.
    let refused =
        |_| std::future::ready(Err::<DuplexStream, _>(ErrorKind::ConnectionRefused.into()));
    let channel = BalancedChannel::builder()
        .source(resolver)
        .connector(refused)
        .connect_lazy();
    let read = || fake.script().reads_of_values > 0;
    until(Duration::from_secs(5), "the key is read", read).await;
    assert_eq!(
        channel.endpoints().len(),
        1,
        "an instance that is still registered was removed"
    );
}

/// Keys that were rejected because of a limit must be used when the limit no longer applies, although nothing writes them again.
#[tokio::test(start_paused = true)]
async fn keys_over_a_limit_are_used_after_other_keys_are_deleted() {
    let fake = Fake::new(1, 0);
    let key = |name: &str| format!("{PREFIX}{name}").into_bytes();
    let value = |port: u16| Some((format!("127.0.0.1:{port}").into_bytes(), 0));
    // A writer fills the prefix with keys that precede the key of the server.
    let flood: Vec<_> = (1..=20).map(|port| key(&format!("a{port:02}"))).collect();
    let puts = (1..)
        .zip(&flood)
        .map(|(port, key)| (key.clone(), value(port)));
    fake.store().apply(puts.collect());
    fake.store().apply(vec![(key("server"), value(1_000))]);
    let policy = AddressPolicy::default();
    let resolver =
        ResolverBuilder::service(fake.etcd(1), &Keyspace::new("/gRPC/"), "greeter", policy)
            .mass_removal_protection(None)
            .max_keys(20)
            .start();
    resolver.ready().await;
    assert_eq!(
        (resolver.instances().len(), resolver.rejected().len()),
        (20, 1)
    );
    fake.store()
        .apply(flood.into_iter().map(|key| (key, None)).collect());
    fake.tell();
    let is_used = || {
        let known = resolver.instances();
        known.len() == 1 && known[0].address().port() == Some(1_000)
    };
    until(
        Duration::from_secs(65),
        "the key of the server is used",
        is_used,
    )
    .await;
    assert!(resolver.rejected().is_empty());
}

/// A resolver of two prefixes, of which only the first can be listed: the seeds stay known until both are.
#[tokio::test(start_paused = true)]
async fn seeds_that_a_first_prefix_replaces_leave_the_set_known() {
    let fake = Fake::new(1, 0);
    let key = format!("{PREFIX}1").into_bytes();
    fake.store()
        .apply(vec![(key, Some((b"127.0.0.1:1".to_vec(), 0)))]);
    fake.script().frozen = u32::MAX;
    let prefixes = [PREFIX.to_owned(), "/other/".to_owned()];
    let resolver = ResolverBuilder::prefixes(fake.etcd(1), &prefixes, AddressPolicy::default())
        .seeds([Instance::new("127.0.0.1:1".parse().expect("an address"))])
        .start();
    resolver.ready().await;
    assert_eq!(resolver.status().state, ResolverState::Stale);
    fake.script().hidden = Some("/other/".to_owned());
    fake.script().frozen = 0;
    let is_listed = || resolver.status().lists == 1;
    until(
        Duration::from_secs(60),
        "the first prefix is listed",
        is_listed,
    )
    .await;
    assert_eq!(resolver.instances().len(), 1);
    assert_eq!(
        resolver.status().state,
        ResolverState::Stale,
        "the set must not become unknown again"
    );
    fake.script().hidden = None;
    let is_fresh = || resolver.status().state == ResolverState::Fresh;
    until(
        Duration::from_secs(60),
        "both prefixes are listed",
        is_fresh,
    )
    .await;
}
