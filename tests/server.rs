//! The lifecycle of a server from bind to the last call, against a real etcd.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod support;

use std::time::Duration;

use support::greeter::NamedGreeter;
use support::greeter::greeter_client::GreeterClient;
use support::greeter::greeter_server::GreeterServer;
use support::{Registered, SOON, World, addresses, client, connect, eventually, hello};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout};
use tonic::transport::{Channel, Server};
use tonic_etcd::{
    AddressPolicy, Registry, ServeRegistered,
    error::{RegisterError, ServeError},
    registration::{RegistrationState, ServerState},
    resolver::{ResolverHandle, ResolverState},
};

#[tokio::test]
async fn the_bound_address_is_registered_served_and_removed_after_the_shutdown() {
    let world = World::new().await;
    let (server, address) = world.start(world.registry.registration("greeter")).await;
    assert!(
        address.starts_with("127.0.0.1:") && !address.ends_with(":0"),
        "{address}"
    );
    connect(&address).await.say_hello(hello()).await.unwrap();
    server.stopped().await.unwrap();
    assert_eq!(world.keys().await, 0);
    assert!(
        client(&world.etcd)
            .await
            .lease_client()
            .leases()
            .await
            .unwrap()
            .leases()
            .is_empty()
    );
    assert!(
        TcpStream::connect(&address).await.is_err(),
        "the listener must be closed"
    );
}

#[tokio::test]
async fn an_unspecified_address_is_advertised_as_the_local_address_towards_etcd() {
    let world = World::new().await;
    let World {
        registry, resolver, ..
    } = &world;
    let servers = [
        Registered::start("alpha", "0.0.0.0:0", registry.registration("greeter")),
        Registered::start("beta", "[::]:0", registry.registration("greeter")),
    ];
    world.counts(2).await;
    for address in addresses(resolver) {
        assert!(address.starts_with("127.0.0.1:"), "{address}");
        connect(&address).await.say_hello(hello()).await.unwrap();
    }
    let named = Registered::start(
        "gamma",
        "0.0.0.0:0",
        registry.registration("named").host("localhost"),
    );
    let named_resolver = registry.resolver("named").start();
    eventually("the server is registered", async || {
        named_resolver.instances().len() == 1
    })
    .await;
    assert!(addresses(&named_resolver)[0].starts_with("localhost:"));
    for server in servers.into_iter().chain([named]) {
        server.stopped().await.unwrap();
    }
}

#[tokio::test]
async fn the_registration_state_of_a_server_can_be_watched() {
    let world = World::new().await;
    let registration = world.registration();
    let mut states = registration.watch_state();
    let server = Registered::start("alpha", "127.0.0.1:0", registration);
    timeout(SOON, states.wait_for(RegistrationState::is_registered))
        .await
        .unwrap()
        .unwrap();
    server.stopped().await.unwrap();
    assert!(matches!(*states.borrow(), RegistrationState::Deregistered));
}

/// A handle returns the address that was bound for port 0. It also pauses the registration, resumes it and changes its weight. The shutdown
/// of the server is the same as without a handle.
#[tokio::test]
async fn a_handle_returns_the_bound_address_and_changes_the_registration_of_a_server() {
    let world = World::new().await;
    let registration = world.registration();
    let handle = registration.handle();
    let server = Registered::start("alpha", "127.0.0.1:0", registration);
    let address = timeout(SOON, handle.address()).await.unwrap().unwrap();
    world.counts(1).await;
    assert_eq!(addresses(&world.resolver), [address.as_str()]);
    assert_eq!(
        handle.keys().await.unwrap(),
        [format!("/gRPC/greeter/{address}")]
    );
    handle.pause().await.unwrap();
    world.counts(0).await;
    let mut client = connect(address.as_str()).await;
    client.say_hello(hello()).await.unwrap();
    handle.resume().await.unwrap();
    world.counts(1).await;
    handle.clone().set_weight(7).await.unwrap();
    eventually("the new weight is listed", async || {
        world.resolver.instances()[0].weight() == 7
    })
    .await;
    server.stopped().await.unwrap();
    assert_eq!(world.keys().await, 0);
    let error = handle.pause().await.unwrap_err();
    assert!(matches!(error, RegisterError::Ended { .. }), "{error:?}");
    // If a server never starts, `address` returns `None`.
    let registration = world.registration();
    let handle = registration.handle();
    drop(registration);
    assert!(timeout(SOON, handle.address()).await.unwrap().is_none());
}

