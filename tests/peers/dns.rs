//! Channels whose endpoints are from SRV records of a real name server, dnsmasq.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::Signal;
use tempfile::TempDir;
use tokio::net::{TcpListener, UdpSocket};
use tokio::process::Command;
use tokio::runtime::Runtime;
use tokio::time::timeout;
use tonic::Request;
use tonic::transport::Server;
use tonic_etcd::channel::{DnsSrv, ServedBy};
use tonic_etcd::{BalancedChannel, LbPolicy};

use crate::fronts::free_port;
use crate::process::{Program, launcher};
use crate::support::greeter::NamedGreeter;
use crate::support::greeter::greeter_client::GreeterClient;
use crate::support::greeter::greeter_server::GreeterServer;
use crate::support::{SOON, all_ready, eventually, hello};

const NAME: &str = "_grpc._tcp.greeter.test";

/// A name server with SRV records, and the addresses of their targets.
struct Dnsmasq {
    launcher: PathBuf,
    folder: TempDir,
    address: SocketAddr,
    program: Option<Program>,
}

impl Dnsmasq {
    /// Returns `None` if dnsmasq is not installed. `ttl` is the time to live of the records in seconds.
    async fn start(ttl: u32, records: &[Record], hosts: &[(&str, Ipv4Addr)]) -> Option<Self> {
        let launcher = launcher("dnsmasq", "dnsmasq")?;
        let mut server = Self {
            launcher,
            folder: tempfile::tempdir().unwrap(),
            address: (Ipv4Addr::LOCALHOST, free_port()).into(),
            program: None,
        };
        server.set_hosts(hosts);
        server.restart(ttl, records).await;
        Some(server)
    }

    /// dnsmasq reads the SRV records only when it starts.
    async fn restart(&mut self, ttl: u32, records: &[Record]) {
        self.program = None;
        let (port, folder) = (self.address.port(), self.folder.path().display());
        let mut config = format!(
            "port={port}\nlisten-address=127.0.0.1\nbind-interfaces\nuser=root\npid-file\nno-resolv\nno-hosts\n\
             log-queries\nlog-facility=-\n             local=/test/\nlocal-ttl={ttl}\naddn-hosts={folder}/hosts\n"
        );
        for (target, port, priority, weight) in records {
            writeln!(
                config,
                "srv-host={NAME},{target},{port},{priority},{weight}"
            )
            .unwrap();
        }
        let path = self.folder.path().join("config");
        fs::write(&path, config).unwrap();
        let mut command = Command::new(&self.launcher);
        command.arg("--keep-in-foreground");
        command.arg(format!("--conf-file={}", path.display()));
        let program = self.program.insert(Program::start(command));
        program.listens(port).await;
    }

    fn set_hosts(&self, hosts: &[(&str, Ipv4Addr)]) {
        let lines = hosts.iter().map(|(name, ip)| format!("{ip} {name}\n"));
        let lines: String = lines.collect();
        fs::write(self.folder.path().join("hosts"), lines).unwrap();
        if let Some(program) = &self.program {
            program.signal(Signal::SIGHUP);
        }
    }

    async fn channel(&self) -> BalancedChannel {
        let source = DnsSrv::new(NAME)
            .name_server(self.address)
            .interval(Duration::from_secs(5));
        let builder = BalancedChannel::builder().policy(LbPolicy::WeightedRoundRobin);
        builder.source(source).connect().await.unwrap()
    }
}

