//! The listening socket and the connections it accepts. They are ours and not tonic's, so that we decide when the socket closes and
//! when a connection ends.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Sleep;
use tokio_stream::Stream;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::{Connected, TcpConnectInfo};

/// What the server and its connections share.
#[derive(Clone, Debug, Default)]
pub(super) struct Connections {
    draining: CancellationToken,
    cut: CancellationToken,
    gauges: Arc<Gauges>,
}

#[derive(Debug, Default)]
struct Gauges {
    open: AtomicUsize,
    /// Set before `draining` or `cut` is cancelled: a connection looks at it on every operation, and at the tokens, which lock, only
    /// when it is set or when it has to wait.
    ending: AtomicBool,
}

impl Connections {
    /// How many connections are open.
    pub(super) fn open(&self) -> usize {
        self.gauges.open.load(Ordering::Relaxed)
    }

    /// Ends connections that have never begun; the others end by themselves.
    pub(super) fn drain(&self) {
        self.gauges.ending.store(true, Ordering::Release);
        self.draining.cancel();
    }

    /// Ends every connection.
    pub(super) fn cut(&self) {
        self.gauges.ending.store(true, Ordering::Release);
        self.cut.cancel();
    }

    /// Completes when the connections are drained.
    pub(super) fn drained(&self) -> WaitForCancellationFutureOwned {
        self.draining.clone().cancelled_owned()
    }
}

/// Accepts connections.
#[derive(Debug)]
pub(super) struct Incoming {
    listener: TcpListener,
    connections: Connections,
    /// Set after an accept error: most of them (no file descriptor left) come back at once.
    pause: Option<Pin<Box<Sleep>>>,
}

impl Incoming {
    pub(super) fn bind(address: SocketAddr, connections: Connections) -> io::Result<Self> {
        let socket = socket2::Socket::new(
            socket2::Domain::for_address(address),
            socket2::Type::STREAM,
            Some(socket2::Protocol::TCP),
        )?;
        // A restarted server takes its port back although connections of the old one linger in TIME_WAIT.
        #[cfg(unix)]
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Ok(Self {
            listener: TcpListener::from_std(socket.into())?,
            connections,
            pause: None,
        })
    }

    pub(super) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

impl Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(pause) = &mut self.pause {
            ready!(pause.as_mut().poll(cx));
            self.pause = None;
        }
        match ready!(self.listener.poll_accept(cx)) {
            Ok((stream, _)) => Poll::Ready(Some(Ok(Connection::new(stream, &self.connections)))),
            Err(error) => {
                tracing::warn!(%error, "could not accept a connection");
                self.pause = Some(Box::pin(tokio::time::sleep(ACCEPT_PAUSE)));
                Poll::Ready(Some(Err(error)))
            }
        }
    }
}

/// An accepted connection that can be cut from outside: then every operation on it fails alike. A connection on which only reading fails
/// would go on trying to flush and never end.
#[derive(Debug)]
pub(super) struct Connection {
    stream: TcpStream,
    info: TcpConnectInfo,
    draining: Pin<Box<WaitForCancellationFutureOwned>>,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    gauges: Arc<Gauges>,
    /// How many bytes of the client's HTTP/2 preface are still to come.
    preface_left: usize,
}

impl Connection {
    fn new(stream: TcpStream, connections: &Connections) -> Self {
        // A call is a few small frames each way; Nagle's algorithm would hold the last one back for a round trip.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "could not set TCP_NODELAY");
        }
        let keepalive = socket2::TcpKeepalive::new().with_time(TCP_KEEPALIVE);
        if let Err(error) = socket2::SockRef::from(&stream).set_tcp_keepalive(&keepalive) {
            tracing::debug!(%error, "could not set TCP keep-alive");
        }
        connections.gauges.open.fetch_add(1, Ordering::Relaxed);
        Self {
            info: stream.connect_info(),
            stream,
            draining: Box::pin(connections.draining.clone().cancelled_owned()),
            cut: Box::pin(connections.cut.clone().cancelled_owned()),
            gauges: Arc::clone(&connections.gauges),
            preface_left: PREFACE,
        }
    }

    /// Carries an operation on the socket out, unless the connection is ended; one that has to wait is woken by that, too.
    fn poll_unless_ended<T>(
        &mut self,
        cx: &mut Context<'_>,
        operation: impl FnOnce(Pin<&mut TcpStream>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if self.gauges.ending.load(Ordering::Acquire) {
            self.check_ended(cx)?;
        }
        let outcome = operation(Pin::new(&mut self.stream), cx);
        if outcome.is_pending() {
            self.check_ended(cx)?;
        }
        outcome
    }

    /// Fails if the connection is ended, and otherwise has the task woken when it is.
    fn check_ended(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let unused = self.preface_left > 0 && self.draining.as_mut().poll(cx).is_ready();
        if unused || self.cut.as_mut().poll(cx).is_ready() {
            let reason = "the server is shutting down";
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, reason));
        }
        Ok(())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.gauges.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.info.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(self.poll_unless_ended(cx, |stream, cx| stream.poll_read(cx, buf)))?;
        self.preface_left = self
            .preface_left
            .saturating_sub(buf.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_unless_ended(cx, |stream, cx| stream.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_unless_ended(cx, |stream, cx| stream.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_unless_ended(cx, AsyncWrite::poll_flush)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_unless_ended(cx, AsyncWrite::poll_shutdown)
    }
}

/// The length of the HTTP/2 client preface (RFC 9113, section 3.4). A connection that has not sent it holds a drain up for ever.
const PREFACE: usize = 24;
/// As many as the kernel allows by default (`net.core.somaxconn`), so that a fleet's reconnects are not turned away.
const BACKLOG: i32 = 4096;
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Finds clients that vanished without a word, within minutes: the kernel probes nine times, 75 s apart, by default.
const TCP_KEEPALIVE: Duration = Duration::from_secs(60);
