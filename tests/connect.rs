//! `Registry::connect`: its errors, for example when etcd is unreachable or when another kind of server answers, and the configurations
//! with which it must succeed.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod support;

use std::time::Duration;

use etcd_client::{Client, ConnectOptions};
use support::proxy::Proxy;
use support::roles::{protect, user};
use support::{etcd, greeter, keeps_a_registration, knows, registry};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::timeout;
use tonic_etcd::testing::Etcd;
use tonic_etcd::{
    Registry,
    error::{RegisterError, RegistryError},
};

/// Connects to endpoints for which `connect` must fail, and returns the error. The error must occur within 30 s.
async fn refused(endpoints: &[&str]) -> RegistryError {
    let connecting = Registry::connect(endpoints.iter().copied());
    timeout(Duration::from_secs(30), connecting)
        .await
        .expect("an answer in time")
        .expect_err("`connect` must fail")
}

/// Returns the error for an endpoint that responds. `connect` gives the endpoint one second to respond. On a busy machine, this may be too
/// short, so `Unreachable` is retried.
async fn connect_error(endpoint: &str) -> RegistryError {
    for _ in 0..3 {
        let error = refused(&[endpoint]).await;
        if !matches!(error, RegistryError::Unreachable { .. }) {
            return error;
        }
    }
    refused(&[endpoint]).await
}

/// Starts a server that answers the first bytes of each connection with `bytes`, and then closes its side of the connection. Returns the
/// address of the server.
async fn answers(bytes: &'static [u8]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let _ = socket.read(&mut [0; 64]).await;
            let _ = socket.write_all(bytes).await;
            // Only the write half is closed, and the rest of the request is read. If a socket is closed while it has unread bytes, it sends
            // a reset, and the client may then lose the answer.
            let _ = socket.shutdown().await;
            tokio::spawn(async move { while let Ok(1..) = socket.read(&mut [0; 64]).await {} });
        }
    });
    address.to_string()
}

#[tokio::test]
async fn a_refused_connection_lists_the_endpoints_tried() {
    let error = refused(&["127.0.0.1:1", "http://127.0.0.1:2"]).await;
    assert!(
        matches!(error, RegistryError::Unreachable { .. }),
        "{error:?}"
    );
    let text = error.to_string();
    assert!(
        text.contains("127.0.0.1:1, 127.0.0.1:2") && text.contains("check that etcd runs"),
        "{text}"
    );
}

