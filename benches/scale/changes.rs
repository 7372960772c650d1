//! L4: the CPU time that a client uses when one instance joins or leaves a large set, from the event of etcd until the picker sees the
//! change. Also the time and the CPU time of loading the set.

use std::time::Duration;

use etcd_client::{Client, Txn, TxnOp};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tonic_etcd::testing::Etcd;
use tonic_etcd::{__bench as seen, BalancedChannel, LbPolicy, Registry};

use super::peer::{in_memory, ready};
use super::{cpu, median, percentile};

const SETS: [usize; 3] = [1_000, 10_000, 20_000];
const CHANGES: usize = 100;
const SERVICE: &str = "greeter";
/// Number of operations in one transaction, within the limit of etcd.
const OPERATIONS: usize = 100;

pub fn run() {
    println!(
        "\nL4: the client's CPU time from a join or leave of one instance until the picker sees the change (target: under 200 us in a set of 10 000), and the time to load the set from etcd (target: under 1 s for 10 000)\n"
    );
    println!(
        "| instances | CPU of a join, p50 | p90 | CPU of a leave, p50 | p90 | load into a resolver: time, CPU | load until all endpoints are ready: time, CPU | the latter CPU per instance | CPU per second, idle |\n|---|---|---|---|---|---|---|---|---|"
    );
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    for instances in SETS {
        runtime.block_on(one(instances));
    }
}

async fn one(instances: usize) {
    let etcd = Etcd::start().await.unwrap();
    let writer = Client::connect(etcd.endpoints(), None).await.unwrap();
    register(&writer, instances).await;
    let subject = Subject::start(etcd.endpoints(), instances).await;
    let idle = subject.cpu().await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let idle = (subject.cpu().await - idle).as_secs_f64() / 2.0;
    let (mut joins, mut leaves) = (Vec::new(), Vec::new());
    for change in 0..CHANGES {
        let (key, value) = entry(instances + change);
        let before = subject.cpu().await;
        writer
            .kv_client()
            .put(key.clone(), value, None)
            .await
            .unwrap();
        subject.sees(instances + 1).await;
        let joined = subject.cpu().await;
        writer.kv_client().delete(key, None).await.unwrap();
        subject.sees(instances).await;
        let left = subject.cpu().await;
        joins.push((joined - before).as_secs_f64() * 1e6);
        leaves.push((left - joined).as_secs_f64() * 1e6);
    }
    let Loaded { resolver, channel } = subject.loaded;
    println!(
        "| {instances} | {:.0} us | {:.0} us | {:.0} us | {:.0} us | {:.0} ms, {:.0} ms | {:.0} ms, {:.0} ms | {:.1} us | {:.1} ms |",
        median(joins.clone()),
        percentile(joins, 0.9),
        median(leaves.clone()),
        percentile(leaves, 0.9),
        resolver.0.as_secs_f64() * 1e3,
        resolver.1.as_secs_f64() * 1e3,
        channel.0.as_secs_f64() * 1e3,
        channel.1.as_secs_f64() * 1e3,
        channel.1.as_secs_f64() * 1e6 / instances as f64,
        idle * 1e3,
    );
}

fn entry(index: usize) -> (String, String) {
    let address = format!(
        "10.{}.{}.{}:50051",
        index >> 16,
        index >> 8 & 255,
        index & 255
    );
    let key = format!("/gRPC/{SERVICE}/{address}");
    (
        key,
        format!("{{\"Op\":0,\"Addr\":\"{address}\",\"Metadata\":null}}"),
    )
}

async fn register(writer: &Client, instances: usize) {
    let indexes: Vec<_> = (0..instances).collect();
    for some in indexes.chunks(OPERATIONS) {
        let puts: Vec<_> = some
            .iter()
            .map(|index| entry(*index))
            .map(|(key, value)| TxnOp::put(key, value, None))
            .collect();
        writer
            .kv_client()
            .txn(Txn::new().and_then(puts))
            .await
            .unwrap();
    }
}

/// A client on a thread of its own, so that the CPU time of the thread is the CPU time of the client.
struct Subject {
    channel: BalancedChannel,
    clock: mpsc::UnboundedSender<oneshot::Sender<Duration>>,
    loaded: Loaded,
}

/// Wall time and CPU time of loading the set: into a resolver alone, and into a channel until all endpoints are ready.
struct Loaded {
    resolver: (Duration, Duration),
    channel: (Duration, Duration),
}

impl Subject {
    async fn start(etcd: Vec<String>, instances: usize) -> Self {
        let (started, start) = oneshot::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async move {
                let registry = Registry::connect(etcd).await.unwrap();
                let (clock, mut questions) = mpsc::unbounded_channel::<oneshot::Sender<_>>();
                let resolver = timed(async {
                    let resolver = registry.resolver(SERVICE).start();
                    resolver.ready().await;
                    assert_eq!(resolver.instances().len(), instances);
                })
                .await;
                let mut loaded = None;
                let whole = timed(async {
                    let builder = in_memory(registry.channel(SERVICE), LbPolicy::default());
                    let channel = loaded.insert(builder.connect_lazy());
                    ready(channel, instances).await;
                })
                .await;
                let subject = Self {
                    channel: loaded.unwrap(),
                    clock,
                    loaded: Loaded {
                        resolver,
                        channel: whole,
                    },
                };
                assert!(started.send(subject).is_ok());
                while let Some(answer) = questions.recv().await {
                    let _ = answer.send(cpu::of_this_thread());
                }
            });
        });
        start.await.unwrap()
    }

    /// Returns the CPU time that the client's thread has used so far.
    async fn cpu(&self) -> Duration {
        let (answer, answered) = oneshot::channel();
        self.clock.send(answer).unwrap();
        answered.await.unwrap()
    }

    /// Waits until the client's picker sees this many endpoints. The polling costs CPU time of the calling thread, not of the client's
    /// thread.
    async fn sees(&self, endpoints: usize) {
        let start = Instant::now();
        while seen::ready(&self.channel) != endpoints {
            tokio::time::sleep(Duration::from_micros(100)).await;
            let waited = Instant::now().saturating_duration_since(start);
            assert!(
                waited < Duration::from_secs(10),
                "the picker does not see {endpoints} endpoints after {waited:?}"
            );
        }
    }
}

async fn timed(work: impl Future<Output = ()>) -> (Duration, Duration) {
    let (start, before) = (Instant::now(), cpu::of_this_thread());
    work.await;
    (
        Instant::now().saturating_duration_since(start),
        cpu::of_this_thread() - before,
    )
}
