//! The greeter of the examples. `helloworld.rs` is generated from `proto/helloworld.proto` and checked in, so that this package builds
//! without `protoc`. A test of `tonic-etcd` compares the file with the output of the build script of `tonic-etcd`.
#![allow(
    dead_code,
    missing_docs,
    clippy::pedantic,
    unused_qualifications,
    unreachable_pub,
    clippy::allow_attributes_without_reason,
    reason = "each test uses its part of the generated code"
)]

use tonic::{Request, Response, Status, Streaming};

include!("helloworld.rs");

/// A greeter whose replies contain the name of its server.
#[derive(Debug, Clone)]
pub struct NamedGreeter(pub String);

#[tonic::async_trait]
impl greeter_server::Greeter for NamedGreeter {
    async fn say_hello(
        &self,
        request: Request<HelloRequest>,
    ) -> Result<Response<HelloReply>, Status> {
        Ok(Response::new(self.greet(&request.into_inner().name)))
    }

    type SayHellosStream = tokio_stream::Iter<std::vec::IntoIter<Result<HelloReply, Status>>>;

    async fn say_hellos(
        &self,
        request: Request<HelloRequest>,
    ) -> Result<Response<Self::SayHellosStream>, Status> {
        let HelloRequest { name, replies } = request.into_inner();
        let replies: Vec<_> = (0..replies.max(1)).map(|_| Ok(self.greet(&name))).collect();
        Ok(Response::new(tokio_stream::iter(replies)))
    }

    async fn greet_all(
        &self,
        request: Request<Streaming<HelloRequest>>,
    ) -> Result<Response<HelloReply>, Status> {
        let mut requests = request.into_inner();
        let mut names = Vec::new();
        while let Some(request) = requests.message().await? {
            names.push(request.name);
        }
        Ok(Response::new(self.greet(&names.join(", "))))
    }

    type ChatStream =
        std::pin::Pin<Box<dyn tokio_stream::Stream<Item = Result<HelloReply, Status>> + Send>>;

    async fn chat(
        &self,
        request: Request<Streaming<HelloRequest>>,
    ) -> Result<Response<Self::ChatStream>, Status> {
        use tokio_stream::StreamExt;
        let greeter = self.clone();
        let replies = request
            .into_inner()
            .map(move |request| Ok(greeter.greet(&request?.name)));
        Ok(Response::new(Box::pin(replies)))
    }
}

impl NamedGreeter {
    fn greet(&self, name: &str) -> HelloReply {
        HelloReply {
            message: format!("Hello {name}, this is {}", self.0),
        }
    }
}
