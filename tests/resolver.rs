//! The set of instances of a resolver, compared with the keys of a real etcd.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod support;

use std::time::Duration;

use etcd_client::PutOptions;
use support::greeter::HelloRequest;
use support::greeter::greeter_client::GreeterClient;
use support::proxy::Proxy;
use support::{addresses, client, etcd, eventually, greeter, knows, list, registry, soak};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_stream::StreamExt;
use tonic_etcd::testing::Etcd;
use tonic_etcd::{Address, Format, Registry, Resolver, resolver::ResolverState};
use tower::discover::Change;

async fn call(client: &mut GreeterClient<tonic::transport::Channel>) -> Option<String> {
    let request = HelloRequest {
        name: "test".to_owned(),
        replies: 1,
    };
    // The timeout of a tonic request does not cover the wait for an endpoint.
    let reply = timeout(Duration::from_millis(500), client.say_hello(request))
        .await
        .ok()?
        .ok()?;
    Some(reply.into_inner().message.rsplit(' ').next()?.to_owned())
}

#[tokio::test]
async fn servers_are_called_until_the_keys_that_were_put_by_hand_are_deleted() {
    let etcd = etcd().await;
    let (alpha, _alpha) = greeter("alpha").await;
    let (beta, _beta) = greeter("beta").await;
    let mut by_hand = client(&etcd).await;
    by_hand
        .put("/gRPC/greeter/1", alpha.to_string(), None)
        .await
        .unwrap();
    let naming = format!(r#"{{"Op":0,"Addr":"{beta}","Metadata":null}}"#);
    by_hand.put("/gRPC/greeter/2", naming, None).await.unwrap();
    by_hand
        .put("/gRPC/greeter-admin/3", "127.0.0.1:1", None)
        .await
        .unwrap();

    // Mass removal protection is off. Otherwise, if both instances were removed within seconds, the second would be held: it would stay in
    // the set for a while.
    let resolver = registry(&etcd)
        .await
        .resolver("greeter")
        .mass_removal_protection(None)
        .start();
    knows(&resolver, &[&alpha.to_string(), &beta.to_string()]).await;
    let mut greeter = GreeterClient::new(resolver.clone().into_tonic_channel());
    for server in ["alpha", "beta"] {
        eventually(server, async || {
            call(&mut greeter).await.as_deref() == Some(server)
        })
        .await;
    }

    by_hand.delete("/gRPC/greeter/1", None).await.unwrap();
    knows(&resolver, &[&beta.to_string()]).await;
    // The channel is updated after the resolver, so the first calls may still reach alpha.
    eventually("twenty calls in a row reach beta", async || {
        for _ in 0..20 {
            if call(&mut greeter).await.as_deref() != Some("beta") {
                return false;
            }
        }
        true
    })
    .await;
    by_hand.delete("/gRPC/greeter/2", None).await.unwrap();
    knows(&resolver, &[]).await;
    eventually("no server receives calls", async || {
        call(&mut greeter).await.is_none()
    })
    .await;
}

#[tokio::test]
async fn an_empty_set_is_a_known_state() {
    let etcd = etcd().await;
    let resolver = registry(&etcd).await.resolver("greeter").start();
    timeout(support::SOON, resolver.ready())
        .await
        .expect("an empty set is known");
    assert_eq!(resolver.status().state, ResolverState::Fresh);
    assert!(resolver.instances().is_empty());
    let mut by_hand = client(&etcd).await;
    for _ in 0..3 {
        by_hand
            .put("/gRPC/greeter/1", "127.0.0.1:1", None)
            .await
            .unwrap();
        knows(&resolver, &["127.0.0.1:1"]).await;
        by_hand.delete("/gRPC/greeter/1", None).await.unwrap();
        knows(&resolver, &[]).await;
    }
}

#[tokio::test]
async fn several_prefixes_form_one_set() {
    let etcd = etcd().await;
    let mut by_hand = client(&etcd).await;
    by_hand
        .put("/web/node1", "127.0.0.1:1", None)
        .await
        .unwrap();
    let resolver = registry(&etcd)
        .await
        .resolver_at(["/web", "/gRPC/", "/web/inner/"])
        .start();
    knows(&resolver, &["127.0.0.1:1"]).await;
    by_hand.put("/gRPC/a/1", "127.0.0.1:2", None).await.unwrap();
    by_hand
        .put("/web/inner/x", "127.0.0.1:3", None)
        .await
        .unwrap();
    by_hand
        .put("/webs/node1", "127.0.0.1:4", None)
        .await
        .unwrap();
    knows(&resolver, &["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"]).await;
    // A key with the same address under another prefix keeps the instance.
    by_hand.put("/gRPC/a/2", "127.0.0.1:1", None).await.unwrap();
    by_hand.delete("/web/node1", None).await.unwrap();
    by_hand.delete("/web/inner/x", None).await.unwrap();
    knows(&resolver, &["127.0.0.1:1", "127.0.0.1:2"]).await;
    assert_eq!(resolver.status().state, ResolverState::Fresh);
}

#[tokio::test]
async fn invalid_values_only_change_a_counter() {
    let etcd = etcd().await;
    let mut by_hand = client(&etcd).await;
    let large = vec![b'x'; 70_000];
    let garbage: [&[u8]; 8] = [
        b"",
        b"{",
        b"not an address",
        b"\xff\xfe",
        b"0.0.0.0:80",
        b"169.254.169.254:80",
        br#"{"Addr":""}"#,
        &large,
    ];
    for (number, value) in garbage.iter().enumerate() {
        by_hand
            .put(format!("/gRPC/greeter/bad{number}"), *value, None)
            .await
            .unwrap();
    }
    for number in 1..=3 {
        by_hand
            .put(
                format!("/gRPC/greeter/good{number}"),
                format!("127.0.0.1:{number}"),
                None,
            )
            .await
            .unwrap();
    }
    let resolver = registry(&etcd).await.resolver("greeter").start();
    let good = ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"];
    knows(&resolver, &good).await;
    assert_eq!(resolver.status().rejected_values, 8);
    assert_eq!(resolver.status().state, ResolverState::Fresh);
    // If a good value turns bad, the last good value is kept.
    by_hand.put("/gRPC/greeter/good2", "{", None).await.unwrap();
    eventually("the bad value is counted", async || {
        resolver.status().rejected_values == 9
    })
    .await;
    assert_eq!(addresses(&resolver), good);
    by_hand
        .put("/gRPC/greeter/good2", "127.0.0.1:22", None)
        .await
        .unwrap();
    knows(&resolver, &["127.0.0.1:1", "127.0.0.1:22", "127.0.0.1:3"]).await;
}

#[tokio::test]
async fn ten_thousand_invalid_values_do_not_delay_a_good_one() {
    let etcd = etcd().await;
    let by_hand = client(&etcd).await;
    for batch in 0..100 {
        let puts: Vec<_> = (0..100)
            .map(|number| {
                etcd_client::TxnOp::put(
                    format!("/gRPC/greeter/{batch:02}{number:02}"),
                    "garbage",
                    None,
                )
            })
            .collect();
        by_hand
            .kv_client()
            .txn(etcd_client::Txn::new().and_then(puts))
            .await
            .unwrap();
    }
    by_hand
        .kv_client()
        .put("/gRPC/greeter/good", "127.0.0.1:1", None)
        .await
        .unwrap();
    let resolver = registry(&etcd).await.resolver("greeter").start();
    knows(&resolver, &["127.0.0.1:1"]).await;
    assert_eq!(resolver.status().rejected_values, 10_000);
    assert_eq!(
        resolver.status().lists,
        1,
        "there must be one list, in several pages"
    );
}

#[tokio::test]
async fn a_resolver_can_be_limited_to_one_format() {
    let etcd = etcd().await;
    let mut by_hand = client(&etcd).await;
    by_hand
        .put("/gRPC/greeter/1", "127.0.0.1:1", None)
        .await
        .unwrap();
    by_hand
        .put("/gRPC/greeter/2", r#"{"Addr":"127.0.0.1:2"}"#, None)
        .await
        .unwrap();
    let resolver = registry(&etcd)
        .await
        .resolver("greeter")
        .format(Format::EtcdNaming)
        .start();
    knows(&resolver, &["127.0.0.1:2"]).await;
}

#[tokio::test]
async fn a_resolver_with_an_invalid_service_name_is_ready_and_reports_the_error() {
    let etcd = etcd().await;
    for service in ["", "a/b"] {
        let resolver = registry(&etcd).await.resolver(service).start();
        timeout(support::SOON, resolver.ready())
            .await
            .expect("the set is known at once");
        let error = resolver
            .status()
            .last_error
            .expect("the status contains the error");
        assert!(error.to_string().contains("service name"), "{error:?}");
    }
}

/// Returns the number of watchers that etcd serves.
async fn watchers(etcd: &Etcd) -> u64 {
    metric(etcd, "etcd_debugging_mvcc_watcher_total ").await
}

/// Returns the number of messages that etcd has received on watch streams.
async fn watch_requests(etcd: &Etcd) -> u64 {
    let name = "grpc_server_msg_received_total{grpc_method=\"Watch\",";
    metric(etcd, name).await
}

/// Returns the value of the metric whose line begins with `name`.
async fn metric(etcd: &Etcd, name: &str) -> u64 {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut socket = tokio::net::TcpStream::connect(etcd.endpoint(0).unwrap())
        .await
        .unwrap();
    socket
        .write_all(b"GET /metrics HTTP/1.0\r\n\r\n")
        .await
        .unwrap();
    let mut text = String::new();
    socket.read_to_string(&mut text).await.unwrap();
    let line = text.lines().find(|line| line.starts_with(name));
    line.unwrap().rsplit(' ').next().unwrap().parse().unwrap()
}

#[tokio::test]
async fn dropping_the_last_handle_ends_the_watch() {
    let etcd = etcd().await;
    let before = watchers(&etcd).await;
    let resolver = registry(&etcd).await.resolver("greeter").start();
    resolver.ready().await;
    eventually("the watch is open", async || {
        watchers(&etcd).await == before + 1
    })
    .await;
    let second = resolver.clone();
    let channel = resolver.into_tonic_channel();
    eventually("there is still one watch", async || {
        watchers(&etcd).await == before + 1
    })
    .await;
    drop(second);
    assert_eq!(
        watchers(&etcd).await,
        before + 1,
        "the channel must keep the watch open"
    );
    drop(channel);
    eventually("the watch has ended", async || {
        watchers(&etcd).await == before
    })
    .await;
}

#[tokio::test]
async fn each_clone_receives_the_whole_set_and_then_the_changes() {
    let etcd = etcd().await;
    let mut by_hand = client(&etcd).await;
    by_hand
        .put("/gRPC/greeter/1", "127.0.0.1:1", None)
        .await
        .unwrap();
    let mut first = registry(&etcd).await.resolver("greeter").start();
    let change = async |resolver: &mut Resolver| match timeout(support::SOON, resolver.next()).await
    {
        Ok(Some(Ok(Change::Insert(address, instance)))) => {
            (address.to_string(), Some(instance.weight()))
        }
        Ok(Some(Ok(Change::Remove(address)))) => (address.to_string(), None),
        other => panic!("{other:?}"),
    };
    assert_eq!(
        change(&mut first).await,
        ("127.0.0.1:1".to_owned(), Some(1))
    );
    let mut second = first.clone();
    assert_eq!(
        change(&mut second).await,
        ("127.0.0.1:1".to_owned(), Some(1))
    );
    // Ten changes of one instance are a single change for a clone that did not read in the meantime.
    for weight in 2..=11 {
        let value = format!(r#"{{"Addr":"127.0.0.1:1","Metadata":{{"weight":{weight}}}}}"#);
        by_hand.put("/gRPC/greeter/1", value, None).await.unwrap();
    }
    eventually("the last weight is listed", async || {
        first.instances()[0].weight() == 11
    })
    .await;
    assert_eq!(
        change(&mut second).await,
        ("127.0.0.1:1".to_owned(), Some(11))
    );
    by_hand.delete("/gRPC/greeter/1", None).await.unwrap();
    knows(&first, &[]).await;
    assert_eq!(change(&mut second).await, ("127.0.0.1:1".to_owned(), None));
}

#[tokio::test]
async fn nothing_is_removed_while_etcd_is_down() {
    let mut etcd = etcd().await;
    let mut by_hand = client(&etcd).await;
    by_hand
        .put("/gRPC/greeter/1", "127.0.0.1:1", None)
        .await
        .unwrap();
    let resolver = registry(&etcd).await.resolver("greeter").start();
    knows(&resolver, &["127.0.0.1:1"]).await;
    let lists = resolver.status().lists;
    etcd.kill(0).await.unwrap();
    eventually("the resolver is `Stale`", async || {
        resolver.status().state == ResolverState::Stale
    })
    .await;
    assert!(resolver.status().last_error.is_some());
    assert_eq!(addresses(&resolver), ["127.0.0.1:1"]);
    etcd.restart(0).await.unwrap();
    eventually("the resolver is `Fresh` again", async || {
        resolver.status().state == ResolverState::Fresh
    })
    .await;
    by_hand
        .put("/gRPC/greeter/2", "127.0.0.1:2", None)
        .await
        .unwrap();
    knows(&resolver, &["127.0.0.1:1", "127.0.0.1:2"]).await;
    assert_eq!(
        resolver.status().lists,
        lists,
        "the watch must be resumed without a list"
    );
}

/// Returns how long a test waits for an event that must not occur: `short` seconds, or `long` seconds with `SOAK=1`.
fn length(short: u64, long: u64) -> Duration {
    Duration::from_secs(soak("seconds", short, long))
}

#[tokio::test]
async fn a_quiet_watch_is_probed_and_not_reopened() {
    let etcd = etcd().await;
    // If the registry uses a client that the user provides, its watch stream is probed after 5 s of silence: a second watch is opened, to
    // check that the stream works. The streams of other registries are probed after 22 to 38 s.
    let registry = Registry::from_client(client(&etcd).await);
    let resolver = registry.resolver("greeter").start();
    resolver.ready().await;
    eventually("the watch is open", async || resolver.status().watches == 1).await;
    let (before, requests) = (watchers(&etcd).await, watch_requests(&etcd).await);
    eventually("a probe is sent", async || {
        watch_requests(&etcd).await > requests
    })
    .await;
    // The state is expected to stay the same in this time.
    tokio::time::sleep(length(6, 60)).await;
    let status = resolver.status();
    assert_eq!(
        (status.watches, status.lists, status.state),
        (1, 1, ResolverState::Fresh)
    );
    eventually("no probe watcher is left", async || {
        watchers(&etcd).await == before
    })
    .await;
    let mut by_hand = client(&etcd).await;
    by_hand
        .put("/gRPC/greeter/1", "127.0.0.1:1", None)
        .await
        .unwrap();
    knows(&resolver, &["127.0.0.1:1"]).await;
    assert_eq!(resolver.status().watches, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_unrelated_writes_per_second_cause_no_list() {
    // The long timeouts prevent an election, which would end the watches.
    let etcd = Etcd::builder().members(3).arg("--heartbeat-interval=500");
    let etcd = etcd.arg("--election-timeout=5000").start().await.unwrap();
    let mut by_hand = client(&etcd).await;
    by_hand
        .put("/gRPC/greeter/1", "127.0.0.1:1", None)
        .await
        .unwrap();
    // A watch may be served by a member that lags behind the member that served the list, which must not cause another list. With five
    // watches, this case is likely. Resolvers of one registry would share a watch.
    let mut resolvers = Vec::new();
    for _ in 0..5 {
        let registry = Registry::connect(etcd.endpoints()).await.unwrap();
        resolvers.push(registry.resolver("greeter").start());
    }
    let mut tasks = tokio::task::JoinSet::new();
    let end = Instant::now() + length(6, 120);
    for writer in 0..16 {
        let mut kv = by_hand.kv_client();
        tasks.spawn(async move {
            let mut writes = 0_u32;
            // Sixteen writers, each with one write every 16 ms.
            let mut pace = tokio::time::interval(Duration::from_millis(16));
            // On a slow disk, the writer continues after the end until it has made 32 writes.
            while Instant::now() < end || writes < 32 {
                pace.tick().await;
                let written = kv.put(format!("/other/{writer}"), "x", None).await;
                writes += u32::from(written.is_ok());
            }
            writes
        });
    }
    for resolver in &resolvers {
        knows(resolver, &["127.0.0.1:1"]).await;
    }
    let late = end + Duration::from_secs(60);
    let written = timeout_at(late, tasks.join_all()).await;
    let writes: u32 = written.expect("the writers end in time").iter().sum();
    println!("{writes} writes");
    by_hand
        .put("/gRPC/greeter/2", "127.0.0.1:2", None)
        .await
        .unwrap();
    for resolver in &resolvers {
        knows(resolver, &["127.0.0.1:1", "127.0.0.1:2"]).await;
        let status = resolver.status();
        assert_eq!((status.lists, status.watches), (1, 1));
    }
}

/// A reconciliation compares the keys that the resolver has with those in etcd.
#[tokio::test]
async fn reconciliations_find_no_difference_while_keys_change() {
    let etcd = etcd().await;
    let mut by_hand = client(&etcd).await;
    let resolver = registry(&etcd)
        .await
        .resolver("greeter")
        .reconcile_interval(Some(Duration::from_millis(200)))
        .start();
    resolver.ready().await;
    for round in 0..600 {
        let key = format!("/gRPC/greeter/{}", round % 7);
        if round % 3 == 0 {
            by_hand.delete(key, None).await.unwrap();
        } else {
            let value = format!("127.0.0.1:{}", 1 + round % 100);
            by_hand.put(key, value, None).await.unwrap();
        }
    }
    let compared = resolver.status().reconciliations;
    // A reconciliation during the changes may have found keys whose changes the watch had not delivered yet. Such a difference must be gone
    // at the next reconciliation, so nothing is repaired.
    eventually("ten more reconciliations are made", async || {
        resolver.status().reconciliations >= compared + 10
    })
    .await;
    let listed = list(&by_hand, "/gRPC/greeter/").await;
    assert!(is_what_is_listed(&resolver, &listed));
    let status = resolver.status();
    assert_eq!((status.repaired, status.lists, status.watches), (0, 1, 1));
}

#[tokio::test]
async fn instances_that_refuse_connections_are_kept_and_their_keys_are_read_rarely() {
    let etcd = etcd().await;
    let mut by_hand = client(&etcd).await;
    for batch in 0..10 {
        let puts: Vec<_> = (1..=100)
            .map(|number| {
                let port = batch * 100 + number;
                let key = format!("/gRPC/greeter/{port}");
                etcd_client::TxnOp::put(key, format!("127.0.0.1:{port}"), None)
            })
            .collect();
        by_hand
            .txn(etcd_client::Txn::new().and_then(puts))
            .await
            .unwrap();
    }
    let resolver = registry(&etcd).await.resolver("greeter").start();
    eventually("a thousand instances are known", async || {
        resolver.instances().len() == 1_000
    })
    .await;
    // Reports instances that refuse connections. The resolver then reads their keys.
    let feedback = resolver.feedback();
    feedback.refused(&"127.0.0.1:60000".parse().unwrap());
    let first = resolver.instances()[0].address().clone();
    feedback.refused(&first);
    feedback.refused(&first);
    let read = eventually("the key is read", async || resolver.status().reads > 0);
    // The read follows the report after a random time of up to 2 s.
    read.await;
    let start = Instant::now();
    for instance in resolver.instances() {
        feedback.refused(instance.address());
    }
    eventually("some keys are read", async || resolver.status().reads >= 25).await;
    let elapsed = Instant::now().saturating_duration_since(start);
    assert!(
        elapsed >= Duration::from_secs(2),
        "25 reads within {elapsed:?}"
    );
    let status = resolver.status();
    assert_eq!((status.repaired, status.lists), (0, 1));
    assert_eq!(resolver.instances().len(), 1_000);
    drop(resolver);
    // The feedback handle can be used after the end of the resolver.
    feedback.refused(&first);
}

/// A page of 500 values of 40 KiB exceeds the size limit of a message, so the resolver halves the page.
#[tokio::test]
async fn values_that_do_not_fit_into_one_message_are_listed_in_smaller_pages() {
    let etcd = etcd().await;
    let by_hand = client(&etcd).await;
    let filler = "x".repeat(40 << 10);
    for batch in 0..20 {
        let puts: Vec<_> = (1..=30)
            .map(|number| {
                let port = batch * 30 + number;
                let key = format!("/gRPC/greeter/{port}");
                let value =
                    format!(r#"{{"Addr":"127.0.0.1:{port}","Metadata":{{"x":"{filler}"}}}}"#);
                etcd_client::TxnOp::put(key, value, None)
            })
            .collect();
        let puts = etcd_client::Txn::new().and_then(puts);
        by_hand.kv_client().txn(puts).await.unwrap();
    }
    let resolver = registry(&etcd).await.resolver("greeter").start();
    // In a debug build, a page of 10 MB may take longer than its timeout, so this bound is long.
    let bound = Duration::from_secs(60);
    support::within(bound, "all instances are known", async || {
        resolver.instances().len() == 600
    })
    .await;
    let status = resolver.status();
    assert_eq!((status.lists, status.rejected_values), (1, 0), "{status:?}");
}

#[tokio::test]
async fn a_resolver_that_starts_before_etcd_waits_for_it() {
    let mut etcd = etcd().await;
    let registry = registry(&etcd).await;
    client(&etcd)
        .await
        .put("/gRPC/greeter/1", "127.0.0.1:1", None)
        .await
        .unwrap();
    etcd.kill(0).await.unwrap();
    let resolver = registry.resolver("greeter").start();
    eventually("the status contains the error", async || {
        resolver.status().last_error.is_some()
    })
    .await;
    assert_eq!(resolver.status().state, ResolverState::Unknown);
    etcd.restart(0).await.unwrap();
    knows(&resolver, &["127.0.0.1:1"]).await;
}

/// Puts instances with these numbers, each under its own lease.
async fn put_leased(by_hand: &mut etcd_client::Client, numbers: std::ops::RangeInclusive<u16>) {
    for number in numbers {
        let lease = by_hand.lease_grant(600, None).await.unwrap().id();
        let options = PutOptions::new().with_lease(lease);
        let (key, value) = (
            format!("/gRPC/greeter/{number}"),
            format!("127.0.0.1:{number}"),
        );
        by_hand.put(key, value, Some(options)).await.unwrap();
    }
}

#[tokio::test]
async fn a_wiped_etcd_leaves_no_stale_instance() {
    for later_writes in [0, 50] {
        let mut etcd = etcd().await;
        let mut by_hand = client(&etcd).await;
        put_leased(&mut by_hand, 1..=3).await;
        let proxy = Proxy::start("127.0.0.1:0", etcd.endpoint(0).unwrap()).await;
        let registry = Registry::connect([proxy.address.to_string()])
            .await
            .unwrap();
        let resolver = registry.resolver("greeter").start();
        knows(&resolver, &["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"]).await;
        proxy.cut();
        etcd.kill(0).await.unwrap();
        etcd.wipe(0).await.unwrap();
        etcd.restart(0).await.unwrap();
        // The keys of the second and third instance return with the same revisions as before. The key of the first never returns.
        let mut by_hand = client(&etcd).await;
        by_hand.put("/other", "", None).await.unwrap();
        put_leased(&mut by_hand, 2..=3).await;
        for _ in 0..later_writes {
            by_hand.put("/other", "", None).await.unwrap();
        }
        proxy.heal();
        knows(&resolver, &["127.0.0.1:2", "127.0.0.1:3"]).await;
    }
}

#[tokio::test]
async fn changes_missed_across_a_disconnect_and_a_compaction_are_found() {
    let etcd = etcd().await;
    let by_hand = client(&etcd).await;
    let proxy = Proxy::start("127.0.0.1:0", etcd.endpoint(0).unwrap()).await;
    let registry = Registry::connect([proxy.address.to_string()])
        .await
        .unwrap();
    let resolver = registry.resolver("greeter").start();
    resolver.ready().await;
    for compact in [false, true] {
        let lists = resolver.status().lists;
        let host = if compact { "127.0.0.2" } else { "127.0.0.1" };
        proxy.cut();
        let mut revision = 0;
        for round in 0..60 {
            let puts: Vec<_> = (0..50)
                .map(|number| {
                    let key = format!("/gRPC/greeter/{number}");
                    if (number + round) % 3 == 0 {
                        etcd_client::TxnOp::delete(key, None)
                    } else {
                        etcd_client::TxnOp::put(
                            key,
                            format!("{host}:{}", 1000 + number * 100 + round),
                            None,
                        )
                    }
                })
                .collect();
            let response = by_hand
                .kv_client()
                .txn(etcd_client::Txn::new().and_then(puts))
                .await
                .unwrap();
            revision = response.header().unwrap().revision();
        }
        if compact {
            by_hand.kv_client().compact(revision, None).await.unwrap();
        }
        proxy.heal();
        let listed = list(&by_hand, "/gRPC/greeter/").await;
        let expected: Vec<_> = listed.iter().map(|(_, value, _)| value.as_str()).collect();
        knows(&resolver, &expected).await;
        if compact {
            assert!(
                resolver.status().lists > lists,
                "a compaction must cause a list"
            );
        }
    }
}

#[tokio::test]
async fn the_resolver_moves_to_another_member_if_its_member_dies_or_freezes() {
    let mut etcd = Etcd::start_cluster(3).await.unwrap();
    let registry = Registry::connect(etcd.endpoints()).await.unwrap();
    let resolver = registry.resolver("greeter").start();
    resolver.ready().await;
    let write = async |etcd: &Etcd, down: usize, port: u16| {
        let alive: Vec<_> = (0..3)
            .filter(|member| *member != down)
            .map(|member| etcd.endpoint(member).unwrap())
            .collect();
        // `connect` may fail, because an election may take longer than its retries.
        let mut writer = None;
        eventually("a leader is elected", async || {
            writer = Registry::connect(alive.clone()).await.ok();
            writer.is_some()
        })
        .await;
        let writer = writer.unwrap();
        let registering = writer
            .registration("greeter")
            .address(format!("127.0.0.1:{port}"));
        registering
            .ttl(Duration::from_secs(60))
            .register()
            .await
            .unwrap()
    };
    let mut kept = Vec::new();
    for member in 0..3 {
        etcd.kill(member).await.unwrap();
        kept.push(write(&etcd, member, 100 + u16::try_from(member).unwrap()).await);
        eventually("the change is applied", async || {
            addresses(&resolver).len() == kept.len()
        })
        .await;
        etcd.restart(member).await.unwrap();
    }
    for member in 0..3 {
        etcd.freeze(member).await.unwrap();
        kept.push(write(&etcd, member, 200 + u16::try_from(member).unwrap()).await);
        let start = Instant::now();
        // After 6 s of silence, the client sends a PING to the frozen member. After 3 s without a response, it closes the connection.
        eventually("the change is applied", async || {
            addresses(&resolver).len() == kept.len()
        })
        .await;
        let took = Instant::now().saturating_duration_since(start);
        assert!(took < Duration::from_secs(18), "{took:?}");
        etcd.thaw(member).await.unwrap();
    }
}

/// Returns whether a resolver contains exactly the instances of the good values. The last good value of a key whose value has turned bad is
/// allowed, because the resolver keeps it.
fn is_what_is_listed(resolver: &Resolver, listed: &[(String, String, i64)]) -> bool {
    let (good, bad): (Vec<_>, Vec<_>) = listed
        .iter()
        .partition(|(_, value, _)| value.parse::<Address>().is_ok());
    let mut known = addresses(resolver);
    for instance in resolver.instances() {
        let last_good = bad
            .iter()
            .any(|(key, ..)| key == instance.location().unwrap().key());
        let address = instance.address().as_str();
        if last_good && !good.iter().any(|(_, value, _)| value == address) {
            known.retain(|known| known != address);
        }
    }
    let mut expected: Vec<_> = good.iter().map(|(_, value, _)| value.clone()).collect();
    expected.sort();
    expected.dedup();
    known.sort();
    known == expected
}

/// Ten thousand random puts and deletes, with revoked leases and reset connections.
#[tokio::test]
async fn ten_thousand_random_steps_match_a_list_of_etcd() {
    let seed = std::env::var("TEST_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| fastrand::u64(..));
    println!("TEST_SEED={seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let etcd = etcd().await;
    let by_hand = client(&etcd).await;
    let proxy = Proxy::start("127.0.0.1:0", etcd.endpoint(0).unwrap()).await;
    let registry = Registry::connect([proxy.address.to_string()])
        .await
        .unwrap();
    let resolver = registry.resolver("greeter").start();
    let mut views = Vec::new();
    let mut leases = Vec::new();
    for round in 0..100 {
        if leases.len() < 5 {
            leases.push(
                by_hand
                    .lease_client()
                    .grant(3_600, None)
                    .await
                    .unwrap()
                    .id(),
            );
        }
        let mut steps = tokio::task::JoinSet::new();
        for _ in 0..100 {
            let key = format!("/gRPC/greeter/{}", rng.u8(..100));
            let value = match rng.u8(..10) {
                0 => "garbage".to_owned(),
                _ => format!("127.0.0.1:{}", rng.u16(1..200)),
            };
            let lease = leases[rng.usize(..leases.len())];
            let mut kv = by_hand.kv_client();
            match rng.u8(..10) {
                0..3 => steps.spawn(async move { kv.delete(key, None).await.map(drop) }),
                3 => steps.spawn(async move { kv.put(key, value, None).await.map(drop) }),
                _ => steps.spawn(async move {
                    kv.put(key, value, Some(PutOptions::new().with_lease(lease)))
                        .await
                        .map(drop)
                }),
            };
        }
        // A put may fail because its lease has been revoked.
        let expire = (round % 10 == 9).then(|| leases.swap_remove(rng.usize(..leases.len())));
        if let Some(lease) = expire {
            by_hand.lease_client().revoke(lease).await.unwrap();
        }
        if round % 7 == 3 {
            proxy.reset();
        }
        if round % 25 == 24 {
            views.push(resolver.clone());
        }
        steps.join_all().await;
    }
    eventually("the set equals the list of etcd", async || {
        is_what_is_listed(&resolver, &list(&by_hand, "/gRPC/greeter/").await)
    })
    .await;
    for mut view in views {
        let mut listed = std::collections::BTreeSet::new();
        let all = resolver.instances().len();
        while let Ok(Some(Ok(change))) = timeout(Duration::from_millis(200), view.next()).await {
            match change {
                Change::Insert(address, _) => listed.insert(address.to_string()),
                Change::Remove(address) => listed.remove(address.as_str()),
            };
        }
        assert_eq!(
            listed.len(),
            all,
            "the stream of changes must match the set"
        );
    }
}

#[tokio::test]
async fn resolvers_and_channels_of_one_service_share_one_watch_and_one_set() {
    let etcd = etcd().await;
    let mut by_hand = client(&etcd).await;
    let mut put = async |port: u16| {
        let key = format!("/gRPC/greeter/{port}");
        let address = format!("127.0.0.1:{port}");
        by_hand.put(key, address, None).await.unwrap();
    };
    put(1).await;
    let registry = registry(&etcd).await;
    let before = watchers(&etcd).await;
    let first = registry.resolver("greeter").start();
    let channel = registry.clone().channel("greeter").connect_lazy();
    let others: Vec<_> = (0..10)
        .map(|_| registry.resolver("greeter").start())
        .collect();
    knows(&first, &["127.0.0.1:1"]).await;
    for other in &others {
        knows(other, &["127.0.0.1:1"]).await;
    }
    eventually("the channel knows the instance", async || {
        channel.endpoints().len() == 1
    })
    .await;
    // The set is known from the list; the watch is created after it.
    eventually("one set is watched", async || {
        first.status().watches == 1 && watchers(&etcd).await == before + 1
    })
    .await;
    assert_eq!(
        (others[0].status().lists, others[9].status().watches),
        (1, 1)
    );
    // Each of them receives the changes, also after the first one was dropped.
    drop(first);
    put(2).await;
    for other in &others {
        knows(other, &["127.0.0.1:1", "127.0.0.1:2"]).await;
    }
    eventually("the channel knows both instances", async || {
        channel.endpoints().len() == 2
    })
    .await;
    // Resolvers with different options do not share a set.
    let limited = registry.resolver("greeter").max_keys(1).start();
    let filtered = registry
        .resolver("greeter")
        .filter(|instance| instance.address().port() == Some(2))
        .start();
    knows(&filtered, &["127.0.0.1:2"]).await;
    eventually("one key is over the limit", async || {
        limited.rejected().len() == 1
    })
    .await;
    eventually("three sets are watched", async || {
        watchers(&etcd).await == before + 3
    })
    .await;
    drop((others, limited, filtered, channel));
    eventually("no set is watched", async || {
        watchers(&etcd).await == before
    })
    .await;
    // After the last resolver was dropped, a new one opens a new watch.
    let again = registry.resolver("greeter").start();
    knows(&again, &["127.0.0.1:1", "127.0.0.1:2"]).await;
}

/// A registry may outlive a runtime on which it was used, for example if several tests share it.
#[test]
fn resolvers_on_different_runtimes_share_no_watch() {
    let runtime = || {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap()
    };
    let (one, other) = (runtime(), runtime());
    let etcd = one.block_on(etcd());
    let registry = one.block_on(registry(&etcd));
    let first = one.block_on(async { registry.resolver("greeter").start() });
    let second = other.block_on(async { registry.resolver("greeter").start() });
    one.block_on(first.ready());
    other.block_on(second.ready());
    one.shutdown_timeout(Duration::from_secs(5));
    other.block_on(async {
        let mut by_hand = client(&etcd).await;
        let put = by_hand.put("/gRPC/greeter/1", "127.0.0.1:1", None);
        put.await.unwrap();
        knows(&second, &["127.0.0.1:1"]).await;
    });
    drop(first);
}
