//! A gRPC relay in front of an etcd. It ends each watch after its first message with events.

use std::convert::Infallible;
use std::marker::PhantomData;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use etcd_client::proto::PbWatchResponse;
use http_body::Frame;
use prost::Message;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Status, codegen::BoxFuture};
use tower::Service;

/// A relay to one member. Dropping it ends the relay.
pub struct Relay {
    pub address: SocketAddr,
    watches: Arc<Watches>,
    task: JoinHandle<()>,
}

/// State of the relayed watches.
#[derive(Default)]
struct Watches {
    /// Number of watches that the relay has ended.
    cuts: AtomicUsize,
    /// Whether new watches are refused.
    refused: AtomicBool,
}

impl Relay {
    pub async fn start(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let incoming = tonic::transport::server::TcpIncoming::from(listener);
        let target = Endpoint::from_shared(format!("http://{target}")).unwrap();
        let target = target.connect_lazy();
        let watches = Arc::<Watches>::default();
        let router = Server::builder()
            .add_service(Forward::<Kv>::new(&target, &watches))
            .add_service(Forward::<Lease>::new(&target, &watches))
            .add_service(Forward::<Watch>::new(&target, &watches));
        let task = tokio::spawn(async move { router.serve_with_incoming(incoming).await.unwrap() });
        Self {
            address,
            watches,
            task,
        }
    }

    /// Refuses new watches, or forwards them again.
    pub fn refuse_watches(&self, refused: bool) {
        self.watches.refused.store(refused, Ordering::SeqCst);
    }

    /// Returns the number of watches that the relay has ended.
    pub fn cuts(&self) -> usize {
        self.watches.cuts.load(Ordering::SeqCst)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Clone)]
struct Kv;
#[derive(Clone)]
struct Lease;
#[derive(Clone)]
struct Watch;

/// Forwards one of etcd's services.
struct Forward<S> {
    target: Channel,
    watches: Arc<Watches>,
    service: PhantomData<fn() -> S>,
}

impl<S> Forward<S> {
    fn new(target: &Channel, watches: &Arc<Watches>) -> Self {
        Self {
            target: target.clone(),
            watches: Arc::clone(watches),
            service: PhantomData,
        }
    }
}

impl<S> Clone for Forward<S> {
    fn clone(&self) -> Self {
        Self::new(&self.target, &self.watches)
    }
}

impl NamedService for Forward<Kv> {
    const NAME: &'static str = "etcdserverpb.KV";
}

impl NamedService for Forward<Lease> {
    const NAME: &'static str = "etcdserverpb.Lease";
}

impl NamedService for Forward<Watch> {
    const NAME: &'static str = "etcdserverpb.Watch";
}

impl<S> Service<http::Request<Body>> for Forward<S> {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let (mut target, watches) = (self.target.clone(), Arc::clone(&self.watches));
        let watch = request.uri().path().ends_with("/Watch");
        Box::pin(async move {
            if watch && watches.refused.load(Ordering::SeqCst) {
                return Ok(Status::unavailable("refused").into_http());
            }
            let ready = std::future::poll_fn(|cx| target.poll_ready(cx)).await;
            let answer = match ready {
                Ok(()) => target.call(request).await,
                Err(error) => Err(error),
            };
            Ok(match answer {
                Ok(answer) if watch => answer.map(|body| {
                    Body::new(Cut {
                        body,
                        state: State::Whole,
                        collected: Vec::new(),
                        watches,
                    })
                }),
                Ok(answer) => answer,
                Err(error) => Status::from_error(Box::new(error)).into_http(),
            })
        })
    }
}

/// A body of gRPC messages that ends after the first message with events. Messages without events report the creation or the progress of a
/// watch.
struct Cut {
    body: Body,
    state: State,
    collected: Vec<u8>,
    watches: Arc<Watches>,
}

#[derive(Clone, Copy)]
enum State {
    Whole,
    /// A message with events was returned.
    Done,
    Ended,
}

/// Returns whether a message of a watch contains events.
fn has_events(message: &[u8]) -> bool {
    let message = PbWatchResponse::decode(&message[5..]).expect("a valid watch response");
    !message.events.is_empty()
}

impl Cut {
    /// Removes one complete message from the collected bytes.
    fn message(&mut self) -> Option<Bytes> {
        let length = self.collected.get(1..5)?;
        let length = 5 + u32::from_be_bytes(length.try_into().unwrap()) as usize;
        let whole = self.collected.len() >= length;
        whole.then(|| self.collected.drain(..length).collect::<Vec<_>>().into())
    }
}

impl http_body::Body for Cut {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        loop {
            match this.state {
                State::Done => {
                    this.watches.cuts.fetch_add(1, Ordering::SeqCst);
                    this.state = State::Ended;
                    // The status is sent in trailers. An error of the body would reset the stream before data that still waits for the
                    // flow-control window is sent.
                    let (head, ()) = Status::unavailable("cut").into_http::<()>().into_parts();
                    return Poll::Ready(Some(Ok(Frame::trailers(head.headers))));
                }
                State::Ended => return Poll::Ready(None),
                State::Whole => {}
            }
            if let Some(message) = this.message() {
                if has_events(&message) {
                    this.state = State::Done;
                }
                return Poll::Ready(Some(Ok(Frame::data(message))));
            }
            match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => this.collected.extend_from_slice(&data),
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                Some(Err(status)) => return Poll::Ready(Some(Err(status))),
                None => return Poll::Ready(None),
            }
        }
    }
}
