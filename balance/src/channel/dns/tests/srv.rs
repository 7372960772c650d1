//! The source for SRV records, with a name server on a loopback socket.

use std::net::SocketAddr;
use std::time::Duration;

use domain::base::Rtype;
use tokio::runtime::Handle;
use tokio::time::{sleep, timeout};

use super::name_server::{Data, NameServer};
use super::{context, serve};
use crate::BalancedChannel;
use crate::channel::EndpointState;
use crate::channel::dns::DnsSrv;
use crate::channel::dns::srv_lookup::SrvLookup;
use crate::channel::dns::task::Lookup;
use crate::channel::source::EndpointSource;

const NAME: &str = "_grpc._tcp.greeter.test";

fn lookup(server: &NameServer) -> SrvLookup {
    lookup_of(&[server.address])
}

fn lookup_of(servers: &[SocketAddr]) -> SrvLookup {
    let (name, _) = DnsSrv::parse(NAME).expect("a valid name");
    SrvLookup::new(name, servers.to_vec())
}

/// Returns the endpoints and their weights, or the error. The error must not contain control characters.
async fn endpoints(lookup: &mut SrvLookup) -> Result<Vec<String>, String> {
    let outcome = lookup.lookup().await.map(|found| {
        let endpoints = found.endpoints.iter();
        endpoints
            .map(|(address, attributes)| format!("{address} {}", attributes.weight()))
            .collect()
    });
    if let Err(error) = &outcome {
        assert!(error.bytes().all(|byte| (0x20..0x7f).contains(&byte)));
    }
    outcome
}

#[tokio::test]
async fn the_records_of_the_lowest_priority_give_ports_and_weights() {
    let server = NameServer::start(&[
        (NAME, Data::Srv(10, 5, 50_051, "a.test")),
        (NAME, Data::Srv(10, 0, 50_052, "b.test")),
        (NAME, Data::Srv(20, 9, 50_053, "c.test")),
        ("a.test", Data::Ip("10.0.0.1")),
        ("b.test", Data::Cname("host.test")),
        ("host.test", Data::Ip("fd00::2")),
        ("c.test", Data::Ip("10.0.0.3")),
    ])
    .await;
    let mut lookup = lookup(&server);
    let expected = ["10.0.0.1:50051 5", "[fd00::2]:50052 1"];
    assert_eq!(endpoints(&mut lookup).await.expect("endpoints"), expected);
    let asked = server.zone().queries.clone();
    assert!(
        !asked.iter().any(|query| query.contains("c.test")),
        "{asked:?}"
    );
}

#[tokio::test]
async fn the_addresses_in_the_additional_section_save_the_queries_for_the_targets() {
    let server = NameServer::start(&[
        (NAME, Data::Srv(0, 1, 50_051, "a.test")),
        ("a.test", Data::Ip("10.0.0.1")),
        ("a.test", Data::Ip("fd00::1")),
    ])
    .await;
    server.zone().additional = vec![Rtype::A, Rtype::AAAA];
    let found = endpoints(&mut lookup(&server)).await.expect("endpoints");
    assert_eq!(found, ["10.0.0.1:50051 1", "[fd00::1]:50051 1"]);
    assert_eq!(server.zone().queries, [format!("tcp SRV {NAME}")]);
}

/// A name server may add only a part of the addresses.
#[tokio::test]
async fn addresses_that_the_additional_section_lacks_are_looked_up() {
    let server = NameServer::start(&[
        (NAME, Data::Srv(0, 1, 50_051, "a.test")),
        ("a.test", Data::Ip("10.0.0.1")),
        ("a.test", Data::Ip("fd00::1")),
    ])
    .await;
    server.zone().additional = vec![Rtype::A];
    let mut lookup = lookup(&server);
    let asked = || {
        let queries = std::mem::take(&mut server.zone().queries);
        let asked = queries.iter().filter(|query| query.ends_with("a.test"));
        assert!(asked.clone().all(|query| query == "udp AAAA a.test"));
        asked.count()
    };
    let both = ["10.0.0.1:50051 1", "[fd00::1]:50051 1"];
    for _ in 0..2 {
        assert_eq!(endpoints(&mut lookup).await.expect("endpoints"), both);
        assert_eq!(asked(), 1);
    }
    server.zone().records.pop();
    for queries in [1, 0] {
        let found = endpoints(&mut lookup).await.expect("endpoints");
        assert_eq!((&found[..], asked()), (&[both[0].to_owned()][..], queries));
    }
}

