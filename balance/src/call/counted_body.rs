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

/// Returns the body and the size of its messages. The size of a body that a task sends grows while the task reads the body.
pub(super) fn counted(body: Outgoing) -> (Outgoing, Option<SentSize>) {
    match body {
        Outgoing::Empty => (body, Some(SentSize::Known(0))),
        Outgoing::Single(ref frame) => {
            let mut size = MessageSize::default();
            size.add(frame);
            (body, Some(SentSize::Known(size.total())))
        }
        Outgoing::Stream { read, rest } => {
            let mut size = MessageSize::default();
            for frame in &read {
                size.add(frame);
            }
            let total = Arc::new(AtomicU64::new(size.total()));
            let sent = SentSize::Counted(Arc::clone(&total));
            let rest = Body::new(CountedBody {
                body: rest,
                size,
                total,
            });
            (Outgoing::Stream { read, rest }, Some(sent))
        }
    }
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
