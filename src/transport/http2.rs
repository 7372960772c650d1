//! One HTTP/2 connection: its handshake, the task that drives it, and the one way to send a request on it.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{Ping, Reason, SendStream};
use http::Request;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::activity::{Activity, Watched};
use super::pinger::Pinger;
use super::pings::{Action, KeepAlive, Pings};

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
    /// Streams that calls leave free, for what is not a call.
    pub(crate) reserved_streams: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            stream_window: 1 << 20,
            connection_window: 64 << 20,
            max_frame_size: 256 << 10,
            abuse_limits: false,
            keep_alive: None,
            reserved_streams: 0,
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

/// A connection whose peer has answered on HTTP/2. Dropping it closes the connection once its streams have ended.
#[derive(Debug)]
pub(crate) struct Connection {
    limit: Arc<AtomicUsize>,
    reserved: usize,
    send: SendRequest<Bytes>,
    round_trip: Duration,
    activity: Arc<Activity>,
    /// Tells the connection's task of calls that took too long. Its drop says that nobody will send any more.
    suspicions: mpsc::UnboundedSender<()>,
}

impl Connection {
    /// Shakes hands, waits until the peer has answered a PING, and spawns the task that drives the connection. From that task `on_report`
    /// is called with what becomes of the connection.
    ///
    /// The handshake alone proves nothing: it succeeds before anybody has accepted the connection.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes the connection.
    pub(crate) async fn establish<T, F>(
        io: T,
        settings: &Settings,
        on_report: F,
    ) -> Result<Self, h2::Error>
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
        F: FnMut(Report) + Send + Unpin + 'static,
    {
        let activity = Activity::new();
        let io = Watched::new(io, Arc::clone(&activity));
        let handshake = settings.builder().handshake::<_, Bytes>(io);
        let (send, mut connection) = handshake.await?;
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
        let reserved = settings.reserved_streams;
        let limit = for_calls(send.current_max_send_streams(), reserved);
        let limit = Arc::new(AtomicUsize::new(limit));
        let (suspicions, suspected) = mpsc::unbounded_channel();
        let decided = Pings::new(settings.keep_alive, round_trip, Instant::now());
        let task = Task {
            connection,
            probe: Some(send.clone()),
            suspected,
            limit: Arc::clone(&limit),
            reserved,
            pinger: pings.map(|pings| Pinger::new(pings, decided, Arc::clone(&activity))),
            left: false,
            on_report,
        };
        tokio::spawn(task);
        Ok(Self {
            limit,
            reserved,
            send,
            round_trip,
            activity,
            suspicions,
        })
    }

    /// How many calls the peer takes at once. More would wait inside h2, where they cannot be told from sent ones.
    pub(crate) fn max_streams(&self) -> usize {
        // Relaxed: nothing else hangs on it, and the value is the peer's of a moment ago in any case.
        self.limit.load(Ordering::Relaxed)
    }

    /// Whether the streams that calls leave free are there.
    pub(crate) fn has_reserve(&self) -> bool {
        self.send.current_max_send_streams() > self.reserved
    }

    /// The first PING's round trip.
    pub(crate) fn round_trip(&self) -> Duration {
        self.round_trip
    }

    /// A call that was sent `then` has taken too long. Unless the peer was heard of since, it is asked whether it is there.
    pub(crate) fn suspect(&self, then: Instant) {
        if !self.activity.is_heard_since(then) {
            // The task may be gone, and then the connection is as well.
            let _ = self.suspicions.send(());
        }
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

/// What becomes of a connection.
#[derive(Debug)]
pub(crate) enum Report {
    /// The peer does not answer, though nothing says that the connection is gone.
    Stalled,
    /// The peer has answered after all.
    Recovered,
    /// The peer takes more calls at once, or fewer.
    Streams,
    /// The connection takes no more streams. Nothing comes after this.
    Left(Leave),
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

/// How many of the peer's streams calls may have: one at least, or a peer that allows no more than are reserved could not be used.
fn for_calls(streams: usize, reserved: usize) -> usize {
    streams.saturating_sub(reserved).max(streams.min(1))
}

/// Drives one connection until it is closed.
struct Task<T, F>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    connection: h2::client::Connection<Watched<T>, Bytes>,
    /// Asks, after every poll, whether streams can still be opened. It would keep the connection open, so it goes when the last sender
    /// does.
    probe: Option<SendRequest<Bytes>>,
    suspected: mpsc::UnboundedReceiver<()>,
    limit: Arc<AtomicUsize>,
    reserved: usize,
    pinger: Option<Pinger>,
    left: bool,
    on_report: F,
}

impl<T, F> Future for Task<T, F>
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    F: FnMut(Report) + Send + Unpin + 'static,
{
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        if let Poll::Ready(outcome) = Pin::new(&mut this.connection).poll(cx) {
            this.leave(Leave::new(outcome));
            return Poll::Ready(());
        }
        while let Poll::Ready(suspicion) = this.suspected.poll_recv(cx) {
            if suspicion.is_none() {
                this.probe = None;
                break;
            }
            if let Some(pinger) = &mut this.pinger {
                pinger.suspect();
            }
        }
        if let Some(probe) = &mut this.probe {
            let limit = for_calls(probe.current_max_send_streams(), this.reserved);
            if this.limit.load(Ordering::Relaxed) != limit {
                this.limit.store(limit, Ordering::Relaxed);
                (this.on_report)(Report::Streams);
            }
            if let Poll::Ready(Err(error)) = probe.poll_ready(cx) {
                this.probe = None;
                this.leave(Leave::Failed(error));
            }
        }
        while let Some(pinger) = &mut this.pinger
            && let Poll::Ready(action) = pinger.poll(cx)
        {
            match action {
                Action::Stalled if !this.left => (this.on_report)(Report::Stalled),
                Action::Recovered if !this.left => (this.on_report)(Report::Recovered),
                Action::Lost => {
                    // Dropping the connection fails its streams with an I/O error, which is what happened to them.
                    this.leave(Leave::Unresponsive);
                    return Poll::Ready(());
                }
                _ => {}
            }
        }
        Poll::Pending
    }
}

impl<T, F> Task<T, F>
where
    T: AsyncRead + AsyncWrite + Unpin,
    F: FnMut(Report),
{
    fn leave(&mut self, why: Leave) {
        if !std::mem::replace(&mut self.left, true) {
            (self.on_report)(Report::Left(why));
        }
    }
}

/// Streams that we have reset and whose late frames are still expected, without an error for the connection.
const RESET_STREAMS: usize = 1024;
