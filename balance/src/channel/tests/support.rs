//! Servers on real sockets: tonic's greeter, and a bare `h2` server that the tests control.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::{HeaderMap, Request, Response};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::body::Body;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use super::greeter::NamedGreeter;
use super::greeter::greeter_server::GreeterServer;
use crate::channel::{BalancedChannel, Routing};

pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// Polls until a condition holds.
pub(super) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let poll = async {
        while !condition() {
            sleep(Duration::from_millis(2)).await;
        }
    };
    let held = timeout(PATIENCE, poll).await;
    assert!(held.is_ok(), "timed out waiting until {what}");
}

/// Makes a routed call in a task. The response is dropped when it arrives: while its body is unread, the call counts as in flight.
pub(super) fn spawn_routed(
    channel: &BalancedChannel,
    routing: &Routing,
) -> JoinHandle<Result<(), Status>> {
    let request = Request::post("/helloworld.Greeter/SayHello")
        .body(Body::empty())
        .expect("a request");
    let response = channel.call_routed(routing, request);
    tokio::spawn(async move { response.await.map(drop) })
}

pub(super) async fn in_time<T>(what: &str, future: impl Future<Output = T>) -> T {
    let output = timeout(PATIENCE, future).await;
    output.unwrap_or_else(|_| unreachable!("{what} took too long"))
}

/// Returns a listener on this port of 127.0.0.1. If the port is 0, the system chooses a free port.
pub(super) fn listen(port: u16) -> TcpListener {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_reuseaddr(true).expect("an option");
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    socket.bind(address).expect("a free port");
    socket.listen(1024).expect("a listener")
}

/// Returns an address that refuses connections until a test listens on it. The socket stays bound, so that the system assigns its port to
/// no other socket while the tests run.
pub(super) fn refusing() -> String {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_reuseaddr(true).expect("an option");
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    socket.bind(any).expect("a free port");
    let address = socket.local_addr().expect("an address");
    std::mem::forget(socket);
    address.to_string()
}

/// Returns a listener and its address. The kernel accepts connections to the address, but no byte is ever sent on them.
pub(super) fn black_hole() -> (std::net::TcpListener, String) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("an address").to_string();
    (listener, address)
}

/// A server with tonic's greeter.
pub(super) struct Greeter {
    name: String,
    pub(super) address: SocketAddr,
    stop: CancellationToken,
    served: JoinHandle<()>,
}

impl Greeter {
    pub(super) fn start(name: &str) -> Self {
        Self::start_with(name, 0, |server| server)
    }

