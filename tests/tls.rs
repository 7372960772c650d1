//! TLS and mutual TLS to etcd, and certificates that are renewed.
#![cfg(feature = "tls")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod support;

use std::time::Duration;

use etcd_client::Permission;
use support::authority::Authority;
use support::{client, eventually, keeps_a_registration, knows, list};
use tonic_etcd::testing::Etcd;
use tonic_etcd::{Registry, TlsConfig, error::RegistryError, registry::RegistryBuilder};

/// Starts an etcd that requires client certificates.
async fn mutual(authority: &Authority) -> Etcd {
    authority.sign("server", "etcd");
    authority.sign("client", "greeter");
    let trusted = authority.path("ca.pem");
    Etcd::builder()
        .tls(authority.path("server.pem"), authority.path("server.key"))
        .arg("--client-cert-auth=true")
        .arg(format!("--trusted-ca-file={}", trusted.display()))
        .start()
        .await
        .unwrap()
}

async fn works(builder: RegistryBuilder) {
    keeps_a_registration(&builder.connect().await.unwrap()).await;
}

#[tokio::test]
async fn etcd_is_connected_over_tls_and_mutual_tls() {
    let authority = Authority::new();
    let etcd = mutual(&authority).await;
    // The certificate of each member is verified against its own host, which is an IP address here.
    let trusting = TlsConfig::verify_dialled_host().ca_certificate(authority.read("ca.pem"));
    let (chain, key) = (authority.read("client.pem"), authority.read("client.key"));
    let shown = trusting.clone().identity(chain, key);
    works(Registry::builder(etcd.tls_endpoints()).tls_config(shown)).await;

    let files = TlsConfig::new("etcd").ca_certificate_file(authority.path("ca.pem"));
    let shown = files
        .clone()
        .identity_files(authority.path("client.pem"), authority.path("client.key"));
    works(Registry::builder(etcd.tls_endpoints()).tls_config(shown)).await;

    // A client without a certificate is rejected, and the error reports the reason.
    for builder in [
        Registry::builder(etcd.tls_endpoints()).tls_config(trusting),
        Registry::builder(etcd.tls_endpoints()).tls_config(files),
    ] {
        let refused = builder.connect().await.expect_err("must be rejected");
        assert!(matches!(refused, RegistryError::Tls { .. }), "{refused:?}");
    }
    // The client rejects a server whose certificate does not contain the host name.
    let named = etcd.tls_endpoints().into_iter();
    let named: Vec<_> = named
        .map(|endpoint| endpoint.replace("127.0.0.1", "localhost"))
        .collect();
    let (chain, key) = (authority.read("client.pem"), authority.read("client.key"));
    let shown = TlsConfig::verify_dialled_host().ca_certificate(authority.read("ca.pem"));
    let refused = Registry::builder(named).tls_config(shown.identity(chain, key));
    let refused = refused.connect().await.expect_err("must be rejected");
    assert!(matches!(refused, RegistryError::Tls { .. }), "{refused:?}");
    // A configuration that can never work is rejected before anything is sent.
    let unnameable = TlsConfig::new("not a name");
    let refused = Registry::builder(["https://127.0.0.1:1"]).tls_config(unnameable);
    let refused = refused.connect().await.expect_err("must be rejected");
    assert!(
        matches!(refused, RegistryError::InvalidTls { .. }),
        "{refused:?}"
    );
    // The client rejects a server whose certificate was signed by another authority.
    let stranger = Authority::new();
    let files = TlsConfig::new("etcd")
        .ca_certificate_file(stranger.path("ca.pem"))
        .identity_files(authority.path("client.pem"), authority.path("client.key"));
    let refused = Registry::builder(etcd.tls_endpoints()).tls_config(files);
    let refused = refused.connect().await.expect_err("must be rejected");
    assert!(matches!(refused, RegistryError::Tls { .. }), "{refused:?}");
}

