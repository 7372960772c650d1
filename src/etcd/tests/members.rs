//! Measures what failing members cost this client, in comparison with `etcd-client` over the same endpoints.

use std::time::Duration;

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::error::EtcdError;
use crate::etcd::{Config, Etcd, Watch};
use crate::keyspace::{Key, LeaseId, Range};
use crate::testing;

fn since(start: Instant) -> Duration {
    Instant::now().saturating_duration_since(start)
}

/// Waits for a leader and returns its index.
async fn leader(cluster: &testing::Etcd) -> usize {
    let start = Instant::now();
    loop {
        if let Some(leader) = cluster.leader().await {
            return leader;
        }
        assert!(since(start) < Duration::from_secs(20), "there is no leader");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Isolates a member from the others, as soon as the member reports its id.
async fn isolate(cluster: &mut testing::Etcd, member: usize) {
    let start = Instant::now();
    while let Err(error) = cluster.isolate(member).await {
        assert!(since(start) < Duration::from_secs(20), "{error}");
    }
}

async fn connect(endpoints: Vec<String>) -> Etcd {
    let config = Config {
        endpoints,
        ..Config::default()
    };
    let connected = Etcd::connect(&config, &Key::from("/gRPC/")).await;
    connected.expect("a connection")
}

/// Reads one key repeatedly. Returns the number of failures, the duration of the slowest read, and the mean duration of the other reads
/// (approximately: their sum is divided by the number of all reads).
async fn ours(etcd: &Etcd, reads: u32) -> (u32, Duration, Duration) {
    let (mut failed, mut slowest, mut total) = (0, Duration::ZERO, Duration::ZERO);
    for _ in 0..reads {
        let start = Instant::now();
        failed += u32::from(etcd.read(&Key::from("/a")).await.is_err());
        let took = since(start);
        slowest = slowest.max(took);
        total += took;
    }
    (failed, slowest, total.saturating_sub(slowest) / reads)
}

/// Reads one key with concurrent requests over one `etcd_client::Client` for all endpoints. Returns the number of failures and the number
/// of timeouts.
async fn stock(client: &etcd_client::Client, reads: u32) -> (u32, u32) {
    let mut tasks = JoinSet::new();
    for _ in 0..reads {
        let mut kv = client.kv_client();
        tasks.spawn(async move {
            match timeout(Duration::from_secs(2), kv.get("/a", None)).await {
                Ok(Ok(_)) => (0, 0),
                Ok(Err(_)) => (1, 0),
                Err(_) => (0, 1),
            }
        });
    }
    let add = |sum: (u32, u32), one: (u32, u32)| (sum.0 + one.0, sum.1 + one.1);
    tasks.join_all().await.into_iter().fold((0, 0), add)
}

/// Reads one key repeatedly and returns the duration of each read. No read may fail.
async fn reads(etcd: &Etcd, reads: usize) -> Vec<Duration> {
    let mut took = Vec::with_capacity(reads);
    for _ in 0..reads {
        let start = Instant::now();
        let answer = etcd.read(&Key::from("/a")).await;
        took.push(since(start));
        answer.expect("an answer");
    }
    took
}

/// Prints how many reads waited (took more than 1.5 s, because one of their requests ran into its 2 s deadline), the index of the last of
/// them, and the duration of the slowest read. At most `few` reads may wait, and each read must take less than `longest`. It is random
/// which read first reaches the failing member. Later reads avoid the member for a while.
fn few_wait(what: &str, took: &[Duration], few: usize, longest: Duration) {
    let waits = |took: &&Duration| **took > Duration::from_millis(1_500);
    let waited = took.iter().filter(waits).count();
    let last = took.iter().rposition(|took| waits(&took));
    let slowest = took.iter().max().expect("at least one read");
    let mut sorted = took.to_vec();
    sorted.sort();
    let median = sorted[sorted.len() / 2];
    println!(
        "{what}: 0 of {} reads failed, {waited} waited, index of the last one {last:?}; the slowest took {slowest:?}, the median {median:?}",
        took.len()
    );
    assert!(waited <= few, "{waited} reads waited, limit {few}");
    assert!(*slowest < longest, "the slowest read took {slowest:?}");
}

#[tokio::test]
async fn one_frozen_or_dead_member_of_three_delays_one_read() {
    let mut cluster = testing::Etcd::start_cluster(3).await.expect("a cluster");
    let etcd = connect(cluster.endpoints()).await;
    let client = etcd_client::Client::connect(cluster.endpoints(), None).await;
    let client = client.expect("a connection");
    few_wait(
        "all members healthy",
        &reads(&etcd, 300).await,
        0,
        Duration::from_millis(1_900),
    );
    let leader = leader(&cluster).await;
    let follower = (leader + 1) % 3;

    cluster.freeze(follower).await.expect("a frozen member");
    let took = reads(&etcd, 300).await;
    let (refused, hung) = stock(&client, 300).await;
    println!("etcd-client: {refused} of 300 failed, {hung} timed out");
    few_wait("one frozen", &took, 1, Duration::from_millis(3_900));
    cluster.thaw(follower).await.expect("a thawed member");

    cluster.kill(follower).await.expect("a dead member");
    let took = reads(&etcd, 300).await;
    let (refused, hung) = stock(&client, 300).await;
    println!("etcd-client: {refused} of 300 failed, {hung} timed out");
    few_wait("one dead", &took, 0, Duration::from_millis(1_900));
    cluster.restart(follower).await.expect("a restart");

    // The other members first elect a new leader, which takes a second or two.
    cluster.freeze(leader).await.expect("a frozen member");
    let took = reads(&etcd, 300).await;
    few_wait("the leader frozen", &took, 4, Duration::from_secs(12));
}

/// Opens a watch on a member for whose address `is_it` returns true.
async fn watch_at(etcd: &Etcd, is_it: impl Fn(&str) -> bool) -> Watch {
    let start = Instant::now();
    loop {
        let opened = etcd.watch(&Range::prefix("/gRPC/"), None).await;
        let mut watch = opened.expect("a watch");
        assert!(watch.message().await.expect("a message").created);
        if is_it(&watch.endpoint()) {
            return watch;
        }
        assert!(
            since(start) < Duration::from_secs(20),
            "no watch was opened on the member"
        );
        drop(watch);
        // Without this wait, the next watch would share the stream.
        super::rules::until(Duration::from_secs(2), "the stream is closed", || {
            etcd.watch_streams() == 0
        })
        .await;
    }
}

/// Waits until a watch ends, and returns its error.
async fn end(watch: &mut Watch) -> EtcdError {
    loop {
        if let Err(error) = watch.message().await {
            return error;
        }
    }
}

#[tokio::test]
async fn a_watch_is_moved_from_a_member_that_freezes_or_loses_its_leader() {
    let starting = testing::Etcd::builder().members(3).partitionable();
    let mut cluster = starting.start().await.expect("a cluster");
    let etcd = connect(cluster.endpoints()).await;
    let leader = leader(&cluster).await;
    let bad = (leader + 1) % 3;
    let address = cluster.endpoint(bad).unwrap();
    let deadline = Duration::from_secs(2);
    let lease = LeaseId::new(42);
    let granted = etcd.grant(lease, Duration::from_secs(60), deadline);
    granted.await.expect("a lease");
    for fault in ["frozen", "cut off"] {
        let mut watch = watch_at(&etcd, |endpoint| endpoint == address).await;
        let start = Instant::now();
        match fault {
            "frozen" => cluster.freeze(bad).await.expect("a frozen member"),
            _ => isolate(&mut cluster, bad).await,
        }
        let error = end(&mut watch).await;
        println!("{fault}: the watch ended after {:?}: {error}", since(start));
        assert_eq!(error.endpoint(), Some(&*address));
        // On a frozen member, the watch ends after 6 s of silence and 3 s without an answer to the PING. A member without a leader ends the
        // watch itself.
        let bound = Duration::from_secs(12);
        assert!(since(start) < bound, "{:?}", since(start));
        etcd.record_watch_end(&watch, &error);
        // Every further watch must use another member, and its first message must be received at once.
        let start = Instant::now();
        let mut slowest = Duration::ZERO;
        for _ in 0..30 {
            let step = Instant::now();
            let mut next = etcd
                .watch(&Range::prefix("/gRPC/"), None)
                .await
                .expect("a watch");
            assert_ne!(next.endpoint(), address, "{fault}");
            assert!(next.message().await.expect("a message").created);
            etcd.read(&Key::from("/a")).await.expect("a read");
            slowest = slowest.max(since(step));
        }
        // Lease requests have their own connections, but share the failure record of the member.
        etcd.keep_alive(lease, 0, deadline)
            .await
            .expect("a renewal");
        println!(
            "{fault}: 30 watches, 30 reads, and a renewal took {:?}",
            since(start)
        );
        assert!(slowest < deadline, "{slowest:?}");
        match fault {
            "frozen" => cluster.thaw(bad).await.expect("a thawed member"),
            _ => cluster.rejoin(bad).expect("a rejoined member"),
        }
    }
}

/// The client has three endpoints, in a cluster of five members. One of the three members dies, and another one of them freezes.
#[tokio::test]
async fn reads_succeed_while_one_member_is_dead_and_another_is_frozen() {
    let mut cluster = testing::Etcd::start_cluster(5).await.expect("a cluster");
    let known = cluster.endpoints()[..3].to_vec();
    let etcd = connect(known.clone()).await;
    let client = etcd_client::Client::connect(known.clone(), None).await;
    let client = client.expect("a connection");
    let lease = LeaseId::new(42);
    let ttl = Duration::from_secs(60);
    let deadline = Duration::from_secs(2);
    etcd.grant(lease, ttl, deadline).await.expect("a lease");

    let (dead, frozen) = (0, 1);
    cluster.kill(dead).await.expect("a dead member");
    // The four remaining members have a leader, at once or after an election.
    leader(&cluster).await;
    let (failed, slowest, mean) = ours(&etcd, 300).await;
    let (refused, hung) = stock(&client, 300).await;
    println!(
        "dead: {failed} of 300 reads failed, the slowest {slowest:?}, the others {mean:?}; etcd-client: {refused} failed, {hung} timed out"
    );
    assert_eq!(failed, 0);

    cluster.freeze(frozen).await.expect("a frozen member");
    let (failed, slowest, mean) = ours(&etcd, 20).await;
    assert_eq!(failed, 0);
    // The bound covers two deadlines, and an election if the frozen member is the leader.
    assert!(slowest < Duration::from_secs(12), "{slowest:?}");
    assert!(mean < Duration::from_millis(200), "{mean:?}");
    // Lease requests avoid the members on which reads have failed. If no read has reached the frozen member, the first renewal may reach it
    // and fail.
    let start = Instant::now();
    if etcd.keep_alive(lease, 0, deadline).await.is_err() {
        etcd.keep_alive(lease, 0, deadline)
            .await
            .expect("a renewal");
    }
    println!("a renewal took {:?}", since(start));
    let (failed, slowest, mean) = ours(&etcd, 300).await;
    let (refused, hung) = stock(&client, 300).await;
    println!(
        "dead and frozen: {failed} of 300 reads failed, the slowest {slowest:?}, the others {mean:?}; etcd-client: {refused} failed, {hung} timed out"
    );
    assert_eq!(failed, 0);
    assert!(mean < Duration::from_millis(200), "{mean:?}");
}

/// Starts a proxy with one address for several members, like a Kubernetes Service, and returns the address. Each new connection is
/// forwarded to the member that the test has set.
async fn service(mut member: watch::Receiver<String>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    tokio::spawn(async move {
        while let Ok((mut inbound, _)) = listener.accept().await {
            let target = member.borrow_and_update().clone();
            tokio::spawn(async move {
                if let Ok(mut outbound) = TcpStream::connect(target).await {
                    drop(copy_bidirectional(&mut inbound, &mut outbound).await);
                }
            });
        }
    });
    address
}

#[tokio::test]
async fn a_frozen_member_behind_a_load_balancer_is_replaced_by_a_new_connection() {
    let mut cluster = testing::Etcd::start_cluster(3).await.expect("a cluster");
    let leader = leader(&cluster).await;
    let (frozen, well) = ((leader + 1) % 3, (leader + 2) % 3);
    let (member, members) = watch::channel(cluster.endpoint(frozen).unwrap());
    let etcd = connect(vec![service(members).await]).await;
    let lease = LeaseId::new(42);
    let deadline = Duration::from_secs(1);
    etcd.grant(lease, Duration::from_secs(60), deadline)
        .await
        .expect("a lease");
    cluster.freeze(frozen).await.expect("a frozen member");
    member.send_replace(cluster.endpoint(well).unwrap());
    // The read waits until a PING has shown that the connection is dead, or for two deadlines. Then it waits for a new connection.
    let start = Instant::now();
    etcd.read(&Key::from("/a")).await.expect("a read");
    assert!(since(start) < Duration::from_secs(10), "{:?}", since(start));
    // After two renewals without a response, the client replaces the connection for leases.
    for _ in 0..2 {
        drop(etcd.keep_alive(lease, 0, deadline).await);
    }
    // This renewal has to wait for the new connection, so its deadline is longer.
    let long = Duration::from_secs(5);
    etcd.keep_alive(lease, 0, long).await.expect("a renewal");
}
