//! The connections that a server has accepted. [`Connection`] is used in place of tonic's own type, so that the server can count and close
//! connections.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::Connected;

use super::opening::Opening;

/// State that the server shares with its connections.
#[derive(Clone, Debug, Default)]
pub(super) struct Connections {
    /// Cancelled when the listener must close.
    draining: CancellationToken,
    /// Cancelled when connections on which the client has not started HTTP must close.
    unopened: CancellationToken,
    /// Cancelled when every connection must close.
    cut: CancellationToken,
    gauges: Arc<Gauges>,
}

#[derive(Debug, Default)]
struct Gauges {
    open: Arc<AtomicUsize>,
    /// Set before `unopened` or `cut` is cancelled. A connection reads this flag on every operation. It polls the tokens, which take a
    /// lock, only if the flag is set or if the operation is pending.
    ending: AtomicBool,
}

impl Connections {
    /// Returns the gauge of the open connections, for the registration.
    pub(super) fn gauge(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.gauges.open)
    }

    /// Returns the number of open connections.
    pub(super) fn open(&self) -> usize {
        self.gauges.open.load(Ordering::Relaxed)
    }

    /// Closes the listener. Each accepted connection then ends by itself after its last call.
    pub(super) fn drain(&self) {
        self.draining.cancel();
    }

    /// Closes connections on which the client has not started HTTP. A graceful shutdown does not end such connections.
    pub(super) fn cut_unopened(&self) {
        self.gauges.ending.store(true, Ordering::Release);
        self.unopened.cancel();
    }

    /// Closes the listener and every connection.
    pub(super) fn cut(&self) {
        self.drain();
        self.gauges.ending.store(true, Ordering::Release);
        self.cut.cancel();
    }

    /// Completes when the listener must close.
    pub(super) fn draining(&self) -> WaitForCancellationFutureOwned {
        self.draining.clone().cancelled_owned()
    }
}

/// An accepted connection that the server can close. After the close, every operation on the connection fails. If only reads failed, hyper
/// would retry the flush and never end.
#[derive(Debug)]
pub(super) struct Connection<T: Connected = TcpStream> {
    stream: T,
    info: T::ConnectInfo,
    unopened: Pin<Box<WaitForCancellationFutureOwned>>,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    gauges: Arc<Gauges>,
    opening: Opening,
}

impl Connection {
    /// Wraps a TCP connection, and sets the options of its socket.
    pub(super) fn tcp(stream: TcpStream, connections: &Connections) -> Self {
        // A call consists of a few small frames in each direction. Nagle's algorithm would delay the last frame by one round trip.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "could not set TCP_NODELAY");
        }
        let keepalive = socket2::TcpKeepalive::new().with_time(TCP_KEEPALIVE);
        if let Err(error) = socket2::SockRef::from(&stream).set_tcp_keepalive(&keepalive) {
            tracing::debug!(%error, "could not set TCP keep-alive");
        }
        Self::new(stream, connections)
    }
}

impl<T: Connected> Connection<T> {
    pub(super) fn new(stream: T, connections: &Connections) -> Self {
        connections.gauges.open.fetch_add(1, Ordering::Relaxed);
        Self {
            info: stream.connect_info(),
            stream,
            unopened: Box::pin(connections.unopened.clone().cancelled_owned()),
            cut: Box::pin(connections.cut.clone().cancelled_owned()),
            gauges: Arc::clone(&connections.gauges),
            opening: Opening::default(),
        }
    }

    /// Runs an operation on the socket, unless the server has closed the connection. If the server closes the connection while the
    /// operation is pending, the task is woken.
    fn poll_unless_ended<O>(
        &mut self,
        cx: &mut Context<'_>,
        operation: impl FnOnce(Pin<&mut T>, &mut Context<'_>) -> Poll<io::Result<O>>,
    ) -> Poll<io::Result<O>>
    where
        T: Unpin,
    {
        if self.gauges.ending.load(Ordering::Acquire) {
            self.check_ended(cx)?;
        }
        let outcome = operation(Pin::new(&mut self.stream), cx);
        if outcome.is_pending() {
            self.check_ended(cx)?;
        }
        outcome
    }

    /// Returns an error if the server has closed the connection. Otherwise, registers the task to be woken when the server closes it.
    fn check_ended(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let unopened = !self.opening.is_over() && self.unopened.as_mut().poll(cx).is_ready();
        if unopened || self.cut.as_mut().poll(cx).is_ready() {
            let reason = "the server is shutting down";
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, reason));
        }
        Ok(())
    }
}

/// No field is pinned in place: the stream is `Unpin`, and the other fields are moved or boxed.
impl<T: Connected + Unpin> Unpin for Connection<T> {}

impl<T: Connected> Drop for Connection<T> {
    fn drop(&mut self) {
        self.gauges.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<T: Connected> Connected for Connection<T> {
    type ConnectInfo = T::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        // tonic calls this function when it starts to serve the connection. With TLS, this is after the handshake.
        self.opening.on_http();
        self.info.clone()
    }
}

impl<T: AsyncRead + Connected + Unpin> AsyncRead for Connection<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(self.poll_unless_ended(cx, |stream, cx| stream.poll_read(cx, buf)))?;
        self.opening.on_read(buf.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Connected + Unpin> AsyncWrite for Connection<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(self.poll_unless_ended(cx, |stream, cx| stream.poll_write(cx, buf)))?;
        self.opening.on_write();
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let write =
            |stream: Pin<&mut T>, cx: &mut Context<'_>| stream.poll_write_vectored(cx, bufs);
        let written = ready!(self.poll_unless_ended(cx, write))?;
        self.opening.on_write();
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_unless_ended(cx, AsyncWrite::poll_flush))?;
        self.opening.on_flush();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_unless_ended(cx, AsyncWrite::poll_shutdown)
    }
}

/// Idle time before the first keep-alive probe. With the defaults of Linux (nine probes, 75 s apart), a client that has disappeared
/// silently is detected within 13 minutes.
const TCP_KEEPALIVE: Duration = Duration::from_secs(60);
