//! Contains the Rust code of the README and of the pages in `docs/`, so that this code is compiled. A test checks that no code block is
//! missing here.
#![allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    unused_qualifications,
    unused_mut,
    unused_variables,
    clippy::items_after_statements,
    clippy::pedantic,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "the code is as a user writes it"
)]

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use tonic_etcd::Registry;

#[path = "../examples/greeter/mod.rs"]
mod greeter;
use greeter::greeter_client::GreeterClient;

mod readme_1 {
    use super::greeter::{NamedGreeter as MyGreeter, *};
    use greeter_client::GreeterClient;
    use greeter_server::GreeterServer;

    use tonic::transport::Server;
    use tonic_etcd::{Registry, ServeRegistered};

    #[tokio::main]
    async fn main() -> Result<(), Box<dyn std::error::Error>> {
        let registry = Registry::connect(["127.0.0.1:2379"]).await?;
        let registration = registry.registration("helloworld.Greeter");
        Server::builder()
            .add_service(GreeterServer::new(MyGreeter::default()))
            .serve_registered("0.0.0.0:50051".parse()?, registration)
            .await?;
        Ok(())
    }
}

mod readme_2 {
    use super::greeter::{NamedGreeter as MyGreeter, *};
    use greeter_client::GreeterClient;
    use greeter_server::GreeterServer;

    use std::time::Duration;
    use tonic_etcd::Registry;

    #[tokio::main]
    async fn main() -> Result<(), Box<dyn std::error::Error>> {
        let registry = Registry::connect(["127.0.0.1:2379"]).await?;
        let channel = registry
            .channel("helloworld.Greeter")
            .timeout(Duration::from_secs(5))
            .connect()
            .await?;
        let mut client = GreeterClient::new(channel);
        let request = HelloRequest {
            name: "world".to_owned(),
            ..Default::default()
        };
        println!("{}", client.say_hello(request).await?.into_inner().message);
        Ok(())
    }
}

async fn formats_1(registry: Registry) -> Result<(), Box<dyn Error>> {
    use tonic_etcd::{Format, Instance, error::FormatError, format::InstanceFormat};

    /// `host:port;zone`
    #[derive(Debug)]
    struct WithZone;

    impl InstanceFormat for WithZone {
        fn name(&self) -> &str {
            "WithZone"
        }

        fn encode(&self, _key: &str, instance: &Instance) -> Result<Vec<u8>, FormatError> {
            let zone = instance.zone().unwrap_or_default();
            Ok(format!("{};{zone}", instance.address()).into_bytes())
        }

        fn decode(&self, _key: &str, value: &[u8]) -> Result<Option<Instance>, FormatError> {
            let text = str::from_utf8(value).map_err(|_| FormatError::new("is not UTF-8"))?;
            let (address, zone) = text
                .split_once(';')
                .ok_or(FormatError::new("has no zone"))?;
            let address = address
                .parse()
                .map_err(|_| FormatError::new("has no address"))?;
            let instance = Instance::new(address);
            Ok(Some(if zone.is_empty() {
                instance
            } else {
                instance.with_zone(zone)
            }))
        }
    }

    let format = Format::custom(WithZone);
    Ok(())
}

async fn migration_1(registry: Registry) -> Result<(), Box<dyn Error>> {
    use tonic::transport::{Channel, Endpoint};

    let endpoints = ["http://10.0.0.5:50051", "http://10.0.0.6:50051"]
        .into_iter()
        .map(Endpoint::from_static);
    let channel = Channel::balance_list(endpoints);
    let mut client = GreeterClient::new(channel);
    Ok(())
}

async fn migration_2(registry: Registry) -> Result<(), Box<dyn Error>> {
    use tonic_balance::BalancedChannel;

    let channel = BalancedChannel::builder()
        .addresses(["http://10.0.0.5:50051", "http://10.0.0.6:50051"])
        .connect_lazy();
    let mut client = GreeterClient::new(channel);
    Ok(())
}

