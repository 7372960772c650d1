//! A gRPC server on bare `h2`. Its [`Manner`] defines how it behaves: well, or with a fault that servers and proxies in production have.
//! The [`wire`] between the socket and `h2` counts, rejects and adds frames.

pub mod answer;
pub mod foreign;
mod wire;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use h2::Reason;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio::task::{JoinHandle, JoinSet};

pub use answer::Answer;

/// Behaviour of a server. The default answers at once and keeps its connections.
#[derive(Clone, Debug, Default)]
pub struct Manner {
    pub answer: Answer,
    /// Delay of the answers `Reply`, `Quiet`, `NoTrailers`, `Http` and `Fail`.
    pub delay: Duration,
    /// The content-type of replies, if not `application/grpc`.
    pub content_type: Option<&'static str>,
    /// Size of the text in each reply. Zero means that a reply contains the name from the request.
    pub reply: usize,
    pub close: Option<Close>,
    pub limit: Option<Limit>,
    pub police: Option<Police>,
    /// Limit on the number of open streams of a connection.
    pub max_streams: Option<u32>,
}

/// When and how a connection is closed.
#[derive(Clone, Copy, Debug)]
pub struct Close {
    pub when: When,
    pub how: How,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// At the request with this number on a connection, counted from 1.
    Requests(u32),
    /// At this age of a connection.
    Age(Duration),
    /// At the first PING response of the server on a connection, before any call. The client usually treats this as a failed dial.
    Pong,
    /// At the first request of a connection, which is not served.
    Unserved,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// nginx: one GOAWAY `NO_ERROR` that names the last stream. Later streams are dropped. The connection is closed when the open streams
    /// have ended.
    Goaway,
    /// gRPC servers: a GOAWAY `NO_ERROR` with the maximum stream ID, a PING, and a second GOAWAY after the PING response.
    Graceful,
    /// grpc-java: like `Graceful`, but the connection is closed at once if a request is received after the PING response.
    Strict,
    /// No GOAWAY. The connection is closed when the open streams have ended.
    Fin,
}

/// Limit on the size of a block of request headers, in bytes on the wire, and the reaction to a larger block.
#[derive(Clone, Copy, Debug)]
pub struct Limit {
    pub bytes: u32,
    /// Whether `SETTINGS_MAX_HEADER_LIST_SIZE` announces the limit.
    pub announced: bool,
    pub beyond: Beyond,
}

#[derive(Clone, Copy, Debug)]
pub enum Beyond {
    /// Sends a GOAWAY with this code, and then closes the connection. The last stream ID in the GOAWAY is lower than that of the request.
    Goaway(Reason),
    /// Closes the connection without a frame.
    Drop,
}

/// The implementation whose rules for PINGs the server enforces. A strike is a PING that counts against the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Police {
    /// `KeepAliveEnforcer` of grpc-java: every PING is a strike. The strikes are reset when the server sends HEADERS or DATA. The third
    /// strike ends the connection.
    Java,
    /// `handlePing` of grpc-go: the first PING after the server has sent HEADERS or DATA is free, and every further PING is a strike. The
    /// third strike ends the connection.
    Go,
}

/// A byte stream of any kind.
trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

type BoxIo = Box<dyn Io>;

/// A running server. Dropping it ends the server and its connections.
pub struct Peer {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

/// State shared by the connections of a server.
struct Shared {
    manner: Mutex<Manner>,
    counts: Counts,
}

impl Shared {
    fn manner(&self) -> Manner {
        self.manner.lock().unwrap().clone()
    }
}

/// Counters of a server.
#[derive(Default)]
pub struct Counts {
    connections: AtomicUsize,
    open: AtomicUsize,
    requests: AtomicUsize,
    executed: AtomicUsize,
    kept: AtomicUsize,
    pings: AtomicUsize,
    /// Lifetimes of the connections that were ended because of too many PINGs.
    scolded: Mutex<Vec<Duration>>,
    oversized: AtomicUsize,
}

impl Counts {
    fn add(counter: &AtomicUsize) {
        counter.fetch_add(1, Ordering::SeqCst);
    }
}

impl Peer {
    /// Starts a server that behaves well.
    pub async fn good() -> Self {
        Self::start(Manner::default()).await
    }

    pub async fn answering(answer: Answer) -> Self {
        let manner = Manner {
            answer,
            ..Manner::default()
        };
        Self::start(manner).await
    }

    pub async fn closing(when: When, how: How) -> Self {
        let manner = Manner {
            close: Some(Close { when, how }),
            ..Manner::default()
        };
        Self::start(manner).await
    }

    pub async fn start(manner: Manner) -> Self {
        Self::at("127.0.0.1:0", manner).await
    }

    pub async fn at(listen: &str, manner: Manner) -> Self {
        Self::accepting(listen, manner, |socket| async {
            Some(Box::new(socket) as _)
        })
        .await
    }

    /// Like `start`, with TLS and the certificate of `localhost`.
    #[cfg(feature = "tls")]
    pub async fn with_tls(manner: Manner, localhost: &super::tls::Localhost) -> Self {
        Self::with_tls_at("127.0.0.1:0", manner, localhost).await
    }

