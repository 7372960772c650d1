//! Tests of the test servers ([`Peer`]) and of the links in front of them ([`Link`]). Other tests rely on their properties.

use std::time::Duration;

use bytes::Bytes;
use h2::Reason;
use h2::client::{ResponseFuture, SendRequest};
use http::Request;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout};

use super::ms;
use super::support::eventually;
use super::support::link::{Behaviour, Link};
use super::support::peer::{Close, How, Manner, Peer, Police, When};

/// Opens a connection whose PINGs the test controls.
async fn connect(peer: &Peer) -> (SendRequest<Bytes>, h2::PingPong) {
    let socket = TcpStream::connect(peer.address).await.unwrap();
    let (requests, mut connection) = h2::client::handshake(socket).await.unwrap();
    let pings = connection.ping_pong().unwrap();
    tokio::spawn(connection);
    (requests, pings)
}

/// Sends a request. Returns `None` once a GOAWAY was received.
fn request(requests: &mut SendRequest<Bytes>) -> Option<ResponseFuture> {
    let request = Request::post("http://peer/helloworld.Greeter/SayHello");
    let sent = requests.send_request(request.body(()).unwrap(), false);
    let (response, mut stream) = match sent {
        Ok(sent) => sent,
        Err(error) => {
            assert!(error.is_go_away(), "{error}");
            return None;
        }
    };
    let _ = stream.send_data(Bytes::from_static(&[0, 0, 0, 0, 0]), true);
    Some(response)
}

/// Reads a response to its end. Returns an error if the response is incomplete.
async fn whole(response: ResponseFuture) -> Result<(), h2::Error> {
    let mut body = response.await?.into_body();
    while let Some(data) = body.data().await {
        let _ = body.flow_control().release_capacity(data?.len());
    }
    body.trailers().await.map(drop)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_up_to_the_last_stream_of_a_goaway_are_answered_and_later_calls_are_not_run() {
    for round in 0..50 {
        let delay = Duration::from_millis(round % 3);
        let peer = Peer::start(Manner {
            close: Some(Close {
                when: When::Requests(5),
                how: How::Goaway,
            }),
            delay,
            ..Manner::default()
        })
        .await;
        let (mut requests, _pings) = connect(&peer).await;
        let mut open = Vec::new();
        for _ in 0..12 {
            // All requests are sent at once. On a busy machine, the GOAWAY may be received before the last request is sent.
            let Ok(ready) = requests.ready().await else {
                break;
            };
            requests = ready;
            let Some(response) = request(&mut requests) else {
                break;
            };
            open.push(response);
        }
        let mut answered = 0;
        for response in open {
            match timeout(ms(5_000), whole(response)).await.unwrap() {
                Ok(()) => answered += 1,
                Err(error) => {
                    assert!(error.is_go_away() && error.is_remote(), "{error:?}");
                    assert_eq!(error.reason(), Some(Reason::NO_ERROR), "{error:?}");
                }
            }
        }
        assert_eq!(
            (answered, peer.executed()),
            (5, 5),
            "round {round}: the server must run and answer exactly five calls"
        );
        eventually("the connection is closed", async || peer.open() == 0).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pings_are_limited_as_grpc_java_and_grpc_go_limit_them() {
    for (police, allowed) in [(Police::Java, 2), (Police::Go, 3)] {
        let peer = Peer::start(Manner {
            police: Some(police),
            ..Manner::default()
        })
        .await;
        let (mut requests, mut pings) = connect(&peer).await;
        // Each response resets the number of PINGs that the server has counted.
        for _ in 0..3 {
            for _ in 0..allowed {
                pings.ping(h2::Ping::opaque()).await.unwrap();
            }
            whole(request(&mut requests).unwrap()).await.unwrap();
        }
        assert_eq!(
            peer.scolded().len(),
            0,
            "{police:?}: no connection may be closed so far"
        );
        let mut answered = 0;
        while pings.ping(h2::Ping::opaque()).await.is_ok() {
            answered += 1;
        }
        println!("{police:?}: {answered} PINGs were answered");
        eventually("the peer closes the connection", async || {
            peer.scolded().len() == 1
        })
        .await;
        let error = requests
            .ready()
            .await
            .expect_err("the server must close the connection");
        assert_eq!(error.reason(), Some(Reason::ENHANCE_YOUR_CALM), "{error:?}");
        assert!(
            answered <= allowed,
            "{police:?}: the server answered too many PINGs: {answered}"
        );
    }
}

/// Starts a server that echoes its input.
async fn echo() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = socket.split();
                let _ = tokio::io::copy(&mut from, &mut to).await;
            });
        }
    });
    address
}

async fn echoed(flow: &mut TcpStream, within: u64) -> bool {
    flow.write_all(b"x").await.unwrap();
    let read = timeout(ms(within), flow.read(&mut [0; 8])).await;
    matches!(read, Ok(Ok(1..)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_drops_idle_flows_permanently_and_accepts_new_ones() {
    let link = Link::behaving(echo().await, Behaviour::Forget(ms(300))).await;
    let mut flow = TcpStream::connect(link.address).await.unwrap();
    assert!(
        echoed(&mut flow, 1_000).await,
        "a new flow must be forwarded"
    );
    tokio::time::sleep(ms(500)).await;
    assert!(
        !echoed(&mut flow, 200).await,
        "an idle flow must be dropped"
    );
    let mut new = TcpStream::connect(link.address).await.unwrap();
    assert!(
        echoed(&mut new, 1_000).await,
        "a new flow must be forwarded"
    );
    link.set(Behaviour::Pass);
    assert!(!echoed(&mut flow, 200).await, "the flow must stay dropped");
    assert_eq!((link.accepted(), link.open()), (2, 2));
    drop(flow);
    eventually("the link closes the flow", async || link.open() == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_behaviour_of_a_link_applies_to_open_flows() {
    let link = Link::start(echo().await).await;
    let mut flow = TcpStream::connect(link.address).await.unwrap();
    assert!(echoed(&mut flow, 1_000).await);
    link.set(Behaviour::HalfOpen);
    assert!(echoed(&mut flow, 1_000).await, "the old flow must continue");
    let mut new = TcpStream::connect(link.address).await.unwrap();
    assert!(
        !echoed(&mut new, 200).await,
        "a new flow must not be answered"
    );
    link.set(Behaviour::CloseIdle(ms(200)));
    let ended = timeout(ms(2_000), flow.read(&mut [0; 8])).await.unwrap();
    assert_eq!(ended.unwrap(), 0, "an idle flow must be closed gracefully");
    link.set(Behaviour::Pass);
    let mut flow = TcpStream::connect(link.address).await.unwrap();
    assert!(echoed(&mut flow, 1_000).await);
    link.set(Behaviour::Refuse);
    let ended = timeout(ms(2_000), flow.read(&mut [0; 8])).await.unwrap();
    assert!(matches!(ended, Ok(0) | Err(_)), "all flows must be closed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_link_limits_the_bytes_per_second() {
    let link = Link::behaving(echo().await, Behaviour::Rate(100_000)).await;
    let flow = TcpStream::connect(link.address).await.unwrap();
    let (mut from, mut to) = flow.into_split();
    let began = Instant::now();
    tokio::spawn(async move { to.write_all(&vec![0; 50_000]).await.map(|()| to) });
    let mut got = vec![0; 50_000];
    from.read_exact(&mut got).await.unwrap();
    let took = Instant::now().saturating_duration_since(began);
    println!("50 kB at 100 kB/s took {took:?}");
    assert!(took > ms(400), "too fast: {took:?}");
    assert!(took < ms(2_000), "too slow: {took:?}");
}
