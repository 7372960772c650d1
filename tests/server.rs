//! A server's life from bind to the last call, against a real etcd.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod support;

use std::time::Duration;

use support::greeter::greeter_client::GreeterClient;
use support::greeter::{HelloRequest, NamedGreeter};
use support::{Registered, SOON, addresses, client, etcd, eventually, knows, list, registry};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Server};
use tonic_etcd::testing::Etcd;
use tonic_etcd::{RegisterError, RegistrationState, Registry, ServeError, ServeRegistered};

fn hello() -> HelloRequest {
    HelloRequest {
        name: "test".to_owned(),
        replies: 1,
    }
}

async fn connect(address: &str) -> GreeterClient<Channel> {
    GreeterClient::connect(format!("http://{address}"))
        .await
        .unwrap()
}

#[tokio::test]
async fn what_was_bound_is_registered_and_served_and_gone_after_the_end() {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    let resolver = registry.resolver("greeter");
    let server = Registered::start("alpha", "127.0.0.1:0", registry.registration("greeter"));
    eventually("it is registered", async || resolver.instances().len() == 1).await;
    let address = addresses(&resolver).remove(0);
    assert!(
        address.starts_with("127.0.0.1:") && !address.ends_with(":0"),
        "{address}"
    );
    connect(&address).await.say_hello(hello()).await.unwrap();
    server.stopped().await.unwrap();
    let by_hand = client(&etcd).await;
    assert!(list(&by_hand, "/").await.is_empty());
    assert!(
        by_hand
            .lease_client()
            .leases()
            .await
            .unwrap()
            .leases()
            .is_empty()
    );
    assert!(
        TcpStream::connect(&address).await.is_err(),
        "nobody listens any more"
    );
}

#[tokio::test]
async fn an_unspecified_address_is_advertised_as_the_one_that_routes_to_etcd() {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    let resolver = registry.resolver("greeter");
    let servers = [
        Registered::start("alpha", "0.0.0.0:0", registry.registration("greeter")),
        Registered::start("beta", "[::]:0", registry.registration("greeter")),
    ];
    eventually("both are registered", async || {
        resolver.instances().len() == 2
    })
    .await;
    for address in addresses(&resolver) {
        assert!(address.starts_with("127.0.0.1:"), "{address}");
        connect(&address).await.say_hello(hello()).await.unwrap();
    }
    let named = Registered::start(
        "gamma",
        "0.0.0.0:0",
        registry.registration("named").host("localhost"),
    );
    let named_resolver = registry.resolver("named");
    eventually("it is registered", async || {
        named_resolver.instances().len() == 1
    })
    .await;
    assert!(addresses(&named_resolver)[0].starts_with("localhost:"));
    for server in servers.into_iter().chain([named]) {
        server.stopped().await.unwrap();
    }
}

#[tokio::test]
async fn the_state_can_be_watched_from_outside() {
    let etcd = etcd().await;
    let registration = registry(&etcd).await.registration("greeter");
    let mut states = registration.states();
    let server = Registered::start("alpha", "127.0.0.1:0", registration);
    timeout(SOON, states.wait_for(RegistrationState::is_registered))
        .await
        .unwrap()
        .unwrap();
    server.stopped().await.unwrap();
    assert!(matches!(*states.borrow(), RegistrationState::Deregistered));
}

#[tokio::test]
async fn a_port_that_is_taken_is_a_bind_error_and_registers_nothing() {
    let etcd = etcd().await;
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let server = Registered::start(
        "alpha",
        &address,
        registry(&etcd).await.registration("greeter"),
    );
    let error = timeout(SOON, server.task)
        .await
        .unwrap()
        .unwrap()
        .expect_err("the port is taken");
    assert!(matches!(error, ServeError::Bind { .. }), "{error:?}");
    assert!(error.to_string().contains(&address), "{error}");
    assert!(list(&client(&etcd).await, "/").await.is_empty());
}

