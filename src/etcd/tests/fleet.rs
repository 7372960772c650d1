//! A fleet in virtual time: counts the requests of many clients and servers to the scripted etcd. docs/capacity.md states these numbers.

use std::collections::BTreeMap;

use super::*;

/// The number of servers. Each client knows all of them.
const SERVERS: usize = 40;

/// The scripted etcd, the resolver of each client, and the registration of each server.
struct Fleet {
    fake: Fake,
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
    async fn start(clients: usize) -> Self {
        let fake = Fake::new(1, 0);
        let keyspace = Keyspace::new("/gRPC/");
        let policy = AddressPolicy::default();
        let mut registrations = Vec::new();
        for server in 0..SERVERS {
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
            resolver.status().state == ResolverState::Fresh && resolver.instances().len() == SERVERS
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

/// Returns the number of clients: 60 in the test suite, 10 000 in `make fleet`.
fn clients() -> usize {
    let given = std::env::var("TEST_FLEET").ok();
    given.and_then(|given| given.parse().ok()).unwrap_or(60)
}

#[test]
#[allow(
    clippy::cast_precision_loss,
    reason = "a count of requests is far below 2^52"
)]
fn a_fleet_in_virtual_time_sends_as_many_requests_as_documented() {
    let mut paused = tokio::runtime::Builder::new_current_thread();
    let paused = paused.enable_all().start_paused(true).build();
    let clients = clients();
    // Jitter and lease ids use the random number generator of this thread.
    fastrand::seed(1);
    paused.expect("a runtime").block_on(async move {
        let fleet = Fleet::start(clients).await;
        // Requests at rest. In 450 s, each client reconciles its instances twice on average.
        sleep(Duration::from_secs(60)).await;
        let interval = Duration::from_secs(450);
        let rest = fleet.count(interval).await;
        let (clients, servers) = (clients as f64, SERVERS as f64);
        let mean = |kind: &str| rest.per_second(kind, interval);
        println!("{clients} clients, {servers} servers at rest: {rest:?}");
        for (kind, expected) in [
            ("watch request", (clients + servers) / 30.0),
            ("renewal", servers / 5.0),
            ("read", servers / 45.0),
            ("list", clients / 225.0),
        ] {
            let found = mean(kind);
            assert!(
                (found / expected - 1.0).abs() < 0.2,
                "{kind}: {found} requests per second, expected {expected}"
            );
        }
        let all: u64 = rest.total.values().sum();
        let all = all as f64 / interval.as_secs_f64();
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
        let expected = 2.0 * clients + 8.0 * servers + 20.0 * all_at_rest(clients, servers);
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

/// Returns the expected number of requests per second at rest.
fn all_at_rest(clients: f64, servers: f64) -> f64 {
    (clients + servers) / 30.0 + servers / 5.0 + servers / 45.0 + clients / 225.0
}
