//! Registered servers that count the calls they run, and callers that count those that fail.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};
use tonic_etcd::{BalancedChannel, RegistrationBuilder, ServeRegistered};

use super::SOON;
use super::greeter::greeter_client::GreeterClient;
use super::greeter::greeter_server::{Greeter, GreeterServer};
use super::greeter::{HelloReply, HelloRequest};

pub fn hello() -> HelloRequest {
    HelloRequest {
        name: "test".to_owned(),
        replies: 1,
    }
}

/// A greeter that counts the calls it runs.
#[derive(Clone, Default)]
pub struct Counting(pub Arc<AtomicU64>);

#[tonic::async_trait]
impl Greeter for Counting {
    async fn say_hello(
        &self,
        request: Request<HelloRequest>,
    ) -> Result<Response<HelloReply>, Status> {
        self.0.fetch_add(1, Ordering::SeqCst);
        let message = request.into_inner().name;
        Ok(Response::new(HelloReply { message }))
    }

    type SayHellosStream = tokio_stream::Empty<Result<HelloReply, Status>>;

    async fn say_hellos(
        &self,
        _: Request<HelloRequest>,
    ) -> Result<Response<Self::SayHellosStream>, Status> {
        Err(Status::unimplemented("not here"))
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

/// A registered server with the counter.
pub struct Counted {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Counted {
    pub fn start(counter: &Counting, registration: RegistrationBuilder) -> Self {
        let (stop, stopped) = oneshot::channel();
        let router = Server::builder().add_service(GreeterServer::new(counter.clone()));
        let task = tokio::spawn(async move {
            let signal = async { drop(stopped.await) };
            router
                .serve_registered_with_shutdown(
                    "127.0.0.1:0".parse().unwrap(),
                    registration,
                    signal,
                )
                .await
                .unwrap();
        });
        Self { stop, task }
    }

    pub async fn stopped(self) {
        drop(self.stop);
        timeout(SOON, self.task).await.unwrap().unwrap();
    }
}

/// Callers that never pause.
pub struct Callers {
    stop: watch::Sender<bool>,
    tasks: Vec<JoinHandle<(u64, Vec<Status>)>>,
}

impl Callers {
    pub fn start(channel: &BalancedChannel, callers: usize) -> Self {
        let (stop, stopped) = watch::channel(false);
        let call = |stopped: watch::Receiver<bool>| {
            let mut client = GreeterClient::new(channel.clone());
            async move {
                let (mut calls, mut failed) = (0, Vec::new());
                while !*stopped.borrow() {
                    calls += 1;
                    let mut request = Request::new(hello());
                    request.set_timeout(Duration::from_secs(5));
                    if let Err(status) = client.say_hello(request).await {
                        failed.push(status);
                        // What fails at once never yields.
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                }
                (calls, failed)
            }
        };
        let tasks = (0..callers)
            .map(|_| tokio::spawn(call(stopped.clone())))
            .collect();
        Self { stop, tasks }
    }

    /// Stops them; says how many calls there were, and which failed.
    pub async fn stopped(self) -> (u64, Vec<Status>) {
        self.stop.send_replace(true);
        let (mut calls, mut failed) = (0, Vec::new());
        for task in self.tasks {
            let (its_calls, its_failed) = timeout(SOON, task).await.unwrap().unwrap();
            calls += its_calls;
            failed.extend(its_failed);
        }
        (calls, failed)
    }

    /// Stops them; fails if a call has.
    pub async fn none_failed(self) -> u64 {
        let (calls, failed) = self.stopped().await;
        assert!(
            failed.is_empty(),
            "{} of {calls} calls failed: {:?}",
            failed.len(),
            failed.first()
        );
        calls
    }
}
