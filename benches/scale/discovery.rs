//! L5: the time from a change of a key in etcd until calls are sent to its server, or no longer sent to it. The times are compared with a
//! bare watch and a bare connection in the same run.

use std::time::Duration;

use bytes::Bytes;
use etcd_client::{Client, WatchOptions};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use tonic_etcd::testing::Etcd;
use tonic_etcd::{
    BalancedChannel, Registry,
    channel::{ServedBy, WaitForReady},
};

use super::greeter::HelloRequest;
use super::greeter::greeter_client::GreeterClient;
use super::server::ServerProcess;
use super::{median, percentile};

const ROUNDS: usize = 60;
const PATIENCE: Duration = Duration::from_secs(10);
/// Pause between two changes.
const REST: Duration = Duration::from_millis(40);

pub fn run() {
    println!(
        "\nL5: the time from `put` until the new endpoint serves the first call, and from `delete` until the last call to the endpoint is sent (target: at most twice as long as a bare watch event, TCP and HTTP/2 connect, and call)\n"
    );
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(measure());
}

/// The times at which a change was sent to etcd, was acknowledged by etcd, and became effective.
struct Change {
    sent: Instant,
    acknowledged: Instant,
    effective: Instant,
}

async fn measure() {
    let etcd = Etcd::start().await.unwrap();
    let servers = ServerProcess::start_many(&[0; 4]);
    let addresses = ServerProcess::addresses(&servers);
    let client = Client::connect(etcd.endpoints(), None).await.unwrap();
    let registry = Registry::connect(etcd.endpoints()).await.unwrap();
    // The other addresses stay in the set. Without them, the removal of the last instance would count as a mass removal, and the resolver
    // would hold the instance, that is, keep it as a last resort. No server listens on the three ports of `alone`.
    for (service, others) in [
        ("alone", ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"]),
        ("beside", [&*addresses[1], &*addresses[2], &*addresses[3]]),
    ] {
        for other in others {
            put(&client, service, other).await;
        }
    }
    let mut bare = Bare::start(&client).await;
    let alone = registry.channel("alone").connect_lazy();
    let beside = registry.channel("beside").connect().await.unwrap();
    let subject = addresses[0].as_str();
    let (mut bare_joins, mut bare_leaves) = (Vec::new(), Vec::new());
    let (mut alone_joins, mut beside_joins) = (Vec::new(), Vec::new());
    let (mut alone_leaves, mut beside_leaves) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        bare_joins.push(bare.join(&client, subject).await);
        bare_leaves.push(bare.leave(&client, subject).await);
        alone_joins.push(join_alone(&client, &alone, subject).await);
        alone_leaves.push(leave(&client, "alone", &alone, subject).await);
        beside_joins.push(join_beside(&client, &beside, subject).await);
        beside_leaves.push(leave(&client, "beside", &beside, subject).await);
    }
    println!(
        "| | since the request, p50 | p90 | ratio of p50 to bare | since etcd's answer, p50 | p90 |\n|---|---|---|---|---|---|"
    );
    print(
        "`put`, bare: event, connect, call",
        &bare_joins,
        &bare_joins,
    );
    print("`put`, the only endpoint", &alone_joins, &bare_joins);
    print("`put`, beside 3 others", &beside_joins, &bare_joins);
    print("`delete`, bare: event", &bare_leaves, &bare_leaves);
    print("`delete`, the only endpoint", &alone_leaves, &bare_leaves);
    print("`delete`, beside 3 others", &beside_leaves, &bare_leaves);
}

fn print(name: &str, changes: &[Change], base: &[Change]) {
    let since_sent = |changes: &[Change]| -> Vec<f64> {
        changes
            .iter()
            .map(|change| micros(change.effective, change.sent))
            .collect()
    };
    let since_answer: Vec<_> = changes
        .iter()
        .map(|change| micros(change.effective, change.acknowledged))
        .collect();
    println!(
        "| {name} | {:.0} us | {:.0} us | {:.2} | {:.0} us | {:.0} us |",
        median(since_sent(changes)),
        percentile(since_sent(changes), 0.9),
        median(since_sent(changes)) / median(since_sent(base)),
        median(since_answer.clone()),
        percentile(since_answer, 0.9),
    );
}

/// Returns the difference in microseconds, negative if `later` is before `earlier`.
fn micros(later: Instant, earlier: Instant) -> f64 {
    let after = later.saturating_duration_since(earlier).as_secs_f64();
    let before = earlier.saturating_duration_since(later).as_secs_f64();
    (after - before) * 1e6
}

fn key(service: &str, address: &str) -> String {
    format!("/gRPC/{service}/{address}")
}

async fn put(client: &Client, service: &str, address: &str) {
    let value = format!("{{\"Op\":0,\"Addr\":\"{address}\",\"Metadata\":null}}");
    let put = client
        .kv_client()
        .put(key(service, address), value, None)
        .await;
    put.unwrap();
}

async fn delete(client: &Client, service: &str, address: &str) {
    let delete = client.kv_client().delete(key(service, address), None).await;
    delete.unwrap();
}

