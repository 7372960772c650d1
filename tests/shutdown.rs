//! Shutdown of a server: the order of its phases, the timeout of each phase, and the connections that are cut.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod support;

use std::io::ErrorKind;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use support::counting::Counting;
use support::greeter::greeter_client::GreeterClient;
use support::greeter::greeter_server::GreeterServer;
use support::greeter::{HelloReply, HelloRequest, NamedGreeter};
use support::program::{example, line_with, lines, rest, signal};
use support::{Registered, SOON, World, client, connect, eventually, hello, list};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::{Channel, Server};
use tonic_etcd::{ServeRegistered, registration::ServerState};

/// A call that stays open until its caller ends it.
struct Chat {
    names: mpsc::Sender<HelloRequest>,
    replies: Streaming<HelloReply>,
}

impl Chat {
    async fn start(client: &mut GreeterClient<Channel>) -> Self {
        let (names, sent) = mpsc::channel(1);
        let replies = client.chat(ReceiverStream::new(sent)).await.unwrap();
        let mut chat = Self {
            names,
            replies: replies.into_inner(),
        };
        chat.continues().await;
        chat
    }

    async fn continues(&mut self) {
        self.names.send(hello()).await.unwrap();
        let reply = self.replies.message().await;
        reply.expect("the call continues").expect("a reply");
    }

    async fn ends(mut self) {
        drop(self.names);
        assert!(self.replies.message().await.unwrap().is_none());
    }
}

async fn reaches(states: &mut watch::Receiver<ServerState>, goal: fn(&ServerState) -> bool) {
    timeout(SOON, states.wait_for(goal)).await.unwrap().unwrap();
}

fn connections_cut(states: &watch::Receiver<ServerState>) -> usize {
    match *states.borrow() {
        ServerState::Stopped {
            connections_cut, ..
        } => connections_cut,
        state => panic!("the server has not stopped: {state:?}"),
    }
}

fn since(start: Instant) -> Duration {
    Instant::now().saturating_duration_since(start)
}

#[tokio::test]
async fn the_state_reports_each_phase() {
    let world = World::new().await;
    let registration = world.registration();
    let mut states = registration.watch_server_state();
    assert_eq!(*states.borrow_and_update(), ServerState::Starting);
    let seen = tokio::spawn(async move {
        let mut seen = Vec::new();
        while states.changed().await.is_ok() {
            seen.push(*states.borrow_and_update());
        }
        seen
    });
    let (server, _) = world.start(registration).await;
    server.stopped().await.unwrap();
    let seen = seen.await.unwrap();
    assert_eq!(
        seen[..3],
        [
            ServerState::Serving,
            ServerState::LameDuck,
            ServerState::Draining
        ]
    );
    assert!(
        matches!(
            seen[3..],
            [ServerState::Stopped {
                connections_cut: 0,
                ..
            }]
        ),
        "{seen:?}"
    );
}

#[tokio::test]
async fn a_deregistration_without_a_response_ends_at_its_timeout() {
    let mut world = World::new().await;
    let registration = world
        .registration()
        .deregister_timeout(Duration::from_millis(300));
    let mut states = registration.watch_server_state();
    let (mut server, address) = world.start(registration).await;
    world.etcd.freeze(0).await.unwrap();
    let start = Instant::now();
    server.stop();
    reaches(&mut states, ServerState::is_stopping).await;
    // Calls are still served in the meantime.
    connect(&address).await.say_hello(hello()).await.unwrap();
    server.stopped().await.unwrap();
    let took = since(start);
    // The timeout of the deregistration is 300 ms, and the grace period is 10 ms.
    assert!(
        took >= Duration::from_millis(310) && took < Duration::from_secs(4),
        "{took:?}"
    );
    world.etcd.thaw(0).await.unwrap();
}

#[tokio::test]
async fn clients_see_the_deregistration_before_the_listener_closes() {
    let world = World::new().await;
    let grace = Duration::from_secs(2);
    let (mut server, address) = world.start(world.registration().grace_period(grace)).await;
    let start = Instant::now();
    server.stop();
    world.counts(0).await;
    // A client that has not received the removal yet is still served.
    let late = connect(&address).await.say_hello(hello()).await;
    late.expect("the server serves during the grace period");
    server.stopped().await.unwrap();
    let took = since(start);
    let bound = grace + Duration::from_secs(5);
    assert!(took >= grace && took < bound, "{took:?}");
    assert!(TcpStream::connect(&address).await.is_err());
}