#[tokio::test]
async fn the_next_name_server_is_used_after_an_error_of_the_first() {
    let records = [
        (NAME, Data::Srv(0, 1, 50_051, "a.test")),
        ("a.test", Data::Ip("10.0.0.1")),
    ];
    let good = NameServer::start(&records).await;
    let expected = Ok(vec!["10.0.0.1:50051 1".to_owned()]);
    // No server has the first port. The other server fails only for the target.
    let closed = SocketAddr::from(([127, 0, 0, 1], 9));
    let failing = NameServer::start(&records).await;
    failing.zone().failing.insert("a.test");
    for first in [closed, failing.address] {
        let mut lookup = lookup_of(&[first, good.address]);
        assert_eq!(endpoints(&mut lookup).await, expected, "{first}");
    }
    // The same over UDP, with a server that fails for all names.
    good.zone().closes_connections = true;
    failing.zone().failing.insert(NAME);
    for first in [closed, failing.address] {
        let mut lookup = lookup_of(&[first, good.address]);
        assert_eq!(endpoints(&mut lookup).await, expected, "{first}");
    }
    let queries = good.zone().queries.clone();
    assert!(queries.contains(&format!("udp SRV {NAME}")), "{queries:?}");
}

#[tokio::test]
async fn the_failure_of_the_smallest_target_is_reported_and_each_target_is_looked_up_once() {
    let names = ["d.test", "b.test", "a.test", "c.test"];
    let mut records: Vec<_> = names
        .iter()
        .map(|name| (NAME, Data::Srv(0, 1, 50_051, name)))
        .collect();
    // The targets of the next priority are the same.
    records.extend(names.map(|name| (NAME, Data::Srv(1, 1, 50_051, name))));
    let server = NameServer::start(&records).await;
    server.zone().failing.extend(names);
    for _ in 0..5 {
        let error = endpoints(&mut lookup(&server)).await;
        let error = error.expect_err("a failure");
        assert!(error.starts_with("the target a.test "), "{error}");
        let queries = std::mem::take(&mut server.zone().queries);
        let asked = queries.iter().filter(|query| *query == "udp A a.test");
        // Two attempts.
        assert_eq!(asked.count(), 2, "{queries:?}");
    }
}

#[tokio::test]
async fn too_many_records_or_addresses_are_an_error() {
    const ELEVEN: [&str; 11] = [
        "10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6", "fd00::1",
        "fd00::2", "fd00::3", "fd00::4", "fd00::5",
    ];
    let server = NameServer::start(&[]).await;
    for port in 0..=1_000 {
        let record = (NAME, 60, Data::Srv(0, 1, port, "a.test"));
        server.zone().records.push(record);
    }
    let mut lookup = lookup(&server);
    let error = endpoints(&mut lookup).await.expect_err("a failure");
    assert_eq!(error, "the name has more than 1000 SRV records");
    // 1 000 records with 11 addresses each.
    server.zone().records.pop();
    for address in ELEVEN {
        let record = ("a.test", 60, Data::Ip(address));
        server.zone().records.push(record);
    }
    let error = endpoints(&mut lookup).await.expect_err("a failure");
    assert!(error.contains("more than 10000 addresses"), "{error}");
    server.zone().records.pop();
    assert_eq!(
        endpoints(&mut lookup).await.expect("endpoints").len(),
        10_000
    );
}

#[tokio::test]
async fn the_next_priority_is_used_while_no_target_of_the_lowest_has_an_address() {
    let server = NameServer::start(&[
        (NAME, Data::Srv(0, 1, 50_051, "a.test")),
        (NAME, Data::Srv(1, 1, 50_052, "b.test")),
        ("b.test", Data::Ip("10.0.0.2")),
    ])
    .await;
    let mut lookup = lookup(&server);
    let found = endpoints(&mut lookup).await.expect("endpoints");
    assert_eq!(found, ["10.0.0.2:50052 1"]);
    let record = ("a.test", 60, Data::Ip("10.0.0.1"));
    server.zone().records.push(record);
    let found = endpoints(&mut lookup).await.expect("endpoints");
    assert_eq!(found, ["10.0.0.1:50051 1"]);
}

#[tokio::test]
async fn a_target_whose_lookup_fails_keeps_its_addresses_until_an_answer_removes_them() {
    let server = NameServer::start(&[
        (NAME, Data::Srv(0, 1, 50_051, "a.test")),
        (NAME, Data::Srv(0, 1, 50_052, "b.test")),
        ("a.test", Data::Ip("10.0.0.1")),
        ("b.test", Data::Ip("10.0.0.2")),
    ])
    .await;
    let mut lookup = lookup(&server);
    let both = ["10.0.0.1:50051 1", "10.0.0.2:50052 1"];
    assert_eq!(endpoints(&mut lookup).await.expect("endpoints"), both);
    server.zone().failing.insert("b.test");
    let found = lookup.lookup().await.expect("endpoints");
    assert_eq!(found.endpoints.len(), 2);
    let trouble = found.trouble.expect("the reason");
    assert_eq!(
        trouble,
        "the target b.test cannot be looked up: the name server returned SERVFAIL"
    );
    server.zone().failing.clear();
    server.zone().records.pop();
    let found = lookup.lookup().await.expect("endpoints");
    assert_eq!((found.endpoints.len(), found.trouble), (1, None));
}

