//! How a registration keeps the keys of its server in a real etcd.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod support;

use std::time::Duration;

use etcd_client::PutOptions;
use support::{SOON, addresses, client, etcd, eventually, knows, list, registry, within};
use tokio::time::{Instant, timeout};
use tonic_etcd::testing::Etcd;
use tonic_etcd::{
    Format, Registration, Registry,
    error::RegisterError,
    instance::LeaseId,
    registration::{RegistrationBuilder, RegistrationState},
};

const TTL: Duration = Duration::from_secs(3);

fn describe(registry: &Registry) -> RegistrationBuilder {
    registry
        .registration("greeter")
        .address("127.0.0.1:80")
        .ttl(TTL)
}

async fn register(registry: &Registry) -> Registration {
    describe(registry).register().await.unwrap()
}

/// Returns the lease that a registration reports.
fn lease(registration: &Registration) -> Option<LeaseId> {
    match registration.state() {
        RegistrationState::Registered { lease, .. } => Some(lease),
        _ => None,
    }
}

/// Returns whether etcd contains the key under the lease that the registration reports.
async fn is_kept(etcd: &etcd_client::Client, registration: &Registration) -> bool {
    let listed = list(etcd, registration.key()).await;
    listed.len() == 1 && lease(registration).is_some_and(|lease| lease.get() == listed[0].2)
}

#[tokio::test]
async fn a_clone_of_a_builder_registers_another_server_with_a_state_of_its_own() {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    let builder = describe(&registry).zone("eu-1a");
    let copy = builder.clone().address("127.0.0.1:81");
    let (states, copied) = (builder.watch_state(), copy.watch_state());
    let registered =
        |state: &RegistrationState| matches!(state, RegistrationState::Registered { .. });
    let _first = builder.register().await.unwrap();
    assert!(registered(&states.borrow()));
    assert!(
        !registered(&copied.borrow()),
        "the clone must not be registered"
    );
    let second = copy.register().await.unwrap();
    assert!(registered(&copied.borrow()));
    second.deregister().await.unwrap();
    assert!(
        registered(&states.borrow()),
        "the original must stay registered"
    );
    let resolver = registry.resolver("greeter").start();
    knows(&resolver, &["127.0.0.1:80"]).await;
    assert_eq!(resolver.instances()[0].zone(), Some("eu-1a"));
}

#[tokio::test]
async fn a_registration_writes_the_configured_values() {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    let by_hand = client(&etcd).await;
    let plain = register(&registry).await;
    assert_eq!(plain.key(), "/gRPC/greeter/127.0.0.1:80");
    let rich = describe(&registry)
        .address("10.0.0.5:50051")
        .instance_id("node1")
        .weight(3)
        .zone("eu-1a")
        .version("1.2.0")
        .metadata("rack", "7");
    let rich = rich.register().await.unwrap();
    let exact = registry
        .registration_at("/web/node1")
        .address("10.0.0.5:8000")
        .format(Format::Plain)
        .register()
        .await
        .unwrap();

    let values: Vec<_> = list(&by_hand, "/")
        .await
        .into_iter()
        .map(|(key, value, lease)| (key, value, lease != 0))
        .collect();
    let expected = [
        (
            "/gRPC/greeter/127.0.0.1:80",
            r#"{"Op":0,"Addr":"127.0.0.1:80","Metadata":null}"#,
        ),
        (
            "/gRPC/greeter/node1",
            r#"{"Op":0,"Addr":"10.0.0.5:50051","Metadata":{"rack":"7","version":"1.2.0","weight":3,"zone":"eu-1a"}}"#,
        ),
        ("/web/node1", "10.0.0.5:8000"),
    ];
    assert_eq!(
        values,
        expected.map(|(key, value)| (key.to_owned(), value.to_owned(), true))
    );

    let resolver = registry.resolver("greeter").start();
    knows(&resolver, &["10.0.0.5:50051", "127.0.0.1:80"]).await;
    let found = &resolver.instances()[0];
    assert_eq!(
        (found.id(), found.weight(), found.zone(), found.version()),
        (Some("node1"), 3, Some("eu-1a"), Some("1.2.0"))
    );
    assert_eq!(
        (
            found.metadata()["rack"].as_str(),
            found.location().unwrap().lease()
        ),
        ("7", lease(&rich))
    );

    plain.deregister().await.unwrap();
    rich.deregister().await.unwrap();
    exact.deregister().await.unwrap();
    assert!(list(&by_hand, "/").await.is_empty());
    assert!(
        by_hand
            .lease_client()
            .leases()
            .await
            .unwrap()
            .leases()
            .is_empty(),
        "a lease is left"
    );
}

