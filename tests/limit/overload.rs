//! A server that receives twice as many calls as it can serve.

use std::time::Duration;

use tonic::Code;
use tonic_etcd::RetryPolicy;
use tonic_etcd::limit::AdaptiveLimitLayer;

use crate::load::{Calls, Kind, Outcome, clients};
use crate::support::greeter::greeter_client::GreeterClient;
use crate::support::{self, registry, soak};
use crate::workers::Process;
use crate::{LOAD, World};

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
/// Four workers that need 40 ms for a call serve 100 calls in a second, which is far below the capacity of the machine. Timers are late by some
/// milliseconds, so the tests measure the capacity.
const WORKERS: usize = 4;
const SERVICE: Duration = Duration::from_millis(40);
const NOMINAL: f64 = 100.0;

/// Sizes and bounds. The small ones permit a machine that is busy with other tests.
#[derive(Clone, Copy, Debug)]
struct Goals {
    /// The seconds before the calls that count, and those of these calls.
    seconds: (u32, u32),
    /// The smallest part of the capacity.
    goodput: f64,
    /// A percentile, and its largest value, relative to that without load.
    latency: (usize, f64),
}

fn goals(name: &str) -> Goals {
    let small = Goals {
        seconds: (5, 5),
        goodput: 0.5,
        latency: (99, 8.0),
    };
    let full = Goals {
        seconds: (15, 60),
        goodput: 0.9,
        latency: (99, 2.0),
    };
    soak(name, small, full)
}

/// The outcome of the same load with and without the layer.
struct Comparison {
    /// The calls that the server can serve in a second.
    capacity: f64,
    without_load: Outcome,
    without_layer: Outcome,
    with_layer: Outcome,
    /// The limit at the end.
    limit: usize,
}

impl Comparison {
    async fn new(kind: Kind, deadline: Duration, goals: Goals) -> Self {
        let (warm_up, time) = goals.seconds;
        let calls = Calls {
            kind,
            deadline,
            warm_up: warm_up * SECOND,
            time: time * SECOND,
        };
        let before = |kind| Calls {
            kind,
            deadline: MINUTE,
            warm_up: SECOND,
            time: (time * SECOND / 2).min(20 * SECOND),
        };
        let without = async {
            let server = Process::start(WORKERS, SERVICE, false).await;
            let clients = clients(&server.address).await;
            let busy = before(Kind::Closed(4 * WORKERS)).make(&clients).await;
            (busy.goodput(), calls.make(&clients).await)
        };
        let with = async {
            let mut server = Process::start(WORKERS, SERVICE, true).await;
            let clients = clients(&server.address).await;
            let quiet = before(Kind::Open(NOMINAL / 4.0)).make(&clients).await;
            (quiet, calls.make(&clients).await, server.limit().await)
        };
        let ((capacity, without_layer), (without_load, with_layer, limit)) =
            tokio::join!(without, with);
        let comparison = Self {
            capacity,
            without_load,
            without_layer,
            with_layer,
            limit,
        };
        println!("{kind:?}, deadline {deadline:?}: capacity {capacity:.1} calls/s");
        println!("without load: {}", comparison.without_load);
        println!("without the layer: {}", comparison.without_layer);
        println!(
            "with the layer, whose limit is {limit}: {}",
            comparison.with_layer
        );
        let (goodput, p99) = (comparison.goodput(), comparison.latency(99));
        println!("{goodput:.2} of the capacity, p99 {p99:.2} times that without load");
        comparison
    }

    /// Returns the part of the capacity that the calls with the layer use.
    fn goodput(&self) -> f64 {
        self.with_layer.goodput() / self.capacity
    }

    /// Returns a percentile of the accepted calls with the layer, relative to that without load.
    fn latency(&self, percent: usize) -> f64 {
        let without_load = self.without_load.percentile(percent);
        self.with_layer.percentile(percent).as_secs_f64() / without_load.as_secs_f64()
    }

