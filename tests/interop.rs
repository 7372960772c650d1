//! Interoperation with grpc-go and etcd's own naming package: a Go client calls our servers, and our channel calls a Go server.
//!
//! The Go program is in `tests/interop`. If Go is missing or too old for it, these tests print the reason and are skipped.
#![allow(
    unreachable_pub,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test, and only this file uses the modules"
)]

mod support;

#[path = "interop/greeter.rs"]
mod interop_greeter;
#[cfg(feature = "orca")]
#[path = "interop/load_reports.rs"]
mod load_reports;
#[path = "interop/overload.rs"]
mod overload;
#[path = "interop/peer.rs"]
mod peer;
#[path = "interop/pushback.rs"]
mod pushback;
#[path = "interop/service_config.rs"]
mod service_config;
#[path = "limit/workers.rs"]
mod workers;

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use interop_greeter::{BINARY, BadRequest, InteropGreeter, RpcStatus, TEXT};
use nix::sys::signal::Signal;
use peer::{Load, example, go};
use prost::Message;
use support::greeter::HelloRequest;
use support::greeter::greeter_client::GreeterClient;
use support::greeter::greeter_server::GreeterServer;
use support::{SOON, client, etcd, eventually, list, within};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_stream::StreamExt;
use tonic::metadata::MetadataValue;
use tonic::transport::Server;
use tonic::transport::server::Router;
use tonic::{Code, Request};
use tonic_etcd::testing::Etcd;
use tonic_etcd::{BalancedChannel, Registry, ServeRegistered, error::ServeError};

const SERVICE: &str = "helloworld.Greeter";
/// The target for etcd's Go resolver if the keys begin with the service name.
const TARGET: &str = "etcd:///helloworld.Greeter";
/// The arguments for a Go client if the keys have our default prefix: the target for etcd's Go resolver, and the authority of the calls.
/// The resolver removes the first slash of the path. If no authority is set, grpc-go escapes the rest of the path and sends it as the
/// authority. HTTP/2 servers in Rust reject `%` in an authority.
const PREFIXED: [&str; 4] = [
    "-target",
    "etcd:////gRPC/helloworld.Greeter",
    "-authority",
    SERVICE,
];

fn hello(name: &str) -> Request<HelloRequest> {
    let mut request = Request::new(HelloRequest {
        name: name.to_owned(),
        replies: 1_000,
    });
    request.set_timeout(Duration::from_secs(10));
    request
}

/// grpc-go's client of the service channelz reads the state of our channel.
#[tokio::test]
async fn a_go_client_reads_the_channelz_of_a_channel() {
    let Some(go) = go().await else { return };
    let (address, _server) = support::greeter("alpha").await;
    // Port 1 is in the range that only privileged services use, and refuses connections.
    let unreachable = "127.0.0.1:1".to_owned();
    let servers = [address.to_string(), unreachable.clone()];
    let channel = BalancedChannel::builder().addresses(servers).connect_lazy();
    for _ in 0..3 {
        let mut client = GreeterClient::new(channel.clone());
        client.say_hello(hello("anyone")).await.unwrap();
    }
    eventually("the other endpoint has failed", async || {
        let endpoints = channel.endpoints();
        let failed = endpoints
            .iter()
            .find(|endpoint| endpoint.address.as_str() == unreachable);
        failed.is_some_and(|endpoint| endpoint.last_error.is_some())
    })
    .await;
    let channelz = tonic_balance_channelz::Channelz::new();
    let id = channelz.add("etcd:///greeter", channel);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let debug = listener.local_addr().unwrap().to_string();
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    let service = Server::builder().add_service(channelz.service());
    let serving = tokio::spawn(service.serve_with_incoming(incoming));
    let printed = go.run(&["channelz", "-address", &debug]).await;
    let lines: Vec<_> = printed.lines().collect();
    assert_eq!(lines[0], "channel etcd:///greeter READY 3 3 0", "{printed}");
    let ready = format!("subchannel {address} READY 3 3 0");
    let at = lines
        .iter()
        .position(|line| *line == ready)
        .expect(&printed);
    assert_eq!(lines[at + 1], format!("socket {address}"), "{printed}");
    let failed = format!("subchannel {unreachable} ");
    let at = lines
        .iter()
        .position(|line| line.starts_with(&failed))
        .expect(&printed);
    assert!(lines[at + 1].starts_with("event CT_WARNING "), "{printed}");
    assert_eq!(lines.last(), Some(&"end true"), "{printed}");
    assert!(channelz.remove(id));
    assert_eq!(
        go.run(&["channelz", "-address", &debug]).await,
        "end true\n"
    );
    serving.abort();
}

