//! One HTTP/2 connection: its handshake, and the only function that sends a request on it.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{Ping, PingPong, Reason, SendStream, StreamId};
use http::Request;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::activity::{Activity, Watched};
use super::connection_task::{ConnectionEvent, OnEvent, Task, streams_for_calls};
use super::frames::recognise_protocol;
use super::pinger::Pinger;
use super::sent_streams::LastSent;
use super::stall_detection::{KeepAlive, PingCause, Pings};
use super::write_batch::Batched;

/// The options of a connection.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Bytes that the peer may send on one stream before they are read.
    pub(crate) stream_window: u32,
    /// Bytes that the peer may send on all streams together before they are read. The default is the maximum, because with a smaller window
    /// a few unread streams would block all other calls. The stream windows limit the memory.
    pub(crate) connection_window: u32,
    /// The largest frame that the client accepts. With larger frames, a task wakes up less often.
    pub(crate) max_frame_size: u32,
    /// Whether h2's limits against hostile servers are enabled.
    pub(crate) http2_abuse_limits: bool,
    pub(crate) keep_alive: Option<KeepAlive>,
    /// Streams that calls leave free for other uses, such as the health watch.
    pub(crate) reserved_streams: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            stream_window: 1 << 20,
            connection_window: MAX_WINDOW,
            max_frame_size: 256 << 10,
            http2_abuse_limits: false,
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
        if !self.http2_abuse_limits {
            // If one of these limits is reached, h2 closes the connection, and all its calls fail. Well-behaved callers can reach them, if
            // they drop half-read responses or leave a stream of small messages unread.
            builder
                .max_local_error_reset_streams(None)
                .max_concurrent_reset_streams(RESET_STREAMS)
                .data_frame_budget(usize::MAX / 4);
        }
        builder
    }
}

/// A connection whose peer has answered on HTTP/2. After the value is dropped, the connection is closed when its streams have ended.
#[derive(Debug)]
pub(crate) struct Connection {
    limit: Arc<AtomicUsize>,
    /// A copy of the peer's limit on a header list. Calls read this copy and not `activity`, because each read of the connection writes to
    /// the cache lines of `activity`.
    max_header_list: Arc<AtomicU32>,
    reserved: usize,
    send: SendRequest<Bytes>,
    round_trip: Duration,
    activity: Arc<Activity>,
    last_sent: LastSent,
    /// Requests PINGs from the connection's task. Dropping the sender shows the task that no more calls will be sent.
    ping_requests: mpsc::UnboundedSender<PingCause>,
}

/// A connection whose task is not started yet. If several dials to one peer run, only the connection that is kept gets a task.
pub(crate) struct Established {
    connection: Connection,
    start: Box<dyn FnOnce(OnEvent) + Send>,
}

impl Established {
    /// Spawns the task that drives the connection. The task calls `on_event` for each event of the connection.
    pub(crate) fn start<F>(self, on_event: F) -> Connection
    where
        F: FnMut(ConnectionEvent) + Send + Unpin + 'static,
    {
        (self.start)(Box::new(on_event));
        self.connection
    }
}

