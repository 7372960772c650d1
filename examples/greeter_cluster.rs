//! A complete cluster on this machine: an etcd (started here, or the cluster at `ETCD_ENDPOINTS`),
//! three servers, and a client that sends calls at a steady pace. Then a fourth server joins, the
//! first server shuts down, and another server is killed and restarted.
//!
//! ```sh
//! cargo run --example greeter_cluster
//! cargo run --example greeter_cluster -- --metrics 127.0.0.1:9464
//! ```
//!
//! With `--metrics`, the client serves its metrics over HTTP, in the text format of Prometheus.
//!
//! The program ends after about twenty seconds. It fails if the client does not call the new
//! server, or if the client calls the server that has shut down. It also fails if a call fails,
//! with one exception: around the time of the kill, up to 8 calls are allowed to fail, because each
//! of the 8 callers has at most one call in flight.
#![allow(clippy::print_stdout, reason = "the example prints its results")]

mod greeter;
#[path = "greeter/prometheus.rs"]
#[allow(
    unreachable_pub,
    reason = "the file is shared with the example of another package"
)]
mod prometheus;

use std::collections::BTreeMap;
use std::io::{IsTerminal, Read, Write};
use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use greeter::{
    HelloRequest, NamedGreeter, greeter_client::GreeterClient, greeter_server::GreeterServer,
};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use prometheus::Prometheus;
use tokio::net::TcpListener;
use tokio::process::{Child, ChildStdin, Command};
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::Server;
use tonic_etcd::testing::Etcd;
use tonic_etcd::{BalancedChannel, Registry, Resolver, ServeRegistered};

type Error = Box<dyn std::error::Error + Send + Sync>;

const SERVICE: &str = "helloworld.Greeter";
const CALLERS: usize = 8;

#[tokio::main]
async fn main() -> Result<(), Error> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [serve, name, endpoints] = &args[..]
        && serve == "serve"
    {
        return serve_greeter(name, endpoints).await;
    }
    let metrics = match &args[..] {
        [] => None,
        [option, address] if option == "--metrics" => Some(address.parse()?),
        _ => return Err("usage: greeter_cluster [--metrics ADDRESS]".into()),
    };
    // The demonstration takes about twenty seconds. If it takes more than a minute, the program
    // fails.
    timeout(Duration::from_secs(60), show(metrics)).await?
}

async fn show(metrics: Option<SocketAddr>) -> Result<(), Error> {
    let given = std::env::var("ETCD_ENDPOINTS").ok();
    let own = if given.is_none() {
        Some(Etcd::start().await?)
    } else {
        None
    };
    let endpoints = given
        .or_else(|| own.as_ref().and_then(|etcd| etcd.endpoint(0)))
        .ok_or("etcd has no member")?;
    println!(
        "etcd {} at {endpoints}",
        own.as_ref().map_or_else(String::new, Etcd::version)
    );

    let mut registry = Registry::builder(endpoints.split(',')).prefix("/greeter-cluster/");
    if let Some(address) = metrics {
        let recorder = Prometheus::default();
        let listener = TcpListener::bind(address).await?;
        println!("metrics at http://{}/metrics", listener.local_addr()?);
        tokio::spawn(serve_metrics(listener, recorder.clone()));
        registry = registry.metrics(recorder);
    }
    let registry = registry.connect().await?;
    let resolver = registry.resolver(SERVICE).start();
    let tally = Arc::new(Mutex::new(Tally::default()));
    let mut servers = BTreeMap::new();
    for name in ["alpha", "beta", "gamma"] {
        servers.insert(name, ServerProcess::start(name, &endpoints)?);
    }
    until("three servers are listed", || {
        resolver.instances().len() == 3
    })
    .await?;

    let channel = registry.channel(SERVICE).connect().await?;
    let callers: Vec<_> = (0..CALLERS)
        .map(|_| tokio::spawn(call(channel.clone(), Arc::clone(&tally))))
        .collect();
    until("all three receive calls", || {
        tally.lock().is_ok_and(|tally| tally.servers() == 3)
    })
    .await?;
    watch("three servers", &tally, &resolver, Duration::from_secs(2)).await;

    servers.insert("delta", ServerProcess::start("delta", &endpoints)?);
    until("delta receives calls", || {
        tally
            .lock()
            .is_ok_and(|tally| tally.served.contains_key("delta"))
    })
    .await?;
    watch(
        "delta has joined",
        &tally,
        &resolver,
        Duration::from_secs(2),
    )
    .await;

    let mut alpha = servers.remove("alpha").ok_or("alpha is missing")?;
    alpha.terminate()?;
    until("alpha is no longer listed", || {
        resolver.instances().len() == 3
    })
    .await?;
    alpha.ended().await?;
    // Waits until the callers have counted the last replies of the server.
    sleep(Duration::from_millis(100)).await;
    let served = tally.lock().map_or(0, |tally| tally.count("alpha"));
    watch("alpha has left", &tally, &resolver, Duration::from_secs(2)).await;

    let beta = servers.remove("beta").ok_or("beta is missing")?;
    let beta = kill_and_restart(beta, &endpoints, &tally, &resolver).await?;
    servers.insert("beta", beta);

    for caller in &callers {
        caller.abort();
    }
    for server in servers.values_mut() {
        server.terminate()?;
        server.ended().await?;
    }
    let tally = tally.lock().map_err(|_| "a caller has panicked")?;
    if tally.count("alpha") != served {
        return Err("alpha was called after its shutdown".into());
    }
    if tally.failed > 0 {
        println!("the last failure: {}", tally.last_failure);
    }
    println!(
        "{} calls failed when beta was killed; the next line does not count them as failed",
        tally.caught
    );
    println!(
        "greeter cluster: {} calls, {} failed, {} servers seen",
        tally.calls(),
        tally.failed,
        tally.servers()
    );
    if tally.failed > 0 || tally.caught > CALLERS as u64 {
        return Err("more calls failed than the kill of beta explains".into());
    }
    Ok(())
}