/// Returns a channel to servers that a Go program has registered. The channel has the same target as a Go client.
async fn channel_to_go(etcd: &Etcd) -> BalancedChannel {
    let registry = Registry::connect(etcd.endpoints()).await.unwrap();
    let channel = registry.channel_to(TARGET).unwrap();
    channel.connect().await.unwrap()
}

#[tokio::test]
async fn go_clients_follow_our_servers_through_joins_restarts_and_kills() {
    let Some(go) = go().await else { return };
    let etcd = etcd().await;
    let mut servers = vec![
        example("greeter_server", &etcd),
        example("greeter_server", &etcd),
    ];
    let mut load = Load::start(&go, &etcd, &PREFIXED).await;
    load.until("both servers receive calls", |tally| {
        tally.servers.len() == 2
    })
    .await;

    servers.push(example("greeter_server", &etcd));
    let joined = load
        .until("the third server receives calls", |tally| {
            tally.servers.len() == 3
        })
        .await;
    assert_eq!(joined.failed, 0, "{joined:?}");

    for server in &mut servers[..2] {
        server.signal(Signal::SIGTERM);
        server.ended().await;
        *server = example("greeter_server", &etcd);
        let name = server.name();
        let restarted = load.until("the new server receives calls", |tally| {
            tally.servers.contains_key(&name)
        });
        let restarted = restarted.await;
        assert_eq!(
            restarted.failed, 0,
            "calls failed during a graceful restart: {restarted:?}"
        );
    }

    let killed = servers.remove(2);
    let name = killed.name();
    killed.signal(Signal::SIGKILL);
    let after = load
        .until("the killed server receives no calls", |tally| {
            !tally.servers.contains_key(&name)
        })
        .await;
    // Each of the eight callers loses at most one call.
    assert!(after.failed <= 8, "{after:?}");
    let later = load.report().await;
    assert_eq!(later.failed, 0, "{later:?}");
}

#[tokio::test]
async fn go_clients_call_our_servers_with_every_kind_of_call() {
    let Some(go) = go().await else { return };
    let etcd = etcd().await;
    let ours = Ours::start(Server::builder(), &etcd).await;
    let checked = go
        .run(&[
            "check",
            "-etcd",
            &etcd.endpoints().join(","),
            "-target",
            TARGET,
        ])
        .await;
    assert_eq!(checked.lines().count(), 7, "{checked}");
    ours.stopped().await;
}

/// The documentation states that a target with a slash needs an authority.
#[tokio::test]
async fn go_clients_need_an_authority_for_a_target_with_a_slash() {
    let Some(go) = go().await else { return };
    let etcd = etcd().await;
    let registry = Registry::builder(etcd.endpoints()).prefix("team/blue");
    let ours = Ours::register(Server::builder(), registry.connect().await.unwrap()).await;
    let endpoints = etcd.endpoints().join(",");
    let target = "etcd:///team/blue/helloworld.Greeter";
    let bare = ["check", "-etcd", &endpoints, "-target", target];
    let refused = go.fails(&bare).await;
    assert!(refused.contains("PROTOCOL_ERROR"), "{refused}");
    go.run(&[&bare[..], &["-authority", SERVICE]].concat())
        .await;
    ours.stopped().await;
}

#[cfg(feature = "tls")]
#[tokio::test]
async fn go_clients_call_our_servers_over_tls() {
    use tonic::transport::{Identity, ServerTlsConfig};

    let Some(go) = go().await else { return };
    let etcd = etcd().await;
    let certificates = go.certificates().await;
    let read = |name: &str| fs::read(certificates.path().join(name)).unwrap();
    let identity = Identity::from_pem(read("server.pem"), read("server.key"));
    let tls = ServerTlsConfig::new().identity(identity);
    let server = Server::builder().tls_config(tls).unwrap();
    let ours = Ours::start(server, &etcd).await;
    let ca = certificates.path().join("ca.pem");
    let endpoints = etcd.endpoints().join(",");
    let arguments = [
        "check",
        "-etcd",
        &endpoints,
        "-target",
        TARGET,
        "-ca",
        ca.to_str().unwrap(),
    ];
    let checked = go.run(&arguments).await;
    assert_eq!(checked.lines().count(), 7, "{checked}");
    ours.stopped().await;
}

/// A registered server in this process.
struct Ours {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), ServeError>>,
}

impl Ours {
    async fn start(server: Server, etcd: &Etcd) -> Self {
        let registry = Registry::builder(etcd.endpoints()).prefix("");
        Self::register(server, registry.connect().await.unwrap()).await
    }

