//! Request bodies: read from the caller and sent under flow control.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use h2::{Reason, SendStream};
use http_body::Body as _;
use tokio::task::{JoinError, JoinHandle};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::Status;
use tonic::body::Body;

/// A request body, after its beginning was read in the caller's task.
#[derive(Debug)]
pub(crate) enum Outgoing {
    /// There is no body, and the head ends the stream.
    Empty,
    /// The whole body is one frame, as in every unary call.
    Single(Bytes),
    /// Any other body.
    Stream {
        /// The frames that were already read, in order.
        read: Vec<Bytes>,
        rest: Body,
    },
}

impl Outgoing {
    /// Reads the part of the body that is available now. Two polls are enough to recognise a unary call.
    pub(crate) fn gather(mut body: Body, cx: &mut Context<'_>) -> Result<Self, Status> {
        if body.is_end_stream() {
            return Ok(Self::Empty);
        }
        let first = match poll_data(&mut body, cx)? {
            Poll::Ready(None) => return Ok(Self::Empty),
            Poll::Ready(Some(first)) => first,
            Poll::Pending => {
                let read = Vec::new();
                return Ok(Self::Stream { read, rest: body });
            }
        };
        if body.is_end_stream() {
            return Ok(Self::Single(first));
        }
        let read = match poll_data(&mut body, cx)? {
            Poll::Ready(None) => return Ok(Self::Single(first)),
            Poll::Ready(Some(second)) => vec![first, second],
            Poll::Pending => vec![first],
        };
        Ok(Self::Stream { read, rest: body })
    }
}

/// Polls for the next data frame. Skips empty frames. Trailers count as the end of the body, because gRPC requests have no trailers.
fn poll_data(body: &mut Body, cx: &mut Context<'_>) -> Result<Poll<Option<Bytes>>, Status> {
    loop {
        return match Pin::new(&mut *body).poll_frame(cx) {
            Poll::Pending => Ok(Poll::Pending),
            Poll::Ready(None) => Ok(Poll::Ready(None)),
            Poll::Ready(Some(Err(status))) => Err(status),
            Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                Ok(data) if data.is_empty() => continue,
                Ok(data) => Ok(Poll::Ready(Some(data))),
                Err(_) => Ok(Poll::Ready(None)),
            },
        };
    }
}

/// Whether a body can be recalled: taken back from its [`Pump`] (the task that sends the body) while the stream is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Recall {
    Never,
    /// The body can be recalled, because the call is possibly sent again after an error in its response.
    Possible,
}

/// The task that sends a request body. Dropping the pump stops the task, and resets the stream unless the stream has ended.
#[derive(Debug)]
pub(crate) struct Pump {
    task: JoinHandle<Pumped>,
    recall: Option<CancellationToken>,
}

impl Pump {
    pub(super) fn start(
        stream: SendStream<Bytes>,
        read: Vec<Bytes>,
        rest: Body,
        recall: Recall,
    ) -> Self {
        let recall = (recall == Recall::Possible).then(CancellationToken::new);
        let recalled = recall
            .clone()
            .map(|recall| Box::pin(recall.cancelled_owned()));
        let sending = Sending {
            stream,
            recalled,
            finished: false,
        };
        let task = tokio::spawn(pump(sending, read, rest));
        Self { task, recall }
    }

    /// Returns whether the body can be recalled while the stream is open.
    pub(super) fn can_be_recalled(&self) -> bool {
        self.recall.is_some()
    }

    /// Takes the body back. Returns `None` if the pump was started with [`Recall::Never`] or its runtime has ended.
    pub(super) async fn recall(self) -> Option<Pumped> {
        // If the pump has already ended, `finish` still returns its result.
        self.recall.as_ref()?.cancel();
        self.finish().await
    }

    /// Waits for the end of a pump whose stream has ended or whose body was recalled. Returns `None` if the pump's runtime has ended.
    pub(super) async fn finish(mut self) -> Option<Pumped> {
        outcome((&mut self.task).await)
    }

    /// Returns the error of the caller's body, if that error ended the call.
    pub(super) fn poll_error(&mut self, cx: &mut Context<'_>) -> Option<Status> {
        match Pin::new(&mut self.task).poll(cx).map(outcome) {
            Poll::Ready(Some(Pumped::Failed(status))) => Some(status),
            _ => None,
        }
    }
}

