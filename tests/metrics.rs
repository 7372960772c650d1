//! The values of the instruments, over real servers and a real etcd.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

#[path = "../balance/src/metrics/tests/memory.rs"]
#[allow(dead_code, reason = "the tests of tonic-balance use the rest")]
mod memory;
mod support;

use std::time::Duration;

use memory::Memory;
use support::greeter::HelloRequest;
use support::greeter::greeter_client::GreeterClient;
use support::script::{Act, Server};
use support::{SOON, all_ready, client, etcd, eventually};
use tokio::time::timeout;
use tonic::{Code, Request};
use tonic_etcd::channel::{
    ChannelBuilder, FailurePercentageEjection, HedgingPolicy, OutlierDetection,
};
use tonic_etcd::metrics::{self, Kind, Metrics, instruments};
use tonic_etcd::registration::RegistrationState;
use tonic_etcd::resolver::ResolverBuilder;
use tonic_etcd::testing::Etcd;
use tonic_etcd::{BalancedChannel, LbPolicy, Registration, Registry, RetryPolicy};

const METHOD: &str = "grpc.method=helloworld.Greeter/SayHello";
const DOWN: Act = Act::Fail(Code::Unavailable, &[]);

fn everything(memory: &Memory) -> Metrics {
    let all = instruments().fold(Metrics::new(memory.clone()), |metrics, instrument| {
        metrics.enable(instrument.name())
    });
    all.with_label("grpc.disconnect_error")
}

/// An etcd, a registry with metrics, and the recorded values.
struct Measured {
    etcd: Etcd,
    registry: Registry,
    memory: Memory,
}

impl Measured {
    async fn new() -> Self {
        let (etcd, memory) = (etcd().await, Memory::default());
        let builder = Registry::builder(etcd.endpoints()).metrics(everything(&memory));
        let registry = builder.connect().await.unwrap();
        Self {
            etcd,
            registry,
            memory,
        }
    }

    /// Registers the servers, and returns a channel to them once all are ready.
    async fn serve(
        &self,
        service: &str,
        servers: &[Server],
        configure: impl FnOnce(ChannelBuilder<ResolverBuilder>) -> ChannelBuilder<ResolverBuilder>,
    ) -> (BalancedChannel, Vec<Registration>) {
        let mut registrations = Vec::new();
        for server in servers {
            let registration = self.registry.registration(service);
            let registration = registration.address(&server.address).ttl(TTL);
            registrations.push(registration.register().await.unwrap());
        }
        let channel = configure(self.registry.channel(service)).connect_lazy();
        all_ready(&channel, servers.len()).await;
        (channel, registrations)
    }

    /// Returns the values of a histogram of a service's calls.
    fn calls(&self, instrument: &str, status: Option<&str>, service: &str) -> Vec<f64> {
        let status = status.map_or(String::new(), |status| format!("grpc.status={status},"));
        let key = format!("{instrument}{{{METHOD},{status}{}}}", target(service));
        self.memory.values(&key)
    }

    fn started(&self, service: &str) -> i64 {
        let key = format!(
            "grpc.client.attempt.started{{{METHOD},{}}}",
            target(service)
        );
        self.memory.sum(&key)
    }

    /// Returns the value of a counter that has only the label of the target.
    fn count(&self, instrument: &str, service: &str) -> i64 {
        let key = format!("{instrument}{{{}}}", target(service));
        self.memory.sum(&key)
    }

    fn instances(&self, state: &str, service: &str) -> Option<f64> {
        let labels = format!("{},tonic_etcd.state={state}", target(service));
        self.memory
            .gauge(&format!("tonic_etcd.resolver.instances{{{labels}}}"))
    }

    fn connected(&self, service: &str) -> Option<f64> {
        let target = target(service);
        self.memory
            .gauge(&format!("tonic_etcd.resolver.connected{{{target}}}"))
    }

    fn registration(&self, instrument: &str, service: &str) -> Option<f64> {
        let key = format!("tonic_etcd.registration.{instrument}{{tonic_etcd.service={service}}}");
        self.memory.gauge(&key)
    }

