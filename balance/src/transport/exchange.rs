//! One HTTP/2 exchange, from the sent request to the head of its response.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use h2::StreamId;
use h2::client::ResponseFuture;
use http::{Request, Response};

use super::http2::{Connection, OpenError};
use super::request_body::{Outgoing, Pump, Pumped, Recall};
use super::response_body::Incoming;

/// A request that was sent, and whose response head was not received yet. Dropping the exchange resets the stream.
#[derive(Debug)]
pub(crate) struct Exchange {
    response: ResponseFuture,
    pump: Option<Pump>,
}

impl Exchange {
    /// Sends a request. A body of at most one frame is sent immediately; a task sends any other body under flow control.
    ///
    /// If no stream can be opened, nothing was sent, and the body is returned with the error.
    pub(crate) fn start(
        connection: &Connection,
        head: Request<()>,
        body: Outgoing,
        recall: Recall,
    ) -> Result<Self, (OpenError, Outgoing)> {
        let end_of_stream = matches!(body, Outgoing::Empty);
        let (response, mut stream) = match connection.open(head, end_of_stream) {
            Ok(opened) => opened,
            Err(error) => return Err((error, body)),
        };
        let pump = match body {
            Outgoing::Empty => None,
            Outgoing::Single(frame) => {
                // An error is ignored, because it only means that the stream is already closed, for example after an early response. The
                // response future reports the outcome.
                let _ = stream.send_data(frame, true);
                None
            }
            Outgoing::Stream { read, rest } => Some(Pump::start(stream, read, rest, recall)),
        };
        Ok(Self { response, pump })
    }

    pub(crate) fn stream_id(&self) -> StreamId {
        self.response.stream_id()
    }

    /// Polls for the response's head.
    pub(crate) fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Response<Incoming>, h2::Error>> {
        let response = ready!(Pin::new(&mut self.response).poll(cx))?;
        let pump = self.pump.take();
        Poll::Ready(Ok(response.map(|stream| Incoming::new(stream, pump))))
    }

    /// After a failure, waits until the pump (the task that sends the body) has ended. Returns the result of the pump, such as the body for
    /// another attempt. Returns `None` if the body has no pump, or if the runtime has ended.
    pub(crate) async fn into_pumped(self) -> Option<Pumped> {
        self.pump?.finish().await
    }
}
