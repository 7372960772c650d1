//! Response bodies on their way in.

use std::collections::VecDeque;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::RecvStream;
use http::HeaderMap;
use http_body::Frame;
use tonic::Status;

use super::request_body::{Pump, Pumped};

/// A response's body. Dropping it resets the stream unless it has ended.
#[derive(Debug)]
pub(crate) struct Incoming {
    stream: RecvStream,
    /// The request body ends with the response.
    pump: Option<Pump>,
    data_ended: bool,
    ahead: Option<Box<Ahead>>,
}

/// What was read of a response before its caller asked for it.
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

    /// Takes the request's body back, for another try. None if there is no pump, or nobody said when it started that this might come.
    pub(crate) async fn recall(&mut self) -> Option<Pumped> {
        self.pump.take()?.recall().await
    }

    /// Whether the peer has sent everything, read or not.
    pub(crate) fn is_complete(&self) -> bool {
        self.stream.is_end_stream()
    }

    /// Reads on, and keeps what comes. Ready once no more is to be waited for: at the response's end, or where it breaks, or when what is
    /// kept is enough.
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

    /// Whether anything was read ahead.
    pub(crate) fn has_begun(&self) -> bool {
        let ahead = self.ahead.as_ref();
        ahead.is_some_and(|ahead| !ahead.frames.is_empty())
    }

    /// Whether reading ahead has found the response broken.
    pub(crate) fn is_broken(&self) -> bool {
        let ahead = self.ahead.as_ref();
        ahead.is_some_and(|ahead| ahead.broken.is_some())
    }

    /// What has broken the response, if reading ahead has found it broken.
    pub(crate) fn take_broken(&mut self) -> Option<Broken> {
        self.ahead.as_mut()?.broken.take()
    }

    /// The next frame; its room in the windows is given back at once.
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
                    // It fails only on a stream that is gone already.
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

    /// The request is over when its response is: the server's handler is not kept waiting for the rest.
    fn end_pump(&mut self) {
        // Asked only where it matters: it takes h2's lock.
        if self.pump.is_some() && self.stream.is_end_stream() {
            self.pump = None;
        }
    }

    fn broken(&mut self, error: h2::Error, cx: &mut Context<'_>) -> Broken {
        let status = self.pump.take().and_then(|mut pump| pump.poll_error(cx));
        status.map_or(Broken::Stream(error), Broken::Request)
    }
}

/// What ended a response before its end.
#[derive(Debug)]
pub(crate) enum Broken {
    Stream(h2::Error),
    /// The caller's own request body.
    Request(Status),
}

/// How much of a response is read ahead. The peer may send as much again, and a frame, before anybody reads.
const AHEAD: usize = 64 << 10;
