//! Channels that connect to a subset of the registered servers, and clients whose index among their peers is read from etcd.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use support::greeter::greeter_client::GreeterClient;
use support::{SOON, World, all_ready, eventually, greeter, hello};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;
use tonic_etcd::{
    Address, BalancedChannel, Registration, Registry,
    channel::{ChannelBuilder, PeerIndex},
    resolver::ResolverBuilder,
};

/// A registered greeter that counts its open connections.
struct Server {
    address: String,
    open: Arc<AtomicUsize>,
    accepting: JoinHandle<()>,
    registration: Registration,
}

/// An open connection of a server.
struct Open(Arc<AtomicUsize>);

impl Open {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(count))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Server {
    async fn start(registry: &Registry, name: &str) -> Self {
        let (target, _) = greeter(name).await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let open = Arc::<AtomicUsize>::default();
        let count = Arc::clone(&open);
        // The connections end with this task.
        let accepting = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut near, _)) = listener.accept().await {
                let open = Open::new(&count);
                connections.spawn(async move {
                    let _open = open;
                    if let Ok(mut far) = TcpStream::connect(target).await {
                        let _ = copy_bidirectional(&mut near, &mut far).await;
                    }
                });
            }
        });
        let registration = registry.registration("greeter").address(address.as_str());
        Self {
            registration: registration.register().await.unwrap(),
            address,
            open,
            accepting,
        }
    }

    /// Returns the number of open connections.
    fn open(&self) -> usize {
        self.open.load(Ordering::SeqCst)
    }

    /// Closes all sockets, as the end of the process does. The key in etcd remains.
    fn kill(&self) {
        self.accepting.abort();
    }
}

async fn start(world: &World, names: &[&str]) -> Vec<Server> {
    let mut servers = Vec::new();
    for name in names {
        servers.push(Server::start(&world.registry, name).await);
    }
    world.counts(names.len()).await;
    servers
}

fn builder(world: &World) -> ChannelBuilder<ResolverBuilder> {
    world.registry.channel("greeter")
}

/// Returns the addresses of the endpoints of a channel.
fn used(channel: &BalancedChannel) -> BTreeSet<String> {
    let endpoints = channel.endpoints().into_iter();
    endpoints.map(|one| one.address.to_string()).collect()
}

