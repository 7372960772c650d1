//! One process that watches many services, or one service with many instances: its messages at rest, and its memory.

use std::process::Stdio;
use std::time::Duration;

use etcd_client::{Txn, TxnOp};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;
use tokio::time::{Instant, sleep, timeout};
use tonic_etcd::resolver::ResolverState;
use tonic_etcd::{Registry, Resolver};

use super::Result;
use super::metrics::{Measured, Meter};
use super::options::Options;
use super::world::World;

/// The measurement of one process.
#[derive(Debug)]
pub struct Process {
    pub measured: Measured,
    /// Growth of the process's resident memory in bytes, from before the services start until after the time at rest.
    pub memory: f64,
    /// Time until the instances of all services were up to date.
    pub fresh: Duration,
}

impl Process {
    /// Returns the messages per second from the process to etcd, and from etcd to the process.
    pub fn rates(&self) -> (f64, f64) {
        let seconds = self.measured.time.as_secs_f64();
        let counters = &self.measured.counters;
        (
            counters.requests() / seconds,
            counters.responses() / seconds,
        )
    }
}

/// What the process watches, and how it starts to watch.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub services: usize,
    /// Number of instances of each service.
    pub instances: usize,
    /// Whether the resolvers of all services start at once. Otherwise they start one after the other.
    pub at_once: bool,
    /// Whether the values of the keys have metadata.
    pub metadata: bool,
}

/// Measures a process that watches services.
pub async fn measure(options: &Options, shape: Shape) -> Result<Process> {
    let Shape {
        services,
        instances,
        at_once,
        metadata,
    } = shape;
    let world = World::start(1, false).await?;
    let keys = (0..services)
        .flat_map(|service| (0..instances).map(move |instance| put(service, instance, metadata)));
    let keys: Vec<_> = keys.collect();
    let mut kv = world.operator(0).await?.kv_client();
    for keys in keys.chunks(OPERATIONS) {
        let written = kv.txn(Txn::new().and_then(keys)).await;
        written.map_err(|error| format!("write the instances: {error}"))?;
    }
    let program = std::env::current_exe().map_err(|error| format!("find this program: {error}"))?;
    let mut child = Command::new(program)
        .args([
            "watch",
            &world.etcd.endpoint(0).unwrap(),
            &services.to_string(),
            &instances.to_string(),
            if at_once { AT_ONCE } else { "in-turn" },
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("start the process with {services} services: {error}"))?;
    let mut input = child.stdin.take().ok_or("the process has no input")?;
    let output = child.stdout.take().ok_or("the process has no output")?;
    let mut lines = BufReader::new(output).lines();
    let mut figure = async || -> Result<f64> {
        let line = timeout(PATIENCE, lines.next_line()).await;
        let line = line.map_err(|_| {
            format!("the sets of {services} services are not up to date after {PATIENCE:?}")
        })?;
        let line = line.ok().flatten().unwrap_or_default();
        line.parse().map_err(|error| {
            format!("read {line:?} from the process with {services} services: {error}")
        })
    };
    let fresh = figure().await?;
    let mut meter = Meter::start(&world.etcd).await?;
    meter.wait_for_watchers(services).await?;
    let mut meter = Meter::start(&world.etcd).await?;
    let rest = async {
        sleep(options.rest).await;
        Ok(())
    };
    meter.during(rest).await?;
    let measured = meter.end().await?;
    input
        .write_all(b"\n")
        .await
        .map_err(|error| format!("write to the process: {error}"))?;
    let memory = figure().await?;
    drop(input);
    let ended = timeout(PATIENCE, child.wait()).await;
    ended
        .map_err(|_| format!("the process with {services} services does not end"))?
        .map_err(|error| format!("wait for the process: {error}"))?;
    Ok(Process {
        measured,
        memory,
        fresh: Duration::from_secs_f64(fresh),
    })
}

/// Runs the measured process. The process watches the services, and prints the time until all services are up to date. For each line of its
/// input, it prints the growth of its memory. It ends at the end of its input.
pub async fn watch(endpoint: &str, services: usize, instances: usize, start: &str) -> Result<()> {
    let registry = Registry::connect([endpoint]).await;
    let registry = registry.map_err(|error| format!("connect to {endpoint}: {error}"))?;
    // The first resolver opens the connections that all services share, so that they do not count as memory of the services.
    let first = registry.resolver("first").start();
    first.ready().await;
    let before = resident_memory()?;
    drop(first);
    let began = Instant::now();
    let mut resolvers = Vec::with_capacity(services);
    for service in 0..services {
        let resolver = registry.resolver(name(service)).start();
        if start != AT_ONCE {
            resolver.ready().await;
        }
        resolvers.push(resolver);
    }
    let is_fresh = |resolver: &Resolver| {
        resolver.status().state == ResolverState::Fresh && resolver.instances().len() == instances
    };
    while !resolvers.iter().all(is_fresh) {
        sleep(Duration::from_millis(20)).await;
    }
    println!(
        "{}",
        Instant::now()
            .saturating_duration_since(began)
            .as_secs_f64()
    );
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Ok(Some(_)) = lines.next_line().await {
        println!("{}", resident_memory()? - before);
    }
    Ok(())
}

/// Returns the resident memory of this process in bytes.
fn resident_memory() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/self/smaps_rollup");
    let text = text.map_err(|error| format!("read the memory of this process: {error}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Rss:"));
    let kilobytes =
        line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<f64>().ok());
    kilobytes
        .map(|kilobytes| kilobytes * 1024.0)
        .ok_or_else(|| "no line \"Rss\" in /proc/self/smaps_rollup".to_owned())
}

fn name(service: usize) -> String {
    format!("service{service}")
}

/// Returns the put of one instance. Its value contains the address, and with `metadata` also weight, zone, version and one more field.
fn put(service: usize, instance: usize, metadata: bool) -> TxnOp {
    let address = format!(
        "10.{}.{}.{}:50051",
        service % 250,
        instance / 250,
        instance % 250
    );
    let metadata = if metadata {
        format!(
            r#"{{"weight":"10","zone":"eu-1a","version":"1.2.0","host":"node{instance}.example"}}"#
        )
    } else {
        "null".to_owned()
    };
    let value = format!(r#"{{"Op":0,"Addr":"{address}","Metadata":{metadata}}}"#);
    TxnOp::put(format!("/gRPC/{}/{address}", name(service)), value, None)
}

const AT_ONCE: &str = "at-once";
/// Number of operations in one transaction. By default, etcd accepts at most 128.
const OPERATIONS: usize = 100;
const PATIENCE: Duration = Duration::from_secs(60);