async fn migration_3(registry: Registry) -> Result<(), Box<dyn Error>> {
    use tonic_etcd::Registry;

    let registry = Registry::connect(["10.0.0.1:2379"]).await?;
    let channel = registry.channel("helloworld.Greeter").connect_lazy();
    let mut client = GreeterClient::new(channel);
    Ok(())
}

async fn migration_4(registry: Registry) -> Result<(), Box<dyn Error>> {
    use tonic::transport::channel::Change;
    use tonic::transport::{Channel, Endpoint};

    let (channel, changes) = Channel::balance_channel::<&str>(16);
    let endpoint = Endpoint::from_static("http://10.0.0.5:50051");
    changes.send(Change::Insert("a", endpoint)).await?;
    changes.send(Change::Remove("a")).await?;
    Ok(())
}

async fn migration_5(registry: Registry) -> Result<(), Box<dyn Error>> {
    use std::convert::Infallible;

    use tokio_stream::wrappers::ReceiverStream;
    use tonic_balance::{Address, BalancedChannel};
    use tower::discover::Change;

    let (changes, receiver) =
        tokio::sync::mpsc::channel::<Result<Change<Address, ()>, Infallible>>(16);
    let channel = BalancedChannel::builder()
        .discover(ReceiverStream::new(receiver))
        .connect_lazy();
    let address: Address = "10.0.0.5:50051".parse()?;
    changes
        .send(Ok(Change::Insert(address.clone(), ())))
        .await?;
    changes.send(Ok(Change::Remove(address))).await?;
    Ok(())
}

async fn migration_6(registry: Registry) -> Result<(), Box<dyn Error>> {
    let channel = registry
        .resolver("helloworld.Greeter")
        .start()
        .into_tonic_channel();
    Ok(())
}

async fn migration_7(registry: Registry) -> Result<(), Box<dyn Error>> {
    use std::time::Duration;

    let channel = registry
        .resolver("helloworld.Greeter")
        .start()
        .into_tonic_channel_with(|endpoint| endpoint.timeout(Duration::from_secs(5)));
    Ok(())
}

async fn migration_8(registry: Registry) -> Result<(), Box<dyn Error>> {
    use std::time::Duration;

    use tonic_etcd::Registry;

    let registry = Registry::connect(["10.0.0.1:2379"]).await?;
    let channel = registry
        .channel("helloworld.Greeter")
        .timeout(Duration::from_secs(10))
        .connect()
        .await?;
    let mut client = GreeterClient::new(channel);
    Ok(())
}

async fn migration_9(registry: Registry) -> Result<(), Box<dyn Error>> {
    use std::time::Duration;

    use tonic_balance::BalancedChannel;
    use tonic_balance::channel::Dns;

    let dns = Dns::new("greeter.internal:50051").interval(Duration::from_secs(5));
    let channel = BalancedChannel::builder().source(dns).connect().await?;
    let mut client = GreeterClient::new(channel);
    Ok(())
}

#[cfg(feature = "dns-srv")]
async fn migration_10(registry: Registry) -> Result<(), Box<dyn Error>> {
    use tonic_balance::BalancedChannel;
    use tonic_balance::channel::DnsSrv;

    let dns = DnsSrv::new("_grpc._tcp.greeter.default.svc.cluster.local");
    let channel = BalancedChannel::builder().source(dns).connect().await?;
    let mut client = GreeterClient::new(channel);
    Ok(())
}

async fn options_1(registry: Registry) -> Result<(), Box<dyn Error>> {
    use tonic::Code;
    use tonic_etcd::RetryPolicy;

    let channel = registry
        .channel("shop.Orders")
        .retry(RetryPolicy::new([Code::Unavailable]).max_attempts(3))
        // Pay must not run twice.
        .retry_for("shop.Orders/Pay", RetryPolicy::new([]))
        .connect()
        .await?;
    Ok(())
}