/// Makes calls until the flag is set. Panics if a call fails.
async fn call(channel: BalancedChannel, stop: Arc<AtomicBool>) -> usize {
    let mut client = GreeterClient::new(channel);
    let mut calls = 0;
    while !stop.load(Ordering::SeqCst) {
        client.say_hello(hello()).await.expect("no call fails");
        calls += 1;
    }
    calls
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_channel_with_a_subset_connects_to_as_many_servers_and_no_call_fails_while_servers_join()
{
    let world = World::new().await;
    let mut servers = start(&world, &["a", "b", "c", "d", "e", "f"]).await;
    let mut channels = Vec::new();
    for _ in 0..4 {
        let channel = builder(&world).subset(2).connect().await.unwrap();
        all_ready(&channel, 2).await;
        channels.push(channel);
    }
    eventually("each channel has two connections", async || {
        servers.iter().map(Server::open).sum::<usize>() == 8
    })
    .await;
    for server in &servers {
        let clients = channels
            .iter()
            .filter(|one| used(one).contains(&server.address));
        assert_eq!(server.open(), clients.count(), "{}", server.address);
    }

    let stop = Arc::<AtomicBool>::default();
    let calls = channels.iter().cloned();
    let calls: Vec<_> = calls
        .map(|channel| tokio::spawn(call(channel, Arc::clone(&stop))))
        .collect();
    for name in ["g", "h", "i", "j", "k", "l"] {
        servers.push(Server::start(&world.registry, name).await);
    }
    world.counts(12).await;
    for channel in &channels {
        all_ready(channel, 2).await;
    }
    stop.store(true, Ordering::SeqCst);
    for calls in calls {
        assert!(timeout(SOON, calls).await.unwrap().unwrap() > 0);
    }
    eventually("each channel has two connections", async || {
        servers.iter().map(Server::open).sum::<usize>() == 8
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_server_of_a_subset_is_replaced_when_its_key_is_removed() {
    let world = World::new().await;
    let servers = start(&world, &["a", "b", "c", "d", "e"]).await;
    let channel = builder(&world).subset(2).connect().await.unwrap();
    all_ready(&channel, 2).await;
    let before = used(&channel);
    let killed = servers.iter().position(|one| before.contains(&one.address));
    let killed = killed.unwrap();
    servers[killed].kill();
    eventually("the connection is lost", async || {
        servers[killed].open() == 0 && channel.endpoints().iter().any(|one| one.connections == 0)
    })
    .await;
    // The other server of the subset serves the calls.
    let mut client = GreeterClient::new(channel.clone());
    for _ in 0..20 {
        client.say_hello(hello()).await.expect("no call fails");
    }
    assert_eq!(used(&channel), before);
    let mut servers = servers;
    let gone = servers.remove(killed);
    gone.registration.deregister().await.unwrap();
    all_ready(&channel, 2).await;
    let after = used(&channel);
    assert!(!after.contains(&gone.address));
    assert_eq!(before.intersection(&after).count(), 1);
}

/// A client of the greeters that is registered as a `frontend`.
struct Client {
    registration: Registration,
    channel: BalancedChannel,
}

async fn frontend(world: &World, index: usize) -> Client {
    let own: Address = format!("127.0.0.1:{}", 9_000 + index).parse().unwrap();
    let registration = world.registry.registration("frontend");
    let registration = registration.address(own.as_str()).register();
    let peers = world.registry.resolver("frontend").start();
    let peers = peers.peer_index(async { Some(own) });
    let channel = builder(world).aperture(2, peers).connect().await.unwrap();
    Client {
        registration: registration.await.unwrap(),
        channel,
    }
}

/// Waits until the numbers of clients of all servers differ by at most 1, and each client has two servers.
async fn evenly(servers: &[Server], clients: &[Client]) {
    let bound = Duration::from_secs(30);
    support::within(bound, "the clients are spread evenly", async || {
        let mut loads: BTreeMap<_, _> = servers.iter().map(|one| (&one.address, 0)).collect();
        for client in clients {
            let used = used(&client.channel);
            if used.len() != 2 {
                return false;
            }
            for server in &used {
                if let Some(load) = loads.get_mut(server) {
                    *load += 1;
                }
            }
        }
        let least = clients.len() * 2 / servers.len();
        let is_even = |load: &usize| (least..=least + 1).contains(load);
        loads.values().all(is_even) && servers.iter().all(|one| one.open() == loads[&one.address])
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn registered_clients_with_an_aperture_have_even_shares_of_the_servers() {
    let world = World::new().await;
    let mut servers = start(&world, &["a", "b", "c", "d", "e", "f", "g"]).await;
    let mut clients = Vec::new();
    for index in 0..5 {
        clients.push(frontend(&world, index).await);
    }
    evenly(&servers, &clients).await;
    // Servers and clients join and leave while calls run.
    let stop = Arc::<AtomicBool>::default();
    let calls = clients[1..].iter().map(|client| client.channel.clone());
    let calls: Vec<_> = calls
        .map(|channel| tokio::spawn(call(channel, Arc::clone(&stop))))
        .collect();
    servers.push(Server::start(&world.registry, "h").await);
    evenly(&servers, &clients).await;
    let leaving = servers.remove(2);
    leaving.registration.deregister().await.unwrap();
    evenly(&servers, &clients).await;
    let leaving = clients.remove(0);
    leaving.registration.deregister().await.unwrap();
    drop(leaving.channel);
    clients.push(frontend(&world, 5).await);
    evenly(&servers, &clients).await;
    stop.store(true, Ordering::SeqCst);
    for calls in calls {
        assert!(timeout(SOON, calls).await.unwrap().unwrap() > 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_index_of_a_client_is_unknown_until_it_is_registered() {
    let world = World::new().await;
    let own: Address = "127.0.0.1:9001".parse().unwrap();
    let other = world.registry.registration("frontend");
    let other = other.address("127.0.0.1:9002").register().await.unwrap();
    let resolver = world.registry.resolver("frontend").start();
    resolver.ready().await;
    let address = own.clone();
    let mut index = resolver.peer_index(async { Some(address) });
    assert_eq!(*index.borrow_and_update(), None);
    let registration = world.registry.registration("frontend");
    let registration = registration.address(own.as_str()).register();
    let registration = registration.await.unwrap();
    timeout(SOON, index.changed()).await.unwrap().unwrap();
    let peers = [own.clone(), "127.0.0.1:9002".parse().unwrap()];
    assert_eq!(*index.borrow_and_update(), PeerIndex::among(&own, &peers));
    other.deregister().await.unwrap();
    timeout(SOON, index.changed()).await.unwrap().unwrap();
    assert_eq!(*index.borrow_and_update(), PeerIndex::new(0, 1));
    // A client that shuts down keeps its last index.
    registration.deregister().await.unwrap();
    let change = timeout(Duration::from_secs(7), index.changed()).await;
    assert!(change.is_err(), "{:?}", *index.borrow());
    assert_eq!(*index.borrow(), PeerIndex::new(0, 1));
}
