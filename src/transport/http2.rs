//! One HTTP/2 connection: its handshake, the task that drives it, and the one way to send a request on it.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{Ping, PingPong, Reason, SendStream};
use http::Request;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::oneshot;
use tokio::time::{Instant, Sleep};

/// The options of a connection.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Bytes that the peer may send ahead on one stream.
    pub(crate) stream_window: u32,
    /// Bytes that the peer may send ahead on all streams together. Many stream windows, or a few unread streams stop every other call.
    pub(crate) connection_window: u32,
    /// The largest DATA frame that we take: larger frames are fewer wake-ups.
    pub(crate) max_frame_size: u32,
    /// Whether h2's limits against hostile servers are in force.
    pub(crate) abuse_limits: bool,
    pub(crate) keep_alive: Option<KeepAlive>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            stream_window: 1 << 20,
            connection_window: 64 << 20,
            max_frame_size: 256 << 10,
            abuse_limits: false,
            keep_alive: None,
        }
    }
}

impl Settings {
    fn builder(&self) -> h2::client::Builder {
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(self.stream_window)
            .initial_connection_window_size(self.connection_window)
            .max_frame_size(self.max_frame_size)
            .enable_push(false);
        if !self.abuse_limits {
            // Each of these ends the connection, and with it the calls of everybody else, for something an honest caller does: drop
            // half-read responses, or leave a stream of small messages unread.
            builder
                .max_local_error_reset_streams(None)
                .max_concurrent_reset_streams(RESET_STREAMS)
                .data_frame_budget(usize::MAX / 4);
        }
        builder
    }
}

/// Pings that keep a connection alive, whether calls are open or not.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KeepAlive {
    /// From one ping's answer to the next ping.
    pub(crate) interval: Duration,
    /// How long an answer may take; then the connection counts as lost.
    pub(crate) timeout: Duration,
}

/// A connection whose peer has answered on HTTP/2. Dropping it closes the connection once its streams have ended.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Connection {
    limit: Arc<AtomicUsize>,
    send: SendRequest<Bytes>,
    round_trip: Duration,
    /// Its drop tells the connection's task that nobody will send any more.
    _alive: oneshot::Sender<()>,
}

impl Connection {
    /// Shakes hands, waits until the peer has answered a PING, and spawns the task that drives the connection. `on_leave` is called once,
    /// from that task, when the connection can take no more streams.
    ///
    /// The handshake alone proves nothing: it succeeds before anybody has accepted the connection.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes the connection.
    pub(crate) async fn establish<T, F>(
        io: T,
        settings: &Settings,
        on_leave: F,
    ) -> Result<Self, h2::Error>
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
        F: FnOnce(Leave) + Send + Unpin + 'static,
    {
        let (send, mut connection) = settings.builder().handshake::<T, Bytes>(io).await?;
        let started = Instant::now();
        let mut pings = connection.ping_pong();
        if let Some(pings) = &mut pings {
            pings.send_ping(Ping::opaque())?;
        }
        // The peer's SETTINGS are always before its PONG, so the number of streams it allows is known by then. A peer that allows none
        // cannot be used yet.
        let mut pong = pings.is_none();
        let mut round_trip = Duration::ZERO;
        std::future::poll_fn(|cx| {
            let progress = Pin::new(&mut connection).poll(cx);
            if let Poll::Ready(outcome) = progress {
                let gone = || h2::Error::from(Reason::NO_ERROR);
                return Poll::Ready(Err(outcome.err().unwrap_or_else(gone)));
            }
            if let Some(pings) = &mut pings
                && !pong
            {
                ready!(pings.poll_pong(cx))?;
                pong = true;
                round_trip = Instant::now().saturating_duration_since(started);
            }
            if pong && send.current_max_send_streams() > 0 {
                return Poll::Ready(Ok(()));
            }
            Poll::Pending
        })
        .await?;
        let limit = Arc::new(AtomicUsize::new(send.current_max_send_streams()));
        let (alive, released) = oneshot::channel();
        let task = Task {
            connection,
            probe: Some(send.clone()),
            released,
            limit: Arc::clone(&limit),
            pinger: Pinger::new(pings, settings.keep_alive),
            on_leave: Some(on_leave),
        };
        tokio::spawn(task);
        Ok(Self {
            send,
            limit,
            round_trip,
            _alive: alive,
        })
    }

    /// How many streams the peer takes at once. More would wait inside h2, where they cannot be told from sent ones.
    pub(crate) fn max_streams(&self) -> usize {
        // Relaxed: nothing else hangs on it, and the value is the peer's of a moment ago in any case.
        self.limit.load(Ordering::Relaxed)
    }

    /// The first PING's round trip.
    pub(crate) fn round_trip(&self) -> Duration {
        self.round_trip
    }

    /// Opens a stream. It never waits; the caller has made sure that a stream is free.
    pub(crate) fn open(
        &self,
        head: Request<()>,
        end_of_stream: bool,
    ) -> Result<(ResponseFuture, SendStream<Bytes>), OpenError> {
        // A clone has no memory of a stream that waits to be opened, so it never refuses on that ground.
        let mut send = self.send.clone();
        send.send_request(head, end_of_stream).map_err(|error| {
            // The error itself does not tell a connection that is gone from a request that is malformed; the handle does.
            match send.poll_ready(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(Err(error)) => OpenError::Gone(error),
                _ => OpenError::Malformed(error),
            }
        })
    }
}

