//! The client processes in Rust: this project's channel, tonic's own, and bare `h2` as the lower bound.

use bytes::Bytes;
use http_body::Body as HttpBody;
use tokio::net::TcpStream;
use tonic::body::Body;
use tonic::client::GrpcService;
use tonic::transport::{Channel, Endpoint};
use tonic_etcd::{LbPolicy, Registry};

use super::bare_h2::H2;
use super::callers::{Caller, Load};
use super::greeter::HelloRequest;
use super::greeter::greeter_client::GreeterClient;

pub async fn run(etcd: &str, service: &str, policy: &str, load: Load) {
    let registry = Registry::connect([etcd]).await.unwrap();
    let policy = match policy {
        "latency" => LbPolicy::Latency,
        "least_request" => LbPolicy::LeastRequest,
        "weighted_round_robin" => LbPolicy::WeightedRoundRobin,
        "bare_h2" => {
            let mut sockets = Vec::new();
            for address in addresses(&registry, service).await {
                let socket = TcpStream::connect(address).await.unwrap();
                socket.set_nodelay(true).unwrap();
                sockets.push(socket);
            }
            return load.run(GreeterClient::new(H2::over(sockets).await)).await;
        }
        "stock" => {
            let endpoints = addresses(&registry, service).await.into_iter();
            let endpoints = endpoints
                .map(|address| Endpoint::from_shared(format!("http://{address}")).unwrap());
            return load
                .run(GreeterClient::new(Channel::balance_list(endpoints)))
                .await;
        }
        policy => panic!("unknown policy {policy}"),
    };
    let channel = registry.channel(service).policy(policy).connect_lazy();
    load.run(GreeterClient::new(channel)).await;
}

/// Returns the addresses of the servers, for the clients that do not resolve them.
async fn addresses(registry: &Registry, service: &str) -> Vec<String> {
    let resolver = registry.resolver(service).start();
    resolver.ready().await;
    let instances = resolver.instances();
    let addresses = instances
        .iter()
        .map(|instance| instance.address().to_string());
    addresses.collect()
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

impl<S> Caller for GreeterClient<S>
where
    S: GrpcService<Body> + Clone + Send + 'static,
    S::ResponseBody: HttpBody<Data = Bytes> + Send + 'static,
    <S::ResponseBody as HttpBody>::Error: Into<BoxError> + Send,
    S::Error: Into<BoxError>,
    S::Future: Send,
{
    async fn call(&mut self, name: String) -> bool {
        self.say_hello(HelloRequest { name, replies: 0 })
            .await
            .is_ok()
    }
}