#[tokio::test]
async fn idle_connections_end_at_once() {
    let world = World::new().await;
    let registration = world.registration();
    let states = registration.watch_server_state();
    let (server, address) = world.start(registration).await;
    let mut idle = Vec::new();
    for _ in 0..10 {
        let mut client = connect(&address).await;
        client.say_hello(hello()).await.unwrap();
        idle.push(client);
    }
    let start = Instant::now();
    server.stopped().await.unwrap();
    let took = since(start);
    // Connections that do not end by themselves are cut after 20 s.
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert_eq!(connections_cut(&states), 0);
}

#[tokio::test]
async fn new_connections_are_refused_during_the_drain() {
    let world = World::new().await;
    let registration = world.registration();
    let mut states = registration.watch_server_state();
    let (mut server, address) = world.start(registration).await;
    let mut chat = Chat::start(&mut connect(&address).await).await;
    server.stop();
    reaches(&mut states, ServerState::is_draining).await;
    eventually("the listener is closed", async || {
        TcpStream::connect(&address).await.is_err()
    })
    .await;
    for _ in 0..10 {
        let start = Instant::now();
        let error = TcpStream::connect(&address).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        assert!(since(start) < Duration::from_secs(5));
        chat.continues().await;
    }
    assert!(!server.task.is_finished());
    chat.ends().await;
    server.stopped().await.unwrap();
    assert_eq!(connections_cut(&states), 0);
}

/// Reads until the peer closes the connection.
async fn ends(mut connection: impl AsyncRead + Unpin) {
    let mut bytes = Vec::new();
    // The connection is closed, or reset because the server never read the sent bytes.
    let end = timeout(SOON, connection.read_to_end(&mut bytes)).await;
    drop(end.expect("the connection is closed"));
}

#[tokio::test]
async fn connections_without_a_preface_are_closed_during_the_drain() {
    let world = World::new().await;
    let registration = world.registration();
    let states = registration.watch_server_state();
    let (mut server, address) = world.start(registration).await;
    let silent = TcpStream::connect(&address).await.unwrap();
    let mut halting = TcpStream::connect(&address).await.unwrap();
    halting.write_all(b"PRI * HTTP/2.0\r\n").await.unwrap();
    let mut chat = Chat::start(&mut connect(&address).await).await;
    server.stop();
    ends(silent).await;
    ends(halting).await;
    chat.continues().await;
    chat.ends().await;
    server.stopped().await.unwrap();
    assert_eq!(connections_cut(&states), 0);
}

/// Reads HTTP/2 frames up to a GOAWAY. Returns whether a GOAWAY was received.
async fn receives_goaway(connection: &mut TcpStream) -> bool {
    let mut header = [0; 9];
    while connection.read_exact(&mut header).await.is_ok() {
        if header[3] == 7 {
            return true;
        }
        let length = usize::from(header[1]) << 8 | usize::from(header[2]);
        let mut payload = vec![0; length];
        connection.read_exact(&mut payload).await.unwrap();
    }
    false
}

#[tokio::test]
async fn a_connection_that_begins_http2_just_after_the_listener_closed_receives_a_goaway() {
    let world = World::new().await;
    // The connection must begin HTTP/2 within 200 ms. If the test takes longer, the connection may be cut, and the test tries again.
    for _ in 0..20 {
        let registration = world.registration();
        let mut states = registration.watch_server_state();
        let (mut server, address) = world.start(registration).await;
        let mut late = TcpStream::connect(&address).await.unwrap();
        let start = Instant::now();
        server.stop();
        reaches(&mut states, ServerState::is_draining).await;
        // The time of one or two round trips. The server must not close the connection in this time.
        tokio::time::sleep(Duration::from_millis(50)).await;
        // The preface, with an empty SETTINGS frame.
        let begins = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
        let begun = late.write_all(begins).await.is_ok();
        let took = since(start);
        let received = timeout(SOON, receives_goaway(&mut late)).await.unwrap();
        drop(late);
        server.stopped().await.unwrap();
        if begun && received {
            return;
        }
        let slow = took > Duration::from_millis(150);
        assert!(
            slow,
            "the connection was cut, although it began HTTP/2 only {took:?} after the stop"
        );
    }
    panic!("every attempt took too long");
}

