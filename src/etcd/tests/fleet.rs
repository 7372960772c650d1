//! A fleet in virtual time: counts the requests of many clients and servers to the scripted etcd. docs/capacity.md states these numbers.

use std::collections::BTreeMap;

use super::*;

/// The scripted etcd, the resolver of each client, and the registration of each server.
struct Fleet {
    fake: Fake,
    /// The number of servers. Each client knows all of them.
    servers: usize,
    resolvers: Vec<Resolver>,
    registrations: Vec<Registration>,
}

/// The numbers of requests in an interval.
#[derive(Debug, Default)]
struct Counted {
    total: BTreeMap<&'static str, u64>,
    /// The largest number of requests within one second.
    peak: u64,
}

impl Counted {
    #[allow(
        clippy::cast_precision_loss,
        reason = "a count of requests is far below 2^52"
    )]
    fn per_second(&self, kind: &str, interval: Duration) -> f64 {
        let count = self.total.get(kind).copied().unwrap_or_default();
        count as f64 / interval.as_secs_f64()
    }
}

impl Fleet {
    /// Starts all servers, and then all clients. Waits until every client knows every server.
    async fn start(clients: usize, servers: usize) -> Self {
        let fake = Fake::new(1, 0);
        let keyspace = Keyspace::new("/gRPC/");
        let policy = AddressPolicy::default();
        let mut registrations = Vec::new();
        for server in 0..servers {
            let builder = RegistrationBuilder::service(
                fake.etcd(1),
                policy.clone(),
                keyspace.clone(),
                "greeter",
            );
            let builder = builder.address(format!("127.0.0.1:{}", server + 1));
            registrations.push(builder.register().await.expect("a registration"));
        }
        let resolver = |_| {
            let etcd = fake.etcd(1);
            ResolverBuilder::service(etcd, &keyspace, "greeter", policy.clone()).start()
        };
        let resolvers: Vec<_> = (0..clients).map(resolver).collect();
        for resolver in &resolvers {
            resolver.ready().await;
        }
        let fleet = Self {
            fake,
            servers,
            resolvers,
            registrations,
        };
        fleet.until_right(Duration::from_secs(30)).await;
        fleet
    }

    /// Returns whether every server is registered and every client knows all servers.
    fn is_right(&self) -> bool {
        let registered = |registration: &Registration| registration.state().is_registered();
        let known = |resolver: &Resolver| {
            resolver.status().state == ResolverState::Fresh
                && resolver.instances().len() == self.servers
        };
        self.registrations.iter().all(registered) && self.resolvers.iter().all(known)
    }

    /// Waits until [`is_right`](Self::is_right) returns true. Returns the time that this took.
    async fn until_right(&self, bound: Duration) -> Duration {
        let start = Instant::now();
        while !self.is_right() {
            assert!(
                Instant::now().saturating_duration_since(start) < bound,
                "a server is not registered or not known to every client after {bound:?}"
            );
            sleep(Duration::from_millis(100)).await;
        }
        Instant::now().saturating_duration_since(start)
    }

    /// Counts the requests of an interval.
    async fn count(&self, interval: Duration) -> Counted {
        let mut counted = Counted::default();
        for _ in 0..interval.as_secs() {
            self.fake.script().counts.clear();
            sleep(Duration::from_secs(1)).await;
            let second = self.fake.script().counts.clone();
            counted.peak = counted.peak.max(second.values().sum());
            for (kind, count) in second {
                *counted.total.entry(kind).or_default() += count;
            }
        }
        counted
    }
}

/// Returns the numbers of clients and servers: 60 and 40 in the test suite. `TEST_FLEET=10000,40` sets other numbers.
fn sizes() -> (usize, usize) {
    let given = std::env::var("TEST_FLEET").ok();
    let given = given.as_deref().and_then(|given| {
        let (clients, servers) = given.split_once(',')?;
        Some((clients.parse().ok()?, servers.parse().ok()?))
    });
    given.unwrap_or((60, 40))
}

/// Returns the numbers of renewals and of reads per second that the servers send at rest, if each server counts those that registered
/// before it: a renewal every TTL/3, and a read after the first renewal that is at least 30 s to 60 s after the previous read.
#[allow(clippy::cast_precision_loss, reason = "the numbers are below 2^52")]
fn renewals_and_reads(servers: usize) -> (f64, f64) {
    let of_one = |before: usize| {
        let ttl = (0.06 * before as f64).floor().clamp(15.0, 120.0);
        let interval = ttl / 3.0;
        let read_after = |wait: u32| (f64::from(wait) / interval).ceil() * interval;
        let mean = (30..60).map(read_after).sum::<f64>() / 30.0;
        (1.0 / interval, 1.0 / mean)
    };
    let sum = |(renewals, reads), (renewal, read)| (renewals + renewal, reads + read);
    (0..servers).map(of_one).fold((0.0, 0.0), sum)
}

#[test]
#[allow(
    clippy::cast_precision_loss,
    reason = "a count of requests is far below 2^52"
)]
fn a_fleet_in_virtual_time_sends_as_many_requests_as_documented() {
    let mut paused = tokio::runtime::Builder::new_current_thread();
    let paused = paused.enable_all().start_paused(true).build();
    let (clients, servers) = sizes();
    // Jitter and lease ids use the random number generator of this thread.
    fastrand::seed(1);
    paused.expect("a runtime").block_on(async move {
        let fleet = Fleet::start(clients, servers).await;
        // Requests at rest. In 450 s, each client reconciles its instances twice on average.
        sleep(Duration::from_secs(60)).await;
        let interval = Duration::from_secs(450);
        let rest = fleet.count(interval).await;
        let (renewals, reads) = renewals_and_reads(servers);
        let (clients, servers) = (clients as f64, servers as f64);
        let mean = |kind: &str| rest.per_second(kind, interval);
        let all: u64 = rest.total.values().sum();
        let all = all as f64 / interval.as_secs_f64();
        println!(
            "{clients} clients, {servers} servers at rest: {all:.1} requests per second, {rest:?}"
        );
        for (kind, expected) in [
            ("watch request", clients / 30.0),
            ("renewal", renewals),
            ("read", reads),
            ("list", clients / 225.0),
        ] {
            let found = mean(kind);
            assert!(
                (found / expected - 1.0).abs() < 0.2,
                "{kind}: {found} requests per second, expected {expected}"
            );
        }
        assert!(
            rest.peak as f64 <= 3.0 * all + 20.0,
            "a peak of {} requests in one second, but {all} on average",
            rest.peak
        );
        // etcd restarts: every stream ends at once.
        fleet.fake.cut();
        let after = fleet.count(Duration::from_secs(20)).await;
        println!("20 s after a restart: {after:?}");
        fleet.until_right(Duration::from_secs(10)).await;
        let all: u64 = after.total.values().sum();
        // The estimate: two requests for each client, which reads one key as a check and opens a watch; eight for each server, which renews
        // its lease, reads its key and opens a watch; and the requests at rest.
        let expected = 2.0 * clients
            + 8.0 * servers
            + 20.0 * (clients / 30.0 + renewals + reads + clients / 225.0);
        assert!(
            all as f64 <= 1.2 * expected,
            "{all} requests in 20 s are too many: the estimate is {expected}"
        );
        let lists = after.total.get("list").copied().unwrap_or_default();
        assert!(
            (lists as f64) < 20.0 + clients / 4.0,
            "{lists} lists in 20 s are too many"
        );
    });
}