    #[cfg(feature = "tls")]
    pub async fn with_tls_at(
        listen: &str,
        manner: Manner,
        localhost: &super::tls::Localhost,
    ) -> Self {
        let acceptor = localhost.acceptor();
        Self::accepting(listen, manner, move |socket| {
            let secured = acceptor.accept(socket);
            async { Some(Box::new(secured.await.ok()?) as _) }
        })
        .await
    }

    async fn accepting<F, Fut>(listen: &str, manner: Manner, secure: F) -> Self
    where
        F: Fn(tokio::net::TcpStream) -> Fut + Clone + Send + 'static,
        Fut: Future<Output = Option<BoxIo>> + Send,
    {
        let listener = TcpListener::bind(listen).await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            manner: Mutex::new(manner),
            counts: Counts::default(),
        });
        let all = Arc::clone(&shared);
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                while connections.try_join_next().is_some() {}
                let _ = socket.set_nodelay(true);
                Counts::add(&all.counts.connections);
                let (shared, secure) = (Arc::clone(&all), secure.clone());
                connections.spawn(async move {
                    let Some(io) = secure(socket).await else {
                        return;
                    };
                    Counts::add(&shared.counts.open);
                    let open = Open(Arc::clone(&shared));
                    serve(io, shared).await;
                    drop(open);
                });
            }
        });
        Self {
            address,
            shared,
            task,
        }
    }

    /// Changes the behaviour. The part that concerns calls applies at once. The part that concerns connections applies to new connections.
    pub fn set(&self, manner: Manner) {
        *self.shared.manner.lock().unwrap() = manner;
    }

    /// Stops the server with all its connections and waits until its port is free.
    pub async fn stopped(mut self) {
        self.task.abort();
        let _ = (&mut self.task).await;
    }

    /// Returns the number of connections accepted so far.
    pub fn connections(&self) -> usize {
        self.shared.counts.connections.load(Ordering::SeqCst)
    }

    /// Returns the number of open connections.
    pub fn open(&self) -> usize {
        self.shared.counts.open.load(Ordering::SeqCst)
    }

    /// Returns the number of requests whose first frame was received, including dropped and refused requests.
    pub fn requests(&self) -> usize {
        self.shared.counts.requests.load(Ordering::SeqCst)
    }

    /// Returns the number of calls that a handler has begun.
    pub fn executed(&self) -> usize {
        self.shared.counts.executed.load(Ordering::SeqCst)
    }

    /// Returns the number of executed calls with the header `x-kept`.
    pub fn kept(&self) -> usize {
        self.shared.counts.kept.load(Ordering::SeqCst)
    }

    /// Returns the number of received PINGs, without acknowledgements.
    pub fn pings(&self) -> usize {
        self.shared.counts.pings.load(Ordering::SeqCst)
    }

    /// Returns the lifetimes of the connections that were ended because of too many PINGs.
    pub fn scolded(&self) -> Vec<Duration> {
        self.shared.counts.scolded.lock().unwrap().clone()
    }

    /// Returns the number of connections that were ended because of oversized metadata.
    pub fn oversized(&self) -> usize {
        self.shared.counts.oversized.load(Ordering::SeqCst)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Counts one open connection until it is dropped.
struct Open(Arc<Shared>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.counts.open.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Serves one connection with the wire, and with `h2` behind the wire. Returns when the wire has ended.
async fn serve(io: BoxIo, shared: Arc<Shared>) {
    let (near, far) = tokio::io::duplex(PIPE);
    let leave = Arc::new(Notify::new());
    let mut tasks = JoinSet::new();
    tasks.spawn(http2(near, Arc::clone(&shared), Arc::clone(&leave)));
    wire::run(io, far, shared, &leave).await;
}

async fn http2(near: tokio::io::DuplexStream, shared: Arc<Shared>, leave: Arc<Notify>) {
    let manner = shared.manner();
    let mut builder = h2::server::Builder::new();
    builder
        .max_concurrent_reset_streams(100_000)
        .max_pending_accept_reset_streams(100_000)
        .max_local_error_reset_streams(None);
    if let Some(streams) = manner.max_streams {
        builder.max_concurrent_streams(streams);
    }
    if let Some(Limit {
        bytes,
        announced: true,
        ..
    }) = manner.limit
    {
        builder.max_header_list_size(bytes);
    }
    let Ok(mut connection) = builder.handshake(near).await else {
        return;
    };
    // The calls end with the connection.
    let mut calls = JoinSet::new();
    let mut leaves = false;
    loop {
        tokio::select! {
            call = connection.accept() => match call {
                Some(Ok((request, respond))) => {
                    calls.spawn(answer::run(request, respond, Arc::clone(&shared)));
                }
                _ => return,
            },
            () = leave.notified(), if !leaves => {
                leaves = true;
                connection.graceful_shutdown();
            }
            Some(_) = calls.join_next() => {}
        }
    }
}

/// Size of the buffer between the wire and `h2`.
const PIPE: usize = 1 << 20;