    pub(super) fn start_with(
        name: &str,
        port: u16,
        configure: impl FnOnce(Server) -> Server,
    ) -> Self {
        let listener = listen(port);
        let address = listener.local_addr().expect("an address");
        let stop = CancellationToken::new();
        let greeter = GreeterServer::new(NamedGreeter(name.to_owned()))
            .max_decoding_message_size(32 << 20)
            .max_encoding_message_size(32 << 20);
        let serving = configure(Server::builder())
            .add_service(greeter)
            .serve_with_incoming_shutdown(
                TcpIncoming::from(listener),
                stop.clone().cancelled_owned(),
            );
        let served = tokio::spawn(async move { serving.await.expect("a server") });
        Self {
            name: name.to_owned(),
            address,
            stop,
            served,
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn address(&self) -> String {
        self.address.to_string()
    }

    /// Shuts the server down as tonic does: the server sends a GOAWAY and finishes the calls in flight.
    pub(super) async fn shut_down(self) {
        self.stop.cancel();
        in_time("a graceful shutdown", self.served)
            .await
            .expect("no panic");
    }
}

pub(super) type Accepted = (Request<RecvStream>, SendResponse<Bytes>);

/// A bare `h2` server. Each call is passed to the test or to a function. [`cut`](Self::cut) closes all sockets of the server.
pub(super) struct Raw {
    pub(super) address: SocketAddr,
    pub(super) accepted: mpsc::UnboundedReceiver<Accepted>,
    pub(super) connections: Arc<AtomicUsize>,
    task: AbortHandle,
}

impl Raw {
    pub(super) fn start(configure: impl Fn(&mut h2::server::Builder) + Send + 'static) -> Self {
        Self::start_on(0, configure)
    }

    pub(super) fn start_on(
        port: u16,
        configure: impl Fn(&mut h2::server::Builder) + Send + 'static,
    ) -> Self {
        let listener = listen(port);
        let address = listener.local_addr().expect("an address");
        let (accepts, accepted) = mpsc::unbounded_channel();
        let connections = Arc::new(AtomicUsize::new(0));
        let open = Arc::clone(&connections);
        let task = tokio::spawn(async move {
            let mut tasks = JoinSet::new();
            loop {
                let Ok((socket, _)) = listener.accept().await else {
                    return;
                };
                socket.set_nodelay(true).expect("an option");
                let mut builder = h2::server::Builder::new();
                builder
                    .max_concurrent_reset_streams(100_000)
                    .max_pending_accept_reset_streams(100_000);
                configure(&mut builder);
                let (accepts, open) = (accepts.clone(), Arc::clone(&open));
                tasks.spawn(async move {
                    open.fetch_add(1, Ordering::SeqCst);
                    if let Ok(mut connection) = builder.handshake(socket).await {
                        while let Some(Ok(call)) = connection.accept().await {
                            let _ = accepts.send(call);
                        }
                    }
                    open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Self {
            address,
            accepted,
            connections,
            task: task.abort_handle(),
        }
    }

    /// Starts a server that answers each call with this function, in a task for each call.
    pub(super) fn answering<F, Fut>(
        configure: impl Fn(&mut h2::server::Builder) + Send + 'static,
        answer: F,
    ) -> Cut
    where
        F: Fn(Accepted) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let mut raw = Self::start(configure);
        let (address, task) = (raw.address, raw.task.clone());
        tokio::spawn(async move {
            while let Some(call) = raw.accepted.recv().await {
                tokio::spawn(answer(call));
            }
        });
        Cut { address, task }
    }

    pub(super) fn address(&self) -> String {
        self.address.to_string()
    }

    pub(super) async fn accept(&mut self) -> Accepted {
        in_time("a call", self.accepted.recv())
            .await
            .expect("a live server")
    }

    pub(super) fn try_accept(&mut self) -> Option<Accepted> {
        self.accepted.try_recv().ok()
    }

    /// Closes all sockets at once, as a `kill -9` of the server does.
    pub(super) fn cut(&self) {
        self.task.abort();
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // `answering` moves its `Raw` into a task that runs as long as the server, so this line does not abort the server early.
        self.task.abort();
    }
}

/// A [`Raw`] server whose calls are answered by a function and not by the test.
pub(super) struct Cut {
    pub(super) address: SocketAddr,
    task: AbortHandle,
}

impl Cut {
    pub(super) fn address(&self) -> String {
        self.address.to_string()
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// An empty gRPC message: only the prefix of 5 bytes.
pub(super) const EMPTY_MESSAGE: &[u8] = &[0, 0, 0, 0, 0];

/// Reads the whole request and sends an empty message as the response.
pub(super) async fn reply((request, mut respond): Accepted) {
    let mut body = request.into_body();
    while let Some(Ok(data)) = body.data().await {
        let _ = body.flow_control().release_capacity(data.len());
    }
    let Ok(mut stream) = respond.send_response(grpc_head(), false) else {
        return;
    };
    let _ = stream.send_data(Bytes::from_static(EMPTY_MESSAGE), false);
    let _ = stream.send_trailers(ok());
}

/// Returns the head of a gRPC response.
pub(super) fn grpc_head() -> Response<()> {
    let head = Response::builder().header("content-type", "application/grpc");
    head.body(()).expect("a head")
}

/// Returns the trailers of a successful call.
pub(super) fn ok() -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", "0".parse().expect("a value"));
    trailers
}

/// Waits until this many endpoints are ready.
pub(super) async fn ready(channel: &BalancedChannel, endpoints: usize) {
    let is_ready = |status: &crate::channel::EndpointStatus| {
        status.state == crate::channel::EndpointState::Ready
    };
    until("endpoints are ready", || {
        channel
            .endpoints()
            .iter()
            .filter(|status| is_ready(status))
            .count()
            == endpoints
    })
    .await;
    // The state of an endpoint becomes ready up to a millisecond before picks can use the endpoint, because new connections are published
    // in batches.
    let published = || channel.0.shared().summary().ready;
    let first_choice =
        |status: &crate::channel::EndpointStatus| is_ready(status) && !status.last_resort;
    until("the endpoints are in the ready set", || {
        let statuses = channel.endpoints();
        let first = statuses
            .iter()
            .filter(|status| first_choice(status))
            .count();
        published() >= if first > 0 { first } else { endpoints }
    })
    .await;
}

/// Returns how many steps or seconds a test runs: `full` with `SOAK=1` in the environment, and otherwise `small`. If the result is `small`,
/// prints both numbers.
pub(super) fn soak(what: &str, small: usize, full: usize) -> usize {
    if std::env::var_os("SOAK").is_some_and(|soak| soak == "1") {
        return full;
    }
    println!("{what}: {small}; with SOAK=1: {full}");
    small
}

/// Waits until no call is in flight on any endpoint.
pub(super) async fn idle(channel: &BalancedChannel) {
    until("no call is in flight", || {
        channel
            .endpoints()
            .iter()
            .all(|status| status.in_flight == 0)
    })
    .await;
}

/// Returns the output of a future and its duration.
pub(super) async fn timed<T>(future: impl Future<Output = T>) -> (T, Duration) {
    let start = Instant::now();
    let output = in_time("a call", future).await;
    (output, Instant::now().saturating_duration_since(start))
}

/// Starts a server that answers PINGs, and returns its address. The server answers the first call with a GOAWAY that has `last` as the id
/// of the last stream, and closes the connection.
pub(super) fn shy(last: u8) -> String {
    let listener = listen(0);
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        // The listener is dropped, so that later connections are refused.
        let (mut socket, _) = listener.accept().await.expect("a connection");
        drop(listener);
        let mut preface = [0; 24];
        socket.read_exact(&mut preface).await.expect("a preface");
        let settings = b"\0\0\0\x04\0\0\0\0\0\0\0\0\x04\x01\0\0\0\0";
        socket.write_all(settings).await.expect("settings");
        loop {
            let mut head = [0; 9];
            if socket.read_exact(&mut head).await.is_err() {
                return;
            }
            let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
            socket.read_exact(&mut payload).await.expect("a payload");
            match head[3] {
                6 if head[4] == 0 => {
                    let pong = [b"\0\0\x08\x06\x01\0\0\0\0", &payload[..]].concat();
                    socket.write_all(&pong).await.expect("a pong");
                }
                1 => break,
                _ => {}
            }
        }
        let goaway = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, last, 0, 0, 0, 0];
        socket.write_all(&goaway).await.expect("a goaway");
        let _ = socket.shutdown().await;
        // If a socket is closed while data is unread, the kernel sends a TCP reset, and the client could lose the GOAWAY. So the data is
        // read first.
        let _ = socket.read_to_end(&mut Vec::new()).await;
    });
    address.to_string()
}

/// An address whose connection requests get no response: the accept queue of its listener is full, so the kernel drops the packets.
pub(super) struct Hole {
    address: SocketAddr,
    _listener: TcpListener,
    _queue: Vec<TcpStream>,
}

impl Hole {
    pub(super) async fn dig() -> Self {
        let socket = TcpSocket::new_v4().expect("a socket");
        let local = SocketAddr::from(([127, 0, 0, 1], 0));
        socket.bind(local).expect("a free port");
        let listener = socket.listen(1).expect("a listener");
        let address = listener.local_addr().expect("an address");
        let mut queue = Vec::new();
        while let Ok(connected) =
            timeout(Duration::from_millis(200), TcpStream::connect(address)).await
        {
            queue.push(connected.expect("a connection"));
            assert!(queue.len() < 1_000, "the queue never fills");
        }
        Self {
            address,
            _listener: listener,
            _queue: queue,
        }
    }

    pub(super) fn address(&self) -> String {
        self.address.to_string()
    }
}

/// Returns an address that forwards to `target`, and a switch that stops all bytes between the two without closing a connection.
pub(super) fn valve(target: SocketAddr) -> (SocketAddr, watch::Sender<bool>) {
    let listener = listen(0);
    let address = listener.local_addr().expect("an address");
    let (shut, is_shut) = watch::channel(false);
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            let mut is_shut = is_shut.clone();
            tokio::spawn(async move {
                let mut far = TcpStream::connect(target).await.expect("a connection");
                tokio::select! {
                    _ = tokio::io::copy_bidirectional(&mut near, &mut far) => return,
                    _ = is_shut.wait_for(|shut| *shut) => {}
                }
                // Keeps the sockets open until the switch is dropped.
                while is_shut.changed().await.is_ok() {}
            });
        }
    });
    (address, shut)
}
