//! Host names with two addresses, of which only one answers. The machine's own names have one address each, so each test runs again in a
//! separate process with another `/etc/hosts`.

use std::io::Write;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use tokio::net::{TcpListener, lookup_host};
use tokio::time::Instant;
use tonic_etcd::{BalancedChannel, Registry};

use super::support::link::{Behaviour, Link};
use super::support::peer::{Manner, Peer};
use super::support::{all_ready, etcd, within};
use super::{lazily, ms, say};

/// `both.test` has two addresses of one family, `mixed.test` has one address of each family.
const HOSTS: &str = "127.0.0.1 localhost\n127.0.0.2 both.test\n127.0.0.1 both.test\n::1 mixed.test\n127.0.0.1 mixed.test\n";

/// Returns whether this process has the names. If not, runs the test in a process that has them, and returns false.
fn has_names(test: &str) -> bool {
    if std::env::var_os(CHILD).is_some() {
        return true;
    }
    let mut hosts = tempfile::NamedTempFile::new().unwrap();
    hosts.write_all(HOSTS.as_bytes()).unwrap();
    let child = Command::new("unshare")
        .args([
            "-rm",
            "sh",
            "-c",
            "mount --bind \"$0\" /etc/hosts && exec \"$@\"",
        ])
        .arg(hosts.path())
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(CHILD, "1")
        .output();
    let output = match child {
        Ok(output) => output,
        Err(error) => {
            skipped(test, &error.to_string());
            return false;
        }
    };
    let printed = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    if !printed.contains("running 1 test") {
        skipped(test, &errors);
        return false;
    }
    println!("{printed}");
    assert!(output.status.success(), "{printed}\n{errors}");
    false
}

/// Prints that a test is skipped. The line is written directly to stderr, because the test harness captures the output of `eprintln!`.
fn skipped(test: &str, reason: &str) {
    let line = format!("SKIPPED {test}: cannot create a name with two addresses: {reason}\n");
    std::io::stderr().write_all(line.as_bytes()).unwrap();
}

/// Returns the two addresses of a name in the order in which they are dialled, with a port that is free at both addresses. Returns `None`
/// if the machine lacks the first address.
async fn addresses(name: &str) -> Option<[SocketAddr; 2]> {
    for _ in 0..20 {
        let found: Vec<_> = lookup_host((name, 0)).await.unwrap().collect();
        let [first, second] = found[..] else {
            panic!("expected two addresses for {name}, found {found:?}");
        };
        let Ok(probe) = TcpListener::bind(first).await else {
            skipped(name, &format!("{first} is missing"));
            return None;
        };
        let port = probe.local_addr().unwrap().port();
        let both = [first, second].map(|address| SocketAddr::new(address.ip(), port));
        if TcpListener::bind(both[1]).await.is_ok() {
            return Some(both);
        }
    }
    panic!("no port is free at both addresses of {name}");
}

/// Binds one of the addresses to a listener that never answers. Returns the listener and the other address, which is free for a server.
async fn half_dead(name: &str, dead: usize) -> Option<(TcpListener, SocketAddr)> {
    let both = addresses(name).await?;
    let silent = TcpListener::bind(both[dead]).await.unwrap();
    Some((silent, both[1 - dead]))
}

const CONNECT_TIMEOUT: Duration = ms(3_000);
/// Limit on the time until a channel serves calls. It is less than `CONNECT_TIMEOUT`, so that the first attempt must succeed.
const BOUND: Duration = ms(2_500);

