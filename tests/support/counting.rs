//! A greeter that counts the calls it runs.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::{interval, sleep};
use tokio_stream::wrappers::IntervalStream;
use tokio_stream::{Stream, StreamExt, iter};
use tonic::transport::Server;
use tonic::transport::server::Router;
use tonic::{Request, Response, Status, Streaming};
use tonic_etcd::registration::RegistrationBuilder;

use super::Registered;
use super::greeter::greeter_server::{Greeter, GreeterServer};
use super::greeter::{HelloReply, HelloRequest};

/// Counts unary and server-streaming calls together. A server-streaming call that requests zero replies gets an endless stream.
#[derive(Clone, Debug, Default)]
pub struct Counting {
    calls: Arc<AtomicU64>,
    /// Duration of a unary call.
    takes: Duration,
}

impl Counting {
    /// Returns a greeter whose unary calls take this long.
    pub fn slow(takes: Duration) -> Self {
        Self {
            takes,
            ..Self::default()
        }
    }

    pub fn count(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }

    pub fn router(&self) -> Router {
        Server::builder().add_service(GreeterServer::new(self.clone()))
    }

    /// Serves on a free port and registers the server.
    pub fn register(&self, registration: RegistrationBuilder) -> Registered {
        Registered::serve(self.router(), "127.0.0.1:0", registration)
    }
}

type Reply = Result<HelloReply, Status>;

#[tonic::async_trait]
impl Greeter for Counting {
    async fn say_hello(
        &self,
        request: Request<HelloRequest>,
    ) -> Result<Response<HelloReply>, Status> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        if !self.takes.is_zero() {
            sleep(self.takes).await;
        }
        let message = request.into_inner().name;
        Ok(Response::new(HelloReply { message }))
    }

    type SayHellosStream = Pin<Box<dyn Stream<Item = Reply> + Send>>;

    async fn say_hellos(
        &self,
        request: Request<HelloRequest>,
    ) -> Result<Response<Self::SayHellosStream>, Status> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let HelloRequest { name, replies } = request.into_inner();
        if replies == 0 {
            let ticks = IntervalStream::new(interval(Duration::from_millis(5)));
            let replies = ticks.map(move |_| {
                let message = name.clone();
                Reply::Ok(HelloReply { message })
            });
            return Ok(Response::new(Box::pin(replies)));
        }
        let replies = (0..replies).map(|number| {
            let message = number.to_string();
            Reply::Ok(HelloReply { message })
        });
        Ok(Response::new(Box::pin(iter(replies))))
    }

    async fn greet_all(
        &self,
        _: Request<Streaming<HelloRequest>>,
    ) -> Result<Response<HelloReply>, Status> {
        Err(Status::unimplemented("not here"))
    }

    type ChatStream = tokio_stream::Empty<Result<HelloReply, Status>>;

    async fn chat(
        &self,
        _: Request<Streaming<HelloRequest>>,
    ) -> Result<Response<Self::ChatStream>, Status> {
        Err(Status::unimplemented("not here"))
    }
}