/// Why no stream was opened. In either case nothing was sent.
#[derive(Debug)]
pub(crate) enum OpenError {
    /// The connection takes no more streams.
    Gone(h2::Error),
    /// The request breaks HTTP/2's rules, on this connection and any other.
    Malformed(h2::Error),
}

/// Why a connection takes no more streams.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Leave {
    #[error("the peer closed the connection")]
    Closed,
    #[error("{0}")]
    Failed(h2::Error),
    #[error("a keep-alive ping was not answered")]
    Unresponsive,
}

impl Leave {
    fn new(outcome: Result<(), h2::Error>) -> Self {
        match outcome {
            Ok(()) => Self::Closed,
            Err(error) => Self::Failed(error),
        }
    }

    /// Whether the peer asked us to go, rather than the connection having broken.
    pub(crate) fn is_graceful(&self) -> bool {
        match self {
            Self::Closed => true,
            Self::Failed(error) => {
                error.is_go_away() && error.is_remote() && error.reason() == Some(Reason::NO_ERROR)
            }
            Self::Unresponsive => false,
        }
    }
}

/// Whether a call that failed with this error before its response's head can be sent again, because the peer has certainly not processed
/// it.
///
/// `is_go_away` alone is not enough: errors that h2 detects by itself have it too, and the peer may have processed the call then.
pub(crate) fn is_unprocessed(error: &h2::Error) -> bool {
    let refused = error.is_reset() && error.reason() == Some(Reason::REFUSED_STREAM);
    error.is_remote() && (error.is_go_away() || refused)
}

/// Drives one connection until it is closed.
struct Task<T, F>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    connection: h2::client::Connection<T, Bytes>,
    /// Asks, after every poll, whether streams can still be opened. It would keep the connection open, so it goes when the last sender
    /// does.
    probe: Option<SendRequest<Bytes>>,
    released: oneshot::Receiver<()>,
    limit: Arc<AtomicUsize>,
    pinger: Option<Pinger>,
    on_leave: Option<F>,
}

impl<T, F> Future for Task<T, F>
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    F: FnOnce(Leave) + Send + Unpin + 'static,
{
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        if let Poll::Ready(outcome) = Pin::new(&mut this.connection).poll(cx) {
            this.leave(Leave::new(outcome));
            return Poll::Ready(());
        }
        if this.probe.is_some() && Pin::new(&mut this.released).poll(cx).is_ready() {
            this.probe = None;
        }
        if let Some(probe) = &mut this.probe {
            this.limit
                .store(probe.current_max_send_streams(), Ordering::Relaxed);
            if let Poll::Ready(Err(error)) = probe.poll_ready(cx) {
                this.probe = None;
                this.leave(Leave::Failed(error));
            }
        }
        if let Some(pinger) = &mut this.pinger
            && pinger.poll_lost(cx).is_ready()
        {
            // Dropping the connection fails its streams with an I/O error, which is what happened to them.
            this.leave(Leave::Unresponsive);
            return Poll::Ready(());
        }
        Poll::Pending
    }
}

impl<T, F> Task<T, F>
where
    T: AsyncRead + AsyncWrite + Unpin,
    F: FnOnce(Leave),
{
    fn leave(&mut self, why: Leave) {
        if let Some(on_leave) = self.on_leave.take() {
            on_leave(why);
        }
    }
}

/// The one sender of PINGs on a connection: h2 holds one at a time. After the ready check it serves the keep-alive.
struct Pinger {
    pings: PingPong,
    keep_alive: KeepAlive,
    timer: Pin<Box<Sleep>>,
    waiting: bool,
}

impl Pinger {
    fn new(pings: Option<PingPong>, keep_alive: Option<KeepAlive>) -> Option<Self> {
        let keep_alive = keep_alive?;
        Some(Self {
            pings: pings?,
            keep_alive,
            timer: Box::pin(tokio::time::sleep(keep_alive.interval)),
            waiting: false,
        })
    }

    /// Ready when a ping was not answered in time.
    fn poll_lost(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            if self.waiting && self.pings.poll_pong(cx).is_ready() {
                self.waiting = false;
                self.arm(self.keep_alive.interval);
            }
            ready!(self.timer.as_mut().poll(cx));
            // A ping that cannot be sent belongs to a connection that ends by itself.
            if self.waiting || self.pings.send_ping(Ping::opaque()).is_err() {
                return Poll::Ready(());
            }
            self.waiting = true;
            self.arm(self.keep_alive.timeout);
        }
    }

    fn arm(&mut self, wait: Duration) {
        let now = Instant::now();
        self.timer
            .as_mut()
            .reset(now.checked_add(wait).unwrap_or(now));
    }
}

/// Streams that we have reset and whose late frames are still expected, without an error for the connection.
const RESET_STREAMS: usize = 1024;