#[tokio::test]
async fn a_lease_is_renewed_while_the_server_runs() {
    let etcd = etcd().await;
    let by_hand = client(&etcd).await;
    let registration = register(&registry(&etcd).await).await;
    let first = lease(&registration);
    let before = list(&by_hand, registration.key()).await;
    let mut states = registration.watch_state();
    let mut renewed = 0;
    while renewed < 8 {
        timeout(SOON, states.changed())
            .await
            .expect("a renewal after each third of the TTL")
            .unwrap();
        assert!(states.borrow_and_update().is_registered());
        renewed += 1;
    }
    assert_eq!(lease(&registration), first);
    assert_eq!(
        list(&by_hand, registration.key()).await,
        before,
        "a renewal must write nothing"
    );
}

#[tokio::test]
async fn a_lease_revoked_by_hand_is_replaced_within_a_ttl() {
    let etcd = etcd().await;
    let by_hand = client(&etcd).await;
    let registration = register(&registry(&etcd).await).await;
    for _ in 0..3 {
        let lease = lease(&registration).expect("registered");
        by_hand.lease_client().revoke(lease.get()).await.unwrap();
        within(TTL, "registered again", async || {
            is_kept(&by_hand, &registration).await
        })
        .await;
    }
}

#[tokio::test]
async fn a_key_deleted_by_hand_is_put_back_within_a_ttl() {
    let etcd = etcd().await;
    let by_hand = client(&etcd).await;
    let registration = register(&registry(&etcd).await).await;
    for _ in 0..3 {
        by_hand
            .kv_client()
            .delete(registration.key(), None)
            .await
            .unwrap();
        within(TTL, "registered again", async || {
            is_kept(&by_hand, &registration).await
        })
        .await;
    }
}

#[tokio::test]
async fn an_outage_longer_than_the_ttl_is_survived() {
    let mut etcd = etcd().await;
    let registry = registry(&etcd).await;
    let registration = register(&registry).await;
    let resolver = registry.resolver("greeter").start();
    knows(&resolver, &["127.0.0.1:80"]).await;
    etcd.kill(0).await.unwrap();
    let mut states = registration.watch_state();
    timeout(SOON, states.wait_for(|state| !state.is_registered()))
        .await
        .expect("the state changes one TTL after the last renewal")
        .unwrap();
    assert_eq!(addresses(&resolver), ["127.0.0.1:80"]);
    etcd.restart(0).await.unwrap();
    let by_hand = client(&etcd).await;
    eventually("registered again", async || {
        is_kept(&by_hand, &registration).await
    })
    .await;
    // After a restart, etcd extends old leases by one TTL. The registration must last for longer than that.
    for _ in 0..5 {
        timeout(SOON, states.changed())
            .await
            .expect("renewals continue")
            .unwrap();
        assert!(is_kept(&by_hand, &registration).await);
    }
}

#[tokio::test]
async fn a_wiped_etcd_is_filled_again_within_a_ttl() {
    let mut etcd = etcd().await;
    // The TTL of the other tests is too short here: most of that TTL would pass while the client waits before it dials etcd again.
    let ttl = TTL * 3;
    let registration = describe(&registry(&etcd).await).ttl(ttl).register().await;
    let registration = registration.unwrap();
    etcd.kill(0).await.unwrap();
    etcd.wipe(0).await.unwrap();
    etcd.restart(0).await.unwrap();
    let by_hand = client(&etcd).await;
    within(ttl, "registered again", async || {
        is_kept(&by_hand, &registration).await
    })
    .await;
}