async fn is_ready_soon(channel: &BalancedChannel, what: &str) {
    let ready = within(BOUND, what, async || say(channel, ms(500)).await.is_ok()).await;
    println!("{what}: ready after {ready:?}");
    for _ in 0..50 {
        say(channel, ms(1_000))
            .await
            .expect("the live address must serve");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_with_a_silent_address_is_ready_in_the_first_attempt() {
    if !has_names("race::a_name_with_a_silent_address_is_ready_in_the_first_attempt") {
        return;
    }
    for name in ["both.test", "mixed.test"] {
        for dead in [0, 1] {
            let Some((silent, live)) = half_dead(name, dead).await else {
                continue;
            };
            let peer = Peer::at(&live.to_string(), Manner::default()).await;
            let builder = BalancedChannel::builder().connect_timeout(CONNECT_TIMEOUT);
            let channel = lazily(builder, &[format!("{name}:{}", live.port())]);
            is_ready_soon(&channel, &format!("{name}, address {dead} is dead")).await;
            drop((silent, peer));
        }
    }
}

#[cfg(feature = "tls")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_with_a_silent_address_is_ready_in_the_first_attempt_under_tls() {
    if !has_names("race::a_name_with_a_silent_address_is_ready_in_the_first_attempt_under_tls") {
        return;
    }
    let localhost = super::support::tls::Localhost::new();
    for dead in [0, 1] {
        let Some((silent, live)) = half_dead("both.test", dead).await else {
            continue;
        };
        let listen = live.to_string();
        let peer = Peer::with_tls_at(&listen, Manner::default(), &localhost).await;
        let builder = BalancedChannel::builder().connect_timeout(CONNECT_TIMEOUT);
        let builder = builder.tls_config(localhost.trusted());
        let channel = lazily(builder, &[format!("both.test:{}", live.port())]);
        is_ready_soon(&channel, &format!("TLS, address {dead} is dead")).await;
        drop((silent, peer));
    }
}

/// If an attempt ends before the second address is dialled, the next attempt begins with the second address.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_with_a_silent_address_is_ready_after_two_short_attempts() {
    if !has_names("race::a_name_with_a_silent_address_is_ready_after_two_short_attempts") {
        return;
    }
    let Some((silent, live)) = half_dead("both.test", 0).await else {
        return;
    };
    let peer = Peer::at(&live.to_string(), Manner::default()).await;
    let builder = BalancedChannel::builder().connect_timeout(ms(200));
    let channel = lazily(builder, &[format!("both.test:{}", live.port())]);
    is_ready_soon(&channel, "the first attempt is too short").await;
    drop((silent, peer));
}

/// The server at the connected address stops. From then on, the address accepts connections and does not answer. The channel uses the other
/// address of the name.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_fails_over_to_its_other_address() {
    if !has_names("race::a_name_fails_over_to_its_other_address") {
        return;
    }
    let Some(both) = addresses("both.test").await else {
        return;
    };
    let first = Peer::at(&both[0].to_string(), Manner::default()).await;
    let second = Peer::at(&both[1].to_string(), Manner::default()).await;
    let builder = BalancedChannel::builder().connect_timeout(CONNECT_TIMEOUT);
    let channel = lazily(builder, &[format!("both.test:{}", both[0].port())]);
    all_ready(&channel, 1).await;
    let (used, other) = if first.connections() > 0 {
        (first, second)
    } else {
        (second, first)
    };
    let address = used.address;
    used.stopped().await;
    // From now on, this address accepts connections and never answers.
    let silent = TcpListener::bind(address).await.unwrap();
    is_ready_soon(&channel, "after the first address went silent").await;
    assert!(other.executed() > 0, "the other address must serve");
    drop(silent);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_name_with_a_silent_address_connects() {
    if !has_names("race::an_etcd_name_with_a_silent_address_connects") {
        return;
    }
    let etcd = etcd().await;
    let Some((silent, live)) = half_dead("both.test", 0).await else {
        return;
    };
    let port = live.port();
    let link = Link::at(
        &live.to_string(),
        etcd.endpoint(0).unwrap(),
        Behaviour::Pass,
    )
    .await;
    let began = Instant::now();
    let connected =
        tokio::time::timeout(ms(8_000), Registry::connect([format!("both.test:{port}")]));
    let connected = connected.await.expect("`connect` must return in time");
    let took = Instant::now().saturating_duration_since(began);
    println!("after {took:?}: {:?}", connected.as_ref().err());
    connected.expect("etcd must answer on the other address");
    assert!(
        took < ms(1_900),
        "`connect` must not wait for the connect timeout: {took:?}"
    );
    drop((silent, link));
}

const CHILD: &str = "TONIC_ETCD_TWO_ADDRESSES";