#[tokio::test]
async fn renewed_certificates_need_no_restart() {
    let authority = Authority::new();
    let mut etcd = mutual(&authority).await;
    let tls = TlsConfig::new("etcd")
        .ca_certificate_file(authority.path("ca.pem"))
        .identity_files(authority.path("client.pem"), authority.path("client.key"));
    let registry = Registry::builder(etcd.tls_endpoints()).tls_config(tls);
    let registry = registry.connect().await.unwrap();
    let registration = registry
        .registration("greeter")
        .address("127.0.0.1:80")
        .ttl(Duration::from_secs(5))
        .register()
        .await
        .unwrap();
    let resolver = registry.resolver("greeter").start();
    knows(&resolver, &["127.0.0.1:80"]).await;

    // A new authority signs all certificates again. A client that trusts only the old authority cannot connect.
    let next = Authority::new();
    next.sign("server", "etcd");
    next.sign("client", "greeter");
    for file in [
        "ca.pem",
        "server.pem",
        "server.key",
        "client.pem",
        "client.key",
    ] {
        std::fs::write(authority.path(file), next.read(file)).unwrap();
    }
    etcd.kill(0).await.unwrap();
    etcd.restart(0).await.unwrap();
    let by_hand = client(&etcd).await;
    let mut kv = by_hand.kv_client();
    let put = kv.put("/gRPC/greeter/1", "127.0.0.1:1", None);
    put.await.unwrap();
    knows(&resolver, &["127.0.0.1:1", "127.0.0.1:80"]).await;
    let mut states = registration.watch_state();
    for _ in 0..3 {
        states.changed().await.unwrap();
    }
    eventually("the lease is renewed", async || {
        registration.state().is_registered() && list(&by_hand, registration.key()).await.len() == 1
    })
    .await;
    registration.deregister().await.unwrap();
}

/// If authentication is enabled, etcd takes the user from the common name of the client's certificate. There is no password and no token.
/// So after a restart of etcd, no token is invalid, and etcd computes no password hashes.
#[tokio::test]
async fn a_client_certificate_replaces_the_password() {
    let authority = Authority::new();
    let mut etcd = mutual(&authority).await;
    authority.sign("stranger", "stranger");
    let mut auth = client(&etcd).await.auth_client();
    auth.role_add("greeter").await.unwrap();
    let permission = Permission::read_write("/gRPC/").with_prefix();
    auth.role_grant_permission("greeter", permission)
        .await
        .unwrap();
    auth.role_add("root").await.unwrap();
    // etcd never compares these passwords, because no client of this test sends one.
    for (user, role) in [("greeter", "greeter"), ("root", "root")] {
        auth.user_add(user, "unused", None).await.unwrap();
        auth.user_grant_role(user, role).await.unwrap();
    }
    auth.user_add("stranger", "unused", None).await.unwrap();
    auth.auth_enable().await.unwrap();

    let tls = |name: &str| {
        let (chain, key) = (format!("{name}.pem"), format!("{name}.key"));
        TlsConfig::new("etcd")
            .ca_certificate_file(authority.path("ca.pem"))
            .identity_files(authority.path(&chain), authority.path(&key))
    };
    let registry = Registry::builder(etcd.tls_endpoints()).tls_config(tls("client"));
    let registry = registry.connect().await.unwrap();
    keeps_a_registration(&registry).await;
    let registration = registry.registration("kept").address("127.0.0.1:80");
    let registration = registration.register().await.unwrap();
    let resolver = registry.resolver("kept").start();
    knows(&resolver, &["127.0.0.1:80"]).await;
    etcd.restart(0).await.unwrap();
    let second = registry.registration("kept").address("127.0.0.1:81");
    let second = second.register().await.unwrap();
    knows(&resolver, &["127.0.0.1:80", "127.0.0.1:81"]).await;
    assert!(registration.state().is_registered());
    registration.deregister().await.unwrap();
    second.deregister().await.unwrap();

    // The user of this certificate has no role.
    let stranger = Registry::builder(etcd.tls_endpoints()).tls_config(tls("stranger"));
    let stranger = stranger.connect().await.unwrap();
    let refused = stranger.registration("greeter").address("127.0.0.1:80");
    let refused = refused.register().await.expect_err("must be rejected");
    assert!(
        refused.to_string().contains("permission denied"),
        "{refused}"
    );
}
