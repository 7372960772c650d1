//! Effects of authentication on long-running registrations and watches.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod support;

use std::time::Duration;

use support::authority::Authority;
use support::proxy::Proxy;
use support::roles::{protect, root, user, user_at};
use support::{addresses, etcd, eventually, knows, list, within};
use tonic_etcd::testing::Etcd;
use tonic_etcd::{
    Registration, Resolver, error::EtcdErrorKind, registration::RegistrationState,
    resolver::ResolverState,
};

const TTL: Duration = Duration::from_secs(5);

/// A registration and a resolver. Each of them connects to etcd through a proxy of its own, as a user with the minimal rights.
struct Pair<'a> {
    etcd: &'a Etcd,
    /// The proxy of the registration, and the proxy of the resolver.
    ways: [Proxy; 2],
    registration: Registration,
    resolver: Resolver,
    changes: u16,
}

impl<'a> Pair<'a> {
    async fn start(etcd: &'a Etcd) -> Self {
        protect(etcd).await;
        let way = async || Proxy::start("127.0.0.1:0", etcd.endpoint(0).unwrap()).await;
        let ways = [way().await, way().await];
        let over = |way: usize| vec![ways[way].address.to_string()];
        let registration = user_at(over(0), "writer")
            .await
            .unwrap()
            .registration("greeter")
            .address("127.0.0.1:80")
            .ttl(TTL)
            .register()
            .await
            .unwrap();
        let resolver = user_at(over(1), "reader").await.unwrap();
        let resolver = resolver.resolver("greeter").start();
        knows(&resolver, &["127.0.0.1:80"]).await;
        Self {
            etcd,
            ways,
            registration,
            resolver,
            changes: 0,
        }
    }

    /// Returns a new client of the user `root`, which therefore has a new token.
    async fn root(&self) -> etcd_client::Client {
        root(self.etcd).await
    }

    /// Asserts that renewals, writes and events continue. `what` describes this expectation, and is printed if it is not met.
    async fn is_well(&mut self, what: &str) {
        let mut states = self.registration.watch_state();
        // The first `changed` returns at once, for the current state.
        for _ in 0..3 {
            tokio::time::timeout(TTL * 2, states.changed())
                .await
                .expect(what)
                .unwrap();
        }
        eventually(what, async || self.registration.state().is_registered()).await;
        self.changes += 1;
        let address = format!("127.0.0.1:{}", 1_000 + self.changes);
        let mut kv = self.root().await.kv_client();
        kv.put("/gRPC/greeter/change", address.as_str(), None)
            .await
            .unwrap();
        // A token with a TTL of one second may expire before the watch that uses it is created. If etcd rejects a watch twice, the next
        // attempt follows after 15 to 30 s.
        let bound = Duration::from_secs(45);
        within(bound, what, async || {
            addresses(&self.resolver).contains(&address)
        })
        .await;
        let weight = u32::from(self.changes) + 1;
        self.registration.set_weight(weight).await.expect(what);
        eventually(what, async || {
            let instances = self.resolver.instances();
            instances.iter().any(|instance| instance.weight() == weight)
        })
        .await;
    }
}

async fn heals(etcd: Etcd) {
    let mut pair = Pair::start(&etcd).await;
    let key = pair.registration.key().to_owned();
    let lease = list(&pair.root().await, &key).await[0].2;
    pair.is_well("renewals, writes and events continue while tokens expire")
        .await;
    // A call whose token is rejected renews the token. Watches are tested separately, because etcd may reject a new watch with a message on
    // the stream, and not with the status of the call.
    let watches = pair.resolver.status().watches;
    for way in &pair.ways {
        way.reset();
    }
    pair.is_well("watches are opened with the current token")
        .await;
    assert!(pair.resolver.status().watches > watches);

    for round in 0..3 {
        let name = format!("somebody{round}");
        pair.root()
            .await
            .user_add(&name, "secret", None)
            .await
            .unwrap();
        pair.root().await.user_delete(&name).await.unwrap();
    }
    pair.is_well("clients continue after the list of users has changed")
        .await;

    pair.root().await.auth_disable().await.unwrap();
    pair.is_well("clients continue without authentication")
        .await;
    pair.root().await.auth_enable().await.unwrap();
    pair.is_well("clients continue with authentication again")
        .await;
    assert_eq!(
        list(&pair.root().await, &key).await[0].2,
        lease,
        "the lease must not change"
    );

    // The password is changed. The test changes it back only after the state of the registration has reported the rejection.
    pair.root()
        .await
        .user_change_password("writer", "another")
        .await
        .unwrap();
    for way in &pair.ways {
        way.reset();
    }
    eventually("the state reports the rejection", async || {
        // If a member does not check the token of a renewal, the lease stays alive and the state stays `Registered`.
        let (RegistrationState::Registering {
            last_error: Some(error),
            ..
        }
        | RegistrationState::Registered {
            last_error: Some(error),
            ..
        }) = pair.registration.state()
        else {
            return false;
        };
        error.kind() == EtcdErrorKind::BadCredentials
    })
    .await;
    pair.root()
        .await
        .user_change_password("writer", "writer-password")
        .await
        .unwrap();
    eventually("the server is registered again", async || {
        pair.registration.state().is_registered()
    })
    .await;
    pair.is_well("clients continue with the old password").await;
    pair.registration.deregister().await.unwrap();
}

#[tokio::test]
async fn rejected_simple_tokens_are_renewed() {
    let etcd = Etcd::builder().arg("--auth-token-ttl=1").start();
    Box::pin(heals(etcd.await.unwrap())).await;
}

#[tokio::test]
async fn rejected_signed_tokens_are_renewed() {
    let keys = Authority::new();
    keys.token_keys();
    let token = format!(
        "--auth-token=jwt,pub-key={},priv-key={},sign-method=RS256,ttl=2s",
        keys.path("token.pub").display(),
        keys.path("token.key").display()
    );
    let etcd = Etcd::builder().arg(token).start().await.unwrap();
    Box::pin(heals(etcd)).await;
}

/// One member issues a token, and the other members know the token only a moment later. Requests to these members must not fail in the
/// meantime.
#[tokio::test]
async fn requests_with_a_new_token_succeed_at_every_member() {
    // The long timeouts prevent an election during the test. During an election, the writes of `protect` would fail.
    let etcd = Etcd::builder().members(3).arg("--heartbeat-interval=500");
    let etcd = etcd.arg("--election-timeout=5000");
    let etcd = etcd.start().await.unwrap();
    protect(&etcd).await;
    for _ in 0..20 {
        let reader = user(&etcd, "reader").await.expect("the reader connects");
        let resolver = reader.resolver("greeter").start();
        resolver.ready().await;
        assert!(resolver.status().last_error.is_none());
    }
}

#[tokio::test]
async fn a_missing_read_permission_is_reported() {
    let etcd = etcd().await;
    protect(&etcd).await;
    let resolver = user(&etcd, "nobody")
        .await
        .unwrap()
        .resolver("greeter")
        .start();
    let refused = async || {
        let error = resolver.status().last_error;
        error.is_some_and(|error| error.kind() == EtcdErrorKind::PermissionDenied)
    };
    eventually("the status reports the error", refused).await;
    assert_eq!(resolver.status().state, ResolverState::Unknown);
}