impl Connection {
    /// Performs the handshake and waits until the peer has answered a PING.
    ///
    /// A completed handshake is not enough, because the client's handshake succeeds before the peer's process has accepted the connection.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes the connection.
    pub(crate) async fn establish<T>(
        io: T,
        settings: &Settings,
        keep_alive: Option<KeepAlive>,
    ) -> Result<Established, HandshakeError>
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let activity = Activity::new();
        let socket = Batched::new(io);
        let handshake = Self::shake_hands(socket, settings, keep_alive, Arc::clone(&activity));
        handshake.await.map_err(|source| HandshakeError {
            speaks: recognise_protocol(&activity.first_bytes()),
            source,
        })
    }

    async fn shake_hands<T>(
        socket: Batched<T>,
        settings: &Settings,
        keep_alive: Option<KeepAlive>,
        activity: Arc<Activity>,
    ) -> Result<Established, h2::Error>
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let io = Watched::new(socket.clone(), Arc::clone(&activity));
        let last_sent = socket.last_sent();
        let handshake = settings.builder().handshake::<_, Bytes>(io);
        let (send, mut connection) = handshake.await?;
        let mut pings = connection.ping_pong();
        let round_trip = ready_check(&mut connection, pings.as_mut(), &send).await?;
        let reserved = settings.reserved_streams;
        let limit = streams_for_calls(send.current_max_send_streams(), reserved);
        let limit = Arc::new(AtomicUsize::new(limit));
        let max_header_list = Arc::new(AtomicU32::new(activity.max_header_list()));
        let task_max_header_list = Arc::clone(&max_header_list);
        let (request_sender, ping_requests) = mpsc::unbounded_channel();
        let policy = Pings::new(keep_alive, round_trip, activity.progress(), Instant::now());
        let pinger = pings.map(|pings| Pinger::new(pings, policy, Arc::clone(&activity)));
        let probe = Some(send.clone());
        let (task_limit, task_activity) = (Arc::clone(&limit), Arc::clone(&activity));
        let start = move |on_event: OnEvent| {
            socket.start();
            tokio::spawn(Task {
                connection,
                socket,
                probe,
                ping_requests,
                limit: task_limit,
                max_header_list: task_max_header_list,
                reserved,
                pinger,
                activity: task_activity,
                is_closed: false,
                linger: None,
                on_event,
            });
        };
        Ok(Established {
            start: Box::new(start),
            connection: Self {
                limit,
                max_header_list,
                reserved,
                send,
                round_trip,
                activity,
                last_sent,
                ping_requests: request_sender,
            },
        })
    }

    /// Returns how many calls may be open at once. Further calls would wait inside h2, where they cannot be distinguished from sent calls.
    pub(crate) fn max_streams(&self) -> usize {
        // Relaxed: no other memory depends on the value, and the peer may have changed it in the meantime anyway.
        self.limit.load(Ordering::Relaxed)
    }

    /// Returns whether the peer allows the reserved streams and at least one stream for calls.
    pub(crate) fn has_reserve(&self) -> bool {
        self.send.current_max_send_streams() > self.reserved
    }

    /// Returns false if the socket has not taken the HEADERS of a stream. The peer has then certainly not processed the stream.
    pub(crate) fn has_sent(&self, stream: StreamId) -> bool {
        self.last_sent.includes(stream)
    }

    /// Returns the round trip time of the first PING.
    pub(crate) fn round_trip(&self) -> Duration {
        self.round_trip
    }

    /// Returns the peer's limit on a header list, in bytes; `u32::MAX` if the peer has announced no limit.
    pub(crate) fn max_header_list(&self) -> u32 {
        self.max_header_list.load(Ordering::Relaxed)
    }

    /// Returns whether the peer has closed the connection because of our PINGs.
    pub(crate) fn has_too_many_pings(&self) -> bool {
        self.activity.has_too_many_pings()
    }

    /// Returns the error code of the peer's GOAWAY.
    pub(crate) fn goaway(&self) -> Option<Reason> {
        self.activity.goaway().map(Reason::from)
    }

    /// Returns the error code of the peer's GOAWAY, if a request on the connection may have caused the GOAWAY. Returns `None` for
    /// `NO_ERROR` and for `too_many_pings`. A call whose stream id is at most the last stream id of the GOAWAY fails when the socket
    /// closes, and the error of that call does not contain the code.
    pub(crate) fn goaway_error(&self) -> Option<Reason> {
        let reason = self.goaway()?;
        (reason != Reason::NO_ERROR && !self.has_too_many_pings()).then_some(reason)
    }

    /// Sets the function that returns whether calls are open on the connection. The keep-alive and the [PING
    /// budget](super::stall_detection) depend on its result.
    pub(crate) fn set_busy(&self, is_busy: impl Fn() -> bool + Send + Sync + 'static) {
        self.activity.set_busy(is_busy);
    }

    /// Returns the time since the last read.
    pub(crate) fn silence(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.activity.last_read())
    }

    /// Requests a PING because a call that was sent at `then` has overrun its deadline. Does nothing if bytes were read since `then`.
    pub(crate) fn request_ping_for_overrun(&self, then: Instant) {
        if !self.activity.has_read_since(then) {
            // The send fails only if the task has ended, and then the connection has ended as well.
            let _ = self.ping_requests.send(PingCause::Overrun);
        }
    }

    /// Requests a PING because a call that was sent at `then` was dropped. Does nothing if bytes were read since `then`.
    pub(crate) fn request_ping_for_drop(&self, then: Instant) {
        if !self.activity.has_read_since(then) {
            let _ = self.ping_requests.send(PingCause::Dropped);
        }
    }

    /// Requests a PING because the connection was silent for a while and another connection was found dead. No call waits for the answer.
    pub(crate) fn request_check(&self) {
        let _ = self.ping_requests.send(PingCause::Sweep);
    }

    /// Returns how many bytes were read.
    pub(crate) fn bytes_read(&self) -> u64 {
        self.activity.progress().bytes
    }

    /// Requests a PING and waits for a byte from the peer. Returns true if the peer sends a byte, and false if it sends none in time or if
    /// the connection ends.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future changes nothing for the connection.
    pub(crate) async fn is_alive(&self) -> bool {
        let mark = self.activity.mark();
        if self.ping_requests.send(PingCause::Silence).is_err() {
            return false;
        }
        // The connection's task usually ends the wait much earlier. The timeout only matters if the task's runtime does not run.
        let answered = self.activity.wait_since(mark);
        tokio::time::timeout(MAX_CHECK_TIME, answered)
            .await
            .unwrap_or(false)
    }

    /// Opens a stream without waiting. The caller must have reserved a stream.
    pub(crate) fn open(
        &self,
        head: Request<()>,
        end_of_stream: bool,
    ) -> Result<(ResponseFuture, SendStream<Bytes>), OpenError> {
        // A handle rejects a request while an earlier stream of the same handle is pending. A clone has no pending stream, so its
        // `send_request` does not reject the request for this reason.
        let mut send = self.send.clone();
        send.send_request(head, end_of_stream).map_err(|error| {
            // The error alone does not show whether the connection is closed or the request is malformed. The state of the handle does.
            match send.poll_ready(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(Err(error)) => OpenError::Gone(error),
                _ => OpenError::Malformed(error),
            }
        })
    }
}