#[tokio::test]
async fn a_registration_that_is_refused_stops_the_server() {
    let mut etcd = etcd().await;
    let registry = registry(&etcd).await;
    // What is wrong by itself is said before the socket is bound.
    let server = Registered::start("alpha", "127.0.0.1:0", registry.registration("a/b"));
    let error = timeout(SOON, server.task)
        .await
        .unwrap()
        .unwrap()
        .expect_err("bad name");
    assert!(
        matches!(error, ServeError::Register(RegisterError::Invalid { .. })),
        "{error:?}"
    );
    // What etcd does not take in time stops what serves already.
    etcd.kill(0).await.unwrap();
    let port = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let registration = registry
        .registration("greeter")
        .startup_timeout(Duration::from_millis(500));
    let server = Registered::start("alpha", &port.to_string(), registration);
    eventually("it serves while it tries", async || {
        TcpStream::connect(port).await.is_ok()
    })
    .await;
    let error = timeout(SOON, server.task)
        .await
        .unwrap()
        .unwrap()
        .expect_err("no etcd");
    assert!(
        matches!(error, ServeError::Register(RegisterError::TimedOut { .. })),
        "{error:?}"
    );
    assert!(
        TcpStream::connect(port).await.is_err(),
        "nobody listens any more"
    );
}

#[tokio::test]
async fn a_shutdown_during_the_registration_is_a_shutdown() {
    let mut etcd = etcd().await;
    let registry = registry(&etcd).await;
    etcd.freeze(0).await.unwrap();
    let port = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let server = Registered::start("alpha", &port.to_string(), registry.registration("greeter"));
    eventually("it serves", async || TcpStream::connect(port).await.is_ok()).await;
    let start = Instant::now();
    server.stopped().await.unwrap();
    // A grant that is under way is waited for, up to its deadline of 2 s, and then the grace period.
    assert!(Instant::now().saturating_duration_since(start) < Duration::from_secs(5));
    etcd.thaw(0).await.unwrap();
    let by_hand = client(&etcd).await;
    eventually("nothing is left", async || {
        list(&by_hand, "/").await.is_empty()
    })
    .await;
}

#[tokio::test]
async fn clients_learn_before_the_listener_closes() {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    let resolver = registry.resolver("greeter");
    let registration = registry
        .registration("greeter")
        .grace_period(Duration::from_millis(800));
    let mut server = Registered::start("alpha", "127.0.0.1:0", registration);
    eventually("it is registered", async || resolver.instances().len() == 1).await;
    let address = addresses(&resolver).remove(0);
    server.stop();
    knows(&resolver, &[]).await;
    // Who has not heard of it yet is still served.
    connect(&address)
        .await
        .say_hello(hello())
        .await
        .expect("during the grace period");
    server.stopped().await.unwrap();
    assert!(TcpStream::connect(&address).await.is_err());
}

#[tokio::test]
async fn calls_in_flight_are_waited_for_and_idle_connections_are_not() {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    let resolver = registry.resolver("greeter");
    let registration = registry
        .registration("greeter")
        .grace_period(Duration::from_millis(10));
    let mut server = Registered::start("alpha", "127.0.0.1:0", registration);
    eventually("it is registered", async || resolver.instances().len() == 1).await;
    let address = addresses(&resolver).remove(0);
    let _idle = connect(&address).await;
    let _never_spoke = TcpStream::connect(&address).await.unwrap();
    let mut client = connect(&address).await;
    let (names, sent) = mpsc::channel(1);
    let mut chat = client
        .chat(ReceiverStream::new(sent))
        .await
        .unwrap()
        .into_inner();
    names.send(hello()).await.unwrap();
    chat.message().await.unwrap().expect("a reply");
    server.stop();
    eventually("the listener is closed", async || {
        TcpStream::connect(&address).await.is_err()
    })
    .await;
    names.send(hello()).await.unwrap();
    chat.message()
        .await
        .expect("the call goes on while the server drains")
        .expect("a reply");
    assert!(!server.task.is_finished());
    drop(names);
    assert!(chat.message().await.unwrap().is_none());
    server.stopped().await.unwrap();
}