/// Kills beta under load and restarts it.
async fn kill_and_restart(
    mut beta: ServerProcess,
    endpoints: &str,
    tally: &Mutex<Tally>,
    resolver: &Resolver,
) -> Result<ServerProcess, Error> {
    let served = || tally.lock().map_or(0, |tally| tally.count("beta"));
    beta.kill(tally).await?;
    let before = served();
    watch("beta is killed", tally, resolver, Duration::from_secs(2)).await;
    let beta = ServerProcess::start("beta", endpoints)?;
    until("beta receives calls again", || served() > before + 100).await?;
    watch("beta is back", tally, resolver, Duration::from_secs(2)).await;
    Ok(beta)
}

/// The number of calls that each server has answered, and the number of failed calls.
#[derive(Default)]
struct Tally {
    served: BTreeMap<String, u64>,
    /// Number of calls that failed outside the [`Kill`] period.
    failed: u64,
    /// Number of calls that failed in the [`Kill`] period.
    caught: u64,
    kill: Option<Kill>,
    last_failure: String,
}

impl Tally {
    fn servers(&self) -> usize {
        self.served.len()
    }

    fn calls(&self) -> u64 {
        self.served.values().sum::<u64>() + self.failed + self.caught
    }

    fn count(&self, name: &str) -> u64 {
        self.served.get(name).copied().unwrap_or_default()
    }
}

/// The period in which calls may fail because beta was killed. It begins just before the SIGKILL,
/// and ends 250 ms after the exit of the process. By then, the client has detected the closed
/// connections.
struct Kill {
    from: Instant,
    until: Option<Instant>,
}

impl Kill {
    /// Returns whether a call that began at `start` and ends now was in flight in this period.
    fn caught(&self, start: Instant) -> bool {
        self.until.is_none_or(|until| start <= until) && Instant::now() >= self.from
    }
}

/// Sends calls at a steady pace until the task is aborted.
async fn call(channel: BalancedChannel, tally: Arc<Mutex<Tally>>) {
    let mut client = GreeterClient::new(channel);
    loop {
        let mut request = tonic::Request::new(HelloRequest {
            name: "world".to_owned(),
            replies: 1,
        });
        request.set_timeout(Duration::from_secs(5));
        let start = Instant::now();
        let outcome = client.say_hello(request).await;
        if let Ok(mut tally) = tally.lock() {
            match outcome {
                Ok(reply) => {
                    let name = reply
                        .into_inner()
                        .message
                        .rsplit(' ')
                        .next()
                        .unwrap_or_default()
                        .to_owned();
                    *tally.served.entry(name).or_default() += 1;
                }
                Err(_) if tally.kill.as_ref().is_some_and(|kill| kill.caught(start)) => {
                    tally.caught += 1;
                }
                Err(status) => {
                    tally.failed += 1;
                    tally.last_failure = format!("{status:?}");
                }
            }
        }
        sleep(Duration::from_millis(2)).await;
    }
}

