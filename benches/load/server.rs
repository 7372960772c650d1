//! The servers. Each server is this program, started again as a separate process.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

use super::greeter::greeter_server::{Greeter, GreeterServer};
use super::greeter::{HelloReply, HelloRequest};

pub struct ServerProcess {
    child: Child,
    _stdin: ChildStdin,
    address: String,
    delay: u64,
}

impl ServerProcess {
    /// Starts one server for each delay. The delays are in microseconds.
    pub fn start_many(delays: &[u64]) -> Vec<Self> {
        let start = |delay: &u64| Self::start(*delay, "127.0.0.1:0");
        delays.iter().map(start).collect()
    }

    /// Kills the process (SIGKILL).
    #[allow(dead_code, reason = "not every benchmark kills servers")]
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts the server again at the same address, after [`kill`](Self::kill).
    #[allow(dead_code, reason = "not every benchmark kills servers")]
    pub fn restart(&mut self) {
        *self = Self::start(self.delay, &self.address);
    }

    fn start(delay: u64, address: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["serve", &delay.to_string(), address])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut address = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut address)
            .unwrap();
        Self {
            _stdin: child.stdin.take().unwrap(),
            child,
            address: address.trim().to_owned(),
            delay,
        }
    }

    pub fn addresses(servers: &[Self]) -> Vec<String> {
        servers
            .iter()
            .map(|server| server.address.clone())
            .collect()
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Serves until standard input is closed. Responses are delayed by `delay` microseconds.
pub fn serve(delay: u64, address: &str) {
    std::thread::spawn(|| {
        let _ = std::io::stdin().read(&mut [0]);
        std::process::exit(0);
    });
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        println!("{}", listener.local_addr().unwrap());
        let service = GreeterServer::new(Echo {
            delay: Duration::from_micros(delay),
        })
        .max_decoding_message_size(64 << 20)
        .max_encoding_message_size(64 << 20);
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        Server::builder()
            .add_service(service)
            .serve_with_incoming(incoming)
            .await
            .unwrap();
    });
}

/// Echoes requests, and delays unary responses. A unary request can set its own delay in microseconds, in the field `replies`.
struct Echo {
    delay: Duration,
}

#[tonic::async_trait]
impl Greeter for Echo {
    async fn say_hello(
        &self,
        request: Request<HelloRequest>,
    ) -> Result<Response<HelloReply>, Status> {
        let HelloRequest { name, replies } = request.into_inner();
        let delay = if replies > 0 {
            Duration::from_micros(replies.into())
        } else {
            self.delay
        };
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        Ok(Response::new(HelloReply { message: name }))
    }

    type SayHellosStream = tokio_stream::Iter<std::vec::IntoIter<Result<HelloReply, Status>>>;

    async fn say_hellos(
        &self,
        request: Request<HelloRequest>,
    ) -> Result<Response<Self::SayHellosStream>, Status> {
        let HelloRequest { name, replies } = request.into_inner();
        let replies: Vec<_> = (0..replies)
            .map(|_| {
                Ok(HelloReply {
                    message: name.clone(),
                })
            })
            .collect();
        Ok(Response::new(tokio_stream::iter(replies)))
    }

    async fn greet_all(
        &self,
        request: Request<Streaming<HelloRequest>>,
    ) -> Result<Response<HelloReply>, Status> {
        let mut requests = request.into_inner();
        let mut length = 0;
        while let Some(request) = requests.message().await? {
            length += request.name.len();
        }
        Ok(Response::new(HelloReply {
            message: length.to_string(),
        }))
    }

    type ChatStream =
        std::pin::Pin<Box<dyn tokio_stream::Stream<Item = Result<HelloReply, Status>> + Send>>;

    async fn chat(
        &self,
        request: Request<Streaming<HelloRequest>>,
    ) -> Result<Response<Self::ChatStream>, Status> {
        use tokio_stream::StreamExt;
        let replies = request.into_inner().map(|request| {
            Ok(HelloReply {
                message: request?.name,
            })
        });
        Ok(Response::new(Box::pin(replies)))
    }
}
