//! The connections that a server has accepted. They are ours and not tonic's, so that they can be counted, and ended from outside.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::{Connected, TcpConnectInfo};

use super::opening::Opening;

/// What the server and its connections share.
#[derive(Clone, Debug, Default)]
pub(super) struct Connections {
    draining: CancellationToken,
    unopened: CancellationToken,
    cut: CancellationToken,
    gauges: Arc<Gauges>,
}

#[derive(Debug, Default)]
struct Gauges {
    open: AtomicUsize,
    /// Set before `unopened` or `cut` is cancelled: a connection looks at it on every operation, and at the tokens, which lock, only
    /// when it is set or when it has to wait.
    ending: AtomicBool,
}

impl Connections {
    /// How many connections are open.
    pub(super) fn open(&self) -> usize {
        self.gauges.open.load(Ordering::Relaxed)
    }

    /// Ends the listener. What was accepted ends by itself, once its calls are done.
    pub(super) fn drain(&self) {
        self.draining.cancel();
    }

    /// Ends connections on which no client has begun to speak: nothing would ever end those.
    pub(super) fn cut_unopened(&self) {
        self.gauges.ending.store(true, Ordering::Release);
        self.unopened.cancel();
    }

    /// Ends the listener and every connection.
    pub(super) fn cut(&self) {
        self.drain();
        self.gauges.ending.store(true, Ordering::Release);
        self.cut.cancel();
    }

    /// Completes when the listener is to end.
    pub(super) fn draining(&self) -> WaitForCancellationFutureOwned {
        self.draining.clone().cancelled_owned()
    }
}

/// An accepted connection that can be ended from outside: then every operation on it fails alike. A connection on which only reading
/// fails would go on trying to flush and never end.
#[derive(Debug)]
pub(super) struct Connection {
    stream: TcpStream,
    info: TcpConnectInfo,
    unopened: Pin<Box<WaitForCancellationFutureOwned>>,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    gauges: Arc<Gauges>,
    opening: Opening,
}

impl Connection {
    pub(super) fn new(stream: TcpStream, connections: &Connections) -> Self {
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
            unopened: Box::pin(connections.unopened.clone().cancelled_owned()),
            cut: Box::pin(connections.cut.clone().cancelled_owned()),
            gauges: Arc::clone(&connections.gauges),
            opening: Opening::default(),
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
        let unopened = !self.opening.is_over() && self.unopened.as_mut().poll(cx).is_ready();
        if unopened || self.cut.as_mut().poll(cx).is_ready() {
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
        // tonic asks for it when it starts to serve the connection, which with TLS is after the handshake.
        self.opening.on_http();
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
        self.opening.on_read(buf.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
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
        let write = |stream: Pin<&mut TcpStream>, cx: &mut Context<'_>| {
            stream.poll_write_vectored(cx, bufs)
        };
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

/// Finds clients that vanished without a word, within minutes: the kernel probes nine times, 75 s apart, by default.
const TCP_KEEPALIVE: Duration = Duration::from_secs(60);