    async fn register(mut server: Server, registry: Registry) -> Self {
        let router: Router = server.add_service(GreeterServer::new(InteropGreeter));
        let registration = registry.registration(SERVICE);
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(async move {
            let address = "127.0.0.1:0".parse().unwrap();
            let serving = router.serve_registered_with_shutdown(address, registration, async {
                drop(stopped.await);
            });
            serving.await
        });
        let resolver = registry.resolver(SERVICE).start();
        eventually("the server is registered", async || {
            !resolver.instances().is_empty()
        })
        .await;
        Self { stop, task }
    }

    async fn stopped(self) {
        drop(self.stop);
        timeout(SOON, self.task).await.unwrap().unwrap().unwrap();
    }
}

/// Callers that call continuously and count the outcomes.
struct Callers {
    ok: Arc<AtomicU64>,
    failed: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Callers {
    fn start(channel: &BalancedChannel) -> Self {
        let this = Self {
            ok: Arc::default(),
            failed: Arc::default(),
            stop: Arc::default(),
            tasks: Vec::new(),
        };
        let tasks = (0..8).map(|_| {
            let mut client = GreeterClient::new(channel.clone());
            let (ok, failed, stop) = (this.ok.clone(), this.failed.clone(), this.stop.clone());
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    match client.say_hello(hello("load")).await {
                        Ok(_) => ok.fetch_add(1, Ordering::Relaxed),
                        Err(_) => failed.fetch_add(1, Ordering::Relaxed),
                    };
                    sleep(Duration::from_millis(2)).await;
                }
            })
        });
        Self {
            tasks: tasks.collect(),
            ..this
        }
    }

    fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    async fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.unwrap();
        }
        self.ok.load(Ordering::Relaxed)
    }
}

#[tokio::test]
async fn our_channel_follows_go_servers_through_joins_restarts_and_kills() {
    let Some(go) = go().await else { return };
    let etcd = etcd().await;
    let mut servers = vec![
        go.server(&etcd, SERVICE, "a", None).await,
        go.server(&etcd, SERVICE, "b", None).await,
    ];
    let channel = channel_to_go(&etcd).await;
    let callers = Callers::start(&channel);
    let is_called = async |address: &str| {
        eventually("the server receives calls", async || {
            let endpoints = channel.endpoints();
            endpoints
                .iter()
                .any(|endpoint| endpoint.address.as_str() == address && endpoint.calls > 0)
        })
        .await;
    };
    servers.push(go.server(&etcd, SERVICE, "c", None).await);
    for server in &servers {
        is_called(server.address()).await;
    }
    for server in &mut servers[..2] {
        server.signal(Signal::SIGTERM);
        server.ended().await;
        *server = go.server(&etcd, SERVICE, "again", None).await;
        is_called(server.address()).await;
    }
    assert_eq!(
        callers.failed(),
        0,
        "calls failed during joins and graceful restarts"
    );
    servers[2].signal(Signal::SIGKILL);
    servers[2].ended().await;
    let gone = within(
        Duration::from_secs(30),
        "the key expires with its lease",
        async || channel.endpoints().len() == 2,
    );
    gone.await;
    assert!(
        callers.failed() <= 8,
        "{} calls failed at a kill",
        callers.failed()
    );
    assert!(callers.end().await > 1_000);
}

#[tokio::test]
async fn our_channel_calls_go_servers_with_every_kind_of_call() {
    let Some(go) = go().await else { return };
    let etcd = etcd().await;
    let _server = go.server(&etcd, SERVICE, "go", None).await;
    every_way(channel_to_go(&etcd).await).await;
}

#[cfg(feature = "tls")]
#[tokio::test]
async fn our_channel_calls_go_servers_over_tls() {
    use tonic_etcd::TlsConfig;

    let Some(go) = go().await else { return };
    let etcd = etcd().await;
    let certificates = go.certificates().await;
    let server = certificates.path().join("server.pem");
    let _server = go.server(&etcd, SERVICE, "go", server.to_str()).await;
    let registry = Registry::builder(etcd.endpoints()).prefix("");
    let registry = registry.connect().await.unwrap();
    let tls =
        TlsConfig::new("greeter.test").ca_certificate_file(certificates.path().join("ca.pem"));
    let channel = registry
        .channel(SERVICE)
        .tls_config(tls)
        .connect()
        .await
        .unwrap();
    every_way(channel).await;
}