    fn losses(&self, reason: &str, service: &str) -> i64 {
        let labels = format!("tonic_etcd.reason={reason},tonic_etcd.service={service}");
        self.memory
            .sum(&format!("tonic_etcd.registration.losses{{{labels}}}"))
    }
}

const TTL: Duration = Duration::from_secs(5);

fn target(service: &str) -> String {
    format!("grpc.target=etcd:////gRPC/{service}")
}

async fn say(channel: &BalancedChannel, deadline: Option<Duration>) -> Result<(), tonic::Status> {
    let mut request = Request::new(HelloRequest {
        name: "world".to_owned(),
        replies: 1,
    });
    if let Some(deadline) = deadline {
        request.set_timeout(deadline);
    }
    let mut client = GreeterClient::new(channel.clone());
    let call = timeout(SOON, client.say_hello(request));
    call.await.expect("an answer in time").map(drop)
}

#[tokio::test]
async fn calls_retries_and_hedges_are_recorded_with_the_target_of_the_registry() {
    let measured = Measured::new().await;
    let servers = [Server::always(Act::Reply).await];
    let (channel, _kept) = measured.serve("a.Good", &servers, |channel| channel).await;
    for _ in 0..5 {
        say(&channel, None).await.unwrap();
    }
    assert_eq!(measured.started("a.Good"), 5);
    let request = "world".len() + 4;
    let sent = "grpc.client.attempt.sent_total_compressed_message_size";
    let sent = measured.calls(sent, Some("OK"), "a.Good");
    assert_eq!(sent, vec![f64::from(u32::try_from(request).unwrap()); 5]);
    let received = "grpc.client.attempt.rcvd_total_compressed_message_size";
    assert_eq!(measured.calls(received, Some("OK"), "a.Good"), [0.0; 5]);
    for instrument in ["grpc.client.attempt.duration", "grpc.client.call.duration"] {
        assert_eq!(measured.calls(instrument, Some("OK"), "a.Good").len(), 5);
    }

    let servers = [Server::always(Act::Fail(Code::NotFound, &[])).await];
    let (channel, _kept) = measured.serve("a.Bad", &servers, |channel| channel).await;
    say(&channel, None).await.unwrap_err();
    let failed = measured.calls("grpc.client.call.duration", Some("NOT_FOUND"), "a.Bad");
    assert_eq!(failed.len(), 1);

    let script = |call| if call == 0 { DOWN } else { Act::Reply };
    let servers = [Server::start(script).await];
    let policy = RetryPolicy::new([Code::Unavailable]);
    let retrying = |channel: ChannelBuilder<_>| channel.retry(policy);
    let (channel, _kept) = measured.serve("a.Retry", &servers, retrying).await;
    say(&channel, None).await.unwrap();
    assert_eq!(
        measured.calls("grpc.client.call.retries", None, "a.Retry"),
        [1.0]
    );
    let delay = measured.calls("grpc.client.call.retry_delay", None, "a.Retry");
    assert!(delay.len() == 1 && delay[0] > 0.0, "{delay:?}");

    let refused = |call| {
        if call == 0 {
            Act::Reset(h2::Reason::REFUSED_STREAM)
        } else {
            Act::Reply
        }
    };
    let servers = [Server::start(refused).await, Server::start(refused).await];
    let (channel, _kept) = measured
        .serve("a.Refused", &servers, |channel| channel)
        .await;
    for _ in 0..6 {
        let _ = say(&channel, None).await;
    }
    let transparent = measured.calls("grpc.client.call.transparent_retries", None, "a.Refused");
    assert!(!transparent.is_empty());
    assert!(
        measured
            .calls("grpc.client.call.retries", None, "a.Refused")
            .is_empty()
    );

    let servers = [
        Server::always(Act::Hang).await,
        Server::always(Act::Hang).await,
    ];
    let policy = HedgingPolicy::new(2, Duration::from_millis(5));
    let hedged = |channel: ChannelBuilder<_>| channel.hedge(policy);
    let (channel, _kept) = measured.serve("a.Hedge", &servers, hedged).await;
    let deadline = Some(Duration::from_millis(200));
    say(&channel, deadline).await.unwrap_err();
    assert_eq!(
        measured.calls("grpc.client.call.hedges", None, "a.Hedge"),
        [1.0]
    );
    assert_eq!(measured.started("a.Hedge"), 2);
}