/// Target, port, priority and weight.
type Record = (&'static str, u16, u16, u16);

/// Starts a server, and returns its port.
async fn serve(ip: Ipv4Addr, port: u16) -> u16 {
    let listener = TcpListener::bind((ip, port)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    let router = Server::builder().add_service(GreeterServer::new(NamedGreeter(String::new())));
    tokio::spawn(async move { router.serve_with_incoming(incoming).await.unwrap() });
    port
}

/// Makes a call, which must succeed, and returns the address of its server.
async fn call(channel: &BalancedChannel) -> String {
    let mut request = Request::new(hello());
    request.set_timeout(SOON);
    let mut client = GreeterClient::new(channel.clone());
    let response = client.say_hello(request).await.unwrap();
    let served_by = response.extensions().get::<ServedBy>().unwrap();
    served_by.address().to_string()
}

fn addresses(channel: &BalancedChannel) -> Vec<String> {
    let endpoints = channel.endpoints();
    let mut addresses: Vec<_> = endpoints
        .iter()
        .map(|endpoint| endpoint.address.to_string())
        .collect();
    addresses.sort();
    addresses
}

/// Makes calls until the channel has these endpoints. No call fails.
async fn moves_to(channel: &BalancedChannel, expected: &[String]) {
    eventually("the endpoints follow the records", async || {
        call(channel).await;
        addresses(channel) == expected
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_follow_the_srv_records_of_dnsmasq_and_survive_its_outage() {
    let local = Ipv4Addr::LOCALHOST;
    let mut ports = Vec::new();
    for _ in 0..3 {
        ports.push(serve(local, 0).await);
    }
    let target = "a.greeter.test";
    let (one, two, last) = (ports[0], ports[1], ports[2]);
    let records = [
        (target, one, 10, 3),
        (target, two, 10, 1),
        (target, last, 20, 9),
    ];
    let server = Dnsmasq::start(0, &records, &[(target, local)]).await;
    let Some(mut server) = server else { return };
    let channel = server.channel().await;
    // The two servers of the lower priority get calls in proportion to their weights.
    all_ready(&channel, 2).await;
    let mut calls: BTreeMap<String, usize> = BTreeMap::new();
    for _ in 0..400 {
        *calls.entry(call(&channel).await).or_default() += 1;
    }
    let share = calls[&format!("127.0.0.1:{one}")];
    assert!((280..=320).contains(&share), "{calls:?}");

    // Another set of records, after a restart of the name server.
    server.restart(0, &[(target, last, 20, 9)]).await;
    let expected = [format!("127.0.0.1:{last}")];
    moves_to(&channel, &expected).await;

    // The name server does not answer any more. Each lookup sends two queries.
    server.program = None;
    let mut socket = None;
    eventually("the port is free", async || {
        socket = UdpSocket::bind(server.address).await.ok();
        socket.is_some()
    })
    .await;
    let silent = socket.unwrap();
    for _ in 0..4 {
        let mut query = [0; 512];
        let received = timeout(SOON, silent.recv_from(&mut query)).await;
        received.expect("the lookups are repeated").unwrap();
        call(&channel).await;
    }
    assert_eq!(addresses(&channel), expected);

    // The name has no record.
    drop(silent);
    server.restart(0, &[]).await;
    let program = server.program.as_ref().unwrap();
    eventually("two lookups find no record", async || {
        program.logged().matches("query[SRV]").count() > 1
    })
    .await;
    assert_eq!(addresses(&channel), expected);
    server.restart(0, &[(target, one, 0, 0)]).await;
    moves_to(&channel, &[format!("127.0.0.1:{one}")]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_moves_to_another_address_is_found_after_a_failed_attempt_to_connect() {
    let (here, there) = (Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 0, 0, 2));
    // All connections of the old server end with its runtime.
    let old = Runtime::new().unwrap();
    let is_free = |port: &u16| std::net::TcpListener::bind((there, *port)).is_ok();
    let port = std::iter::repeat_with(free_port).find(is_free).unwrap();
    old.spawn(serve(here, port)).await.unwrap();
    let target = "a.greeter.test";
    // The time to live is longer than the test.
    let server = Dnsmasq::start(600, &[(target, port, 0, 0)], &[(target, here)]).await;
    let Some(server) = server else { return };
    let source = DnsSrv::new(NAME)
        .name_server(server.address)
        .interval(Duration::from_secs(600));
    let channel = BalancedChannel::builder().source(source);
    let channel = channel.connect().await.unwrap();
    assert_eq!(call(&channel).await, format!("{here}:{port}"));
    serve(there, port).await;
    server.set_hosts(&[(target, there)]);
    old.shutdown_background();
    let moved = [format!("{there}:{port}")];
    eventually("the endpoint has the new address", async || {
        addresses(&channel) == moved
    })
    .await;
    assert_eq!(call(&channel).await, moved[0]);
}

/// The answer does not fit into a datagram.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_hundred_records_are_read_over_tcp() {
    let target = "a.greeter.test";
    let local = Ipv4Addr::LOCALHOST;
    let records: Vec<_> = (1..=300).map(|port| (target, port, 0, 1)).collect();
    let server = Dnsmasq::start(0, &records, &[(target, local)]).await;
    let Some(server) = server else { return };
    let source = DnsSrv::new(NAME).name_server(server.address);
    let channel = BalancedChannel::builder().source(source).connect_lazy();
    eventually("all records are endpoints", async || {
        channel.endpoints().len() == 300
    })
    .await;
}
