//! Response bodies.

use std::collections::VecDeque;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::RecvStream;
use http::HeaderMap;
use http_body::Frame;
use tonic::Status;

use super::request_body::{Pump, Pumped};

/// The body of a response. Dropping the body resets the stream unless the stream has ended.
#[derive(Debug)]
pub(crate) struct Incoming {
    stream: RecvStream,
    /// The task that sends the request body. The pump is stopped at the end of the response.
    pump: Option<Pump>,
    data_ended: bool,
    ahead: Option<Box<Ahead>>,
}

/// The part of a response that was read before the caller polled for it.
#[derive(Debug, Default)]
struct Ahead {
    frames: VecDeque<Frame<Bytes>>,
    bytes: usize,
    ended: bool,
    broken: Option<Broken>,
}

impl Incoming {
    pub(super) fn new(stream: RecvStream, pump: Option<Pump>) -> Self {
        let mut incoming = Self {
            stream,
            pump,
            data_ended: false,
            ahead: None,
        };
        let stays = incoming.pump.as_ref().is_some_and(Pump::can_be_recalled);
        if !stays {
            incoming.end_pump();
        }
        incoming
    }

    /// Takes the request body back for another attempt. Returns `None` if there is no pump, or if the pump cannot be recalled.
    pub(crate) async fn recall(&mut self) -> Option<Pumped> {
        self.pump.take()?.recall().await
    }

    /// Returns whether the peer has ended the stream and everything that it sent was read from the stream.
    pub(crate) fn is_complete(&self) -> bool {
        self.stream.is_end_stream()
    }

    /// Reads ahead and keeps the frames. Completes when the response ends, when an error ends it early, or when [`AHEAD`] bytes are kept.
    pub(crate) fn poll_ahead(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut ahead = self.ahead.take().unwrap_or_default();
        let mut polled = Poll::Ready(());
        while !ahead.ended && ahead.broken.is_none() && ahead.bytes < AHEAD {
            match self.poll_next(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    ahead.bytes += frame.data_ref().map_or(0, Bytes::len);
                    ahead.ended = frame.is_trailers();
                    ahead.frames.push_back(frame);
                }
                Poll::Ready(Some(Err(broken))) => ahead.broken = Some(broken),
                Poll::Ready(None) => ahead.ended = true,
                Poll::Pending => {
                    polled = Poll::Pending;
                    break;
                }
            }
        }
        self.ahead = Some(ahead);
        polled
    }

    /// Returns whether at least one frame that was read ahead is still kept.
    pub(crate) fn has_begun(&self) -> bool {
        let ahead = self.ahead.as_ref();
        ahead.is_some_and(|ahead| !ahead.frames.is_empty())
    }

    /// Returns whether an error of the response was found while reading ahead.
    pub(crate) fn is_broken(&self) -> bool {
        let ahead = self.ahead.as_ref();
        ahead.is_some_and(|ahead| ahead.broken.is_some())
    }

    /// Takes the error that was found while reading ahead.
    pub(crate) fn take_broken(&mut self) -> Option<Broken> {
        self.ahead.as_mut()?.broken.take()
    }

    /// Polls for the next frame. Its bytes are returned to the flow-control windows at once.
    pub(crate) fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        if let Some(ahead) = &mut self.ahead {
            if let Some(frame) = ahead.frames.pop_front() {
                return Poll::Ready(Some(Ok(frame)));
            }
            if let Some(broken) = ahead.broken.take() {
                return Poll::Ready(Some(Err(broken)));
            }
            if ahead.ended {
                return Poll::Ready(None);
            }
            self.ahead = None;
        }
        self.poll_next(cx)
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        while !self.data_ended {
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(data)) => {
                    // An error means that the stream has already ended.
                    let _ = self.stream.flow_control().release_capacity(data.len());
                    self.end_pump();
                    if !data.is_empty() {
                        return Poll::Ready(Some(Ok(Frame::data(data))));
                    }
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(self.broken(error, cx)))),
                None => self.data_ended = true,
            }
        }
        match ready!(self.stream.poll_trailers(cx)) {
            Ok(trailers) => {
                self.pump = None;
                Poll::Ready(trailers.map(|trailers: HeaderMap| Ok(Frame::trailers(trailers))))
            }
            Err(error) => Poll::Ready(Some(Err(self.broken(error, cx)))),
        }
    }

    /// Stops the pump if the response has ended. If the request was not sent completely, this resets the stream, so that the server does
    /// not wait for the rest of the request.
    fn end_pump(&mut self) {
        // `is_end_stream` takes h2's lock, so it is called only if there is a pump.
        if self.pump.is_some() && self.stream.is_end_stream() {
            self.pump = None;
        }
    }

    fn broken(&mut self, error: h2::Error, cx: &mut Context<'_>) -> Broken {
        let status = self.pump.take().and_then(|mut pump| pump.poll_error(cx));
        status.map_or(Broken::Stream(error), Broken::Request)
    }
}

/// The reason why a response ended early.
#[derive(Debug)]
pub(crate) enum Broken {
    Stream(h2::Error),
    /// The error of the caller's own request body.
    Request(Status),
}

/// Limit on the bytes of a response that are read ahead. The last frame may exceed the limit. In addition, h2 may buffer up to one
/// flow-control window.
const AHEAD: usize = 64 << 10;