#[cfg(feature = "tls")]
#[tokio::test]
async fn under_tls_connections_without_a_preface_are_closed_during_the_drain() {
    let world = World::new().await;
    let registration = world.registration();
    let states = registration.watch_server_state();
    let localhost = support::tls::Localhost::new();
    let greeter = GreeterServer::new(NamedGreeter("secure".to_owned()));
    let router = Server::builder()
        .tls_config(localhost.server())
        .unwrap()
        .add_service(greeter);
    let mut server = Registered::serve(router, "127.0.0.1:0", registration);
    let address = world.the_one().await;
    let no_handshake = TcpStream::connect(&address).await.unwrap();
    let silent = localhost.connect(&address).await;
    let mut halting = localhost.connect(&address).await;
    halting.write_all(b"PRI * HTTP/2.0\r\n").await.unwrap();
    halting.flush().await.unwrap();
    let endpoint = Channel::from_shared(format!("https://{address}")).unwrap();
    let endpoint = endpoint.tls_config(localhost.client()).unwrap();
    let channel = endpoint.connect().await.unwrap();
    let mut chat = Chat::start(&mut GreeterClient::new(channel)).await;
    // A connection with a call that has not received any response yet.
    let waiting = endpoint.connect().await.unwrap();
    let (names, sent) = mpsc::channel(1);
    let waiting = tokio::spawn(async move {
        let names = ReceiverStream::new(sent);
        GreeterClient::new(waiting).greet_all(names).await
    });
    names.send(hello()).await.unwrap();
    server.stop();
    ends(no_handshake).await;
    ends(silent).await;
    ends(halting).await;
    chat.continues().await;
    chat.ends().await;
    assert!(!server.task.is_finished());
    drop(names);
    waiting.await.unwrap().expect("the call succeeds");
    server.stopped().await.unwrap();
    assert_eq!(connections_cut(&states), 0);
}

#[tokio::test]
async fn connections_that_do_not_end_are_cut_at_the_drain_timeout_and_counted() {
    let world = World::new().await;
    let registration = world
        .registration()
        .drain_timeout(Duration::from_millis(400));
    let states = registration.watch_server_state();
    // A health service that is not informed of the shutdown.
    let (_reporter, health) = tonic_health::server::health_reporter();
    let router = Server::builder()
        .add_service(GreeterServer::new(Counting::default()))
        .add_service(health);
    let mut server = Registered::serve(router, "127.0.0.1:0", registration);
    let address = world.the_one().await;
    let _silent = TcpStream::connect(&address).await.unwrap();
    let _idle = connect(&address).await;
    let mut endless = connect(&address).await;
    let mut endless = endless.say_hellos(HelloRequest::default()).await.unwrap();
    endless.get_mut().message().await.unwrap().expect("a reply");
    // The replies are never read, so the server waits until the flow-control window has room.
    let mut unread = connect(&address).await;
    let unread = unread.say_hellos(HelloRequest::default()).await.unwrap();
    let channel = Channel::from_shared(format!("http://{address}")).unwrap();
    let channel = channel.connect().await.unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
    let request = tonic_health::pb::HealthCheckRequest::default();
    let mut health = health.watch(request).await.unwrap().into_inner();
    health.message().await.unwrap().expect("a status");
    let start = Instant::now();
    server.stop();
    server.stopped().await.unwrap();
    let took = since(start);
    assert!(
        took >= Duration::from_millis(400) && took < Duration::from_secs(10),
        "{took:?}"
    );
    // Only the three connections with open calls are cut.
    assert_eq!(connections_cut(&states), 3);
    while let Ok(reply) = endless.get_mut().message().await {
        assert!(reply.is_some(), "the call must fail");
    }
    health.message().await.expect_err("the call must fail");
    drop(unread);
}

#[tokio::test]
async fn a_call_that_ends_when_the_drain_begins_is_not_cut() {
    let world = World::new().await;
    let registration = world.registration();
    let mut states = registration.watch_server_state();
    let (mut server, address) = world.start(registration).await;
    let chat = Chat::start(&mut connect(&address).await).await;
    server.stop();
    reaches(&mut states, ServerState::is_draining).await;
    chat.ends().await;
    server.stopped().await.unwrap();
    assert_eq!(connections_cut(&states), 0);
}

#[tokio::test]
async fn a_dropped_server_reports_the_connections_that_it_cut() {
    let world = World::new().await;
    let registration = world.registration();
    let mut states = registration.watch_server_state();
    let (server, address) = world.start(registration).await;
    let chat = Chat::start(&mut connect(&address).await).await;
    server.task.abort();
    reaches(&mut states, ServerState::is_draining).await;
    assert_eq!(connections_cut(&states), 1);
    drop(chat);
}