/// Sends the same calls as the mode `check` of the Go program, but from our channel to a Go server.
async fn every_way(channel: BalancedChannel) {
    let mut client = GreeterClient::new(channel);
    let reply = client.say_hello(hello("unary")).await.unwrap();
    assert_eq!(reply.into_inner().message, "Hello unary, this is go");

    let replies = client.say_hellos(hello("many")).await.unwrap().into_inner();
    let replies: Vec<_> = replies.collect().await;
    assert_eq!(
        (replies.len(), replies.iter().all(Result::is_ok)),
        (1_000, true)
    );

    let names = ["a", "b", "c"].map(|name| hello(name).into_inner());
    let all = client
        .greet_all(tokio_stream::iter(names.clone()))
        .await
        .unwrap();
    assert_eq!(all.into_inner().message, "Hello a, b, c, this is go");
    let chat = client
        .chat(tokio_stream::iter(names))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(chat.collect::<Vec<_>>().await.len(), 3);

    let mut request = hello("metadata");
    request
        .metadata_mut()
        .insert("x-text", TEXT.parse().unwrap());
    request
        .metadata_mut()
        .insert_bin("x-data-bin", MetadataValue::from_bytes(BINARY));
    let reply = client.say_hello(request).await.unwrap();
    assert_eq!(reply.metadata().get("x-text").unwrap(), TEXT);
    let binary = reply.metadata().get_bin("x-data-bin").unwrap();
    assert_eq!(&*binary.to_bytes().unwrap(), BINARY);
    assert_eq!(reply.metadata().get("x-trailer").unwrap(), TEXT);

    let status = client.say_hello(hello("details")).await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (Code::InvalidArgument, "no such name: \u{fc}%")
    );
    let details = RpcStatus::decode(status.details()).unwrap();
    let bad_request = BadRequest::decode(&*details.details[0].value).unwrap();
    assert_eq!(bad_request.field_violations[0].field, "name");

    let mut request = hello("deadline");
    request.set_timeout(Duration::from_millis(200));
    let status = client.say_hello(request).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
}

/// A Go server permits one PING every 5 minutes while calls are open, and one every 2 hours without calls. At the third PING that comes
/// sooner, the server closes the connection. With `INTEROP_SECONDS=330`, the test runs for longer than 5 minutes.
#[tokio::test]
async fn go_servers_accept_our_pings() {
    let Some(go) = go().await else { return };
    let seconds = std::env::var("INTEROP_SECONDS").map_or(8, |text| text.parse().unwrap());
    let etcd = etcd().await;
    let mut server = go.server(&etcd, SERVICE, "go", None).await;
    let channel = channel_to_go(&etcd).await;
    let mut client = GreeterClient::new(channel.clone());
    // Each round has a call, an open call without traffic, and a pause without any call.
    for _ in 0..seconds {
        client.say_hello(hello("unary")).await.unwrap();
        let mut waiting = hello("deadline");
        waiting.set_timeout(Duration::from_millis(500));
        client.say_hello(waiting).await.unwrap_err();
        sleep(Duration::from_millis(500)).await;
    }
    let endpoints = channel.endpoints();
    assert_eq!(endpoints.len(), 1);
    server.signal(Signal::SIGTERM);
    let printed = server.ended().await;
    assert!(
        printed.contains("accepted 1\n"),
        "all calls must use one connection: {printed}"
    );
}

#[tokio::test]
async fn the_golden_values_match_the_go_package_of_etcd() {
    let Some(go) = go().await else { return };
    let etcd = etcd().await;
    go.run(&["golden", &etcd.endpoints().join(",")]).await;
    let golden = include_str!("golden/etcd_naming.txt");
    let written = list(&client(&etcd).await, "helloworld/").await;
    assert_eq!(written.len(), 3);
    for (key, value, _) in written {
        assert!(
            golden.contains(&format!("key: {key}\nvalue: {value}\n")),
            "{key} {value}"
        );
    }
}

#[tokio::test]
async fn the_go_package_of_etcd_reads_our_values() {
    let Some(go) = go().await else { return };
    let etcd = etcd().await;
    let registry = Registry::connect(etcd.endpoints()).await.unwrap();
    let registration = registry
        .registration(SERVICE)
        .address("10.0.0.5:80")
        .instance_id("node1");
    let registration = registration
        .weight(3)
        .zone("eu-1a")
        .metadata("rack", "<r1>");
    let registration = registration.register().await.unwrap();
    let endpoints = etcd.endpoints().join(",");
    let read = go
        .run(&[
            "list",
            "-etcd",
            &endpoints,
            "-service",
            "/gRPC/helloworld.Greeter",
        ])
        .await;
    let read: BTreeMap<String, serde_json::Value> = serde_json::from_str(&read).unwrap();
    let expected = serde_json::json!({
        "/gRPC/helloworld.Greeter/node1": {
            "Addr": "10.0.0.5:80",
            "Metadata": { "weight": 3, "zone": "eu-1a", "rack": "<r1>" },
        }
    });
    assert_eq!(serde_json::to_value(read).unwrap(), expected);
    registration.deregister().await.unwrap();
}
