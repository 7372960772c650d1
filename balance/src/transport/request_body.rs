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

/// A request body, as far as it was read in the caller's task.
#[derive(Debug)]
pub(crate) enum Outgoing {
    /// Nothing; the head ends the stream.
    Empty,
    /// One frame at the end of the body: every unary call.
    Single(Bytes),
    /// Anything else.
    Stream {
        /// What was read already, in order.
        read: Vec<Bytes>,
        rest: Body,
    },
}

impl Outgoing {
    /// Reads what the body has to give right now: two polls are enough to know a unary call.
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

/// The next data frame. gRPC requests have no trailers.
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

/// Whether a body that has a pump may be wanted back although its stream is alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Recall {
    Never,
    /// The answer may be an error after which the call is sent again.
    Possible,
}

/// The task that sends a request body. Dropping it ends the task, and resets the stream if its end was not sent.
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

    /// Whether the body may be wanted back while the stream is alive.
    pub(super) fn can_be_recalled(&self) -> bool {
        self.recall.is_some()
    }

    /// Takes the body back. None if nobody said at the start that this might come.
    pub(super) async fn recall(self) -> Option<Pumped> {
        // A pump that has ended by itself has its say all the same.
        self.recall.as_ref()?.cancel();
        self.finish().await
    }

    /// Waits for the end of a pump whose stream is dead. None if its runtime has ended.
    pub(super) async fn finish(mut self) -> Option<Pumped> {
        outcome((&mut self.task).await)
    }

    /// The error of the caller's body, if that is what ended the call.
    pub(super) fn poll_error(&mut self, cx: &mut Context<'_>) -> Option<Status> {
        match Pin::new(&mut self.task).poll(cx).map(outcome) {
            Poll::Ready(Some(Pumped::Failed(status))) => Some(status),
            _ => None,
        }
    }
}

/// A body that panics has failed.
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

/// How a pump ended.
#[derive(Debug)]
pub(crate) enum Pumped {
    /// The whole body is sent, or the stream died after more of it was sent than is kept.
    Spent,
    /// The stream died, and this is the whole body again.
    Returned(Outgoing),
    /// The caller's body failed.
    Failed(Status),
}

/// A stream that a request is sent on.
struct Sending {
    stream: SendStream<Bytes>,
    recalled: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
    /// Whether the pump has come to its end.
    finished: bool,
}

impl Drop for Sending {
    /// Without a reset the server would wait for the rest of a body that has panicked, and the caller for the server.
    fn drop(&mut self) {
        if !self.finished {
            self.stream.send_reset(Reason::CANCEL);
        }
    }
}

impl Sending {
    /// Ready when nothing more is to be sent: the stream is dead, or the body is wanted back. It is not to be polled after that.
    fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<()> {
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
            return kept.give_back(rest, ended);
        }
    }
    loop {
        let frame = std::future::poll_fn(|cx| {
            // Asked first: it also registers for the wake-up that the end of the stream is.
            if sending.poll_over(cx).is_ready() {
                return Poll::Ready(None);
            }
            match poll_data(&mut rest, cx) {
                Ok(Poll::Pending) => Poll::Pending,
                Ok(Poll::Ready(frame)) => Poll::Ready(Some(Ok(frame))),
                Err(status) => Poll::Ready(Some(Err(status))),
            }
        });
        match frame.await {
            None => return kept.give_back(rest, ended),
            Some(Ok(Some(frame))) => {
                kept.keep(&frame);
                if !send(sending, frame).await {
                    return kept.give_back(rest, ended);
                }
            }
            Some(Ok(None)) => {
                ended = true;
                let _ = sending.stream.send_data(Bytes::new(), true);
                // It stays for the case that the peer refuses the whole call.
                std::future::poll_fn(|cx| sending.poll_over(cx)).await;
                return kept.give_back(rest, ended);
            }
            Some(Err(status)) => {
                sending.stream.send_reset(Reason::CANCEL);
                return Pumped::Failed(status);
            }
        }
    }
}

/// Sends a frame as the peer makes room for it. False if the stream is dead.
async fn send(sending: &mut Sending, mut frame: Bytes) -> bool {
    while !frame.is_empty() {
        // Capacity is reserved only for bytes in hand, and little of it: what a parked call holds, the other calls on the connection lack.
        let wanted = frame.len().min(RESERVE);
        sending.stream.reserve_capacity(wanted);
        let capacity = std::future::poll_fn(|cx| {
            if sending.poll_over(cx).is_ready() {
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

/// The beginning of a body, kept for a second try: its first frame, and more while it is small.
#[derive(Debug, Default)]
struct Kept {
    frames: Vec<Bytes>,
    bytes: usize,
    overflown: bool,
}

impl Kept {
    fn keep(&mut self, frame: &Bytes) {
        self.bytes += frame.len();
        if self.overflown || (!self.frames.is_empty() && self.bytes > KEPT) {
            self.overflown = true;
            self.frames = Vec::new();
            return;
        }
        self.frames.push(frame.clone());
    }

    fn give_back(self, rest: Body, ended: bool) -> Pumped {
        if self.overflown {
            return Pumped::Spent;
        }
        // A body must not be polled after its end.
        let rest = if ended { Body::empty() } else { rest };
        let read = self.frames;
        Pumped::Returned(Outgoing::Stream { read, rest })
    }
}

/// What is reserved of a connection's send window at a time.
const RESERVE: usize = 64 << 10;
/// What is kept of a streamed request body beyond its first frame.
const KEPT: usize = 64 << 10;
