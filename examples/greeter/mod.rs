//! The greeter service that the examples serve and call.
#![allow(
    dead_code,
    missing_docs,
    clippy::pedantic,
    unused_qualifications,
    unreachable_pub,
    clippy::allow_attributes_without_reason,
    reason = "the code is generated, and each example uses only a part of it"
)]

use tonic::{Request, Response, Status, Streaming};

tonic::include_proto!("helloworld");

/// A greeter whose replies contain the name of its server.
#[derive(Debug, Clone, Default)]
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

/// Returns the comma-separated etcd endpoints in `ETCD_ENDPOINTS`. If the variable is not set,
/// returns the default port of etcd on this machine.
pub fn etcd_endpoints() -> Vec<String> {
    let endpoints = std::env::var("ETCD_ENDPOINTS").unwrap_or_else(|_| "127.0.0.1:2379".to_owned());
    endpoints.split(',').map(str::to_owned).collect()
}

/// Returns the exit code of the program. If it failed, prints its error to stderr.
#[allow(clippy::print_stderr, reason = "errors are printed to stderr")]
pub fn report(outcome: Result<(), Box<dyn std::error::Error>>) -> std::process::ExitCode {
    match outcome {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", with_causes(&*error));
            std::process::ExitCode::FAILURE
        }
    }
}

/// Formats an error and its causes as one line.
pub fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let texts: Vec<_> = causes.map(ToString::to_string).collect();
    texts.join(": ")
}
