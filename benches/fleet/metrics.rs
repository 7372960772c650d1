//! The counters of etcd, read from `/metrics` of each member.

use std::collections::BTreeMap;
use std::pin::pin;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tonic_etcd::testing::Etcd;

use super::Result;

/// The counters of a member since its start, or the growth of these counters over a time.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// Messages that etcd received, by gRPC method. A unary request is one message.
    received: BTreeMap<String, f64>,
    /// Messages that etcd sent, by gRPC method.
    sent: BTreeMap<String, f64>,
    /// Streams that have ended, by gRPC method.
    ended: BTreeMap<String, f64>,
    /// CPU time in seconds.
    pub cpu: f64,
    /// Bytes that etcd sent to its clients.
    pub bytes: f64,
}

impl Counters {
    /// Returns the messages that etcd received for one method.
    pub fn received(&self, method: &str) -> f64 {
        self.received.get(method).copied().unwrap_or_default()
    }

    /// Returns the messages that etcd sent for one method.
    pub fn sent(&self, method: &str) -> f64 {
        self.sent.get(method).copied().unwrap_or_default()
    }

    /// Returns all messages that etcd received.
    pub fn requests(&self) -> f64 {
        self.received.values().sum()
    }

    /// Returns all messages that etcd sent.
    pub fn responses(&self) -> f64 {
        self.sent.values().sum()
    }

    fn add(&mut self, now: &Self, before: &Self) {
        let pairs = [
            (&mut self.received, &now.received, &before.received),
            (&mut self.sent, &now.sent, &before.sent),
            (&mut self.ended, &now.ended, &before.ended),
        ];
        for (sum, now, before) in pairs {
            for (method, value) in now {
                let before = before.get(method).copied().unwrap_or_default();
                *sum.entry(method.clone()).or_default() += value - before;
            }
        }
        self.cpu += now.cpu - before.cpu;
        self.bytes += now.bytes - before.bytes;
    }
}

/// Values at one time. Each value is the sum over the members, except `watch_streams`.
#[derive(Clone, Debug, Default)]
pub struct Gauges {
    /// Resident memory in bytes.
    pub memory: f64,
    /// Number of open connections from clients to members.
    pub connections: usize,
    pub watchers: f64,
    /// Number of watch streams of each member.
    pub watch_streams: Vec<f64>,
}

/// Measures the growth of etcd's counters since the creation of the meter.
#[derive(Debug)]
pub struct Meter {
    endpoints: Vec<String>,
    /// Whether etcd counts the end of a stream as a message that it received.
    counts_ends: bool,
    /// The last reading of each member.
    last: Vec<Counters>,
    /// Members that are excluded from the readings, because they do not respond.
    silent: Vec<usize>,
    sum: Counters,
    gauges: Gauges,
    start: Instant,
    /// The time of the last reading, and the total number of requests up to it.
    read: (Instant, f64),
    peak: f64,
}

/// The result of a [`Meter`].
#[derive(Clone, Debug)]
pub struct Measured {
    pub counters: Counters,
    pub gauges: Gauges,
    pub time: Duration,
    /// Maximum rate, in requests per second. Each rate is measured over about one second. `None` if the measurement was shorter.
    pub peak: Option<f64>,
}

impl Meter {
    pub async fn start(etcd: &Etcd) -> Result<Self> {
        let now = Instant::now();
        let mut meter = Self {
            last: vec![Counters::default(); etcd.members()],
            endpoints: etcd.endpoints(),
            counts_ends: counts_ends(&etcd.version()),
            silent: Vec::new(),
            sum: Counters::default(),
            gauges: Gauges::default(),
            start: now,
            read: (now, 0.0),
            peak: 0.0,
        };
        meter.read().await?;
        meter.sum = Counters::default();
        meter.start = Instant::now();
        meter.read = (meter.start, 0.0);
        meter.peak = 0.0;
        Ok(meter)
    }

    /// Waits until etcd has exactly this many watchers.
    pub async fn wait_for_watchers(&mut self, watchers: usize) -> Result<()> {
        let start = Instant::now();
        loop {
            self.read().await?;
            if self.gauges.watchers == watchers as f64 {
                return Ok(());
            }
            if Instant::now().saturating_duration_since(start) > PATIENCE {
                let there = self.gauges.watchers;
                return Err(format!(
                    "{there} watchers and not {watchers} after {PATIENCE:?}"
                ));
            }
            sleep(POLL).await;
        }
    }

    /// Returns the member with the most watch streams at the last reading.
    pub fn busiest(&self) -> usize {
        let streams = self.gauges.watch_streams.iter().enumerate();
        let busiest = streams.max_by(|a, b| a.1.total_cmp(b.1));
        busiest.map_or(0, |(member, _)| member)
    }

    /// Excludes from the readings a member that does not respond, until [`Meter::include`] is called.
    pub fn exclude(&mut self, member: usize) {
        self.silent.push(member);
    }

    pub fn include(&mut self, member: usize) {
        self.silent.retain(|silent| *silent != member);
    }

    /// Records that the counters of a member were reset to zero. If there is no other member, the measured time starts again.
    pub fn on_restarted(&mut self, member: usize) {
        self.last[member] = Counters::default();
        if self.last.len() == 1 {
            self.start = Instant::now();
            self.read = (self.start, self.sum.requests());
        }
    }