async fn options_2(registry: Registry) -> Result<(), Box<dyn Error>> {
    use std::time::Duration;

    let channel = registry
        .channel("helloworld.Greeter")
        .http2_keep_alive_interval(Duration::from_secs(60))
        .keep_alive_timeout(Duration::from_secs(20))
        .connect()
        .await?;
    Ok(())
}

async fn options_3(registry: Registry) -> Result<(), Box<dyn Error>> {
    let resolver = registry.resolver("helloworld.Greeter").start();
    resolver.ready().await;
    println!("{} instances", resolver.instances().len());

    let channel = registry
        .channel("helloworld.Greeter")
        .map_source(|resolver| resolver.filter(|instance| instance.version() == Some("1.2.0")))
        .connect()
        .await?;
    Ok(())
}

#[cfg(feature = "tls")]
async fn options_tls_client(registry: Registry) -> Result<(), Box<dyn Error>> {
    use tonic_etcd::TlsConfig;

    let channel = registry
        .channel("helloworld.Greeter")
        .tls_config(TlsConfig::new("greeter.internal").ca_certificate_file("ca.pem"))
        .connect()
        .await?;
    Ok(())
}

async fn options_tls_server(registry: Registry) -> Result<(), Box<dyn Error>> {
    use greeter::NamedGreeter as MyGreeter;
    use greeter::greeter_server::GreeterServer;

    use tonic::transport::{Identity, Server, ServerTlsConfig};
    use tonic_etcd::ServeRegistered;

    let identity = Identity::from_pem(std::fs::read("server.pem")?, std::fs::read("server.key")?);
    Server::builder()
        .tls_config(ServerTlsConfig::new().identity(identity))?
        .add_service(GreeterServer::new(MyGreeter::default()))
        .serve_registered(
            "0.0.0.0:50051".parse()?,
            registry.registration("helloworld.Greeter"),
        )
        .await?;
    Ok(())
}

fn deadline_propagation() {
    use tonic::transport::Server;
    use tonic_etcd::deadline::PropagateDeadlineLayer;

    let server = Server::builder().layer(PropagateDeadlineLayer::new());
}

async fn limits_of_a_channel(registry: Registry) -> Result<(), Box<dyn std::error::Error>> {
    let channel = registry
        .channel("helloworld.Greeter")
        .max_requests(1_000)
        .max_requests_per_endpoint(100)
        .connect()
        .await?;
    Ok(())
}

fn limit_of_a_server() {
    use tonic::transport::Server;
    use tonic_etcd::limit::AdaptiveLimitLayer;

    let limit = AdaptiveLimitLayer::new();
    let server = Server::builder().layer(limit.clone());
    // The state, for example for a log line or a metric.
    println!(
        "{} of {} calls in flight, {} refused",
        limit.in_flight(),
        limit.limit(),
        limit.refused()
    );
}

fn limit_of_a_service(greeter: greeter::NamedGreeter) {
    use greeter::greeter_server::GreeterServer;

    use tonic::service::LayerExt;
    use tonic::transport::Server;
    use tonic_etcd::limit::AdaptiveLimitLayer;

    let greeter = AdaptiveLimitLayer::new().named_layer(GreeterServer::new(greeter));
    let router = Server::builder().add_service(greeter);
}

mod metrics {
    use opentelemetry::metrics::MeterProvider;
    use opentelemetry_sdk::metrics::SdkMeterProvider;
    use tonic_etcd::{BalancedChannel, Registry, metrics::Metrics};
    use tonic_etcd_opentelemetry::OpenTelemetry;

    async fn measured(
        provider: &SdkMeterProvider,
    ) -> Result<BalancedChannel, Box<dyn std::error::Error>> {
        let recorder = OpenTelemetry::new(provider.meter("tonic-etcd"));
        let metrics = Metrics::new(recorder)
            .enable("grpc.client.call.retries")
            .with_label("grpc.lb.locality");
        let registry = Registry::builder(["127.0.0.1:2379"])
            .metrics(metrics)
            .connect()
            .await?;
        Ok(registry.channel("helloworld.Greeter").connect().await?)
    }
}