#[tokio::test]
async fn what_does_not_end_is_cut_at_the_deadline() {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    let resolver = registry.resolver("greeter");
    let registration = registry
        .registration("greeter")
        .grace_period(Duration::from_millis(10))
        .drain_timeout(Duration::from_millis(300));
    let mut server = Registered::start("alpha", "127.0.0.1:0", registration);
    eventually("it is registered", async || resolver.instances().len() == 1).await;
    let address = addresses(&resolver).remove(0);
    let mut client = connect(&address).await;
    let (names, sent) = mpsc::channel(1);
    let mut chat = client
        .chat(ReceiverStream::new(sent))
        .await
        .unwrap()
        .into_inner();
    names.send(hello()).await.unwrap();
    chat.message().await.unwrap().expect("a reply");
    let start = Instant::now();
    server.stop();
    server.stopped().await.unwrap();
    let took = Instant::now().saturating_duration_since(start);
    assert!(
        took >= Duration::from_millis(310) && took < Duration::from_secs(2),
        "{took:?}"
    );
    chat.message().await.expect_err("the call was cut");
}

#[tokio::test]
async fn a_server_that_is_dropped_takes_its_entry_along() {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    let resolver = registry.resolver("greeter");
    let server = Registered::start(
        "alpha",
        "127.0.0.1:0",
        registry
            .registration("greeter")
            .ttl(Duration::from_secs(60)),
    );
    eventually("it is registered", async || resolver.instances().len() == 1).await;
    let address = addresses(&resolver).remove(0);
    server.task.abort();
    knows(&resolver, &[]).await;
    eventually("nobody listens any more", async || {
        TcpStream::connect(&address).await.is_err()
    })
    .await;
}

