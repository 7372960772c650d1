//! The compared clients: tonic's own channels, hand-written P2C (power of two choices) over bare hyper and bare `h2` connections, and
//! `BalancedChannel`.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body as HttpBody;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tonic::body::Body;
use tonic::client::GrpcService;
use tonic::transport::{Channel, Endpoint};
use tonic_etcd::{
    BalancedChannel,
    channel::{ChannelBuilder, EndpointState, EndpointStatus},
};
use tower::Service;

use super::bare_h2::{H2, Ticket, absolute, pick};
use super::measure::{self, Load, Sample};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A service that a generated client can wrap.
pub trait Target:
    GrpcService<
        Body,
        ResponseBody: HttpBody<Data = Bytes, Error: Into<BoxError> + Send> + Send + 'static,
        Error: Into<BoxError>,
        Future: Send,
    > + Clone
    + Send
    + Sync
    + 'static
{
}

impl<S> Target for S
where
    S: GrpcService<Body> + Clone + Send + Sync + 'static,
    S::ResponseBody: HttpBody<Data = Bytes> + Send + 'static,
    <S::ResponseBody as HttpBody>::Error: Into<BoxError> + Send,
    S::Error: Into<BoxError>,
    S::Future: Send,
{
}

type Round = Pin<Box<dyn Future<Output = Sample>>>;

/// One of the compared clients. The type of the client is erased once for each round, and not for each call, so that the comparison adds no
/// cost to a call.
///
/// Each round opens its own connections. Two properties differ from connection to connection, and hardly change while a connection is open:
/// the worker that runs its task, and how many frames one system call writes on average. If each peer kept its connections for a whole run,
/// two peers with the same code would differ by a tenth in calls per second, and by a fifth in CPU time per call.
pub struct Peer {
    name: String,
    round: Box<dyn Fn(Load) -> Round>,
}

impl Peer {
    fn new<S: Target, Fut: Future<Output = S>>(
        name: &str,
        connect: impl Fn() -> Fut + Clone + 'static,
    ) -> Self {
        Self {
            name: name.to_owned(),
            round: Box::new(move |load| {
                let connect = connect.clone();
                Box::pin(async move { measure::round(load, connect().await).await })
            }),
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub async fn round(&self, load: Load) -> Sample {
        (self.round)(load).await
    }

    pub fn stock(addresses: &[String]) -> Self {
        let addresses = addresses.to_vec();
        Self::new("stock `Channel::balance_list`", move || {
            let endpoints: Vec<_> = addresses.iter().map(endpoint).collect();
            async { Channel::balance_list(endpoints.into_iter()) }
        })
    }

    pub fn plain(address: &String) -> Self {
        let endpoint = endpoint(address);
        Self::new("one plain `Channel`", move || {
            let endpoint = endpoint.clone();
            async move { endpoint.connect().await.unwrap() }
        })
    }

    pub fn bare_hyper(addresses: &[String]) -> Self {
        let addresses = addresses.to_vec();
        Self::new("P2C over bare hyper", move || {
            hyper_connections(addresses.clone())
        })
    }

    pub fn bare_h2(addresses: &[String]) -> Self {
        let addresses = addresses.to_vec();
        Self::new("P2C over bare `h2`", move || {
            h2_connections(addresses.clone())
        })
    }

    pub fn balanced(name: &str, addresses: &[String]) -> Self {
        Self::balanced_with(name, addresses, |builder| builder)
    }

    pub fn balanced_with(
        name: &str,
        addresses: &[String],
        options: impl Fn(ChannelBuilder) -> ChannelBuilder + Clone + 'static,
    ) -> Self {
        let addresses = addresses.to_vec();
        Self::new(name, move || {
            let builder = options(BalancedChannel::builder());
            ready(builder, addresses.clone())
        })
    }
}

fn endpoint(address: &String) -> Endpoint {
    Endpoint::from_shared(format!("http://{address}")).unwrap()
}

async fn hyper_connections(addresses: Vec<String>) -> Hyper {
    let mut connections = Vec::new();
    for address in addresses {
        let mut builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
        builder
            .initial_stream_window_size(1 << 20)
            .initial_connection_window_size(64 << 20);
        let io = TokioIo::new(connect(&address).await);
        let (send, connection) = builder.handshake(io).await.unwrap();
        tokio::spawn(connection);
        connections.push((send, AtomicUsize::new(0)));
    }
    Hyper(connections.into())
}

async fn h2_connections(addresses: Vec<String>) -> H2 {
    let mut sockets = Vec::new();
    for address in addresses {
        sockets.push(connect(&address).await);
    }
    H2::over(sockets).await
}

/// Returns a channel after all its endpoints have become ready, so that the dials are not measured.
async fn ready(builder: ChannelBuilder, addresses: Vec<String>) -> BalancedChannel {
    let channel = builder.addresses(addresses).connect_lazy();
    let ready = async {
        let is_ready = |endpoint: &EndpointStatus| endpoint.state == EndpointState::Ready;
        while !channel.endpoints().iter().all(is_ready) || channel.endpoints().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let ready = tokio::time::timeout(Duration::from_secs(10), ready);
    ready.await.unwrap();
    channel
}

async fn connect(address: &str) -> TcpStream {
    let io = TcpStream::connect(address).await.unwrap();
    io.set_nodelay(true).unwrap();
    io
}

type HyperSend = hyper::client::conn::http2::SendRequest<Body>;

/// P2C over hyper connections, without any other feature.
#[derive(Clone)]
pub struct Hyper(Arc<[(HyperSend, AtomicUsize)]>);

impl Service<Request<Body>> for Hyper {
    type Response = Response<hyper::body::Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let index = pick(&self.0);
        let ticket = Ticket::new(&self.0, index);
        *request.uri_mut() = absolute(request.uri());
        let response = self.0[index].0.clone().send_request(request);
        Box::pin(async move {
            let response = response.await;
            drop(ticket);
            response
        })
    }
}
