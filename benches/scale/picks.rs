//! L3: the cost of one pick whose permit is released at once, for few and for many ready endpoints.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::Duration;

use tokio::runtime::Runtime;
use tokio::time::Instant;
use tonic_etcd::__bench::{answered, pick, pick_hashed, pick_selected};
use tonic_etcd::channel::{Select, TrafficSplit};
use tonic_etcd::{Address, BalancedChannel, Instance, LbPolicy};
use tower::discover::Change;

use super::median;
use super::peer::{in_memory, ready};

const ENDPOINTS: [usize; 3] = [10, 1_000, 10_000];
const ROUNDS: usize = 9;
const PICKS: u32 = 500_000;
/// The name, the policy, and the weight of the endpoint with an index.
type Case = (&'static str, LbPolicy, fn(usize) -> u32);

/// The pick that is measured. It receives its number.
type Picked = Box<dyn Fn(&BalancedChannel, u32) -> bool + Sync>;
/// The name, the policy, and the function that creates the pick.
type PickCase = (&'static str, LbPolicy, fn() -> Picked);

const CASES: [Case; 9] = [
    ("latency", LbPolicy::Latency, equal),
    ("least-request", LbPolicy::LeastRequest, equal),
    ("round-robin", LbPolicy::WeightedRoundRobin, equal),
    ("latency-weighted", LbPolicy::Latency, one_to_four),
    (
        "least-request-weighted",
        LbPolicy::LeastRequest,
        one_to_four,
    ),
    (
        "round-robin-weighted",
        LbPolicy::WeightedRoundRobin,
        one_to_four,
    ),
    (
        "round-robin-one-heavy",
        LbPolicy::WeightedRoundRobin,
        |index| one_heavy(index, 1_000),
    ),
    (
        "round-robin-one-very-heavy",
        LbPolicy::WeightedRoundRobin,
        |index| one_heavy(index, 100_000),
    ),
    ("round-robin-decades", LbPolicy::WeightedRoundRobin, decades),
];

fn equal(_: usize) -> u32 {
    1
}

fn one_to_four(index: usize) -> u32 {
    1 + index as u32 % 4
}

/// Returns the weights of a set in which one endpoint has this weight, and all others have the weight 1.
fn one_heavy(index: usize, weight: u32) -> u32 {
    if index == 5 { weight } else { 1 }
}

/// Returns weights from 1 to 100 000.
fn decades(index: usize) -> u32 {
    10_u32.pow(index as u32 % 6)
}

pub fn run() {
    println!(
        "\nL3: one pick among ready endpoints, with its permit released at once (target: under 100 ns with one thread; at most 2 x as long for 10 000 endpoints as for 10)\n"
    );
    println!(
        "| policy and weights | endpoints | ns, 1 thread | ratio to 10 endpoints | ns, 2 threads |\n|---|---|---|---|---|"
    );
    for (name, policy, weight) in CASES {
        let mut least = None;
        for endpoints in ENDPOINTS {
            let (_runtime, channel) = channel(policy, weight, endpoints);
            let (alone, together) = (nanos(&channel, 1), nanos(&channel, 2));
            let least = *least.get_or_insert(alone);
            println!(
                "| {name} | {endpoints} | {alone:.0} | {:.2} | {together:.0} |",
                alone / least
            );
        }
    }
    let version: fn() -> Picked = || {
        let select = Select::version("1.2");
        Box::new(move |channel, _| pick_selected(channel, &select))
    };
    let cases: [PickCase; 3] = [
        ("ring-hash", LbPolicy::RingHash, || {
            Box::new(|channel, number| pick_hashed(channel, &number.to_le_bytes()))
        }),
        ("latency, selected by version", LbPolicy::Latency, version),
        ("latency, split 5 to 95", LbPolicy::Latency, || {
            Box::new(|channel, _| pick(channel))
        }),
    ];
    for (name, policy, picked) in cases {
        let picked = picked();
        let mut least = None;
        for endpoints in ENDPOINTS {
            let (_runtime, channel) = channel(policy, equal, endpoints);
            if name.contains("split") {
                let split = TrafficSplit::new().version("1.2", 5).rest(95);
                channel.set_split(split).unwrap();
                std::thread::sleep(Duration::from_millis(500));
            }
            assert!(picked(&channel, 0));
            // The set of the selection is built in the background.
            std::thread::sleep(Duration::from_millis(500));
            let nanos = |threads| nanos_of(&channel, threads, &picked);
            let (alone, together) = (nanos(1), nanos(2));
            let least = *least.get_or_insert(alone);
            println!(
                "| {name} | {endpoints} | {alone:.0} | {:.2} | {together:.0} |",
                alone / least
            );
        }
    }
}

/// Returns a channel on which calls with random latencies were already answered.
fn channel(
    policy: LbPolicy,
    weight: fn(usize) -> u32,
    endpoints: usize,
) -> (Runtime, BalancedChannel) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let changes = (0..endpoints).map(move |index| {
        let ip = [10, 0, (index >> 8) as u8, index as u8];
        let address = Address::try_from(std::net::SocketAddr::from((ip, 1))).expect("valid");
        let version = if index % 10 == 0 { "1.2" } else { "1.1" };
        let instance = Instance::new(address.clone())
            .with_weight(weight(index))
            .with_version(version);
        Ok::<_, std::convert::Infallible>(Change::Insert(address, instance))
    });
    let channel = runtime.block_on(async {
        let builder = in_memory(BalancedChannel::builder(), policy);
        let channel = builder.discover(tokio_stream::iter(changes)).connect_lazy();
        ready(&channel, endpoints).await;
        channel
    });
    let mut rng = fastrand::Rng::with_seed(7);
    for _ in 0..endpoints * 40 {
        answered(&channel, Duration::from_micros(rng.u64(500..1_500)));
    }
    (runtime, channel)
}

/// Returns the nanoseconds per pick when this many threads pick at the same time.
fn nanos(channel: &BalancedChannel, threads: usize) -> f64 {
    nanos_of(channel, threads, |channel, _| pick(channel))
}

/// Returns the nanoseconds per call of `picked` when this many threads call it at the same time.
fn nanos_of(
    channel: &BalancedChannel,
    threads: usize,
    picked: impl Fn(&BalancedChannel, u32) -> bool + Sync,
) -> f64 {
    let round = || {
        let start = Barrier::new(threads);
        let picks = || {
            start.wait();
            let started = Instant::now();
            for number in 0..PICKS {
                assert!(black_box(picked(black_box(channel), number)));
            }
            let took = Instant::now().saturating_duration_since(started);
            took.as_nanos() as f64 / f64::from(PICKS)
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..threads).map(|_| scope.spawn(picks)).collect();
            let each: Vec<f64> = threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect();
            each.iter().sum::<f64>() / each.len() as f64
        })
    };
    median((0..ROUNDS).map(|_| round()).collect())
}
