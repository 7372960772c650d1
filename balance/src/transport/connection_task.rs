//! The task that drives one connection, and the events that it reports.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio::time::Sleep;

use super::activity::{Activity, Watched};
use super::h2_error::is_graceful_goaway;
use super::pinger::Pinger;
use super::stall_detection::{Action, PingCause};
use super::write_batch::Batched;

pub(super) type OnEvent = Box<dyn FnMut(ConnectionEvent) + Send>;

/// An event of a connection.
#[derive(Debug)]
pub(crate) enum ConnectionEvent {
    /// The peer has left a PING unanswered. The connection may still be alive.
    Stalled,
    /// Nothing was read in time, and the PING budget, which [limits the PINGs](super::stall_detection) of a connection, allowed no PING.
    Doubtful,
    /// The peer answers again.
    Recovered,
    /// The peer has changed its limit on concurrent streams.
    StreamLimit,
    /// The connection takes no more streams. This is the last event.
    Closed(CloseReason),
}

/// The reason why a connection takes no more streams.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CloseReason {
    #[error("the peer closed the connection")]
    Closed,
    #[error("{0}")]
    Failed(h2::Error),
    #[error("a keep-alive ping was not answered")]
    Unresponsive,
    /// The runtime of the task has ended, or the task has panicked.
    #[error("the connection's task has ended")]
    Aborted,
}

impl CloseReason {
    fn new(outcome: Result<(), h2::Error>) -> Self {
        match outcome {
            Ok(()) => Self::Closed,
            Err(error) => Self::Failed(error),
        }
    }

    /// Returns whether the peer closed the connection gracefully. If not, the connection was lost.
    pub(crate) fn is_graceful(&self) -> bool {
        match self {
            Self::Closed => true,
            Self::Failed(error) => is_graceful_goaway(error),
            Self::Unresponsive | Self::Aborted => false,
        }
    }
}

/// Drives one connection until it is closed.
pub(super) struct Task<T>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    pub(super) connection: h2::client::Connection<Watched<Batched<T>>, Bytes>,
    /// A second handle of the socket that `connection` uses. The socket collects what h2 writes during a poll, and the task sends it at the
    /// end of the poll.
    pub(super) socket: Batched<T>,
    /// A handle that shows, after every poll, whether streams can still be opened. The handle keeps the connection open, so the task drops
    /// it when the [`Connection`](super::http2::Connection) is dropped.
    pub(super) probe: Option<SendRequest<Bytes>>,
    pub(super) ping_requests: mpsc::UnboundedReceiver<PingCause>,
    pub(super) limit: Arc<AtomicUsize>,
    pub(super) max_header_list: Arc<AtomicU32>,
    pub(super) reserved: usize,
    pub(super) pinger: Option<Pinger>,
    pub(super) activity: Arc<Activity>,
    /// Whether the end of the connection was reported.
    pub(super) is_closed: bool,
    /// The timer of [`LINGER`]. It starts when the peer has ended the connection with an error. When it fires, the task closes the
    /// connection.
    pub(super) linger: Option<Pin<Box<Sleep>>>,
    pub(super) on_event: OnEvent,
}

impl<T> Future for Task<T>
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let polled = self.poll_connection(cx);
        self.socket.poll_end(cx);
        polled
    }
}

impl<T> Task<T>
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    fn poll_connection(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let this = self;
        if let Poll::Ready(outcome) = Pin::new(&mut this.connection).poll(cx) {
            this.report_closed(CloseReason::new(outcome));
            return Poll::Ready(());
        }
        this.poll_ping_requests(cx);
        if let Some(probe) = &mut this.probe {
            let limit = streams_for_calls(probe.current_max_send_streams(), this.reserved);
            if this.limit.load(Ordering::Relaxed) != limit {
                this.limit.store(limit, Ordering::Relaxed);
                (this.on_event)(ConnectionEvent::StreamLimit);
            }
            let max_header_list = this.activity.max_header_list();
            if this.max_header_list.load(Ordering::Relaxed) != max_header_list {
                this.max_header_list
                    .store(max_header_list, Ordering::Relaxed);
            }
            if let Poll::Ready(Err(error)) = probe.poll_ready(cx) {
                this.probe = None;
                if !is_graceful_goaway(&error) {
                    this.linger = Some(Box::pin(tokio::time::sleep(LINGER)));
                }
                this.report_closed(CloseReason::Failed(error));
            }
        }
        if let Some(linger) = &mut this.linger
            && linger.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(());
        }
        while let Some(pinger) = &mut this.pinger
            && let Poll::Ready(action) = pinger.poll(cx)
        {
            if action == Action::Lost {
                // When the connection is dropped, its streams fail with an I/O error.
                this.report_closed(CloseReason::Unresponsive);
                return Poll::Ready(());
            }
            this.report(action);
        }
        Poll::Pending
    }
}

impl<T> Task<T>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    fn poll_ping_requests(&mut self, cx: &mut Context<'_>) {
        while let Poll::Ready(cause) = self.ping_requests.poll_recv(cx) {
            let Some(cause) = cause else {
                self.probe = None;
                return;
            };
            let action = self
                .pinger
                .as_mut()
                .and_then(|pinger| pinger.request(cause));
            if let Some(action) = action {
                self.report(action);
            }
        }
    }

    fn report(&mut self, action: Action) {
        let report = match action {
            Action::Stalled => ConnectionEvent::Stalled,
            Action::Doubtful => ConnectionEvent::Doubtful,
            Action::Recovered => ConnectionEvent::Recovered,
            Action::Ping | Action::Lost => return,
        };
        match action {
            Action::Stalled => self.activity.set_unresponsive(true),
            Action::Doubtful => self.activity.end_waits(),
            _ => self.activity.set_unresponsive(false),
        }
        if !self.is_closed {
            (self.on_event)(report);
        }
    }

    /// Reports the end of the connection, once.
    fn report_closed(&mut self, why: CloseReason) {
        self.activity.set_unresponsive(true);
        if !std::mem::replace(&mut self.is_closed, true) {
            (self.on_event)(ConnectionEvent::Closed(why));
        }
    }
}

impl<T> Drop for Task<T>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    /// Reports the end of the connection, also if the task has panicked or its runtime has ended.
    fn drop(&mut self) {
        self.report_closed(CloseReason::Aborted);
    }
}

/// Returns the number of streams that calls can use: the peer's limit minus the reserved streams. If the peer allows any stream, the result
/// is at least one. Without this minimum, a peer whose limit is not above the number of reserved streams could not be used.
pub(super) fn streams_for_calls(streams: usize, reserved: usize) -> usize {
    streams.saturating_sub(reserved).max(streams.min(1))
}

/// Limit on the time that a connection stays open after the peer has ended it with an error. In this time, the peer may still answer open
/// calls. After an error a peer must close the connection (RFC 9113, section 5.4.1), but Node.js leaves it open. Without this limit, the
/// open calls would wait forever.
const LINGER: Duration = Duration::from_secs(5);
