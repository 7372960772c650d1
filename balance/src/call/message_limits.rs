//! The limits on the size of messages, which a service config can set.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tonic::Status;
use tonic::body::Body;

use super::method_config::MethodSettings;
use crate::metrics::MessageSize;
use crate::transport::request_body::Outgoing;

/// The limits of a call on the size of one message in bytes, as it is sent: after compression, and without the prefix of five bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MessageLimits {
    request: u32,
    response: u32,
}

impl MessageLimits {
    /// No limit, because the length of a message in gRPC has 32 bits.
    pub(super) const NONE: Self = Self {
        request: u32::MAX,
        response: u32::MAX,
    };

    pub(super) fn of(settings: &MethodSettings) -> Self {
        Self {
            request: settings.max_request_bytes.unwrap_or(u32::MAX),
            response: settings.max_response_bytes.unwrap_or(u32::MAX),
        }
    }

    /// Checks the messages of a request. Returns an error if a message is too large. A body that is not available yet yields the error when
    /// the message is read.
    pub(super) fn check(self, body: Outgoing, service: &str) -> Result<Outgoing, Status> {
        if self.request == u32::MAX {
            return Ok(body);
        }
        let mut check = MessageCheck::new(self.request, REQUEST);
        let rejected = |reason: String| {
            Status::resource_exhausted(format!("call of {service:?} was not sent: {reason}"))
        };
        match body {
            Outgoing::Empty => Ok(Outgoing::Empty),
            Outgoing::Single(frame) => {
                check.add(&frame).map_err(rejected)?;
                Ok(Outgoing::Single(frame))
            }
            Outgoing::Stream { read, rest } => {
                for frame in &read {
                    check.add(frame).map_err(rejected)?;
                }
                let rest = Body::new(CheckedBody { body: rest, check });
                Ok(Outgoing::Stream { read, rest })
            }
        }
    }

    /// Returns the check of the response, or `None` if its messages have no limit.
    pub(super) fn of_response(self) -> Option<Box<MessageCheck>> {
        let limit = self.response;
        (limit != u32::MAX).then(|| Box::new(MessageCheck::new(limit, RESPONSE)))
    }
}

/// Compares the sizes of the messages in a body with a limit.
#[derive(Debug)]
pub(super) struct MessageCheck {
    limit: u32,
    size: MessageSize,
    /// The kind of the message and the field of the service config, for the error.
    names: (&'static str, &'static str),
}

impl MessageCheck {
    fn new(limit: u32, names: (&'static str, &'static str)) -> Self {
        Self {
            limit,
            size: MessageSize::default(),
            names,
        }
    }

    /// Adds the next frame of the body. Returns an error as soon as the prefix of a message shows that the message is too large.
    pub(super) fn add(&mut self, frame: &[u8]) -> Result<(), String> {
        self.size.add(frame);
        let (largest, limit, (kind, field)) = (self.size.largest(), self.limit, self.names);
        if largest <= limit {
            return Ok(());
        }
        Err(format!(
            "a {kind} message has {largest} bytes, and the limit is {limit} ({field} in the service config)"
        ))
    }
}

/// The rest of a request body, whose messages are checked when they are read.
struct CheckedBody {
    body: Body,
    check: MessageCheck,
}

impl http_body::Body for CheckedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
            && let Err(reason) = self.check.add(data)
        {
            return Poll::Ready(Some(Err(Status::resource_exhausted(reason))));
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

const REQUEST: (&str, &str) = ("request", "maxRequestMessageBytes");
const RESPONSE: (&str, &str) = ("response", "maxResponseMessageBytes");

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    fn message(length: u32) -> Bytes {
        let mut frame = vec![0];
        frame.extend(length.to_be_bytes());
        frame.resize(5 + length as usize, 7);
        frame.into()
    }

    fn limits(request: u32) -> MessageLimits {
        MessageLimits {
            request,
            response: u32::MAX,
        }
    }

    #[test]
    fn a_message_of_the_limit_is_sent_and_a_larger_one_is_not() {
        let check = |length| limits(10).check(Outgoing::Single(message(length)), "greeter");
        assert!(check(10).is_ok());
        let status = check(11).expect_err("a message above the limit");
        assert_eq!(status.code(), Code::ResourceExhausted);
        let reason = "a request message has 11 bytes, and the limit is 10";
        assert!(status.message().contains(reason), "{status:?}");
        let unlimited = MessageLimits::NONE.check(Outgoing::Single(message(11)), "greeter");
        assert!(unlimited.is_ok());
    }

    #[tokio::test]
    async fn a_later_message_of_a_stream_is_checked_when_it_is_read() {
        let rest = Body::new(http_body_of([message(3), message(11)]));
        let read = vec![message(10)];
        let checked = limits(10).check(Outgoing::Stream { read, rest }, "greeter");
        let Ok(Outgoing::Stream { mut rest, .. }) = checked else {
            panic!("the messages that were read are below the limit");
        };
        let mut next = async || {
            std::future::poll_fn(|cx| http_body::Body::poll_frame(Pin::new(&mut rest), cx)).await
        };
        assert!(next().await.is_some_and(|frame| frame.is_ok()));
        let status = next().await.expect("a frame").expect_err("an error");
        assert_eq!(status.code(), Code::ResourceExhausted);
        let read = vec![message(10), message(11)];
        let rest = Body::default();
        assert!(
            limits(10)
                .check(Outgoing::Stream { read, rest }, "greeter")
                .is_err()
        );
    }

    /// A body of these frames.
    fn http_body_of<const N: usize>(frames: [Bytes; N]) -> Frames {
        Frames(frames.into_iter().collect())
    }

    struct Frames(std::collections::VecDeque<Bytes>);

    impl http_body::Body for Frames {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            Poll::Ready(self.0.pop_front().map(|frame| Ok(Frame::data(frame))))
        }
    }
}