/// Returns the result of a pump's task. A panic of the body counts as a failure of the body.
fn outcome(ended: Result<Pumped, JoinError>) -> Option<Pumped> {
    match ended {
        Ok(pumped) => Some(pumped),
        Err(error) if error.is_panic() => {
            let status = Status::internal("the stream of request messages has panicked");
            Some(Pumped::Failed(status))
        }
        Err(_) => None,
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The result of a pump.
#[derive(Debug)]
pub(crate) enum Pumped {
    /// The stream has ended or the body was recalled. The body cannot be sent again, because more of it was sent than is kept.
    Spent,
    /// The stream has ended or the body was recalled. The value is the whole body, for another attempt.
    Returned(Outgoing),
    /// The caller's body has returned an error or has panicked.
    Failed(Status),
}

/// A stream on which a request body is sent.
struct Sending {
    stream: SendStream<Bytes>,
    recalled: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
    /// Whether the pump has run to its end.
    finished: bool,
}

impl Drop for Sending {
    /// Resets an unfinished stream. Otherwise, after a panic of the body, the server would wait for the rest of the body, and the caller
    /// would wait for the server.
    fn drop(&mut self) {
        if !self.finished {
            self.stream.send_reset(Reason::CANCEL);
        }
    }
}

impl Sending {
    /// Completes when sending must stop, because the stream has ended or the body was recalled. This function must not be polled after it
    /// has completed.
    fn poll_stop(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(recalled) = &mut self.recalled
            && recalled.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(());
        }
        self.stream.poll_reset(cx).map(drop)
    }
}

async fn pump(mut sending: Sending, read: Vec<Bytes>, rest: Body) -> Pumped {
    let pumped = send_all(&mut sending, read, rest).await;
    sending.finished = true;
    pumped
}

async fn send_all(sending: &mut Sending, read: Vec<Bytes>, mut rest: Body) -> Pumped {
    let mut kept = Kept::default();
    let mut ended = false;
    for frame in &read {
        kept.keep(frame);
    }
    for frame in read {
        if !send(sending, frame).await {
            return kept.into_pumped(rest, ended);
        }
    }
    loop {
        let frame = std::future::poll_fn(|cx| {
            // `poll_stop` is polled first, and registers the waker for the end of the stream.
            if sending.poll_stop(cx).is_ready() {
                return Poll::Ready(None);
            }
            match poll_data(&mut rest, cx) {
                Ok(Poll::Pending) => Poll::Pending,
                Ok(Poll::Ready(frame)) => Poll::Ready(Some(Ok(frame))),
                Err(status) => Poll::Ready(Some(Err(status))),
            }
        });
        match frame.await {
            None => return kept.into_pumped(rest, ended),
            Some(Ok(Some(frame))) => {
                kept.keep(&frame);
                if !send(sending, frame).await {
                    return kept.into_pumped(rest, ended);
                }
            }
            Some(Ok(None)) => {
                ended = true;
                let _ = sending.stream.send_data(Bytes::new(), true);
                // The task waits for the end of the stream, because the peer may still refuse the call. In that case the body is returned
                // for another attempt.
                std::future::poll_fn(|cx| sending.poll_stop(cx)).await;
                return kept.into_pumped(rest, ended);
            }
            Some(Err(status)) => {
                sending.stream.send_reset(Reason::CANCEL);
                return Pumped::Failed(status);
            }
        }
    }
}

/// Sends a frame as the peer's windows allow. Returns true if the whole frame was sent, and false if sending must stop.
async fn send(sending: &mut Sending, mut frame: Bytes) -> bool {
    while !frame.is_empty() {
        // Capacity is reserved only for bytes that are ready to be sent, and only a little at a time, because other calls on the connection
        // cannot use the capacity that a stalled call has reserved.
        let wanted = frame.len().min(RESERVATION);
        sending.stream.reserve_capacity(wanted);
        let capacity = std::future::poll_fn(|cx| {
            if sending.poll_stop(cx).is_ready() {
                return Poll::Ready(None);
            }
            sending.stream.poll_capacity(cx)
        });
        let Some(Ok(capacity)) = capacity.await else {
            return false;
        };
        let part = frame.split_to(capacity.min(frame.len()));
        if !part.is_empty() && sending.stream.send_data(part, false).is_err() {
            return false;
        }
    }
    true
}

/// The beginning of a body, kept for another attempt: its first frame, and further frames while the total is small.
#[derive(Debug, Default)]
struct Kept {
    frames: Vec<Bytes>,
    bytes: usize,
    is_over_limit: bool,
}

impl Kept {
    fn keep(&mut self, frame: &Bytes) {
        self.bytes += frame.len();
        if self.is_over_limit || (!self.frames.is_empty() && self.bytes > KEPT) {
            self.is_over_limit = true;
            self.frames = Vec::new();
            return;
        }
        self.frames.push(frame.clone());
    }

    fn into_pumped(self, rest: Body, ended: bool) -> Pumped {
        if self.is_over_limit {
            return Pumped::Spent;
        }
        // A body must not be polled after its end.
        let rest = if ended { Body::empty() } else { rest };
        let read = self.frames;
        Pumped::Returned(Outgoing::Stream { read, rest })
    }
}

/// Maximum number of bytes that a call reserves at a time from the connection's send window.
const RESERVATION: usize = 64 << 10;
/// Limit on the bytes of a streamed request body that are kept for another attempt. The first frame is kept even if it is larger than this
/// limit.
const KEPT: usize = 64 << 10;