/// `stop` begins the same shutdown as the stop signal, which this test never sends.
#[tokio::test]
async fn a_handle_stops_a_server_gracefully() {
    let world = World::new().await;
    let registration = world.registration();
    let (handle, states) = (registration.handle(), registration.watch_server_state());
    let (mut server, address) = world.start(registration).await;
    connect(&address).await.say_hello(hello()).await.unwrap();
    handle.stop();
    let outcome = timeout(SOON, &mut server.task).await;
    outcome.unwrap().unwrap().unwrap();
    assert_eq!(world.keys().await, 0);
    assert_eq!(states.borrow().to_string(), "stopped, 0 connections cut");

    // A server that is stopped before it starts ends at once.
    let registration = world.registration();
    registration.handle().stop();
    let mut server = Registered::start("beta", "127.0.0.1:0", registration);
    let outcome = timeout(SOON, &mut server.task).await;
    outcome.unwrap().unwrap().unwrap();
    assert_eq!(world.keys().await, 0);
}

/// The program has bound the listener before the registration, for example to set socket options, or a service manager has bound it.
#[tokio::test]
async fn a_listener_that_is_already_bound_is_served_and_registered() {
    let world = World::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let bound = listener.local_addr().unwrap().to_string();
    let greeter = GreeterServer::new(NamedGreeter("alpha".to_owned()));
    let router = Server::builder().add_service(greeter);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let registration = world.registration();
    let serving = router.serve_registered_with_listener_shutdown(listener, registration, async {
        drop(stopped.await);
    });
    let serving = tokio::spawn(serving);
    world.counts(1).await;
    assert_eq!(addresses(&world.resolver), std::slice::from_ref(&bound));
    connect(&bound).await.say_hello(hello()).await.unwrap();
    drop(stop);
    timeout(SOON, serving).await.unwrap().unwrap().unwrap();
    assert_eq!(world.keys().await, 0);
}

/// The program accepts the connections itself: here on a TCP listener, and on a Unix socket.
#[cfg(unix)]
#[tokio::test]
async fn any_stream_of_connections_is_served_and_registered() {
    let mut world = World::new().await;
    let policy = AddressPolicy::default().allow_unix_sockets();
    world.registry = world.registry.clone().with_address_policy(policy);
    world.resolver = world.registry.resolver("greeter").start();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let bound = listener.local_addr().unwrap().to_string();
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    serves_incoming(&world, incoming, &bound).await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("greeter.sock");
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    let incoming = tokio_stream::wrappers::UnixListenerStream::new(listener);
    serves_incoming(&world, incoming, &format!("unix:{}", path.display())).await;
    // Without an address in the registration, the server cannot be registered, because a stream of connections has no bound address.
    let incoming = tokio_stream::empty::<std::io::Result<TcpStream>>();
    let router = Server::builder().add_service(GreeterServer::new(NamedGreeter::default()));
    let serving = router.serve_registered_with_incoming_shutdown(
        incoming,
        world.registration(),
        std::future::pending(),
    );
    let error = timeout(SOON, serving).await.unwrap().unwrap_err();
    assert!(error.to_string().contains("address"), "{error}");
}