#[tokio::test]
async fn a_killed_server_and_an_ejection_are_counted() {
    let measured = Measured::new().await;
    let servers = [
        Server::always(Act::Reply).await,
        Server::always(Act::Reply).await,
    ];
    let (channel, _kept) = measured
        .serve("a.Killed", &servers, |channel| channel)
        .await;
    let open = || measured.count("grpc.subchannel.open_connections", "a.Killed");
    let attempts = |outcome: &str| {
        let instrument = format!("grpc.subchannel.connection_attempts_{outcome}");
        measured.count(&instrument, "a.Killed")
    };
    assert_eq!((open(), attempts("succeeded")), (2, 2));
    let [killed, alive] = servers;
    drop(killed);
    eventually("the loss is counted", async || open() == 1).await;
    eventually("the next dial fails", async || attempts("failed") > 0).await;
    let keys = measured.memory.keys();
    let ended = keys
        .iter()
        .filter(|key| key.starts_with("grpc.subchannel.disconnections"));
    let ended: Vec<_> = ended.collect();
    assert_eq!(ended.len(), 1, "{ended:?}");
    assert_eq!(measured.memory.sum(ended[0]), 1);
    assert!(!ended[0].contains("subchannel shutdown"), "{ended:?}");
    let ready = || {
        let labels = format!("{},tonic_etcd.state=ready", target("a.Killed"));
        measured
            .memory
            .gauge(&format!("tonic_etcd.lb.endpoints{{{labels}}}"))
    };
    eventually("one endpoint is ready", async || ready() == Some(1.0)).await;
    say(&channel, None).await.unwrap();
    assert_eq!(alive.count(), 1);
    let waiting = format!("tonic_etcd.lb.waiting_calls{{{}}}", target("a.Killed"));
    assert_eq!(measured.memory.gauge(&waiting), Some(0.0));

    let servers = [Server::always(Act::Reply).await, Server::always(DOWN).await];
    let rule = FailurePercentageEjection::new()
        .minimum_hosts(2)
        .request_volume(3);
    let detection = OutlierDetection::new()
        .interval(Duration::from_millis(100))
        .without_success_rate()
        .failure_percentage(rule);
    let ejecting = |channel: ChannelBuilder<_>| {
        channel
            .policy(LbPolicy::WeightedRoundRobin)
            .outlier_detection(detection)
    };
    let (channel, _kept) = measured.serve("a.Outlier", &servers, ejecting).await;
    let method = "grpc.lb.outlier_detection.detection_method=failure_percentage";
    let enforced = "grpc.lb.outlier_detection.ejections_enforced";
    let enforced = format!("{enforced}{{{method},{}}}", target("a.Outlier"));
    eventually("an ejection is counted", async || {
        let _ = say(&channel, None).await;
        measured.memory.sum(&enforced) == 1
    })
    .await;
}

#[tokio::test]
async fn a_resolver_reports_the_revision_and_the_rejections_of_its_service_config() {
    let measured = Measured::new().await;
    let etcd = client(&measured.etcd).await;
    let put = async |value| {
        let mut kv = etcd.kv_client();
        let put = kv.put("/gRPC.control/a.Config/config", value, None);
        put.await.unwrap().take_header().unwrap().revision()
    };
    let revision = || {
        let target = target("a.Config");
        let gauge = format!("tonic_etcd.resolver.service_config_revision{{{target}}}");
        measured.memory.gauge(&gauge)
    };
    let rejected = || measured.count("tonic_etcd.resolver.service_config_rejected", "a.Config");
    let resolver = measured.registry.resolver("a.Config");
    let resolver = resolver.watch_service_config("/gRPC.control/").start();
    eventually("there is no service config", async || {
        revision() == Some(0.0)
    })
    .await;
    let good = f64::from(i32::try_from(put("{}").await).unwrap());
    eventually("the service config is in force", async || {
        revision() == Some(good)
    })
    .await;
    assert_eq!(rejected(), 0);
    put("{").await;
    eventually("the value is rejected", async || rejected() == 1).await;
    assert_eq!(revision(), Some(good));
    drop(resolver);
}

