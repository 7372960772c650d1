//! Tests of the test peers and links. A bare `h2` client checks the properties that the other tests rely on.

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
        assert_eq!((answered, peer.executed()), (5, 5), "round {round}");
        eventually("the connection is closed", async || peer.open() == 0).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ping_strikes_are_counted_like_the_real_servers() {
    for (police, allowed) in [(Police::Java, 2), (Police::Go, 3)] {
        let peer = Peer::start(Manner {
            police: Some(police),
            ..Manner::default()
        })
        .await;
        let (mut requests, mut pings) = connect(&peer).await;
        // Each response resets the strikes that the server has counted.
        for _ in 0..3 {
            for _ in 0..allowed {
                pings.ping(h2::Ping::opaque()).await.unwrap();
            }
            whole(request(&mut requests).unwrap()).await.unwrap();
        }
        assert_eq!(peer.scolded().len(), 0, "{police:?}");
        let mut answered = 0;
        while pings.ping(h2::Ping::opaque()).await.is_ok() {
            answered += 1;
        }
        println!("{police:?}: {answered} pings were answered");
        eventually("the peer closes the connection", async || {
            peer.scolded().len() == 1
        })
        .await;
        let error = requests
            .ready()
            .await
            .expect_err("the connection is closed");
        assert_eq!(error.reason(), Some(Reason::ENHANCE_YOUR_CALM), "{error:?}");
        assert!(answered <= allowed, "{police:?}: {answered}");
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
    assert!(echoed(&mut flow, 1_000).await, "the flow is new");
    tokio::time::sleep(ms(500)).await;
    assert!(!echoed(&mut flow, 200).await, "the flow is dropped");
    let mut new = TcpStream::connect(link.address).await.unwrap();
    assert!(echoed(&mut new, 1_000).await, "a new flow works");
    link.set(Behaviour::Pass);
    assert!(!echoed(&mut flow, 200).await, "the flow stays dropped");
    assert_eq!((link.accepted(), link.open()), (2, 2));
    drop(flow);
    eventually("the link closes the flow", async || link.open() == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_changes_its_fault_with_open_flows() {
    let link = Link::start(echo().await).await;
    let mut flow = TcpStream::connect(link.address).await.unwrap();
    assert!(echoed(&mut flow, 1_000).await);
    link.set(Behaviour::HalfOpen);
    assert!(echoed(&mut flow, 1_000).await, "the old flow continues");
    let mut new = TcpStream::connect(link.address).await.unwrap();
    assert!(
        !echoed(&mut new, 200).await,
        "a new flow is accepted and not answered"
    );
    link.set(Behaviour::CloseIdle(ms(200)));
    let ended = timeout(ms(2_000), flow.read(&mut [0; 8])).await.unwrap();
    assert_eq!(ended.unwrap(), 0, "an idle flow is closed gracefully");
    link.set(Behaviour::Pass);
    let mut flow = TcpStream::connect(link.address).await.unwrap();
    assert!(echoed(&mut flow, 1_000).await);
    link.set(Behaviour::Refuse);
    let ended = timeout(ms(2_000), flow.read(&mut [0; 8])).await.unwrap();
    assert!(matches!(ended, Ok(0) | Err(_)), "all flows are closed");
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
