//! What members that fail cost, against `etcd-client` over the same endpoints.

use std::time::Duration;

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::etcd::{Config, Etcd};
use crate::keyspace::{Key, LeaseId};
use crate::testing;

fn since(start: Instant) -> Duration {
    Instant::now().saturating_duration_since(start)
}

async fn connect(endpoints: Vec<String>) -> Etcd {
    let config = Config {
        endpoints,
        ..Config::default()
    };
    let connected = Etcd::connect(&config, &Key::from("/gRPC/")).await;
    connected.expect("etcd answers")
}

/// Reads of ours, one after the other: how many fail, and how long the slowest and the rest took.
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

/// The same over one client for all endpoints: how many fail, and how many hang.
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

/// Of the five members three are known; one of them dies, and one more freezes.
#[tokio::test]
async fn a_dead_and_a_frozen_member_cost_one_deadline_in_all() {
    let mut cluster = testing::Etcd::start_cluster(5).await.expect("etcd");
    let known = cluster.endpoints()[..3].to_vec();
    let etcd = connect(known.clone()).await;
    let client = etcd_client::Client::connect(known.clone(), None).await;
    let client = client.expect("etcd answers");
    let lease = LeaseId::new(42);
    let ttl = Duration::from_secs(60);
    let deadline = Duration::from_secs(2);
    etcd.grant(lease, ttl, deadline).await.expect("granted");

    let used = etcd.endpoint_in_use();
    let position = known.iter().position(|endpoint| *endpoint == used);
    let (dead, frozen) = (position.expect("known"), (position.expect("known") + 1) % 3);
    cluster.kill(dead).await.expect("killed");
    // With four of five there is a leader, at once or after an election.
    let waited = Instant::now();
    while cluster.leader().await.is_none() {
        assert!(since(waited) < Duration::from_secs(20), "nobody leads");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let (failed, slowest, mean) = ours(&etcd, 300).await;
    let (refused, hung) = stock(&client, 300).await;
    println!(
        "dead: {failed} of 300 reads failed, the slowest {slowest:?}, the others {mean:?}; etcd-client: {refused} failed, {hung} hung"
    );
    assert_eq!(failed, 0);

    cluster.freeze(frozen).await.expect("frozen");
    let (failed, slowest, mean) = ours(&etcd, 300).await;
    let (refused, hung) = stock(&client, 300).await;
    println!(
        "dead and frozen: {failed} of 300 reads failed, the slowest {slowest:?}, the others {mean:?}; etcd-client: {refused} failed, {hung} hung"
    );
    assert_eq!(failed, 0);
    // Two deadlines if the one that leads is frozen as well: an election.
    assert!(slowest < Duration::from_secs(9), "{slowest:?}");
    assert!(mean < Duration::from_millis(50), "{mean:?}");
    let start = Instant::now();
    etcd.keep_alive(lease, deadline).await.expect("renewed");
    println!("a renewal took {:?}", since(start));
    assert!(since(start) < Duration::from_millis(500));
}

/// One address for several members, as a service in Kubernetes is: new connections go to whichever member it is told.
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
async fn a_frozen_member_behind_the_only_address_is_left_by_a_new_connection() {
    let mut cluster = testing::Etcd::start_cluster(3).await.expect("etcd");
    let leader = cluster.leader().await.expect("somebody leads");
    let (frozen, well) = ((leader + 1) % 3, (leader + 2) % 3);
    let (member, members) = watch::channel(cluster.endpoint(frozen));
    let etcd = connect(vec![service(members).await]).await;
    let lease = LeaseId::new(42);
    let deadline = Duration::from_secs(1);
    etcd.grant(lease, Duration::from_secs(60), deadline)
        .await
        .expect("granted");
    cluster.freeze(frozen).await.expect("frozen");
    member.send_replace(cluster.endpoint(well));
    // Two deadlines, then a new connection.
    let start = Instant::now();
    etcd.read(&Key::from("/a")).await.expect("read");
    assert!(since(start) < Duration::from_secs(6), "{:?}", since(start));
    for _ in 0..2 {
        etcd.keep_alive(lease, deadline).await.expect_err("frozen");
    }
    etcd.keep_alive(lease, deadline).await.expect("renewed");
}