/// Returns when the lease expires, or `None` if it may have expired.
fn expires(registration: &Registration) -> Option<Instant> {
    match registration.state() {
        RegistrationState::Registered { expires, .. } => Some(expires),
        _ => None,
    }
}

#[tokio::test]
async fn the_lease_is_kept_while_any_one_member_is_frozen() {
    let mut etcd = Etcd::start_cluster(3).await.unwrap();
    // The TTL is longer than an election, because no lease is renewed during an election.
    let registration = describe(&registry(&etcd).await)
        .ttl(TTL * 3)
        .register()
        .await
        .unwrap();
    let by_hand = Registry::connect(etcd.endpoints()).await.unwrap();
    let resolver = by_hand.resolver("greeter").start();
    knows(&resolver, &["127.0.0.1:80"]).await;
    let first = lease(&registration);
    for member in 0..3 {
        etcd.freeze(member).await.unwrap();
        let mut states = registration.watch_state();
        // Waits for two renewals. A failed renewal changes the state too, so the time of the expiry is compared.
        for _ in 0..2 {
            let before = expires(&registration);
            let renewed = states.wait_for(|_| expires(&registration) > before);
            let renewed = timeout(SOON, renewed).await.expect("renewals continue");
            drop(renewed.unwrap());
            assert!(
                before.is_some(),
                "the lease may have expired while member {member} was frozen"
            );
        }
        etcd.thaw(member).await.unwrap();
    }
    assert_eq!(lease(&registration), first, "the lease must not change");
}

#[tokio::test]
async fn a_key_taken_over_is_left_unchanged_until_it_is_deleted() {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    let by_hand = client(&etcd).await;
    let old = register(&registry).await;
    // Another process starts on the same address and gets the key at once.
    let new = timeout(Duration::from_secs(5), register(&registry))
        .await
        .expect("`register` succeeds without a delay");
    let mut states = old.watch_state();
    let superseded =
        |state: &RegistrationState| matches!(state, RegistrationState::Superseded { .. });
    timeout(SOON, states.wait_for(superseded))
        .await
        .expect("the old registration is superseded")
        .unwrap();
    assert!(matches!(
        old.set_weight(5).await,
        Err(RegisterError::Superseded { .. })
    ));
    let mut renewals = new.watch_state();
    for _ in 0..6 {
        timeout(SOON, renewals.changed())
            .await
            .expect("a renewal")
            .unwrap();
        assert!(
            is_kept(&by_hand, &new).await,
            "the old registration must not write the key"
        );
    }
    new.deregister().await.unwrap();
    within(SOON, "the old registration has the key again", async || {
        is_kept(&by_hand, &old).await
    })
    .await;
    // If a key has no lease, the registration also treats it as the key of another server.
    by_hand
        .kv_client()
        .put(old.key(), "127.0.0.1:99", None)
        .await
        .unwrap();
    timeout(SOON, states.wait_for(superseded))
        .await
        .expect("the old registration is superseded")
        .unwrap();
    old.deregister().await.unwrap();
    assert_eq!(
        list(&by_hand, "/").await.len(),
        1,
        "the key of the other server must be kept"
    );
}

#[tokio::test]
async fn a_value_edited_by_hand_under_the_same_lease_is_kept() {
    let etcd = etcd().await;
    let by_hand = client(&etcd).await;
    let registration = register(&registry(&etcd).await).await;
    let options = PutOptions::new().with_ignore_lease();
    by_hand
        .kv_client()
        .put(registration.key(), "127.0.0.1:99", Some(options))
        .await
        .unwrap();
    let mut states = registration.watch_state();
    for _ in 0..5 {
        timeout(SOON, states.changed())
            .await
            .expect("a renewal")
            .unwrap();
    }
    assert_eq!(list(&by_hand, "/").await[0].1, "127.0.0.1:99");
    assert!(registration.state().is_registered());
}