/// Measures a join in which the new endpoint is the only reachable endpoint. A call already waits for the endpoint.
async fn join_alone(client: &Client, channel: &BalancedChannel, address: &str) -> Change {
    let waiting = tokio::spawn(call(channel.clone(), true));
    tokio::time::sleep(REST).await;
    let sent = Instant::now();
    put(client, "alone", address).await;
    let acknowledged = Instant::now();
    let (served_by, effective) = timeout(PATIENCE, waiting).await.unwrap().unwrap().unwrap();
    assert_eq!(served_by, address);
    Change {
        sent,
        acknowledged,
        effective,
    }
}

/// Measures a join in which the new endpoint is one of several. Calls run continuously until the new endpoint serves a call.
async fn join_beside(client: &Client, channel: &BalancedChannel, address: &str) -> Change {
    let calling: JoinHandle<Instant> = tokio::spawn({
        let (channel, address) = (channel.clone(), address.to_owned());
        async move {
            loop {
                let (served_by, at) = call(channel.clone(), false).await.unwrap();
                if served_by == address {
                    return at;
                }
            }
        }
    });
    tokio::time::sleep(REST).await;
    let sent = Instant::now();
    put(client, "beside", address).await;
    let acknowledged = Instant::now();
    Change {
        sent,
        acknowledged,
        effective: timeout(PATIENCE, calling).await.unwrap().unwrap(),
    }
}

/// Measures a removal. Calls run continuously, and the change becomes effective when the last call that the endpoint serves is sent.
async fn leave(client: &Client, service: &str, channel: &BalancedChannel, address: &str) -> Change {
    let (last, mut lasts) = mpsc::unbounded_channel();
    let calling = tokio::spawn({
        let (channel, address) = (channel.clone(), address.to_owned());
        async move {
            loop {
                let sent = Instant::now();
                match call(channel.clone(), false).await {
                    Ok((served_by, _)) if served_by == address => last.send(sent).unwrap(),
                    Ok(_) => {}
                    Err(_) => tokio::task::yield_now().await,
                }
            }
        }
    });
    tokio::time::sleep(REST).await;
    let sent = Instant::now();
    delete(client, service, address).await;
    let acknowledged = Instant::now();
    tokio::time::sleep(REST).await;
    calling.abort();
    let mut effective = sent;
    while let Some(at) = lasts.recv().await {
        effective = at;
    }
    Change {
        sent,
        acknowledged,
        effective,
    }
}

async fn call(channel: BalancedChannel, wait: bool) -> Result<(String, Instant), tonic::Status> {
    let mut request = tonic::Request::new(HelloRequest {
        name: "x".repeat(16),
        replies: 0,
    });
    request.extensions_mut().insert(WaitForReady::new(wait));
    let response = GreeterClient::new(channel).say_hello(request).await?;
    let served_by = response.extensions().get::<ServedBy>().unwrap();
    Ok((served_by.address().to_string(), Instant::now()))
}

/// A watch of `etcd_client` and connections of `h2`, for comparison.
struct Bare {
    events: mpsc::UnboundedReceiver<Instant>,
}

impl Bare {
    async fn start(client: &Client) -> Self {
        let options = WatchOptions::new().with_prefix();
        let watch = client
            .watch_client()
            .watch("/gRPC/bare/", Some(options))
            .await;
        let mut stream = watch.unwrap();
        let (event, events) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok(Some(response)) = stream.message().await {
                if !response.events().is_empty() && event.send(Instant::now()).is_err() {
                    return;
                }
            }
        });
        Self { events }
    }

    async fn join(&mut self, client: &Client, address: &str) -> Change {
        tokio::time::sleep(REST).await;
        let connecting = async {
            self.events.recv().await.unwrap();
            connect_and_call(address).await;
            Instant::now()
        };
        let sent = Instant::now();
        let putting = async {
            put(client, "bare", address).await;
            Instant::now()
        };
        let (effective, acknowledged) = tokio::join!(connecting, putting);
        Change {
            sent,
            acknowledged,
            effective,
        }
    }

    async fn leave(&mut self, client: &Client, address: &str) -> Change {
        tokio::time::sleep(REST).await;
        let sent = Instant::now();
        delete(client, "bare", address).await;
        let acknowledged = Instant::now();
        let effective = timeout(PATIENCE, self.events.recv())
            .await
            .unwrap()
            .unwrap();
        Change {
            sent,
            acknowledged,
            effective,
        }
    }
}

async fn connect_and_call(address: &str) {
    let io = TcpStream::connect(address).await.unwrap();
    io.set_nodelay(true).unwrap();
    let (mut send, connection) = h2::client::handshake(io).await.unwrap();
    let connection = tokio::spawn(connection);
    let request = http::Request::post(format!("http://{address}/helloworld.Greeter/SayHello"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .unwrap();
    let (response, mut body) = send.send_request(request, false).unwrap();
    body.send_data(Bytes::from_static(&[0; 5]), true).unwrap();
    assert!(response.await.unwrap().status().is_success());
    connection.abort();
}
