//! A greeter with a number of workers, each of which serves one call at a time, and a process that serves it.

use std::io::Write;
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep};
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};
use tonic_etcd::limit::AdaptiveLimitLayer;

use crate::support::greeter::greeter_server::{Greeter, GreeterServer};
use crate::support::greeter::{HelloReply, HelloRequest};
use crate::support::program::{Output, line_with, lines};

/// The greeter.
pub struct Workers {
    pub free: Arc<Semaphore>,
    pub service: Duration,
    /// The number of streams that handlers have begun to read.
    pub streams: Arc<AtomicUsize>,
    /// When the accepted calls have ended, and their latencies.
    pub latencies: Arc<Mutex<Vec<(Instant, Duration)>>>,
}

impl Workers {
    pub fn new(workers: usize, service: Duration) -> Self {
        Self {
            free: Arc::new(Semaphore::new(workers)),
            service,
            streams: Arc::default(),
            latencies: Arc::default(),
        }
    }
}

#[tonic::async_trait]
impl Greeter for Workers {
    async fn say_hello(&self, _: Request<HelloRequest>) -> Result<Response<HelloReply>, Status> {
        let accepted = Instant::now();
        let _worker = self.free.acquire().await.unwrap();
        sleep(self.service).await;
        let now = Instant::now();
        let latency = now.saturating_duration_since(accepted);
        self.latencies.lock().unwrap().push((now, latency));
        Ok(Response::new(HelloReply::default()))
    }

    type SayHellosStream = tokio_stream::Empty<Result<HelloReply, Status>>;

    async fn say_hellos(
        &self,
        _: Request<HelloRequest>,
    ) -> Result<Response<Self::SayHellosStream>, Status> {
        Ok(Response::new(tokio_stream::empty()))
    }

    async fn greet_all(
        &self,
        requests: Request<Streaming<HelloRequest>>,
    ) -> Result<Response<HelloReply>, Status> {
        self.streams.fetch_add(1, Ordering::Relaxed);
        let mut requests = requests.into_inner();
        let mut messages = 0;
        while requests.message().await?.is_some() {
            messages += 1;
        }
        let message = messages.to_string();
        Ok(Response::new(HelloReply { message }))
    }

    type ChatStream = tokio_stream::Empty<Result<HelloReply, Status>>;

    /// Responds after the first message.
    async fn chat(
        &self,
        requests: Request<Streaming<HelloRequest>>,
    ) -> Result<Response<Self::ChatStream>, Status> {
        self.streams.fetch_add(1, Ordering::Relaxed);
        requests.into_inner().message().await?;
        Ok(Response::new(tokio_stream::empty()))
    }
}

/// The server as a process: this program, in which only [`the_process_of_a_server`] runs.
pub struct Process {
    pub address: String,
    output: Output,
    input: ChildStdin,
    _child: Child,
}

/// The variable with the number of workers, the milliseconds for a call, and whether the server has the layer.
const VARIABLE: &str = "LIMIT_SERVER";

impl Process {
    pub async fn start(workers: usize, service: Duration, has_layer: bool) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "workers::the_process_of_a_server"])
            .args(["--ignored", "--nocapture"])
            .env(
                VARIABLE,
                format!("{workers} {} {has_layer}", service.as_millis()),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut output = lines(&mut child);
        let line = line_with(&mut output, "serving ").await;
        let (_, address) = line.split_once("serving ").unwrap();
        Self {
            address: address.to_owned(),
            output,
            input: child.stdin.take().unwrap(),
            _child: child,
        }
    }

    /// Returns the current limit of the layer.
    pub async fn limit(&mut self) -> usize {
        self.input.write_all(b"\n").await.unwrap();
        let line = line_with(&mut self.output, "limit ").await;
        line.strip_prefix("limit ").unwrap().parse().unwrap()
    }
}

/// Serves until the end of the standard input, and prints the limit for each line of the input.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "the process of a server, which other tests start"]
async fn the_process_of_a_server() {
    let variable = std::env::var(VARIABLE).unwrap_or_default();
    let words: Vec<_> = variable.split(' ').collect();
    let [workers, service, has_layer] = *words else {
        panic!("the variable {VARIABLE} is missing");
    };
    let has_layer = has_layer == "true";
    let service = Duration::from_millis(service.parse().unwrap());
    let greeter = GreeterServer::new(Workers::new(workers.parse().unwrap(), service));
    let limit = AdaptiveLimitLayer::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut stdout = std::io::stdout();
    writeln!(stdout, "serving {}", listener.local_addr().unwrap()).unwrap();
    let incoming = TcpIncoming::from(listener);
    let server = tokio::spawn({
        let limit = limit.clone();
        async move {
            if has_layer {
                let mut server = Server::builder().layer(limit);
                server
                    .add_service(greeter)
                    .serve_with_incoming(incoming)
                    .await
            } else {
                let mut server = Server::builder();
                server
                    .add_service(greeter)
                    .serve_with_incoming(incoming)
                    .await
            }
        }
    });
    let mut input = BufReader::new(tokio::io::stdin()).lines();
    while input.next_line().await.unwrap().is_some() {
        writeln!(stdout, "limit {}", limit.limit()).unwrap();
    }
    server.abort();
}