/// `etcdctl put` detaches a key from its lease. Such a key would stay in etcd for ever after the end of the server.
#[tokio::test]
async fn a_value_written_by_hand_is_used_and_does_not_outlive_the_server() {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    let by_hand = client(&etcd).await;
    let resolver = registry.resolver("greeter").start();
    let registration = register(&registry).await;
    knows(&resolver, &["127.0.0.1:80"]).await;
    for weight in [7, 9] {
        let value = format!(
            r#"{{"Op":0,"Addr":"127.0.0.1:80","Metadata":{{"weight":{weight},"owner":"shop"}}}}"#
        );
        let put = by_hand
            .kv_client()
            .put(registration.key(), value, None)
            .await;
        put.unwrap();
        within(SOON, "the key has its lease again", async || {
            is_kept(&by_hand, &registration).await
        })
        .await;
        within(SOON, "the weight is used", async || {
            let instances = resolver.instances();
            instances.iter().all(|instance| instance.weight() == weight)
        })
        .await;
    }
    registration.deregister().await.unwrap();
    assert_eq!(list(&by_hand, "/").await, []);
}

/// The server may leave before it has seen the edit.
#[tokio::test]
async fn a_value_written_by_hand_while_the_server_leaves_does_not_outlive_it() {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    let by_hand = client(&etcd).await;
    for _ in 0..30 {
        let registration = register(&registry).await;
        let value = r#"{"Op":0,"Addr":"127.0.0.1:80","Metadata":{"weight":7}}"#;
        let mut kv = by_hand.kv_client();
        kv.put(registration.key(), value, None).await.unwrap();
        registration.deregister().await.unwrap();
        assert_eq!(list(&by_hand, "/").await, []);
    }
}

/// A format without a leave marker has no put that would detect the edit.
#[tokio::test]
async fn a_value_written_by_hand_does_not_outlive_a_server_whose_format_has_no_leave_marker() {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    let by_hand = client(&etcd).await;
    let plain = || describe(&registry).format(Format::Plain);
    let edit = async |key: &str| {
        let mut kv = by_hand.kv_client();
        kv.put(key, "127.0.0.1:80", None).await.unwrap();
    };
    for _ in 0..10 {
        let registration = plain().register().await.unwrap();
        edit(registration.key()).await;
        registration.deregister().await.unwrap();
        assert_eq!(list(&by_hand, "/").await, []);
    }
    for _ in 0..10 {
        let registration = plain().additional_service("other").register();
        let registration = registration.await.unwrap();
        let keys: Vec<_> = registration.keys().map(str::to_owned).collect();
        edit(&keys[1]).await;
        registration.deregister_service("other").await.unwrap();
        assert_eq!(list(&by_hand, &keys[1]).await, []);
        edit(&keys[1]).await;
        within(
            SOON,
            "the key of the removed service is deleted",
            async || list(&by_hand, &keys[1]).await.is_empty(),
        )
        .await;
        registration.deregister().await.unwrap();
        assert_eq!(list(&by_hand, "/").await, []);
    }
}

#[tokio::test]
async fn a_value_written_by_hand_during_a_pause_is_deleted() {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    let by_hand = client(&etcd).await;
    let registration = register(&registry).await;
    registration.pause().await.unwrap();
    let value = r#"{"Op":0,"Addr":"127.0.0.1:80"}"#;
    let mut kv = by_hand.kv_client();
    kv.put(registration.key(), value, None).await.unwrap();
    within(SOON, "the key is deleted", async || {
        list(&by_hand, "/").await.is_empty()
    })
    .await;
    assert!(matches!(registration.state(), RegistrationState::Paused));
    // The key of another server is not deleted.
    let other = r#"{"Op":0,"Addr":"127.0.0.1:81"}"#;
    kv.put(registration.key(), other, None).await.unwrap();
    registration.deregister().await.unwrap();
    assert_eq!(list(&by_hand, "/").await[0].1, other);
}