async fn serves_incoming<I, T>(world: &World, incoming: I, address: &str)
where
    I: tokio_stream::Stream<Item = std::io::Result<T>> + Send + 'static,
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    T: tonic::transport::server::Connected<ConnectInfo: Clone + Send + Sync + 'static>,
{
    let greeter = GreeterServer::new(NamedGreeter("alpha".to_owned()));
    let router = Server::builder().add_service(greeter);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let registration = world.registration().address(address);
    let stopped = async { drop(stopped.await) };
    let serving = router.serve_registered_with_incoming_shutdown(incoming, registration, stopped);
    let serving = tokio::spawn(serving);
    world.counts(1).await;
    assert_eq!(addresses(&world.resolver), [address]);
    let channel = world.registry.channel("greeter").connect().await.unwrap();
    let mut client = GreeterClient::new(channel.clone());
    client.say_hello(hello()).await.unwrap();
    // The channel provides a handle of its resolver.
    let resolver = channel.source_handle::<ResolverHandle>().unwrap();
    assert_eq!(resolver.status().state, ResolverState::Fresh);
    assert_eq!(resolver.instances().len(), 1);
    assert!(
        channel.source_handle::<String>().is_none(),
        "a handle of another type must not be found"
    );
    drop(stop);
    timeout(SOON, serving).await.unwrap().unwrap().unwrap();
    assert_eq!(world.keys().await, 0);
    world.counts(0).await;
}

#[tokio::test]
async fn a_port_in_use_is_a_bind_error_and_registers_nothing() {
    let world = World::new().await;
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let server = Registered::start("alpha", &address, world.registration());
    let error = timeout(SOON, server.task)
        .await
        .unwrap()
        .unwrap()
        .expect_err("a port in use must be an error");
    assert!(matches!(error, ServeError::Bind { .. }), "{error:?}");
    assert!(error.to_string().contains(&address), "{error}");
    assert_eq!(world.keys().await, 0);
}

#[tokio::test]
async fn a_rejected_registration_stops_the_server() {
    let mut world = World::new().await;
    // An invalid registration is reported before the socket is bound.
    let server = Registered::start("alpha", "127.0.0.1:0", world.registry.registration("a/b"));
    let error = timeout(SOON, server.task)
        .await
        .unwrap()
        .unwrap()
        .expect_err("an invalid service name must be rejected");
    assert!(
        matches!(error, ServeError::Register(RegisterError::Invalid { .. })),
        "{error:?}"
    );
    // If etcd does not accept the registration in time, the server is stopped, although it already serves.
    world.etcd.kill(0).await.unwrap();
    let port = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let registration = world.registration().startup_timeout(Duration::from_secs(2));
    let server = Registered::start("alpha", &port.to_string(), registration);
    eventually("the server serves while it registers", async || {
        TcpStream::connect(port).await.is_ok()
    })
    .await;
    let error = timeout(SOON, server.task)
        .await
        .unwrap()
        .unwrap()
        .expect_err("the registration must fail without etcd");
    assert!(
        matches!(error, ServeError::Register(RegisterError::TimedOut { .. })),
        "{error:?}"
    );
    assert!(
        TcpStream::connect(port).await.is_err(),
        "the listener must be closed"
    );
}

#[tokio::test]
async fn a_server_can_start_while_etcd_is_down() {
    let mut world = World::new().await;
    world.etcd.kill(0).await.unwrap();
    let lazy = Registry::builder(world.etcd.endpoints()).connect_lazy();
    let registration = lazy
        .unwrap()
        .registration("greeter")
        .startup_timeout(Duration::MAX);
    let mut states = registration.watch_server_state();
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = free.local_addr().unwrap().to_string();
    drop(free);
    let server = Registered::start("alpha", &port, registration);
    let serving = states.wait_for(|state| *state == ServerState::Serving);
    drop(timeout(SOON, serving).await.unwrap().unwrap());
    // The server serves before it is registered, because a client that resolves its address must be served at once.
    let mut client = connect(&port).await;
    let early = timeout(SOON, client.say_hello(hello())).await;
    early.expect("the server already serves").unwrap();
    world.etcd.restart(0).await.unwrap();
    let address = world.the_one().await;
    connect(&address).await.say_hello(hello()).await.unwrap();
    server.stopped().await.unwrap();
}

#[tokio::test]
async fn a_shutdown_during_the_registration_succeeds() {
    let mut world = World::new().await;
    world.etcd.freeze(0).await.unwrap();
    let port = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let server = Registered::start("alpha", &port.to_string(), world.registration());
    eventually("the server serves", async || {
        TcpStream::connect(port).await.is_ok()
    })
    .await;
    let start = Instant::now();
    server.stopped().await.unwrap();
    // The shutdown waits for a grant in progress, up to its timeout of 2 s, and then for the grace period.
    assert!(Instant::now().saturating_duration_since(start) < Duration::from_secs(10));
    world.etcd.thaw(0).await.unwrap();
    eventually("no key is left", async || world.keys().await == 0).await;
}