#[tokio::test]
async fn a_server_that_accepts_but_never_responds_is_unreachable() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let error = refused(&[&address]).await;
    assert!(
        matches!(error, RegistryError::Unreachable { .. }),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_web_server_is_reported_as_not_etcd() {
    let address = answers(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n").await;
    let error = connect_error(&address).await;
    assert!(matches!(error, RegistryError::NotEtcd { .. }), "{error:?}");
    assert!(
        error.to_string().contains("HTTP/1") && error.to_string().contains(&address),
        "{error}"
    );
}

#[tokio::test]
async fn another_protocol_is_reported_as_not_etcd() {
    let address = answers(b"SSH-2.0-OpenSSH_9.2\r\n").await;
    let error = connect_error(&address).await;
    assert!(matches!(error, RegistryError::NotEtcd { .. }), "{error:?}");
}

#[tokio::test]
async fn another_grpc_server_is_reported_as_not_etcd() {
    let (address, _server) = greeter("alpha").await;
    let error = connect_error(&address.to_string()).await;
    assert!(matches!(error, RegistryError::NotEtcd { .. }), "{error:?}");
    assert!(
        error.to_string().contains("the services of etcd"),
        "{error}"
    );
}

#[tokio::test]
async fn plaintext_to_a_tls_server_is_a_tls_error() {
    // A TLS server answers an HTTP/2 preface with the alert `unexpected_message`.
    let address = answers(&[0x15, 0x03, 0x03, 0x00, 0x02, 0x02, 0x0a]).await;
    let error = connect_error(&address).await;
    assert!(matches!(error, RegistryError::Tls { .. }), "{error:?}");
    assert!(error.to_string().contains("https://"), "{error}");
}

#[cfg(feature = "tls")]
#[tokio::test]
async fn tls_to_a_plaintext_etcd_is_a_tls_error() {
    let etcd = etcd().await;
    let endpoint = format!("https://{}", etcd.endpoint(0).unwrap());
    let error = connect_error(&endpoint).await;
    assert!(matches!(error, RegistryError::Tls { .. }), "{error:?}");
    assert!(error.to_string().contains("http://"), "{error}");
}

#[tokio::test]
async fn the_error_for_a_malformed_endpoint_quotes_it() {
    for endpoint in [
        "127.0.0.1",
        "ftp://127.0.0.1:2379",
        "127.0.0.1:2379/path",
        "",
    ] {
        let error = refused(&[endpoint]).await;
        assert!(
            matches!(error, RegistryError::InvalidEndpoint { .. }),
            "{error:?}"
        );
        assert!(
            error.to_string().contains(&format!("{endpoint:?}")),
            "{error}"
        );
    }
    let error = Registry::connect(Vec::<String>::new())
        .await
        .expect_err("an empty list must be rejected");
    assert!(matches!(error, RegistryError::NoEndpoints));
}

#[tokio::test]
async fn connect_succeeds_although_two_of_three_endpoints_are_dead() {
    let etcd = etcd().await;
    for _ in 0..10 {
        let endpoints = [
            "127.0.0.1:1".to_owned(),
            etcd.endpoint(0).unwrap(),
            "127.0.0.1:2".to_owned(),
        ];
        Registry::connect(endpoints)
            .await
            .expect("one endpoint responds");
    }
}

#[tokio::test]
async fn endpoints_with_a_scheme_and_ipv6_endpoints_are_accepted() {
    let etcd = etcd().await;
    Registry::connect([format!("http://{}", etcd.endpoint(0).unwrap())])
        .await
        .unwrap();
    let v6 = Proxy::start("[::1]:0", etcd.endpoint(0).unwrap()).await;
    let registry = Registry::connect([v6.address.to_string()]).await.unwrap();
    let registration = registry
        .registration("greeter")
        .address("[::1]:50051")
        .register()
        .await
        .unwrap();
    let resolver = registry.resolver("greeter").start();
    knows(&resolver, &["[::1]:50051"]).await;
    registration.deregister().await.unwrap();
    knows(&resolver, &[]).await;
}

#[tokio::test]
async fn a_client_provided_by_the_user_works() {
    let etcd = etcd().await;
    let options = ConnectOptions::new().with_require_leader(true);
    let client = Client::connect(etcd.endpoints(), Some(options))
        .await
        .unwrap();
    let registry = Registry::from_client(client);
    keeps_a_registration(&registry).await;
}

#[tokio::test]
async fn authentication_works_from_connect_to_registration() {
    // Tokens expire within the test.
    let etcd = Etcd::builder()
        .arg("--auth-token-ttl=1")
        .start()
        .await
        .unwrap();
    // Credentials are not an error if etcd has no authentication.
    let early = user(&etcd, "writer")
        .await
        .expect("the client connects without a token");
    protect(&etcd).await;

    let wrong = Registry::builder(etcd.endpoints())
        .user("writer", "a-guess")
        .connect()
        .await
        .expect_err("a wrong password must be rejected");
    assert!(
        matches!(wrong, RegistryError::Credentials { .. }),
        "{wrong:?}"
    );
    assert!(
        wrong.to_string().contains("\"writer\"") && !wrong.to_string().contains("a-guess"),
        "{wrong}"
    );
    let missing = refused(&[&etcd.endpoint(0).unwrap()]).await;
    assert!(
        matches!(missing, RegistryError::Credentials { .. }),
        "{missing:?}"
    );
    user(&etcd, "nobody")
        .await
        .expect("a user without permissions can connect");

    // A server needs read and write access to its own prefix, and a client needs read access. The server and the client run for longer than
    // their tokens are valid.
    let writer = user(&etcd, "writer").await.unwrap();
    let reader = user(&etcd, "reader").await.unwrap();
    let resolver = reader.resolver("greeter").start();
    let registration = writer
        .registration("greeter")
        .address("127.0.0.1:80")
        .ttl(Duration::from_secs(5))
        .register()
        .await
        .unwrap();
    knows(&resolver, &["127.0.0.1:80"]).await;
    let mut states = registration.watch_state();
    // The first `changed` returns at once, for the current state. The other three are renewals, about 1.7 s apart (a third of
    // the TTL), while a token is valid for 1 s.
    for _ in 0..4 {
        states.changed().await.unwrap();
        assert!(
            states.borrow_and_update().is_registered(),
            "{:?}",
            registration.state()
        );
    }
    // Authentication was enabled after this client had connected.
    let second = early
        .registration("greeter")
        .address("127.0.0.1:81")
        .register()
        .await
        .unwrap();
    knows(&resolver, &["127.0.0.1:80", "127.0.0.1:81"]).await;
    second.deregister().await.unwrap();
    registration.deregister().await.unwrap();
    knows(&resolver, &[]).await;

    // Without write permission, `register` fails at once, with the reason that etcd gives.
    let denied = reader
        .registration("greeter")
        .address("127.0.0.1:80")
        .register();
    // If `register` retried after the rejection, it would wait for at least 7.5 s, so the timeout would elapse.
    let denied = timeout(Duration::from_secs(5), denied)
        .await
        .expect("`register` fails without a delay")
        .expect_err("a reader must not register");
    assert!(
        matches!(denied, RegisterError::Refused { .. }),
        "{denied:?}"
    );
    assert!(
        denied.to_string().contains("permission denied"),
        "{denied:?}"
    );
}

#[tokio::test]
async fn the_prefix_is_configurable() {
    let etcd = etcd().await;
    let registry = Registry::builder(etcd.endpoints())
        .prefix("/production")
        .connect()
        .await
        .unwrap();
    assert_eq!(registry.prefix(), "/production/");
    let registration = registry
        .registration("greeter")
        .address("127.0.0.1:80")
        .register()
        .await
        .unwrap();
    assert_eq!(registration.key(), "/production/greeter/127.0.0.1:80");
    let other = support::registry(&etcd).await.resolver("greeter").start();
    other.ready().await;
    assert!(other.instances().is_empty());
}

#[tokio::test]
async fn a_registry_works_after_a_restart_of_etcd() {
    let mut etcd = etcd().await;
    let registry = registry(&etcd).await;
    etcd.kill(0).await.unwrap();
    etcd.restart(0).await.unwrap();
    let registration = registry
        .registration("greeter")
        .address("127.0.0.1:80")
        .register()
        .await
        .unwrap();
    registration.deregister().await.unwrap();
}