/// All services of a registration have one set of attributes.
#[tokio::test]
async fn a_value_written_by_hand_changes_all_services_of_the_registration() {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    let by_hand = client(&etcd).await;
    let registration = describe(&registry).additional_service("other");
    let registration = registration.register().await.unwrap();
    let value = r#"{"Op":0,"Addr":"127.0.0.1:80","Metadata":{"weight":7}}"#;
    let mut kv = by_hand.kv_client();
    kv.put(registration.key(), value, None).await.unwrap();
    within(SOON, "both values have the weight", async || {
        let listed = list(&by_hand, "/gRPC/").await;
        let lease = lease(&registration).map(LeaseId::get);
        listed.len() == 2
            && listed
                .iter()
                .all(|(_, value, of)| value.contains("\"weight\":7") && Some(*of) == lease)
    })
    .await;
    registration.deregister().await.unwrap();
    assert_eq!(list(&by_hand, "/").await, []);
}

#[tokio::test]
async fn a_pause_removes_the_server_and_a_resume_registers_it_again() {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    let resolver = registry.resolver("greeter").start();
    let registration = register(&registry).await;
    knows(&resolver, &["127.0.0.1:80"]).await;
    for weight in 2..5 {
        registration.pause().await.unwrap();
        assert!(matches!(registration.state(), RegistrationState::Paused));
        knows(&resolver, &[]).await;
        registration
            .pause()
            .await
            .expect("a second pause is no error");
        registration
            .set_weight(weight)
            .await
            .expect("the weight is kept for the resume");
        registration.resume().await.unwrap();
        registration
            .resume()
            .await
            .expect("a second resume is no error");
        knows(&resolver, &["127.0.0.1:80"]).await;
        assert_eq!(resolver.instances()[0].weight(), weight);
    }
}

#[tokio::test]
async fn a_weight_changes_in_place() {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    let resolver = registry.resolver("greeter").start();
    let registration = register(&registry).await;
    let before = lease(&registration);
    for weight in [7, 1, 1_000_000] {
        registration.set_weight(weight).await.unwrap();
        eventually("the new weight is listed", async || {
            resolver
                .instances()
                .first()
                .is_some_and(|instance| instance.weight() == weight)
        })
        .await;
    }
    assert_eq!(lease(&registration), before);
    assert!(matches!(
        registration.set_weight(0).await,
        Err(RegisterError::Invalid { .. })
    ));
}

#[tokio::test]
async fn changes_while_etcd_is_down_are_written_when_it_is_available_again() {
    let mut etcd = etcd().await;
    let registry = registry(&etcd).await;
    let registration = describe(&registry)
        .deregister_timeout(Duration::from_millis(300))
        .register()
        .await
        .unwrap();
    etcd.kill(0).await.unwrap();
    let error = registration
        .set_weight(9)
        .await
        .expect_err("`set_weight` must fail without etcd");
    assert!(matches!(error, RegisterError::TimedOut { .. }), "{error:?}");
    assert!(
        error.to_string().contains(&etcd.endpoint(0).unwrap())
            && error.to_string().contains("failed: "),
        "{error}"
    );
    etcd.restart(0).await.unwrap();
    let by_hand = client(&etcd).await;
    eventually("the weight is written", async || {
        list(&by_hand, registration.key())
            .await
            .iter()
            .any(|(_, value, _)| value.contains("\"weight\":9"))
    })
    .await;

    // If a deregistration fails, it is not tried again, and the key expires with its lease.
    let key = registration.key().to_owned();
    etcd.freeze(0).await.unwrap();
    let error = timeout(Duration::from_secs(4), registration.deregister())
        .await
        .expect("the deregistration ends at its timeout");
    assert!(
        matches!(error, Err(RegisterError::TimedOut { .. })),
        "{error:?}"
    );
    etcd.thaw(0).await.unwrap();
    within(TTL * 2, "the key expires with its lease", async || {
        list(&by_hand, &key).await.is_empty()
    })
    .await;
}

