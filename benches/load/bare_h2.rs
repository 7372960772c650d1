//! A channel over bare `h2` connections: power of two choices (P2C), and nothing else. The upper bound for the other channels.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::{Body as HttpBody, Frame};
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::body::Body;
use tower::Service;

/// Picks the less loaded of two random connections.
pub fn pick<T>(connections: &[(T, AtomicUsize)]) -> usize {
    let a = fastrand::usize(..connections.len());
    let b = (a + fastrand::usize(1..connections.len())) % connections.len();
    let load = |index: usize| connections[index].1.load(Ordering::Relaxed);
    if load(a) <= load(b) { a } else { b }
}

/// Counts a call as load of its connection until the ticket is dropped. `Hyper` drops the ticket when the response head has arrived.
/// [`H2`] drops the ticket together with the response body.
pub struct Ticket<T> {
    connections: Arc<[(T, AtomicUsize)]>,
    index: usize,
}

impl<T> Ticket<T> {
    pub fn new(connections: &Arc<[(T, AtomicUsize)]>, index: usize) -> Self {
        connections[index].1.fetch_add(1, Ordering::Relaxed);
        Self {
            connections: Arc::clone(connections),
            index,
        }
    }
}

impl<T> Drop for Ticket<T> {
    fn drop(&mut self) {
        self.connections[self.index]
            .1
            .fetch_sub(1, Ordering::Relaxed);
    }
}

/// P2C over `h2` connections, only for unary calls.
#[derive(Clone)]
pub struct H2(Arc<[(h2::client::SendRequest<Bytes>, AtomicUsize)]>);

impl H2 {
    /// Performs the handshake on each socket. The options are those of `BalancedChannel`.
    pub async fn over<T>(sockets: Vec<T>) -> Self
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let mut connections = Vec::new();
        for socket in sockets {
            let mut builder = h2::client::Builder::new();
            builder
                .initial_window_size(1 << 20)
                .initial_connection_window_size(64 << 20)
                .max_frame_size(256 << 10)
                .enable_push(false);
            let (send, connection) = builder.handshake(socket).await.unwrap();
            tokio::spawn(connection);
            connections.push((send, AtomicUsize::new(0)));
        }
        Self(connections.into())
    }
}

impl Service<Request<Body>> for H2 {
    type Response = Response<H2Body>;
    type Error = h2::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let index = pick(&self.0);
        let ticket = Ticket::new(&self.0, index);
        let mut send = self.0[index].0.clone();
        Box::pin(async move {
            let (mut head, mut body) = request.into_parts();
            head.uri = absolute(&head.uri);
            let (response, mut stream) = send.send_request(Request::from_parts(head, ()), false)?;
            let mut ended = false;
            while !ended
                && let Some(Ok(frame)) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await
            {
                if let Ok(data) = frame.into_data() {
                    ended = body.is_end_stream();
                    stream.send_data(data, ended)?;
                }
            }
            if !ended {
                stream.send_data(Bytes::new(), true)?;
            }
            let (head, body) = response.await?.into_parts();
            Ok(Response::from_parts(
                head,
                H2Body {
                    stream: body,
                    trailers: false,
                    _ticket: ticket,
                },
            ))
        })
    }
}

pub fn absolute(uri: &http::Uri) -> http::Uri {
    let mut parts = uri.clone().into_parts();
    parts.scheme = Some(http::uri::Scheme::HTTP);
    parts.authority = Some(http::uri::Authority::from_static("localhost"));
    http::Uri::from_parts(parts).unwrap()
}

pub struct H2Body {
    stream: h2::RecvStream,
    trailers: bool,
    _ticket: Ticket<h2::client::SendRequest<Bytes>>,
}

impl HttpBody for H2Body {
    type Data = Bytes;
    type Error = h2::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        if !self.trailers {
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(data)) => {
                    let _ = self.stream.flow_control().release_capacity(data.len());
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => self.trailers = true,
            }
        }
        let trailers: Option<HeaderMap> = ready!(self.stream.poll_trailers(cx))?;
        Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
    }
}