#[tokio::test]
async fn a_resolver_reports_rejected_values_and_mass_removals() {
    let mut measured = Measured::new().await;
    let etcd = client(&measured.etcd).await;
    let mut kv = etcd.kv_client();
    for port in 1..=4 {
        let value = format!(r#"{{"Op":0,"Addr":"127.0.0.1:{port}"}}"#);
        kv.put(format!("/gRPC/a.Set/{port}"), value, None)
            .await
            .unwrap();
    }
    let resolver = measured.registry.resolver("a.Set").start();
    timeout(SOON, resolver.ready()).await.unwrap();
    assert_eq!(measured.connected("a.Set"), Some(1.0));
    assert_eq!(measured.instances("announced", "a.Set"), Some(4.0));
    assert_eq!(measured.count("tonic_etcd.resolver.lists", "a.Set"), 1);
    eventually("the watch is open", async || {
        measured.count("tonic_etcd.resolver.watches", "a.Set") == 1
    })
    .await;
    kv.put("/gRPC/a.Set/bad", "{", None).await.unwrap();
    eventually("the value is rejected", async || {
        measured.count("tonic_etcd.resolver.values_rejected", "a.Set") == 1
    })
    .await;
    assert_eq!(measured.instances("rejected", "a.Set"), Some(1.0));
    assert_eq!(measured.instances("held", "a.Set"), Some(0.0));
    let all = etcd_client::DeleteOptions::new().with_prefix();
    kv.delete("/gRPC/a.Set/", Some(all)).await.unwrap();
    eventually("instances are held", async || {
        measured.instances("held", "a.Set") > Some(0.0)
    })
    .await;
    assert_eq!(
        measured.count("tonic_etcd.resolver.mass_removals", "a.Set"),
        1
    );
    assert_eq!(measured.count("tonic_etcd.resolver.repaired", "a.Set"), 0);
    let requests = |operation: &str, error: &str| {
        let labels = format!("tonic_etcd.error={error},tonic_etcd.operation={operation}");
        let key = format!("tonic_etcd.etcd.request.duration{{{labels}}}");
        measured.memory.values(&key).len()
    };
    assert!(requests("list", "none") > 0, "a list is recorded");
    assert_eq!(requests("watch", "none"), 1);
    measured.etcd.stop_all().await.unwrap();
    eventually("the resolver is out of sync", async || {
        measured.connected("a.Set") == Some(0.0)
    })
    .await;
    eventually("failed requests are recorded", async || {
        let keys = measured.memory.keys();
        let mut keys = keys.iter();
        keys.any(|key| key.contains("request.duration") && !key.contains("error=none"))
    })
    .await;
    drop(resolver);
    eventually("the gauge has ended", async || {
        measured.connected("a.Set").is_none()
    })
    .await;
}

#[tokio::test]
async fn a_registration_reports_its_lease_and_each_loss_with_its_reason() {
    let measured = Measured::new().await;
    let registration = measured.registry.registration("a.Lease");
    let registration = registration.address("127.0.0.1:80").ttl(TTL).register();
    let registration = registration.await.unwrap();
    let registered = || measured.registration("registered", "a.Lease");
    assert_eq!(registered(), Some(1.0));
    let remaining = measured.registration("lease_remaining", "a.Lease").unwrap();
    assert!(
        0.0 < remaining && remaining <= TTL.as_secs_f64(),
        "{remaining}"
    );
    let RegistrationState::Registered { lease, .. } = registration.state() else {
        panic!("{:?}", registration.state());
    };
    let etcd = client(&measured.etcd).await;
    etcd.lease_client().revoke(lease.get()).await.unwrap();
    eventually("the loss is counted", async || {
        measured.losses("removed", "a.Lease") == 1
    })
    .await;
    eventually("the server is registered again", async || {
        registered() == Some(1.0)
    })
    .await;
    let key = registration.key().to_owned();
    // An edit by hand is no loss: the server writes its value again.
    let edited = r#"{"Op":0,"Addr":"127.0.0.1:80","Metadata":{"weight":7}}"#;
    let mut kv = etcd.kv_client();
    kv.put(key.as_str(), edited, None).await.unwrap();
    eventually("the key has its lease again", async || {
        let read = kv.clone().get(key.as_str(), None).await.unwrap();
        read.kvs().first().is_some_and(|kv| kv.lease() != 0)
    })
    .await;
    assert_eq!(registered(), Some(1.0));
    assert_eq!(measured.losses("removed", "a.Lease"), 1);
    let value = r#"{"Op":0,"Addr":"127.0.0.1:81"}"#;
    etcd.kv_client().put(key, value, None).await.unwrap();
    eventually("the loss to another server is counted", async || {
        measured.losses("superseded", "a.Lease") == 1
    })
    .await;
    assert_eq!(registered(), Some(0.0));
    assert_eq!(
        measured.registration("lease_remaining", "a.Lease"),
        Some(0.0)
    );
    drop(registration);
    eventually("the gauge has ended", async || registered().is_none()).await;
}

/// An alert on the gauge must fire, although nothing updates the state of the registration any more.
#[tokio::test]
async fn a_registration_whose_runtime_has_ended_is_exported_as_not_registered() {
    let measured = Measured::new().await;
    let builder = measured.registry.registration("a.Aborted");
    let builder = builder.address("127.0.0.1:80").ttl(TTL);
    let states = builder.watch_state();
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(1).enable_all().build().unwrap();
    let registration = runtime.spawn(builder.register()).await.unwrap().unwrap();
    let registered = || measured.registration("registered", "a.Aborted");
    assert_eq!(registered(), Some(1.0));
    runtime.shutdown_background();
    eventually("the task has ended", async || {
        matches!(*states.borrow(), RegistrationState::Aborted)
    })
    .await;
    assert_eq!(registered(), Some(0.0));
    let remaining = measured.registration("lease_remaining", "a.Aborted");
    assert_eq!(remaining, Some(0.0));
    drop(registration);
    eventually("the gauge has ended", async || registered().is_none()).await;
}

/// `docs/metrics.md` has one row for each instrument, with its kind, unit, labels and default.
#[test]
fn the_page_describes_every_instrument() {
    let page = include_str!("../docs/metrics.md");
    let mut described = 0;
    for line in page.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<_> = line.split('|').map(str::trim).collect();
        described += usize::from(cells.len() == 8);
    }
    assert_eq!(
        described,
        instruments().count(),
        "rows of the tables of instruments"
    );
    for instrument in instruments() {
        let row = format!("| `{}` |", instrument.name());
        let row = page.lines().find(|line| line.starts_with(&row));
        let row = row.unwrap_or_else(|| panic!("no row for {}", instrument.name()));
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        let kind = match instrument.kind() {
            Kind::Counter => "Counter",
            Kind::UpDownCounter => "Up-down counter",
            Kind::Histogram => "Histogram",
            Kind::Gauge => "Gauge",
            kind => panic!("{kind:?}"),
        };
        assert_eq!(
            cells[2],
            format!("{kind}, `{}`", instrument.unit()),
            "{row}"
        );
        let default = if instrument.is_default() { "on" } else { "off" };
        assert_eq!(cells[4], default, "{row}");
        let is_reference = cells[3].starts_with("as ");
        for label in instrument
            .labels()
            .iter()
            .chain(instrument.optional_labels())
        {
            assert!(
                page.contains(&format!("`{label}`")) || label.contains("outlier"),
                "{label}"
            );
            assert!(
                is_reference || cells[3].contains(&format!("`{label}`")),
                "{row}: {label}"
            );
        }
    }
}