#[tokio::test]
async fn a_dropped_registration_is_deregistered() {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    let by_hand = client(&etcd).await;
    drop(
        describe(&registry)
            .ttl(Duration::from_secs(60))
            .register()
            .await
            .unwrap(),
    );
    eventually("the key is deleted", async || {
        list(&by_hand, "/").await.is_empty()
    })
    .await;
    // A registration that is dropped before it is complete is removed, too.
    for _ in 0..20 {
        // If etcd answers a grant too late, the lease remains until it expires.
        let registering = describe(&registry).ttl(Duration::from_secs(10)).register();
        let _ = timeout(Duration::from_micros(fastrand::u64(..4_000)), registering).await;
    }
    eventually("no lease is left", async || {
        by_hand
            .lease_client()
            .leases()
            .await
            .unwrap()
            .leases()
            .is_empty()
    })
    .await;
    assert!(list(&by_hand, "/").await.is_empty());
}

#[tokio::test]
async fn invalid_input_is_rejected_before_any_request_and_the_error_names_it() {
    let mut etcd = etcd().await;
    let registry = registry(&etcd).await;
    // From now on, each request to etcd fails, but later and with another error.
    etcd.kill(0).await.unwrap();
    let service = |name: &str| registry.registration(name).address("127.0.0.1:80");
    let greeter = || service("greeter");
    for (builder, word) in [
        (service(""), "service name is empty"),
        (service("a/b"), "slash"),
        (greeter().address("127.0.0.1:0"), "port 0"),
        (greeter().address("127.0.0.1"), "no port"),
        (greeter().address("0.0.0.0:80"), "unspecified"),
        (greeter().address("[::]:80"), "unspecified"),
        (greeter().address("169.254.1.1:80"), "link-local"),
        (registry.registration("greeter"), "not set"),
        (
            greeter().ttl(Duration::from_millis(1_999)),
            "TTL is 1.999 s",
        ),
        (greeter().ttl(Duration::MAX), "TTL"),
        (greeter().weight(0), "weight is 0"),
        (greeter().weight(u32::MAX), "weight is"),
        (greeter().instance_id("a/b"), "instance id"),
        (greeter().instance_id(""), "instance id"),
        (greeter().metadata("weight", "1"), "reserved"),
        (greeter().metadata("", "1"), "metadata name is empty"),
        (
            greeter().metadata("large", "x".repeat(64 * 1024)),
            "over the limit",
        ),
        (
            greeter().format(Format::Plain).zone("a"),
            "cannot represent",
        ),
        (greeter().additional_service(""), "is empty"),
        (greeter().additional_service("a/b"), "slash"),
        (greeter().additional_service("greeter"), "named twice"),
        (
            registry
                .registration_at("/web/a")
                .address("127.0.0.1:80")
                .additional_service("b"),
            "exact key",
        ),
        (
            registry
                .registration_at("/web/a")
                .address("127.0.0.1:80")
                .instance_id("b"),
            "cannot have the instance id \"b\"",
        ),
        (greeter().drain_timeout(Duration::ZERO), "drain_timeout"),
        (greeter().grace_period(Duration::ZERO), "grace_period"),
        (greeter().health(), "`health` applies only"),
        (
            registry.registration_at("").address("127.0.0.1:80"),
            "must not end in a slash",
        ),
        (
            registry.registration_at("/web/").address("127.0.0.1:80"),
            "must not end in a slash",
        ),
    ] {
        let refused = timeout(Duration::from_millis(100), builder.register())
            .await
            .expect("`register` fails without a request");
        let error = refused.expect_err(word);
        assert!(
            error.to_string().contains(word),
            "the error must contain {word:?}: {error}"
        );
    }
}

/// A list of endpoints may mix two clusters by mistake. The server must not be registered in one cluster and then in the other.
#[tokio::test]
async fn endpoints_of_two_clusters_lead_to_a_registration_in_one() {
    let (one, other) = (etcd().await, etcd().await);
    let registry = Registry::connect([one.endpoint(0).unwrap(), other.endpoint(0).unwrap()]).await;
    let registration = describe(&registry.unwrap()).ttl(Duration::from_secs(2));
    let registration = registration.register().await.unwrap();
    let mut states = registration.watch_state();
    let mut leases = std::collections::HashSet::new();
    let renewals = timeout(Duration::from_secs(10), async {
        loop {
            if let RegistrationState::Registered { lease, .. } = &*states.borrow_and_update() {
                leases.insert(*lease);
            }
            states.changed().await.unwrap();
        }
    });
    renewals.await.expect_err("the renewals must not end");
    assert_eq!(
        leases.len(),
        1,
        "the server was registered again: {leases:?}"
    );
    let mut there = Vec::new();
    for etcd in [&one, &other] {
        there.extend(list(&client(etcd).await, "/").await);
    }
    assert_eq!(there.len(), 1, "one cluster must have the key: {there:?}");
    registration.deregister().await.unwrap();
}