    /// Reads the counters every second until `work` is complete.
    pub async fn during<T>(&mut self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let mut work = pin!(work);
        let mut ticks = interval(SAMPLE);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks.tick().await;
        loop {
            tokio::select! {
                biased;
                outcome = &mut work => return outcome,
                _ = ticks.tick() => self.read().await?,
            }
        }
    }

    pub async fn end(mut self) -> Result<Measured> {
        self.read().await?;
        let mut counters = self.sum;
        if self.counts_ends {
            for (method, ended) in &counters.ended {
                if let Some(received) = counters.received.get_mut(method) {
                    *received = (*received - ended).max(0.0);
                }
            }
        }
        Ok(Measured {
            counters,
            gauges: self.gauges,
            time: Instant::now().saturating_duration_since(self.start),
            peak: (self.peak > 0.0).then_some(self.peak),
        })
    }

    async fn read(&mut self) -> Result<()> {
        let mut gauges = Gauges::default();
        for (member, endpoint) in self.endpoints.iter().enumerate() {
            if self.silent.contains(&member) {
                gauges.watch_streams.push(0.0);
                continue;
            }
            let text = timeout(PATIENCE, fetch(endpoint)).await;
            let text =
                text.map_err(|_| format!("no answer to /metrics of {endpoint} in {PATIENCE:?}"))?;
            let text = text.map_err(|error| format!("read /metrics of {endpoint}: {error}"))?;
            gauges.watch_streams.push(0.0);
            let counters = parse(&text, &mut gauges);
            self.sum.add(&counters, &self.last[member]);
            self.last[member] = counters;
        }
        gauges.connections = connections(&self.endpoints);
        self.gauges = gauges;
        let (before, requests) = self.read;
        let now = Instant::now();
        self.read = (now, self.sum.requests());
        let time = now.saturating_duration_since(before).as_secs_f64();
        // The rate over a shorter interval would not be meaningful.
        if time > 0.5 {
            self.peak = self.peak.max((self.read.1 - requests) / time);
        }
        Ok(())
    }
}

/// Returns the text of `/metrics`. The request uses HTTP/1.0, so that the response is not chunked.
async fn fetch(endpoint: &str) -> std::io::Result<String> {
    let mut socket = TcpStream::connect(endpoint).await?;
    socket.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await?;
    let mut text = String::new();
    socket.read_to_string(&mut text).await?;
    Ok(text)
}

fn parse(text: &str, gauges: &mut Gauges) -> Counters {
    let mut counters = Counters::default();
    for line in text.lines() {
        let Some((name, value)) = line.rsplit_once(' ') else {
            continue;
        };
        let Ok(value) = value.parse::<f64>() else {
            continue;
        };
        let (metric, labels) = name.split_once('{').unwrap_or((name, ""));
        match metric {
            "grpc_server_msg_received_total" => count(&mut counters.received, labels, value),
            "grpc_server_handled_total" if labels.contains("bidi_stream") => {
                count(&mut counters.ended, labels, value);
            }
            "grpc_server_msg_sent_total" => count(&mut counters.sent, labels, value),
            "process_cpu_seconds_total" => counters.cpu = value,
            "etcd_network_client_grpc_sent_bytes_total" => counters.bytes = value,
            "process_resident_memory_bytes" => gauges.memory += value,
            "etcd_debugging_mvcc_watcher_total" => gauges.watchers += value,
            "etcd_debugging_mvcc_watch_stream_total" => {
                if let Some(streams) = gauges.watch_streams.last_mut() {
                    *streams = value;
                }
            }
            _ => {}
        }
    }
    counters
}

fn count(methods: &mut BTreeMap<String, f64>, labels: &str, value: f64) {
    let label = |name: &str| {
        let (_, rest) = labels.split_once(name)?;
        rest.split_once('"').map(|(value, _)| value)
    };
    let is_etcd =
        label("grpc_service=\"").is_some_and(|service| service.starts_with("etcdserverpb."));
    if let Some(method) = label("grpc_method=\"").filter(|_| is_etcd && value > 0.0) {
        *methods.entry(method.to_owned()).or_default() += value;
    }
}

/// Returns whether this version of etcd counts the end of a stream as a received message. Version 3.6 and later versions do, because they
/// use another library for these counters.
fn counts_ends(version: &str) -> bool {
    let mut parts = version.split('.').map(|part| part.parse().unwrap_or(0));
    (parts.next(), parts.next()) >= (Some(3), Some(6))
}

/// Returns the number of open connections to the members, as the operating system lists them. etcd has no metric for this number.
fn connections(endpoints: &[String]) -> usize {
    const ESTABLISHED: &str = "01";
    let ports = endpoints
        .iter()
        .filter_map(|endpoint| endpoint.rsplit(':').next()?.parse().ok());
    let ports: Vec<u16> = ports.collect();
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap_or_default();
    let is_open = |line: &&str| {
        let mut fields = line.split_whitespace().skip(1);
        let port = fields
            .next()
            .and_then(|local| u16::from_str_radix(local.rsplit(':').next()?, 16).ok());
        port.is_some_and(|port| ports.contains(&port)) && fields.nth(1) == Some(ESTABLISHED)
    };
    table.lines().skip(1).filter(is_open).count()
}

/// Time between two readings. One reading costs etcd a few milliseconds.
const SAMPLE: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(100);