/// This test sends the signals to its own process. The other tests of this file do not react to them: their servers are stopped through a
/// future, or run in separate processes.
#[tokio::test]
async fn the_first_signal_shuts_down_gracefully_and_the_second_signal_at_once() {
    let world = World::new().await;
    let start = |grace| {
        let greeter = GreeterServer::new(NamedGreeter("alpha".to_owned()));
        let registration = world.registration().grace_period(grace);
        let router = Server::builder().add_service(greeter);
        tokio::spawn(router.serve_registered("127.0.0.1:0".parse().unwrap(), registration))
    };
    let raise = |signal| nix::sys::signal::kill(Pid::this(), signal).unwrap();
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let serving = start(Duration::from_millis(50));
        world.the_one().await;
        raise(signal);
        timeout(SOON, serving).await.unwrap().unwrap().unwrap();
        world.counts(0).await;
    }
    let serving = start(Duration::from_secs(600));
    let address = world.the_one().await;
    let mut client = connect(&address).await;
    let mut chat = Chat::start(&mut client).await;
    raise(Signal::SIGTERM);
    world.counts(0).await;
    chat.continues().await;
    assert!(!serving.is_finished(), "the grace period must last");
    raise(Signal::SIGTERM);
    let ended = timeout(SOON, serving).await;
    ended
        .expect("the server ends before 600 s")
        .unwrap()
        .unwrap();
    chat.replies
        .message()
        .await
        .expect_err("the connection must be cut");
    assert!(TcpStream::connect(&address).await.is_err());
}

/// Starts the greeter example and returns it with its output and its address.
async fn greeter_server(
    world: &World,
) -> (tokio::process::Child, support::program::Output, String) {
    let mut server = example("greeter_server")
        .env("ETCD_ENDPOINTS", world.etcd.endpoint(0).unwrap())
        .spawn()
        .unwrap();
    let log = lines(&mut server);
    let by_hand = client(&world.etcd).await;
    let mut address = None;
    eventually("the server is registered", async || {
        let keys = list(&by_hand, "/gRPC/helloworld.Greeter/").await;
        address = keys.first().map(|(key, ..)| key.clone());
        address.is_some()
    })
    .await;
    let address = address.unwrap();
    let address = address.rsplit_once('/').unwrap().1.to_owned();
    (server, log, address)
}

#[tokio::test]
async fn a_process_logs_each_phase_in_order_and_exits_successfully() {
    let world = World::new().await;
    let (mut server, mut log, address) = greeter_server(&world).await;
    let _silent = TcpStream::connect(&address).await.unwrap();
    let mut chat = Chat::start(&mut connect(&address).await).await;
    signal(&server, Signal::SIGTERM);
    line_with(&mut log, "shutdown started").await;
    line_with(&mut log, "deregistered").await;
    line_with(&mut log, "grace period").await;
    assert_eq!(world.keys().await, 0);
    let line = line_with(&mut log, "closed the listener").await;
    assert!(line.contains("connections=2"), "{line}");
    chat.continues().await;
    chat.ends().await;
    let status = timeout(SOON, server.wait()).await.unwrap().unwrap();
    assert!(status.success());
}

/// Sends two signals to a server while etcd is frozen. With `answers`, etcd is thawed after the second signal. Returns whether the key was
/// left to expire with its lease.
async fn signal_twice(world: &mut World, answers: bool) -> bool {
    let (mut server, mut log, _) = greeter_server(world).await;
    world.etcd.freeze(0).await.unwrap();
    signal(&server, Signal::SIGTERM);
    line_with(&mut log, "shutdown started").await;
    signal(&server, Signal::SIGTERM);
    line_with(&mut log, "second signal").await;
    let start = Instant::now();
    if answers {
        world.etcd.thaw(0).await.unwrap();
    }
    let status = timeout(SOON, server.wait()).await.unwrap().unwrap();
    assert!(status.success());
    let took = since(start);
    // If etcd does not respond, a graceful shutdown takes about 6 s: 5 s for the deregistration, and 1 s for the grace period.
    assert!(took < Duration::from_secs(5), "{took:?}");
    if !answers {
        world.etcd.thaw(0).await.unwrap();
    }
    let left = rest(&mut log).await.contains("when its lease expires");
    if answers {
        world.counts(0).await;
    }
    left
}

#[tokio::test]
async fn a_second_signal_waits_briefly_for_the_deregistration() {
    let mut world = World::new().await;
    // After the second signal, the server waits half a second for the deregistration. A busy machine may need longer, so there are five
    // tries.
    let mut left = true;
    for _ in 0..5 {
        left = left && signal_twice(&mut world, true).await;
    }
    assert!(!left, "etcd responded, so the key must be deleted");
    assert!(
        signal_twice(&mut world, false).await,
        "etcd did not respond, so the key must remain"
    );
}