#[tokio::test]
async fn a_registration_without_etcd_fails_at_the_startup_timeout() {
    let mut etcd = etcd().await;
    let registry = registry(&etcd).await;
    etcd.kill(0).await.unwrap();
    let registering = describe(&registry)
        .startup_timeout(Duration::from_millis(700))
        .register();
    let error = timeout(Duration::from_secs(10), registering)
        .await
        .expect("`register` ends at the startup timeout")
        .expect_err("`register` must fail without etcd");
    assert!(matches!(error, RegisterError::TimedOut { .. }), "{error:?}");
    assert!(
        error.to_string().contains("0.7 s")
            && error.to_string().contains(&etcd.endpoint(0).unwrap()),
        "{error}"
    );
    // If etcd is available again in time, the registration succeeds.
    let registering = tokio::spawn(describe(&registry).register());
    etcd.restart(0).await.unwrap();
    let registered = timeout(SOON, registering).await.unwrap().unwrap();
    drop(registered.expect("`register` succeeds with etcd"));
}

/// Returns the keys in etcd under the lease that a registration reports.
async fn kept(etcd: &etcd_client::Client, registration: &Registration) -> Vec<String> {
    let own = lease(registration).map(LeaseId::get);
    let listed = list(etcd, "/gRPC/").await;
    let own = listed
        .into_iter()
        .filter(|(_, _, lease)| Some(*lease) == own);
    own.map(|(key, ..)| key).collect()
}

#[tokio::test]
async fn several_services_share_one_lease_and_are_deregistered_one_by_one() {
    let etcd = etcd().await;
    let by_hand = client(&etcd).await;
    let registry = registry(&etcd).await;
    // 150 keys are more than etcd accepts in one transaction.
    let services: Vec<_> = (0..150)
        .map(|number| format!("service{number:03}"))
        .collect();
    let mut builder = registry.registration(&services[0]).address("127.0.0.1:80");
    for service in &services[1..] {
        builder = builder.additional_service(service);
    }
    let registration = builder.ttl(TTL * 4).register().await.unwrap();
    let all: Vec<_> = services
        .iter()
        .map(|service| format!("/gRPC/{service}/127.0.0.1:80"))
        .collect();
    assert_eq!(registration.keys().collect::<Vec<_>>(), all);
    assert_eq!(kept(&by_hand, &registration).await, all);
    let leases = by_hand.lease_client().leases().await.unwrap();
    assert_eq!(leases.leases().len(), 1);

    // Lost keys are put back: first a single deleted key, and then all keys of a revoked lease. After that, all values are changed.
    by_hand
        .kv_client()
        .delete(all[7].as_str(), None)
        .await
        .unwrap();
    // The registration watches each of its keys, so it puts the key back at once. The next renewal follows within a third of the TTL.
    within(TTL * 4 / 3, "the key is restored", async || {
        kept(&by_hand, &registration).await == all
    })
    .await;
    let lost = lease(&registration).unwrap();
    by_hand.lease_client().revoke(lost.get()).await.unwrap();
    within(TTL * 4, "all keys are restored", async || {
        kept(&by_hand, &registration).await == all
    })
    .await;
    registration.set_weight(9).await.unwrap();
    let listed = list(&by_hand, "/gRPC/").await;
    assert!(
        listed
            .iter()
            .all(|(_, value, _)| value.contains("\"weight\":9"))
    );

    // An additional service is deregistered, and then the first service. Neither key is put back.
    for service in [3, 0] {
        let service = &services[service];
        registration.deregister_service(service).await.unwrap();
        registration
            .deregister_service(service)
            .await
            .expect("a repeated deregistration succeeds");
    }
    let left: Vec<_> = [&all[1..3], &all[4..]].concat();
    let mut states = registration.watch_state();
    // The first `changed` returns at once, for the current state. The second waits for a renewal.
    for _ in 0..2 {
        timeout(SOON, states.changed()).await.unwrap().unwrap();
        assert!(states.borrow_and_update().is_registered());
        assert_eq!(kept(&by_hand, &registration).await, left);
    }
    let error = registration.deregister_service("other").await.unwrap_err();
    assert!(matches!(error, RegisterError::Invalid { .. }), "{error:?}");
    registration.pause().await.unwrap();
    assert!(list(&by_hand, "/gRPC/").await.is_empty());
    registration.resume().await.unwrap();
    assert_eq!(kept(&by_hand, &registration).await, left);
    // The deregistration of the last service also revokes the lease.
    for service in [&services[1..3], &services[4..]].concat() {
        registration.deregister_service(&service).await.unwrap();
    }
    assert!(matches!(
        registration.state(),
        RegistrationState::Deregistered
    ));
    let leases = by_hand.lease_client().leases().await.unwrap();
    assert!(leases.leases().is_empty(), "a lease is left");
}