/// Waits until the peer has answered a first PING and allows at least one stream. Returns the round trip time of the PING.
async fn ready_check<T>(
    connection: &mut h2::client::Connection<Watched<Batched<T>>, Bytes>,
    mut pings: Option<&mut PingPong>,
    send: &SendRequest<Bytes>,
) -> Result<Duration, h2::Error>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let started = Instant::now();
    if let Some(pings) = &mut pings {
        pings.send_ping(Ping::opaque())?;
    }
    // The SETTINGS of a peer always precede its PONG, so after the PONG the peer's limit on streams is known. While the peer allows no
    // streams, the connection is not ready.
    let mut round_trip = pings.is_none().then_some(Duration::ZERO);
    std::future::poll_fn(|cx| {
        if let Poll::Ready(outcome) = Pin::new(&mut *connection).poll(cx) {
            let gone = || h2::Error::from(Reason::NO_ERROR);
            return Poll::Ready(Err(outcome.err().unwrap_or_else(gone)));
        }
        if let Some(pings) = &mut pings
            && round_trip.is_none()
        {
            ready!(pings.poll_pong(cx))?;
            round_trip = Some(Instant::now().saturating_duration_since(started));
        }
        match round_trip {
            Some(round_trip) if send.current_max_send_streams() > 0 => Poll::Ready(Ok(round_trip)),
            _ => Poll::Pending,
        }
    })
    .await
}

/// The reason why a peer is not ready for calls.
#[derive(Debug)]
pub(crate) struct HandshakeError {
    /// The protocol that the peer seems to speak instead of HTTP/2.
    pub(crate) speaks: Option<&'static str>,
    pub(crate) source: h2::Error,
}

impl fmt::Display for HandshakeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.speaks {
            Some(protocol) => write!(f, "the peer speaks {protocol}"),
            None => f.write_str("the peer does not answer on HTTP/2"),
        }
    }
}

impl std::error::Error for HandshakeError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        // If the other protocol is known, h2's error is left out, because it would only describe the bytes of that protocol as an invalid
        // frame.
        self.speaks.is_none().then_some(&self.source)
    }
}

/// The reason why no stream was opened. Nothing was sent in either case.
#[derive(Debug)]
pub(crate) enum OpenError {
    /// The connection takes no more streams.
    Gone(h2::Error),
    /// The request violates HTTP/2, so it fails on every connection.
    Malformed(h2::Error),
}

/// Maximum size of a flow-control window in HTTP/2.
pub(crate) const MAX_WINDOW: u32 = (1 << 31) - 1;
/// Limit on streams that the client has reset and whose late frames are still accepted without a connection error.
const RESET_STREAMS: usize = 1024;
/// Limit on the time that [`Connection::is_alive`] waits if the connection's task does not run.
const MAX_CHECK_TIME: Duration = Duration::from_secs(5);
