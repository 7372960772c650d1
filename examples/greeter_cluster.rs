//! A complete cluster on this machine: an etcd (started here, or the cluster at `ETCD_ENDPOINTS`),
//! three servers, and a client that sends calls at a steady pace. Then a fourth server joins, the
//! first server shuts down, and another server is killed and restarted.
//!
//! ```sh
//! cargo run --example greeter_cluster
//! cargo run --example greeter_cluster -- --metrics 127.0.0.1:9464
//! ```
//!
//! On a terminal, the program shows a live picture: the servers with their states, the calls per
//! second, the latencies and the latest events. At the end, it prints the lines that it prints at
//! once if its output is not a terminal.
//!
//! With `--metrics`, the client serves its metrics over HTTP, in the text format of Prometheus.
//!
//! The program ends after about twenty seconds. It fails if the client does not call the new
//! server, or if the client calls the server that has shut down. It also fails if a call fails,
//! with one exception: around the time of the kill, up to 8 calls are allowed to fail, because each
//! of the 8 callers has at most one call in flight.
#![allow(clippy::print_stdout, reason = "the example prints its results")]

#[path = "greeter/cluster/mod.rs"]
#[allow(unreachable_pub, reason = "the modules of an example are private")]
mod cluster;
#[path = "greeter/exporter.rs"]
mod exporter;
mod greeter;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cluster::display::Display;
use cluster::server_process::{self, ServerProcess};
use cluster::tally::{Kill, Tally};
use greeter::{HelloRequest, greeter_client::GreeterClient};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep, timeout};
use tonic_etcd::channel::ServedBy;
use tonic_etcd::testing::Etcd;
use tonic_etcd::{BalancedChannel, Registry, Resolver};

type Error = Box<dyn std::error::Error + Send + Sync>;

const SERVICE: &str = "helloworld.Greeter";
const CALLERS: usize = 8;

#[tokio::main]
async fn main() -> Result<ExitCode, Error> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [serve, name, endpoints] = &args[..]
        && serve == "serve"
    {
        server_process::serve(name, endpoints).await?;
        return Ok(ExitCode::SUCCESS);
    }
    let metrics = exporter::address_in(&args)?;
    let tally = Arc::new(Mutex::new(Tally::default()));
    let display = Display::open(&tally);
    let outcome = tokio::select! {
        // The demonstration takes about twenty seconds. If it takes more than a minute, the program
        // fails.
        outcome = timeout(Duration::from_secs(60), show(&display, &tally, metrics)) => {
            outcome.map_err(Error::from).and_then(|outcome| outcome)
        }
        // Without a picture, the signals have their default effect.
        code = interrupted(&display), if display.is_live() => code,
    };
    // Before an error is printed.
    display.close();
    outcome
}

/// Waits for SIGINT, SIGTERM, SIGHUP or SIGQUIT. Returns the exit code of a shell's command that the signal has ended.
/// After SIGTSTP (Ctrl-Z), the terminal is restored until the program is continued.
async fn interrupted(display: &Display) -> Result<ExitCode, Error> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mut quit = signal(SignalKind::quit())?;
    let mut stop = signal(SignalKind::from_raw(nix::libc::SIGTSTP))?;
    let number = loop {
        tokio::select! {
            _ = interrupt.recv() => break 2,
            _ = terminate.recv() => break 15,
            _ = hangup.recv() => break 1,
            _ = quit.recv() => break 3,
            _ = stop.recv() => display.suspend(),
        }
    };
    Ok(ExitCode::from(128 + number))
}