mod traces {
    use opentelemetry::trace::TracerProvider;
    use opentelemetry_sdk::propagation::TraceContextPropagator;
    use opentelemetry_sdk::trace::SdkTracerProvider;
    use tonic_etcd::{BalancedChannel, Registry, traces::Traces};
    use tonic_etcd_opentelemetry::inject;
    use tracing_subscriber::layer::SubscriberExt;
    use tracing_subscriber::util::SubscriberInitExt;

    async fn traced(
        provider: &SdkTracerProvider,
    ) -> Result<BalancedChannel, Box<dyn std::error::Error>> {
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("greeter"));
        tracing_subscriber::registry().with(layer).init();
        let traces = Traces::new().propagator(inject(TraceContextPropagator::new()));
        let registry = Registry::builder(["127.0.0.1:2379"])
            .traces(traces)
            .connect()
            .await?;
        Ok(registry.channel("helloworld.Greeter").connect().await?)
    }
}

mod service_config {
    use tonic_etcd::{BalancedChannel, Registry};

    async fn orders() -> Result<BalancedChannel, Box<dyn std::error::Error>> {
        let registry = Registry::builder(["10.0.0.1:2379"])
            .watch_service_configs("/gRPC.control/")
            .connect()
            .await?;
        Ok(registry.channel("shop.Orders").connect().await?)
    }
}

async fn policies_1(
    mut client: GreeterClient<tonic_etcd::BalancedChannel>,
) -> Result<(), Box<dyn Error>> {
    use greeter::HelloRequest;

    use tonic_etcd::channel::Select;

    let mut request = tonic::Request::new(HelloRequest::default());
    request.extensions_mut().insert(Select::version("1.2"));
    let reply = client.say_hello(request).await?;
    Ok(())
}

async fn policies_2(registry: Registry) -> Result<(), Box<dyn Error>> {
    use tonic_etcd::channel::TrafficSplit;

    let channel = registry
        .channel("helloworld.Greeter")
        .split(TrafficSplit::new().version("1.2", 5).rest(95))
        .connect()
        .await?;
    // Later, while calls run:
    channel.set_split(TrafficSplit::new().version("1.2", 50).rest(50))?;
    Ok(())
}

async fn policies_3(registry: Registry) -> Result<(), Box<dyn Error>> {
    use greeter::HelloRequest;

    use tonic_etcd::{LbPolicy, channel::HashKey};

    let channel = registry
        .channel("helloworld.Greeter")
        .policy(LbPolicy::RingHash)
        .request_hash_header("x-customer-id")
        .connect()
        .await?;
    let mut client = GreeterClient::new(channel);
    let mut request = tonic::Request::new(HelloRequest::default());
    // Takes precedence over the header.
    request.extensions_mut().insert(HashKey::new("customer-17"));
    client.say_hello(request).await?;
    Ok(())
}

async fn load_reports_of_a_server(registry: Registry) -> Result<(), Box<dyn Error>> {
    use greeter::NamedGreeter as MyGreeter;
    use greeter::greeter_server::GreeterServer;

    use std::time::Duration;

    use tonic::transport::Server;
    use tonic_etcd::ServeRegistered;
    use tonic_etcd::orca::{LoadRecorder, ReportLoadLayer};

    let recorder = LoadRecorder::new();
    // The program updates it, for example whenever a worker takes a job: 6 of 8 workers are busy.
    recorder.set_application_utilization(0.75);
    Server::builder()
        .layer(ReportLoadLayer::new(recorder.clone()))
        .add_service(GreeterServer::new(MyGreeter::default()))
        // Optional: the same reports out of band, for clients that want them without calls.
        .add_service(recorder.service(Duration::from_secs(30)))
        .serve_registered(
            "0.0.0.0:50051".parse()?,
            registry.registration("helloworld.Greeter"),
        )
        .await?;
    Ok(())
}