#[tokio::test]
async fn a_dropped_server_is_deregistered() {
    let world = World::new().await;
    let registration = world.registration().ttl(Duration::from_secs(60));
    let (server, address) = world.start(registration).await;
    server.task.abort();
    world.counts(0).await;
    eventually("the listener is closed", async || {
        TcpStream::connect(&address).await.is_err()
    })
    .await;
}

/// Sends calls without a pause until `stop` is true. Returns the number of calls and the number of failed calls.
async fn load(channel: Channel, mut stop: tokio::sync::watch::Receiver<bool>) -> (u64, u64) {
    let mut client = GreeterClient::new(channel);
    let (mut calls, mut failed) = (0, 0);
    while !*stop.borrow_and_update() {
        calls += 1;
        let call = timeout(Duration::from_secs(5), client.say_hello(hello())).await;
        if !matches!(call, Ok(Ok(_))) {
            failed += 1;
            // Without this pause, calls that fail at once would be repeated in a busy loop.
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    (calls, failed)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_over_the_tonic_channel_fails_less_than_one_call_in_a_hundred() {
    let world = World::new().await;
    let start = |name: &str| {
        let grace = Duration::from_millis(500);
        Registered::start(
            name,
            "127.0.0.1:0",
            world.registration().grace_period(grace),
        )
    };
    let mut servers: Vec<_> = ["a", "b", "c"].map(start).into();
    world.counts(3).await;
    let channel = world.resolver.clone().into_tonic_channel();
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let callers: Vec<_> = (0..8)
        .map(|_| tokio::spawn(load(channel.clone(), stopped.clone())))
        .collect();
    for round in 0..6 {
        servers.remove(0).stopped().await.unwrap();
        servers.push(start(&format!("r{round}")));
        world.counts(3).await;
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
async fn attributes_change_without_a_reconnect_on_the_tonic_channel() {
    let world = World::new().await;
    let (address, _server) = support::greeter("alpha").await;
    let proxy = support::proxy::Proxy::start("127.0.0.1:0", address.to_string()).await;
    let World {
        etcd,
        registry,
        resolver,
    } = &world;
    let registration = registry
        .registration("greeter")
        .address(proxy.address.to_string())
        .register()
        .await
        .unwrap();
    let mut greeter = GreeterClient::new(resolver.clone().into_tonic_channel());
    greeter.say_hello(hello()).await.unwrap();
    for weight in 2..10 {
        registration.set_weight(weight).await.unwrap();
        eventually("the new weight is listed", async || {
            let instances = resolver.instances();
            instances
                .first()
                .is_some_and(|instance| instance.weight() == weight)
        })
        .await;
        greeter.say_hello(hello()).await.unwrap();
    }
    // After a new registration of the same address, at most one further connection is opened.
    let by_hand = client(etcd).await;
    let lease = |instance: &tonic_etcd::Instance| instance.location().unwrap().lease();
    let before = lease(&resolver.instances()[0]);
    let revoked = before.unwrap().get();
    by_hand.lease_client().revoke(revoked).await.unwrap();
    eventually("registered again", async || {
        resolver
            .instances()
            .first()
            .is_some_and(|instance| lease(instance) != before)
    })
    .await;
    timeout(SOON, greeter.say_hello(hello()))
        .await
        .unwrap()
        .unwrap();
    assert!(proxy.accepted() <= 2, "{} connections", proxy.accepted());
}

#[tokio::test]
async fn a_tonic_channel_follows_an_address_that_is_added_and_removed() {
    let world = World::new().await;
    let (address, _server) = support::greeter("alpha").await;
    let mut greeter = GreeterClient::new(world.resolver.clone().into_tonic_channel());
    let mut by_hand = client(&world.etcd).await;
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
        world.counts(0).await;
    }
}