/// Calls without a pause until told to stop, and says how many calls failed of how many.
async fn load(channel: Channel, mut stop: tokio::sync::watch::Receiver<bool>) -> (u64, u64) {
    let mut client = GreeterClient::new(channel);
    let (mut calls, mut failed) = (0, 0);
    while !*stop.borrow_and_update() {
        calls += 1;
        let call = timeout(Duration::from_secs(5), client.say_hello(hello())).await;
        if !matches!(call, Ok(Ok(_))) {
            failed += 1;
        }
    }
    (calls, failed)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_under_load_fails_under_one_call_in_a_hundred_over_the_stock_channel() {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    let resolver = registry.resolver("greeter");
    let start = |name: &str| {
        Registered::start(
            name,
            "127.0.0.1:0",
            registry
                .registration("greeter")
                .grace_period(Duration::from_millis(200)),
        )
    };
    let mut servers: Vec<_> = ["a", "b", "c"].map(start).into();
    eventually("three are registered", async || {
        resolver.instances().len() == 3
    })
    .await;
    let channel = resolver.clone().into_tonic_channel();
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let callers: Vec<_> = (0..8)
        .map(|_| tokio::spawn(load(channel.clone(), stopped.clone())))
        .collect();
    for round in 0..6 {
        servers.remove(0).stopped().await.unwrap();
        servers.push(start(&format!("r{round}")));
        eventually("three are registered", async || {
            resolver.instances().len() == 3
        })
        .await;
    }
    stop.send_replace(true);
    let (mut calls, mut failed) = (0, 0);
    for caller in callers {
        let (its_calls, its_failed) = caller.await.unwrap();
        calls += its_calls;
        failed += its_failed;
    }
    println!("{calls} calls, {failed} failed");
    assert!(
        calls > 1_000 && failed * 100 < calls,
        "{failed} of {calls} calls failed"
    );
}

#[tokio::test]
async fn attributes_change_without_a_reconnect_on_the_stock_channel() {
    let etcd = etcd().await;
    let (address, _server) = support::greeter("alpha").await;
    let proxy = support::proxy::Proxy::start("127.0.0.1:0", address.to_string()).await;
    let registry = registry(&etcd).await;
    let registration = registry
        .registration("greeter")
        .address(proxy.address.to_string())
        .ttl(Duration::from_secs(2))
        .register()
        .await
        .unwrap();
    let resolver = registry.resolver("greeter");
    let mut greeter = GreeterClient::new(resolver.clone().into_tonic_channel());
    greeter.say_hello(hello()).await.unwrap();
    for weight in 2..10 {
        registration.set_weight(weight).await.unwrap();
        eventually("the weight arrives", async || {
            resolver.instances()[0].weight() == weight
        })
        .await;
        greeter.say_hello(hello()).await.unwrap();
    }
    // A fresh registration of the same address is no reason either.
    let by_hand = client(&etcd).await;
    let lease = resolver.instances()[0].lease();
    by_hand.lease_client().revoke(lease.get()).await.unwrap();
    eventually("registered again", async || {
        resolver
            .instances()
            .first()
            .is_some_and(|instance| instance.lease() != lease)
    })
    .await;
    timeout(SOON, greeter.say_hello(hello()))
        .await
        .unwrap()
        .unwrap();
    assert!(proxy.accepted() <= 2, "{} connections", proxy.accepted());
}

#[tokio::test]
async fn a_stock_channel_follows_an_address_that_comes_and_goes() {
    let etcd = etcd().await;
    let (address, _server) = support::greeter("alpha").await;
    let registry = registry(&etcd).await;
    let resolver = registry.resolver("greeter");
    let mut greeter = GreeterClient::new(resolver.clone().into_tonic_channel());
    let mut by_hand = client(&etcd).await;
    for _ in 0..20 {
        by_hand
            .put("/gRPC/greeter/1", address.to_string(), None)
            .await
            .unwrap();
        timeout(SOON, greeter.say_hello(hello()))
            .await
            .unwrap()
            .unwrap();
        by_hand.delete("/gRPC/greeter/1", None).await.unwrap();
        knows(&resolver, &[]).await;
    }
}

/// The other tests stop their servers by hand and take no notice of the signals that this one sends to its own process.
#[tokio::test]
async fn sigterm_ends_a_server_in_order() {
    let etcd: Etcd = etcd().await;
    let registry: Registry = registry(&etcd).await;
    let resolver = registry.resolver("greeter");
    for signal in [
        nix::sys::signal::Signal::SIGTERM,
        nix::sys::signal::Signal::SIGINT,
    ] {
        let greeter =
            support::greeter::greeter_server::GreeterServer::new(NamedGreeter("alpha".to_owned()));
        let registration = registry
            .registration("greeter")
            .grace_period(Duration::from_millis(50));
        let serving = Server::builder()
            .add_service(greeter)
            .serve_registered("127.0.0.1:0".parse().unwrap(), registration);
        let serving = tokio::spawn(serving);
        eventually("it is registered", async || resolver.instances().len() == 1).await;
        nix::sys::signal::kill(nix::unistd::Pid::this(), signal).unwrap();
        timeout(SOON, serving).await.unwrap().unwrap().unwrap();
        knows(&resolver, &[]).await;
    }
    // A second signal ends it at once, whatever is still under way.
    let greeter =
        support::greeter::greeter_server::GreeterServer::new(NamedGreeter("alpha".to_owned()));
    let registration = registry
        .registration("greeter")
        .grace_period(Duration::from_secs(600));
    let serving = Server::builder()
        .add_service(greeter)
        .serve_registered("127.0.0.1:0".parse().unwrap(), registration);
    let serving = tokio::spawn(serving);
    eventually("it is registered", async || resolver.instances().len() == 1).await;
    nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGTERM).unwrap();
    knows(&resolver, &[]).await;
    assert!(!serving.is_finished(), "the grace period");
    nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGTERM).unwrap();
    timeout(Duration::from_secs(1), serving)
        .await
        .expect("at once")
        .unwrap()
        .unwrap();
}