async fn load_reports_of_a_channel(registry: Registry) -> Result<(), Box<dyn Error>> {
    use tonic_etcd::{LbPolicy, channel::LoadReports};

    let channel = registry
        .channel("helloworld.Greeter")
        .policy(LbPolicy::WeightedRoundRobin)
        .load_reports(LoadReports::new())
        .connect()
        .await?;
    for endpoint in channel.endpoints() {
        if let Some(report) = endpoint.load_report {
            println!("{}: {:?}", endpoint.address, report.utilization());
        }
    }
    Ok(())
}

async fn policies_4(registry: Registry) -> Result<(), Box<dyn Error>> {
    use tonic_etcd::channel::{PickInfo, PickPolicy, ReadyEndpoints};

    /// Sends each call to the servers whose metadata entry `tenant` is the tenant of the call.
    struct ByTenant;

    impl PickPolicy for ByTenant {
        fn pick(&self, call: &PickInfo, endpoints: &ReadyEndpoints<'_>) -> Option<usize> {
            let tenant = call.headers().get("x-tenant")?.to_str().ok()?;
            let own = endpoints.iter().enumerate().filter(|(_, endpoint)| {
                endpoint.is_usable() && endpoint.attributes().label("tenant") == Some(tenant)
            });
            own.min_by_key(|(_, endpoint)| endpoint.in_flight())
                .map(|(index, _)| index)
        }
    }

    let channel = registry
        .channel("helloworld.Greeter")
        .pick_policy(ByTenant)
        .connect()
        .await?;
    Ok(())
}

async fn policies_5(registry: Registry) -> Result<(), Box<dyn Error>> {
    let channel = registry
        .channel("helloworld.Greeter")
        .subset(20)
        .connect()
        .await?;
    Ok(())
}

async fn policies_6(registry: Registry) -> Result<(), Box<dyn Error>> {
    use tonic_etcd::Address;

    let own: Address = "10.0.0.5:50051".parse()?;
    let frontends = registry.resolver("shop.Frontend").start();
    let channel = registry
        .channel("helloworld.Greeter")
        .aperture(20, frontends.peer_index(async { Some(own) }))
        .connect()
        .await?;
    Ok(())
}

mod errors {
    use std::error::Error;

    use tonic_etcd::error::CallError;

    /// Returns the server that failed the call.
    fn failed_server(status: &tonic::Status) -> Option<String> {
        let mut cause = status.source();
        while let Some(error) = cause {
            if let Some(failed) = error.downcast_ref::<CallError>() {
                return Some(failed.address().to_string());
            }
            cause = error.source();
        }
        None
    }
}

/// Returns the text without whitespace and trailing commas, because rustfmt places them differently here and on the page.
fn plain(text: &str) -> String {
    let text: String = text.split_whitespace().collect();
    text.replace(",)", ")").replace(",}", "}")
}

#[test]
fn the_rust_code_of_the_documentation_is_compiled() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let compiled = plain(include_str!("snippets.rs"));
    let mut pages: Vec<PathBuf> = vec![root.join("README.md")];
    let docs = fs::read_dir(root.join("docs")).unwrap();
    pages.extend(docs.map(|entry| entry.unwrap().path()));
    let mut missing = Vec::new();
    let mut found = 0;
    for page in pages.iter().filter(|page| page.is_file()) {
        let text = fs::read_to_string(page).unwrap();
        for block in text.split("```rust\n").skip(1) {
            let block = block.split("```").next().unwrap();
            found += 1;
            if !compiled.contains(&plain(block)) {
                missing.push(format!("{}: {block}", page.display()));
            }
        }
    }
    assert!(missing.is_empty(), "not in tests/snippets.rs: {missing:#?}");
    assert!(found > 10, "only {found} code blocks were found");
}