async fn show(
    display: &Display,
    tally: &Arc<Mutex<Tally>>,
    metrics: Option<SocketAddr>,
) -> Result<ExitCode, Error> {
    let given = std::env::var("ETCD_ENDPOINTS").ok();
    let own = if given.is_none() {
        Some(Etcd::start().await?)
    } else {
        None
    };
    let endpoints = given
        .or_else(|| own.as_ref().and_then(|etcd| etcd.endpoint(0)))
        .ok_or("etcd has no member")?;
    let version = own.as_ref().map_or_else(String::new, Etcd::version);
    display.etcd(&format!("{version} at {endpoints}"));

    let mut registry = Registry::builder(endpoints.split(',')).prefix("/greeter-cluster/");
    if let Some(address) = metrics {
        let reporter = display.reporter();
        let on_error = move |error| reporter.line(error);
        let (recorder, address) = exporter::start(address, on_error).await?;
        display.line(format!("metrics at http://{address}/metrics"));
        registry = registry.metrics(recorder);
    }
    let registry = registry.connect().await?;
    let resolver = registry.resolver(SERVICE).start();
    display.title("three servers start");
    let mut servers = BTreeMap::new();
    for name in ["alpha", "beta", "gamma"] {
        servers.insert(name, ServerProcess::start(name, &endpoints)?);
    }
    until("three servers are listed", || {
        resolver.instances().len() == 3
    })
    .await?;

    let channel = registry.channel(SERVICE).connect().await?;
    display.channel(&channel);
    let callers: Vec<_> = (0..CALLERS)
        .map(|_| tokio::spawn(call(channel.clone(), Arc::clone(tally))))
        .collect();
    until("all three receive calls", || {
        tally.lock().is_ok_and(|tally| tally.servers() == 3)
    })
    .await?;
    let watch = async |title| watch(display, title, tally, &resolver).await;
    watch("three servers").await;

    servers.insert("delta", ServerProcess::start("delta", &endpoints)?);
    until("delta receives calls", || {
        tally
            .lock()
            .is_ok_and(|tally| tally.served.contains_key("delta"))
    })
    .await?;
    watch("delta has joined").await;

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
    watch("alpha has left").await;

    let mut beta = servers.remove("beta").ok_or("beta is missing")?;
    kill_server(&mut beta, tally).await?;
    let count = || tally.lock().map_or(0, |tally| tally.count("beta"));
    let before = count();
    watch("beta is killed").await;
    servers.insert("beta", ServerProcess::start("beta", &endpoints)?);
    // The key of the killed server stays until its lease expires.
    until("beta receives calls again", || {
        count() > before + 100 && resolver.instances().len() == 3
    })
    .await?;
    watch("beta is back").await;

    for caller in &callers {
        caller.abort();
    }
    for server in servers.values_mut() {
        server.terminate()?;
        server.ended().await?;
    }
    judge(display, tally, served)
}

/// Reports the result. Fails if more calls have failed than the demonstration explains.
fn judge(display: &Display, tally: &Mutex<Tally>, served: u64) -> Result<ExitCode, Error> {
    let tally = tally.lock().map_err(|_| "a caller has panicked")?;
    if tally.count("alpha") != served {
        return Err("alpha was called after its shutdown".into());
    }
    if tally.failed > 0 {
        display.line(format!("the last failure: {}", tally.last_failure));
    }
    display.line(format!(
        "failed when beta was killed: {} (the next line does not count these calls as failed)",
        tally.caught
    ));
    display.line(format!(
        "greeter cluster: {} calls, {} failed, {} servers seen",
        tally.calls(),
        tally.failed,
        tally.servers()
    ));
    if tally.failed > 0 || tally.caught > CALLERS as u64 {
        return Err("more calls failed than the kill of beta explains".into());
    }
    Ok(ExitCode::SUCCESS)
}

/// Kills a server under load, and records the [`Kill`] period.
async fn kill_server(server: &mut ServerProcess, tally: &Mutex<Tally>) -> Result<(), Error> {
    let from = Instant::now();
    if let Ok(mut tally) = tally.lock() {
        tally.kill = Some(Kill { from, until: None });
    }
    server.kill().await?;
    // The kernel has now closed the sockets of the process. Until the client has detected this,
    // it may still send a call on a closed connection.
    let until = Some(Instant::now() + Duration::from_millis(250));
    if let Ok(mut tally) = tally.lock() {
        tally.kill = Some(Kill { from, until });
    }
    Ok(())
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
                    let server = reply.extensions().get::<ServedBy>();
                    let server = server.map(|server| server.address().clone());
                    let message = reply.into_inner().message;
                    let name = message.rsplit(' ').next().unwrap_or_default();
                    tally.on_reply(name.to_owned(), server, start);
                }
                Err(status) => tally.on_failure(&status, start),
            }
        }
        sleep(Duration::from_millis(2)).await;
    }
}

/// Waits for two seconds, and then reports how many calls each server has answered.
async fn watch(display: &Display, title: &str, tally: &Mutex<Tally>, resolver: &Resolver) {
    display.title(title);
    sleep(Duration::from_secs(2)).await;
    let Ok(tally) = tally.lock() else {
        return;
    };
    let served: Vec<_> = tally
        .served
        .iter()
        .map(|(name, calls)| format!("{name} {calls:>6}"))
        .collect();
    display.line(format!(
        "{title:<17} registered {}   {}   failed {}",
        resolver.instances().len(),
        served.join("   "),
        tally.failed
    ));
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
