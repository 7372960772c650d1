//! The time from the `put` of a server's key until the first call arrives at the server, while a client makes calls.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use super::callers::Load;
use super::greeter::NamedGreeter;
use super::greeter::greeter_server::GreeterServer;
use super::process::{Peer, Programs};
use super::server::ServerProcess;
use super::table;
use super::world::World;

const ROUNDS: usize = 4;
/// Servers that join in each round of each client.
const JOINS: usize = 10;
/// The pause before a key is put or deleted.
const REST: Duration = Duration::from_millis(120);
const PATIENCE: Duration = Duration::from_secs(20);

/// The loads, with their names. With the first load, all clients make the same number of calls in a second. With the second load, each
/// client makes as many calls as it can, and uses the whole machine.
pub const LOADS: [(&str, Load); 2] = [
    ("join, 2 000 calls/s", load(8, Duration::from_millis(4))),
    ("join, 16 callers without a pause", load(16, Duration::ZERO)),
];

const fn load(callers: usize, period: Duration) -> Load {
    Load {
        callers,
        size: 16,
        warm_up: Duration::from_millis(600),
        // Longer than a round takes, which ends the client.
        duration: Duration::from_secs(600),
        period,
    }
}

/// The times of one join since the `put` was sent to etcd.
pub struct Join {
    /// The time of etcd's answer.
    pub acknowledged: Duration,
    pub first_call: Duration,
}

pub async fn run(programs: &Programs, name: &str, load: Load) {
    let servers = ServerProcess::start_many(&[0; 3]);
    let world = World::start(programs, &ServerProcess::addresses(&servers)).await;
    let mut peers = Peer::all(&world);
    peers.retain(|peer| peer.resolves());
    peers.insert(1, Peer::Channel("weighted_round_robin"));
    let mut joins: Vec<Vec<Join>> = peers.iter().map(|_| Vec::new()).collect();
    let mut order: Vec<_> = (0..peers.len()).collect();
    for _ in 0..ROUNDS {
        fastrand::shuffle(&mut order);
        for &index in &order {
            let _client = peers[index].start(&world, load).await;
            for _ in 0..JOINS {
                joins[index].push(join(&world).await);
            }
        }
    }
    table::print_joins(name, &peers, &joins);
}

/// Registers a new server until its first call has arrived.
async fn join(world: &World<'_>) -> Join {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let called = Arc::new(Notify::new());
    let on_call = {
        let called = Arc::clone(&called);
        move |request| {
            called.notify_one();
            Ok(request)
        }
    };
    let greeter = GreeterServer::with_interceptor(NamedGreeter(String::new()), on_call);
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let router = Server::builder().add_service(greeter);
    let server = tokio::spawn(router.serve_with_incoming(incoming));
    let first_call = tokio::spawn(async move {
        called.notified().await;
        Instant::now()
    });
    tokio::time::sleep(REST).await;
    let sent = Instant::now();
    world.put(&address).await;
    let acknowledged = Instant::now().saturating_duration_since(sent);
    let first_call = timeout(PATIENCE, first_call).await.unwrap().unwrap();
    let first_call = first_call.saturating_duration_since(sent);
    world.delete(&address).await;
    tokio::time::sleep(REST).await;
    server.abort();
    Join {
        acknowledged,
        first_call,
    }
}
