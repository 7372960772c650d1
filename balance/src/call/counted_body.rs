//! The size of a request body, for the metrics.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tonic::Status;
use tonic::body::Body;

use crate::metrics::{MessageSize, SentSize};
use crate::transport::request_body::Outgoing;

/// Returns the size of the messages in a body. The size of a body that a task sends grows while the task reads the body.
pub(super) fn count(body: &mut Outgoing) -> SentSize {
    let mut size = MessageSize::default();
    match body {
        Outgoing::Empty => {}
        Outgoing::Single(frame) => size.add(frame),
        Outgoing::Stream { read, rest } => {
            for frame in read {
                size.add(frame);
            }
            let total = Arc::new(AtomicU64::new(size.total()));
            let sent = SentSize::Counted(Arc::clone(&total));
            *rest = Body::new(CountedBody {
                body: std::mem::take(rest),
                size,
                total,
            });
            return sent;
        }
    }
    SentSize::Known(size.total())
}

/// The rest of a request body, whose size is counted when it is read.
struct CountedBody {
    body: Body,
    size: MessageSize,
    total: Arc<AtomicU64>,
}

impl http_body::Body for CountedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
        {
            self.size.add(data);
            self.total.store(self.size.total(), Ordering::Relaxed);
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