#[tokio::test]
async fn only_the_service_taken_over_by_another_server_is_superseded() {
    let etcd = etcd().await;
    let by_hand = client(&etcd).await;
    let registry = registry(&etcd).await;
    let ours = describe(&registry)
        .additional_service("second")
        .register()
        .await
        .unwrap();
    let first = "/gRPC/greeter/127.0.0.1:80".to_owned();
    let second = "/gRPC/second/127.0.0.1:80".to_owned();
    let other = registry
        .registration("second")
        .address("127.0.0.1:80")
        .ttl(TTL);
    let other = other.register().await.unwrap();
    let mut states = ours.watch_state();
    let superseded =
        |state: &RegistrationState| matches!(state, RegistrationState::Superseded { .. });
    timeout(SOON, states.wait_for(superseded))
        .await
        .unwrap()
        .unwrap();
    let held = list(&by_hand, &first).await[0].2;
    for _ in 0..3 {
        tokio::time::sleep(TTL / 2).await;
        assert_eq!(
            list(&by_hand, &first).await[0].2,
            held,
            "the key of the first service must be kept"
        );
        assert!(
            is_kept(&by_hand, &other).await,
            "the old registration must not write the key"
        );
    }
    // The deregistration of a service does not delete the key of another server.
    ours.deregister_service("second").await.unwrap();
    assert!(is_kept(&by_hand, &other).await);
    assert!(ours.state().is_registered());
    other.deregister().await.unwrap();
    ours.deregister().await.unwrap();
    assert!(list(&by_hand, &second).await.is_empty());
}

/// Creates a registration on a runtime with a single thread, and blocks this thread for three TTLs. Returns whether the lease was kept.
async fn busy_for_three_ttls(dedicated_thread: bool) -> bool {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    // After this registration, the connections of the registry are open and are driven by this runtime. A dedicated thread must not use
    // them.
    let other = describe(&registry).register().await.unwrap();
    other.deregister().await.unwrap();
    let registration = describe(&registry)
        .ttl(Duration::from_secs(3))
        .dedicated_thread(dedicated_thread)
        .register()
        .await
        .unwrap();
    let before = lease(&registration).unwrap();
    // Blocks the only thread of the runtime.
    std::thread::sleep(Duration::from_secs(9));
    let by_hand = client(&etcd).await;
    let listed = list(&by_hand, registration.key()).await;
    let kept = listed.iter().any(|(_, _, lease)| *lease == before.get());
    registration.deregister().await.unwrap();
    assert!(list(&by_hand, "/").await.is_empty());
    kept
}

#[tokio::test]
async fn a_registration_on_a_dedicated_thread_survives_a_busy_runtime() {
    assert!(
        Box::pin(busy_for_three_ttls(true)).await,
        "the lease must be renewed"
    );
    assert!(
        !Box::pin(busy_for_three_ttls(false)).await,
        "without a dedicated thread, the lease must expire"
    );
}
