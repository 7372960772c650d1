//! `call`, with the health service as the called service.

use std::net::SocketAddr;

use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic_etcd::{Registration, Registry};

use super::authority::Authority;
use super::support::{etcd, grpc_server, run};
use tonic_etcd::testing::Etcd;

const HEALTH: &str = "grpc.health.v1.Health";

async fn reflecting_server() -> SocketAddr {
    serve_reflection(Server::builder()).await
}

/// Starts a server with the health service and the reflection service.
async fn serve_reflection(mut server: Server) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (_, health) = tonic_health::server::health_reporter();
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .unwrap();
    let router = server.add_service(health).add_service(reflection);
    tokio::spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));
    address
}

async fn register(etcd: &Etcd, address: SocketAddr) -> Registration {
    let registry = Registry::connect(etcd.endpoints()).await.unwrap();
    let registration = registry.registration(HEALTH).address(address.to_string());
    registration.register().await.unwrap()
}

#[tokio::test]
async fn a_unary_call_prints_the_response_and_the_server() {
    let etcd = etcd().await;
    let address = reflecting_server().await;
    let _registration = register(&etcd, address).await;
    let called = run(&etcd, &["call", HEALTH, "Check", r#"{"service":""}"#]).await;
    assert_eq!(called.code, Some(0), "{called:?}");
    assert!(
        called.stdout.starts_with(&address.to_string()),
        "{called:?}"
    );
    assert!(called.stdout.contains("SERVING"), "{called:?}");

    let loaded = [
        "--json",
        "call",
        HEALTH,
        "Check",
        "--load",
        "20",
        "--concurrency",
        "4",
    ];
    let loaded = run(&etcd, &[&loaded[..], &["--rate", "1000"]].concat()).await;
    assert_eq!(loaded.code, Some(0), "{loaded:?}");
    let summary = &loaded.json()[0];
    assert_eq!(summary["calls"], 20);
    assert_eq!(summary["servers"][address.to_string()], 20);

    for (arguments, code) in [
        (&["Check", r#"{"service":"unknown"}"#][..], 4),
        (&["Check", r#"{"nonsense":1}"#], 2),
        (&["Check", "not JSON"], 2),
        (&["Watch"], 2),
        (&["Nonsense"], 1),
        (&["other.Service/Check"], 1),
    ] {
        let failed = run(&etcd, &[&["call", HEALTH], arguments].concat()).await;
        assert_eq!(failed.code, Some(code), "{arguments:?}: {failed:?}");
    }
}

#[tokio::test]
async fn a_server_without_reflection_is_reported() {
    let etcd = etcd().await;
    let _registration = register(&etcd, grpc_server().await).await;
    let failed = run(&etcd, &["call", HEALTH, "Check"]).await;
    assert_eq!(failed.code, Some(1), "{failed:?}");
    assert!(failed.stderr.contains("reflection"), "{failed:?}");
}

/// The addresses come from etcd, so a certificate for the host of an address proves nothing.
#[tokio::test]
async fn a_call_with_tls_needs_the_name_of_the_servers() {
    let etcd = etcd().await;
    let missing = run(&etcd, &["call", HEALTH, "Check", "--server-tls"]).await;
    assert_eq!(missing.code, Some(2), "{missing:?}");
    assert!(missing.stderr.contains("--server-name"), "{missing:?}");
}

#[tokio::test]
async fn a_call_over_tls_verifies_the_server_by_its_name() {
    let authority = Authority::new();
    authority.sign("server", "greeter.internal");
    let identity = Identity::from_pem(authority.read("server.pem"), authority.read("server.key"));
    let tls = ServerTlsConfig::new().identity(identity);
    let address = serve_reflection(Server::builder().tls_config(tls).unwrap()).await;
    let etcd = etcd().await;
    let _registration = register(&etcd, address).await;
    let ca = authority.path("ca.pem");
    let call = |name| {
        let tls = [
            "--server-cacert",
            ca.to_str().unwrap(),
            "--server-name",
            name,
        ];
        [&["--timeout", "3s", "call", HEALTH, "Check"][..], &tls].concat()
    };
    let called = run(&etcd, &call("greeter.internal")).await;
    assert_eq!(called.code, Some(0), "{called:?}");
    assert!(
        called.stdout.starts_with(&address.to_string()),
        "{called:?}"
    );
    assert!(called.stdout.contains("SERVING"), "{called:?}");

    // The certificate is not for this name.
    let refused = run(&etcd, &call("other.internal")).await;
    assert_eq!(refused.code, Some(4), "{refused:?}");
    assert!(refused.stderr.contains("certificate"), "{refused:?}");
    // Without the authority, the certificate is unknown.
    let arguments = ["call", HEALTH, "Check", "--server-tls", "--server-name"];
    let arguments = [&["--timeout", "3s"][..], &arguments, &["greeter.internal"]].concat();
    let refused = run(&etcd, &arguments).await;
    assert_eq!(refused.code, Some(4), "{refused:?}");
    // A client without TLS does not reach the server.
    let refused = run(&etcd, &["--timeout", "3s", "call", HEALTH, "Check"]).await;
    assert_eq!(refused.code, Some(4), "{refused:?}");
}
