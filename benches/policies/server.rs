//! The servers. Each server is this program, started again as a separate process.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::{interval, sleep};
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};
use tonic_etcd::orca::{LoadRecorder, ReportLoadLayer};

use super::clock::Epoch;
use super::faults::Fault;
use super::greeter::greeter_server::{Greeter, GreeterServer};
use super::greeter::{HelloReply, HelloRequest};

/// The message of a response, and of a failure, if the server had a disadvantage when it received the call.
pub const BAD: &str = "bad";

/// An idle server also uses some of its capacity. A utilization of 0 would count as none, and that of the CPU would take its place.
const LEAST_UTILIZATION: f64 = 0.001;

/// The processes of the servers of one client. Dropping them kills the processes.
pub struct Servers {
    processes: Vec<(Child, ChildStdin)>,
    pub addresses: Vec<String>,
}

impl Servers {
    pub fn start(fault: Fault, number: usize, epoch: Epoch) -> Self {
        let fault = Fault::ALL.iter().position(|other| *other == fault).unwrap();
        let start = |index: usize| {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command
                .arg("serve")
                .args([fault, index].map(|argument| argument.to_string()))
                .arg(epoch.to_string())
                .stdin(Stdio::piped())
                .stdout(Stdio::piped());
            let mut child = command.spawn().unwrap();
            (child.stdin.take().unwrap(), child)
        };
        let started: Vec<_> = (0..number).map(start).collect();
        let (mut processes, mut addresses) = (Vec::new(), Vec::new());
        for (stdin, mut child) in started {
            let mut address = String::new();
            let stdout = child.stdout.take().unwrap();
            BufReader::new(stdout).read_line(&mut address).unwrap();
            addresses.push(address.trim().to_owned());
            processes.push((child, stdin));
        }
        Self {
            processes,
            addresses,
        }
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        for (child, _) in &mut self.processes {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Serves until standard input is closed, so no server outlives the benchmark. The arguments are the index of the fault, the index of the
/// server, and the epoch.
pub fn serve(args: &[String]) {
    std::thread::spawn(|| {
        let _ = std::io::stdin().read(&mut [0]);
        std::process::exit(0);
    });
    let [fault, index, epoch] = args else {
        panic!("three arguments are required: {args:?}");
    };
    let fault = Fault::ALL[fault.parse::<usize>().unwrap()];
    let index = index.parse().unwrap();
    let worker = Worker {
        fault,
        index,
        epoch: Epoch::parse(epoch),
        idle: Arc::new(Semaphore::new(fault.workers(index))),
        busy: Arc::new(AtomicU64::new(0)),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        println!("{}", listener.local_addr().unwrap());
        let recorder = LoadRecorder::new();
        tokio::spawn(worker.clone().report(recorder.clone()));
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        Server::builder()
            .layer(ReportLoadLayer::new(recorder))
            .add_service(GreeterServer::new(worker))
            .serve_with_incoming(incoming)
            .await
            .unwrap();
    });
}

#[derive(Clone)]
struct Worker {
    fault: Fault,
    index: usize,
    epoch: Epoch,
    idle: Arc<Semaphore>,
    /// The time of all calls of all workers since the last report, in microseconds.
    busy: Arc<AtomicU64>,
}

impl Worker {
    /// Reports the share of the workers that were busy in the last second.
    async fn report(self, recorder: LoadRecorder) {
        let mut seconds = interval(Duration::from_secs(1));
        let workers = self.fault.workers(self.index) as f64;
        loop {
            seconds.tick().await;
            let busy = self.busy.swap(0, Ordering::Relaxed) as f64 / 1e6;
            recorder.set_application_utilization((busy / workers).max(LEAST_UTILIZATION));
        }
    }
}

#[tonic::async_trait]
impl Greeter for Worker {
    async fn say_hello(&self, _: Request<HelloRequest>) -> Result<Response<HelloReply>, Status> {
        let is_bad = self.fault.is_bad(self.index, self.epoch.micros());
        if self.fault.fails(self.index) {
            return Err(Status::unavailable(BAD));
        }
        let _worker = self.idle.acquire().await.unwrap();
        let mean = self.fault.service_time(self.index, self.epoch.micros());
        let time = mean * fastrand::u64(80..120) / 100;
        sleep(Duration::from_micros(time)).await;
        self.busy.fetch_add(time, Ordering::Relaxed);
        let message = if is_bad { BAD } else { "" };
        Ok(Response::new(HelloReply {
            message: message.to_owned(),
        }))
    }

    type SayHellosStream = tokio_stream::Empty<Result<HelloReply, Status>>;

    async fn say_hellos(
        &self,
        _: Request<HelloRequest>,
    ) -> Result<Response<Self::SayHellosStream>, Status> {
        Err(Status::unimplemented("not part of the benchmark"))
    }

    async fn greet_all(
        &self,
        _: Request<Streaming<HelloRequest>>,
    ) -> Result<Response<HelloReply>, Status> {
        Err(Status::unimplemented("not part of the benchmark"))
    }

    type ChatStream = tokio_stream::Empty<Result<HelloReply, Status>>;

    async fn chat(
        &self,
        _: Request<Streaming<HelloRequest>>,
    ) -> Result<Response<Self::ChatStream>, Status> {
        Err(Status::unimplemented("not part of the benchmark"))
    }
}
