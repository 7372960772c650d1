//! One HTTP/2 exchange: a request that was sent, up to the head of its response.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use h2::client::ResponseFuture;
use http::{Request, Response};

use super::http2::{Connection, OpenError};
use super::request_body::{Outgoing, Pump, Pumped, Recall};
use super::response_body::Incoming;

/// A request that was sent, up to its response's head. Dropping it resets the stream.
#[derive(Debug)]
pub(crate) struct Exchange {
    response: ResponseFuture,
    pump: Option<Pump>,
}

impl Exchange {
    /// Sends a request. A body of one frame goes out here and now; any other has a task of its own, under flow control.
    ///
    /// What was not sent comes back.
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
                // An error decides nothing (the stream may be closed by an early answer): the response knows.
                let _ = stream.send_data(frame, true);
                None
            }
            Outgoing::Stream { read, rest } => Some(Pump::start(stream, read, rest, recall)),
        };
        Ok(Self { response, pump })
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

    /// After a failure: what became of the body, for a second try or for the reason. None if the body was not pumped.
    pub(crate) async fn into_pumped(self) -> Option<Pumped> {
        self.pump?.finish().await
    }
}