/// For the duration `time`, shows how many calls each server has answered: on a terminal as one
/// line that is updated, otherwise as one line at the end.
async fn watch(title: &str, tally: &Mutex<Tally>, resolver: &Resolver, time: Duration) {
    let end = Instant::now() + time;
    let live = std::io::stdout().is_terminal();
    let show = || {
        let Ok(tally) = tally.lock() else {
            return String::new();
        };
        let served: Vec<_> = tally
            .served
            .iter()
            .map(|(name, calls)| format!("{name} {calls:>6}"))
            .collect();
        format!(
            "{title:<17} registered {}   {}   failed {}",
            resolver.instances().len(),
            served.join("   "),
            tally.failed
        )
    };
    while Instant::now() < end {
        sleep(Duration::from_millis(100)).await;
        if live {
            print!("\r\x1b[K{}", show());
            // A failed flush of the terminal does not fail the program.
            let _ = std::io::stdout().flush();
        }
    }
    println!("{}{}", if live { "\r\x1b[K" } else { "" }, show());
}

async fn until(what: &str, condition: impl Fn() -> bool) -> Result<(), Error> {
    let poll = async {
        while !condition() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(Duration::from_secs(15), poll)
        .await
        .map_err(|_| format!("timed out waiting until {what}").into())
}

/// A server in a separate process.
struct ServerProcess {
    child: Child,
    /// The pipe to the standard input of the process. The process exits when the pipe is closed. If
    /// `child` owned the pipe, `Child::wait` would close it, and the process would exit before its
    /// graceful shutdown is complete.
    _stdin: Option<ChildStdin>,
}

impl ServerProcess {
    /// Starts this program again as a server.
    fn start(name: &str, endpoints: &str) -> Result<Self, Error> {
        let mut command = Command::new(std::env::current_exe()?);
        let mut child = command
            .args(["serve", name, endpoints])
            .stdin(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let stdin = child.stdin.take();
        Ok(Self {
            child,
            _stdin: stdin,
        })
    }

    /// Sends SIGTERM, as Kubernetes and systemd do.
    fn terminate(&self) -> Result<(), Error> {
        if let Some(pid) = self.child.id() {
            kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGTERM)?;
        }
        Ok(())
    }

    /// Kills the process with SIGKILL and records the [`Kill`] period.
    async fn kill(&mut self, tally: &Mutex<Tally>) -> Result<(), Error> {
        let from = Instant::now();
        if let Ok(mut tally) = tally.lock() {
            tally.kill = Some(Kill { from, until: None });
        }
        self.child.kill().await?;
        // The kernel has now closed the sockets of the process. Until the client has detected this,
        // it may still send a call on a closed connection.
        let until = Some(Instant::now() + Duration::from_millis(250));
        if let Ok(mut tally) = tally.lock() {
            tally.kill = Some(Kill { from, until });
        }
        Ok(())
    }

    /// Waits until the process ends. Fails if it ends with an error.
    async fn ended(&mut self) -> Result<(), Error> {
        let status = timeout(Duration::from_secs(10), self.child.wait()).await??;
        if status.success() {
            Ok(())
        } else {
            Err(format!("a server ended with {status}").into())
        }
    }
}

async fn serve_greeter(name: &str, endpoints: &str) -> Result<(), Error> {
    // The parent has the other end of the pipe to standard input. When the parent ends, the read
    // returns and this process exits. The read runs on a thread outside the runtime. With tokio's
    // stdin, the shutdown of the runtime would wait for the read.
    std::thread::spawn(|| {
        let _ = std::io::stdin().read(&mut [0]);
        std::process::exit(1);
    });
    let registry = Registry::builder(endpoints.split(','))
        .prefix("/greeter-cluster/")
        .connect()
        .await?;
    let registration = registry.registration(SERVICE).ttl(Duration::from_secs(5));
    let greeter = GreeterServer::new(NamedGreeter(name.to_owned()));
    Server::builder()
        .add_service(greeter)
        .serve_registered("127.0.0.1:0".parse()?, registration)
        .await?;
    Ok(())
}

/// Serves the metrics over HTTP/1.
async fn serve_metrics(listener: TcpListener, recorder: Prometheus) {
    while let Ok((stream, _)) = listener.accept().await {
        let recorder = recorder.clone();
        let answer = service_fn(move |_| {
            let text = recorder.text();
            async move {
                let text = text.map_err(std::io::Error::other)?;
                let answer = http::Response::builder().header("content-type", CONTENT_TYPE);
                answer.body(text).map_err(std::io::Error::other)
            }
        });
        let serving = http1::Builder::new().serve_connection(TokioIo::new(stream), answer);
        tokio::spawn(async move {
            if let Err(error) = serving.await {
                println!("a scrape failed: {error}");
            }
        });
    }
}

const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