    fn check(&self, goals: Goals) {
        assert_eq!(self.without_load.refused, 0);
        assert!(self.goodput() >= goals.goodput);
        let (percent, bound) = goals.latency;
        assert!(self.latency(percent) <= bound);
        assert!(self.limit <= 12);
        assert!(self.with_layer.refused > 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_overloaded_server_stays_fast_for_the_calls_that_it_accepts() {
    let _load = LOAD.lock().await;
    let goals = goals("seconds, goodput and p99 of an open loop");
    let load = Kind::Open(2.0 * NOMINAL);
    let comparison = Comparison::new(load, SECOND, goals).await;
    comparison.check(goals);
    // Its calls are served when their callers do not wait any more.
    assert!(comparison.without_layer.goodput() < comparison.with_layer.goodput());
}

/// Without the layer, 64 callers wait 15 times as long as without load.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_with_too_many_callers_stays_fast_for_the_calls_that_it_accepts() {
    let _load = LOAD.lock().await;
    let goals = goals("seconds, goodput and p99 of a closed loop");
    let comparison = Comparison::new(Kind::Closed(64), MINUTE, goals).await;
    comparison.check(goals);
    assert!(comparison.without_layer.p99() > comparison.with_layer.p99());
}

/// The server is found through etcd. Its clients send a refused call again when the wait that the server requests is over.
#[tokio::test(flavor = "multi_thread")]
async fn a_registered_server_serves_at_its_capacity_while_its_clients_wait_as_it_requests() {
    let _load = LOAD.lock().await;
    let goals = goals("seconds, goodput and p99 of channels with a retry policy");
    let world = World::new(AdaptiveLimitLayer::new(), WORKERS, SERVICE).await;
    let registry = registry(&world.etcd).await;
    let mut clients = Vec::new();
    for _ in 0..4 {
        let retry = RetryPolicy::new([Code::ResourceExhausted]).max_attempts(5);
        let channel = registry.channel(support::SERVICE).retry(retry);
        let channel = channel.max_pushback(SECOND).connect().await.unwrap();
        clients.push(GreeterClient::new(channel));
    }
    let (warm_up, time) = goals.seconds;
    let load = |kind| Calls {
        kind,
        deadline: MINUTE,
        warm_up: warm_up * SECOND,
        time: time * SECOND,
    };
    let latencies = || {
        let mut ended = std::mem::take(&mut *world.latencies.lock().unwrap());
        let end = ended.iter().map(|(at, _)| *at).max().unwrap();
        ended.retain(|(at, _)| end.saturating_duration_since(*at) <= time * SECOND);
        let mut latencies: Vec<_> = ended.into_iter().map(|(_, latency)| latency).collect();
        latencies.sort_unstable();
        latencies
    };
    let quiet = load(Kind::Open(NOMINAL / 4.0)).make(&clients).await;
    assert_eq!((quiet.refused, quiet.late), (0, 0));
    let without_load = latencies();
    let mean = without_load.iter().sum::<Duration>() / u32::try_from(without_load.len()).unwrap();
    let capacity = f64::from(u32::try_from(WORKERS).unwrap()) / mean.as_secs_f64();
    let busy = load(Kind::Closed(64)).make(&clients).await;
    let accepted = latencies();
    let p99 = |latencies: &[Duration]| latencies[latencies.len() * 99 / 100].as_secs_f64();
    let (goodput, latency) = (
        busy.goodput() / capacity,
        p99(&accepted) / p99(&without_load),
    );
    println!(
        "capacity {capacity:.1} calls/s, clients: {busy}, limit {}",
        world.limit.limit()
    );
    println!(
        "{goodput:.2} of the capacity, p99 of accepted calls {latency:.2} times that without load"
    );
    assert!(goodput >= goals.goodput);
    assert!(latency <= goals.latency.1);
    assert!(world.limit.refused() > 0);
}

/// With the initial limit, a call waits 31 times 50 ms.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_calls_all_exceed_their_deadlines_serves_again() {
    let _load = LOAD.lock().await;
    let mut server = Process::start(1, SECOND / 20, true).await;
    let calls = Calls {
        kind: Kind::Open(40.0),
        deadline: SECOND / 2,
        warm_up: 8 * SECOND,
        time: 4 * SECOND,
    };
    let load = calls.make(&clients(&server.address).await).await;
    let limit = server.limit().await;
    println!("of 20 calls/s: {load}, limit {limit}");
    assert!(load.goodput() >= 5.0);
    assert!(limit <= 16);
}