#[tokio::test]
async fn a_lookup_without_a_usable_record_fails() {
    let server = NameServer::start(&[]).await;
    let mut lookup = lookup(&server);
    let set = |records: &[(&'static str, Data)]| {
        let records = records.iter().map(|(name, data)| (*name, 60, data.clone()));
        server.zone().records = records.collect();
    };
    let target = |target| (NAME, Data::Srv(0, 1, 50_051, target));
    for (records, reason) in [
        (vec![], "the name has no SRV record"),
        (
            vec![(NAME, Data::Ip("10.0.0.1"))],
            "the name has no SRV record",
        ),
        (
            vec![target(".")],
            "the record states that the service is not available",
        ),
        (
            vec![target("a.test")],
            "no target of the SRV records has an address",
        ),
    ] {
        set(&records);
        assert_eq!(endpoints(&mut lookup).await, Err(reason.to_owned()));
    }
    server.zone().failing.insert(NAME);
    let error = endpoints(&mut lookup).await.expect_err("a failure");
    assert_eq!(error, "the name server returned SERVFAIL");
}

/// The name of a target is from the network.
#[tokio::test]
async fn a_control_character_in_the_name_of_a_target_is_escaped() {
    const TARGET: &str = "a\\027[31m.test";
    let server = NameServer::start(&[(NAME, Data::Srv(0, 1, 50_051, TARGET))]).await;
    server.zone().failing.insert(TARGET);
    let error = endpoints(&mut lookup(&server))
        .await
        .expect_err("a failure");
    assert!(error.contains("\\027[31m.test"), "{error}");
}

#[tokio::test]
async fn a_truncated_answer_is_requested_over_tcp_and_a_lost_one_again() {
    const TARGETS: [&str; 3] = ["a.test", "b.test", "c.test"];
    let server = NameServer::start(&[]).await;
    {
        let mut zone = server.zone();
        for port in 1..=500 {
            let target = TARGETS[usize::from(port) % 3];
            zone.records.push((NAME, 60, Data::Srv(0, 1, port, target)));
        }
        let addresses = TARGETS.map(|target| (target, 60, Data::Ip("10.0.0.1")));
        zone.records.extend(addresses);
        zone.truncates = true;
    }
    let mut lookup = lookup(&server);
    assert_eq!(endpoints(&mut lookup).await.expect("endpoints").len(), 500);
    let queries = server.zone().queries.clone();
    assert!(queries.contains(&"tcp A a.test".to_owned()), "{queries:?}");
    server.zone().lost = 1;
    assert_eq!(endpoints(&mut lookup).await.expect("endpoints").len(), 500);
}

/// Each lookup has a resolver of its own.
#[tokio::test]
async fn the_tasks_of_a_lookup_end_with_it() {
    let server = NameServer::start(&[
        (NAME, Data::Srv(0, 1, 50_051, "a.test")),
        ("a.test", Data::Ip("10.0.0.1")),
    ])
    .await;
    server.zone().truncates = true;
    let tasks = || Handle::current().metrics().num_alive_tasks();
    let before = tasks();
    let mut lookup = lookup(&server);
    for _ in 0..20 {
        endpoints(&mut lookup).await.expect("endpoints");
    }
    let ended = async {
        while tasks() > before {
            sleep(Duration::from_millis(5)).await;
        }
    };
    let ended = timeout(Duration::from_secs(20), ended).await;
    assert!(ended.is_ok(), "{} tasks, {before} at first", tasks());
}

#[tokio::test]
async fn a_channel_connects_to_the_servers_of_the_records() {
    let (port, server) = serve().await;
    let names = NameServer::start(&[
        (NAME, Data::Srv(0, 3, port, "a.test")),
        ("a.test", Data::Ip("127.0.0.1")),
    ])
    .await;
    let source = DnsSrv::new(NAME).name_server(names.address);
    let channel = BalancedChannel::builder().source(source).connect().await;
    let endpoints = channel.expect("a channel").endpoints();
    let endpoint = endpoints.first().expect("an endpoint");
    let expected = format!("127.0.0.1:{port}");
    assert_eq!(endpoint.address.as_str(), expected);
    assert_eq!((endpoint.weight, endpoint.state), (3, EndpointState::Ready));
    server.abort();
}

#[tokio::test]
async fn the_domain_is_the_server_name_and_the_authority() {
    for (name, domain) in [
        (NAME, "greeter.test"),
        ("_grpc._tcp.Greeter.test.", "greeter.test"),
        ("greeter.service.consul", "greeter.service.consul"),
    ] {
        // No server has this port, so no query leaves the machine.
        let source = DnsSrv::new(name).name_server(([127, 0, 0, 1], 9));
        let endpoints = source.start(&context()).expect("a source");
        let name = endpoints.name.expect("a server name");
        assert_eq!((&*name.host, &*name.authority), (domain, domain));
    }
    for name in [
        "",
        "_grpc._tcp",
        "_grpc._tcp.",
        "greeter..test",
        "a b.test",
        "10.0.0.1",
        "greeter:80",
    ] {
        let builder = BalancedChannel::builder().source(DnsSrv::new(name));
        assert!(builder.connect().await.is_err(), "{name}");
    }
}
