//! Tests of the reconciliation of many services with one request.

use std::time::Duration;

use tokio::task::JoinSet;

use super::fake::Fake;
use super::rules::until;
use crate::etcd::Etcd;
use crate::keyspace::{Key, Keyspace, ListRequest, Page, Range, Revision};
use crate::resolver::ResolverBuilder;
use tonic_balance::AddressPolicy;

fn changes_of(service: &str) -> ListRequest {
    ListRequest {
        range: Range::prefix(&format!("/gRPC/{service}/")),
        limit: 500,
        revision: Revision::ZERO,
        written_after: Revision::new(1),
        keys_only: true,
    }
}

/// Requests the changes of all services at once, and returns the names of the changed keys of each service.
async fn reconcile(etcd: &Etcd, services: &[String]) -> Vec<Vec<Key>> {
    let mut requests = JoinSet::new();
    for (index, service) in services.iter().enumerate() {
        let (etcd, request) = (etcd.clone(), changes_of(service));
        requests.spawn(async move { (index, etcd.reconcile(&request).await) });
    }
    let mut pages = requests.join_all().await;
    pages.sort_by_key(|(index, _)| *index);
    let names = |page: Page| page.kvs.into_iter().map(|kv| kv.key).collect();
    let pages = pages.into_iter().map(|(_, page)| page.expect("a page"));
    pages.map(names).collect()
}

fn put(fake: &Fake, key: &str) {
    let key = key.as_bytes().to_vec();
    let value = Some((br#"{"Addr":"10.0.0.1:1"}"#.to_vec(), 0));
    fake.store().apply(vec![(key, value)]);
    fake.tell();
}

fn services(count: usize) -> Vec<String> {
    (0..count)
        .map(|number| format!("service{number}"))
        .collect()
}

#[tokio::test(start_paused = true)]
async fn each_of_many_services_gets_its_own_keys_from_a_shared_request() {
    let fake = Fake::new(1, 0);
    let services = services(150);
    for service in &services {
        put(&fake, &format!("/gRPC/{service}/a"));
    }
    let found = reconcile(&fake.etcd(2), &services).await;
    for (service, keys) in services.iter().zip(found) {
        assert_eq!(keys, [Key::from(&*format!("/gRPC/{service}/a"))]);
    }
    let counts = fake.script().counts.clone();
    assert_eq!(
        counts.get("txn"),
        Some(&2),
        "there must be one request for each hundred services: {counts:?}"
    );
    assert_eq!(counts.get("list"), None, "{counts:?}");
}

#[tokio::test(start_paused = true)]
async fn a_single_service_is_reconciled_without_a_transaction() {
    let fake = Fake::new(1, 0);
    put(&fake, "/gRPC/service0/a");
    reconcile(&fake.etcd(2), &services(1)).await;
    assert_eq!(fake.script().counts.get("txn"), None);
}

/// Several runtimes can use one registry. A runtime that ends while it collects a batch must not block the requests of the others.
#[test]
fn a_runtime_that_ends_while_it_collects_a_batch_blocks_no_other_runtime() {
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .expect("a runtime")
    };
    let (first, second) = (runtime(), runtime());
    let etcd = first.block_on(async { Fake::new(1, 0).etcd(1) });
    let collects = etcd.clone();
    first.block_on(async move {
        tokio::spawn(async move { collects.reconcile(&changes_of("a")).await });
        tokio::task::yield_now().await;
        tokio::task::yield_now().await;
    });
    let joins = second.spawn(async move { etcd.reconcile(&changes_of("b")).await });
    second.block_on(tokio::task::yield_now());
    drop(first);
    let answer =
        second.block_on(async { tokio::time::timeout(Duration::from_secs(60), joins).await });
    answer
        .expect("the request must not wait for a runtime that has ended")
        .expect("the task must not panic")
        .expect("the request must succeed without the batch");
}

/// At rest, a client sends only reconciliation requests and probes. A probe is a request that shows whether the watch stream still works.
#[tokio::test(start_paused = true)]
async fn a_process_with_many_services_sends_few_requests_at_rest() {
    let fake = Fake::new(1, 0);
    let etcd = fake.etcd(2);
    let keyspace = Keyspace::new("/gRPC/");
    let resolvers: Vec<_> = services(300)
        .iter()
        .map(|service| {
            put(&fake, &format!("/gRPC/{service}/a"));
            let policy = AddressPolicy::default();
            ResolverBuilder::service(etcd.clone(), &keyspace, service, policy).start()
        })
        .collect();
    let all_known = || {
        resolvers
            .iter()
            .all(|resolver| resolver.instances().len() == 1)
    };
    until(Duration::from_secs(10), "all services are known", all_known).await;
    let sum = || -> u64 { fake.script().counts.values().copied().sum() };
    tokio::time::sleep(Duration::from_secs(300)).await;
    let before = sum();
    tokio::time::sleep(Duration::from_secs(1_800)).await;
    let (sent, reconciled) = (
        sum() - before,
        resolvers
            .iter()
            .map(|resolver| resolver.status().reconciliations)
            .min(),
    );
    assert!(reconciled >= Some(6), "{reconciled:?}");
    // In half an hour, there are 2 400 reconciliations: one in 225 s for each of the 300 services. Every sixteenth reconciliation of a
    // service is a separate list request, which makes 150. The other reconciliations share requests.
    assert!(sent < 450, "{sent} requests in half an hour");
}

/// etcd rejects a transaction if the user may not read one of its keys.
#[cfg(feature = "testing")]
#[tokio::test]
async fn a_prefix_without_read_permission_affects_no_other_service() {
    use crate::error::EtcdErrorKind;
    use crate::etcd::{Config, Credentials};
    use crate::testing;
    use etcd_client::{Client, Permission, PermissionType};

    let server = testing::Etcd::start().await.expect("a running etcd");
    let mut root = Client::connect(server.endpoints(), None)
        .await
        .expect("a connection");
    root.put("/gRPC/allowed/a", "10.0.0.1:1", None)
        .await
        .expect("a put");
    root.role_add("root").await.expect("a role");
    root.user_add("root", "root", None).await.expect("a user");
    root.user_grant_role("root", "root").await.expect("a grant");
    root.role_add("reader").await.expect("a role");
    let allowed = Permission::new(PermissionType::Read, "/gRPC/allowed/").with_prefix();
    root.role_grant_permission("reader", allowed)
        .await
        .expect("a grant");
    root.user_add("reader", "reader", None)
        .await
        .expect("a user");
    root.user_grant_role("reader", "reader")
        .await
        .expect("a grant");
    root.auth_enable().await.expect("authentication");
    let config = Config {
        endpoints: server.endpoints(),
        credentials: Some(Credentials {
            user: "reader".to_owned(),
            password: "reader".to_owned(),
        }),
        ..Config::default()
    };
    let etcd = Etcd::connect(&config, &Key::from("/gRPC/allowed/"))
        .await
        .expect("a connection");
    let (allowed, denied) = (changes_of("allowed"), changes_of("denied"));
    let (allowed, denied) = tokio::join!(etcd.reconcile(&allowed), etcd.reconcile(&denied));
    assert_eq!(allowed.expect("a page").count, 1);
    assert_eq!(
        denied.expect_err("an error").kind(),
        EtcdErrorKind::PermissionDenied
    );
}
