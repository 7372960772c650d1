//! The client of tonic-xds in `make bench-peers`. Its arguments are the address of the control plane, the service, the policy, which is
//! that of the control plane, and the load.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "this is a benchmark, and a failed step ends it with a panic"
)]

#[path = "../../callers.rs"]
mod callers;
/// The generated client of the greeter. A test compares the file with what the generator writes, so it is not formatted.
#[rustfmt::skip]
#[allow(
    dead_code,
    reason = "the generated code also contains the server and other calls"
)]
#[path = "../../../../balance/src/channel/tests/greeter/helloworld.rs"]
mod greeter;

use std::pin::Pin;
use std::task::{Context, Poll};

use callers::{Caller, Load};
use greeter::HelloRequest;
use greeter::greeter_client::GreeterClient;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic_xds::{
    BootstrapConfig, ChannelCredentialType, XdsChannelBuilder, XdsChannelConfig, XdsChannelGrpc,
    XdsUri,
};

/// Like the runtimes of the other clients: one worker for each core.
#[tokio::main]
async fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [plane, service, _policy, load @ ..] = &args[..] else {
        panic!("usage: PLANE SERVICE POLICY LOAD...");
    };
    let bootstrap = BootstrapConfig::builder(format!("http://{plane}"))
        .channel_creds([ChannelCredentialType::Insecure])
        .node_id("bench")
        .build()
        .unwrap();
    let target = XdsUri::parse(&format!("xds:///{service}")).unwrap();
    let config = XdsChannelConfig::new(target).with_bootstrap(bootstrap);
    let channel = XdsChannelBuilder::new(config).build_grpc_channel().unwrap();
    Load::parse(load)
        .run(Greeter(GreeterClient::new(Xds(channel))))
        .await;
}

#[derive(Clone)]
struct Greeter(GreeterClient<Xds>);

impl Caller for Greeter {
    async fn call(&mut self, name: String) -> bool {
        let request = HelloRequest { name, replies: 0 };
        self.0.say_hello(request).await.is_ok()
    }
}

/// The channel with another error type. With its own, a boxed error, the compiler cannot prove that the future of a call is `Send`.
#[derive(Clone)]
struct Xds(XdsChannelGrpc);

impl Service<http::Request<Body>> for Xds {
    type Response = http::Response<Body>;
    type Error = Status;
    type Future = Response;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Status>> {
        self.0.poll_ready(cx).map_err(Status::from_error)
    }

    fn call(&mut self, request: http::Request<Body>) -> Response {
        Response(self.0.call(request))
    }
}

struct Response(<XdsChannelGrpc as Service<http::Request<Body>>>::Future);

impl Future for Response {
    type Output = Result<http::Response<Body>, Status>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map_err(Status::from_error)
    }
}
