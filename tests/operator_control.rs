//! Operators pause, resume and weight servers through control keys in etcd.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod support;

use support::callers::Callers;
use support::roles::{protect, user};
use support::{Registered, SOON, World, all_ready, client, etcd, eventually, list};
use tokio::time::timeout;
use tonic_etcd::registration::{RegistrationBuilder, RegistrationHandle, RegistrationState};

const PREFIX: &str = "/gRPC.control/";

fn control_key(address: &str) -> String {
    format!("{PREFIX}greeter/instances/{address}")
}

fn controlled(world: &World) -> RegistrationBuilder {
    world.registration().operator_control(PREFIX)
}

/// An operator with a plain etcd client.
struct Operator(etcd_client::Client);

impl Operator {
    async fn put(&self, address: &str, value: &str) -> i64 {
        let mut kv = self.0.kv_client();
        let put = kv.put(control_key(address), value, None).await;
        let header = put.unwrap().take_header().unwrap();
        header.revision()
    }

    async fn delete(&self, address: &str) {
        let mut kv = self.0.kv_client();
        kv.delete(control_key(address), None).await.unwrap();
    }

    /// Returns the status keys and their values.
    async fn status(&self) -> Vec<(String, String)> {
        let listed = list(&self.0, &format!("{PREFIX}greeter/status/")).await;
        let pairs = listed.into_iter().map(|(key, value, _)| (key, value));
        pairs.collect()
    }

    /// Waits until the server reports this state for the value with this revision.
    async fn reports(&self, address: &str, state: &str, applied: i64) {
        let key = format!("{PREFIX}greeter/status/{address}");
        let state = format!(r#""state":"{state}""#);
        let applied = format!(r#""applied":{applied}"#);
        let what = format!("{key} reports {state} for {applied}");
        eventually(&what, async || {
            let status = self.status().await;
            let mut own = status.iter().filter(|(reported, _)| *reported == key);
            own.any(|(_, value)| value.contains(&state) && value.contains(&applied))
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_are_drained_and_resumed_by_an_operator_without_a_failed_call() {
    let world = World::new().await;
    let operator = Operator(client(&world.etcd).await);
    let mut servers = Vec::new();
    for name in ["alpha", "beta", "gamma"] {
        servers.push(Registered::start(name, "127.0.0.1:0", controlled(&world)));
    }
    world.counts(3).await;
    let channel = world.registry.channel("greeter").connect_lazy();
    all_ready(&channel, 3).await;
    let callers = Callers::start(&channel, 8);
    for address in support::addresses(&world.resolver) {
        let draining = operator.put(&address, r#"{"state":"draining"}"#).await;
        world.counts(2).await;
        assert!(!support::addresses(&world.resolver).contains(&address));
        // The channel closes its connection after the last call.
        operator.reports(&address, "paused", draining).await;
        let serving = operator.put(&address, r#"{"state":"serving"}"#).await;
        operator.reports(&address, "serving", serving).await;
        world.counts(3).await;
        all_ready(&channel, 3).await;
    }
    callers.none_failed().await;
    for server in servers {
        server.stopped().await.unwrap();
    }
    eventually("no status outlives its server", async || {
        operator.status().await.is_empty()
    })
    .await;
}

/// Otherwise, clients would call a server that is out of service, and its key would remain for ever after its end.
#[tokio::test]
async fn a_key_that_is_written_by_hand_neither_returns_a_drained_server_nor_outlives_it() {
    let world = World::new().await;
    let operator = Operator(client(&world.etcd).await);
    let (server, address) = world.start(controlled(&world)).await;
    let draining = operator.put(&address, r#"{"state":"draining"}"#).await;
    operator.reports(&address, "paused", draining).await;
    let key = format!("/gRPC/greeter/{address}");
    let value = format!(r#"{{"Op":0,"Addr":"{address}"}}"#);
    let mut kv = operator.0.kv_client();
    kv.put(key.as_str(), value.as_str(), None).await.unwrap();
    eventually("the key is deleted", async || {
        list(&operator.0, &key).await.is_empty()
    })
    .await;
    operator.reports(&address, "paused", draining).await;
    // The server may end before it has seen the put.
    kv.put(key.as_str(), value.as_str(), None).await.unwrap();
    server.stopped().await.unwrap();
    assert_eq!(list(&operator.0, &key).await, []);
}

#[tokio::test]
async fn a_weight_is_replaced_a_bad_value_is_reported_and_a_deletion_restores_the_options() {
    let world = World::new().await;
    let operator = Operator(client(&world.etcd).await);
    let (server, address) = world.start(controlled(&world).weight(3)).await;
    let weighs = async |weight: u32| {
        eventually(&format!("the weight is {weight}"), async || {
            let instances = world.resolver.instances();
            instances.len() == 1 && instances[0].weight() == weight
        })
        .await;
    };
    weighs(3).await;
    let weighted = operator.put(&address, r#"{"weight":7}"#).await;
    weighs(7).await;
    operator.reports(&address, "serving", weighted).await;
    let bad = operator.put(&address, r#"{"wieght":9}"#).await;
    operator.reports(&address, "serving", bad).await;
    let status = operator.status().await;
    assert!(status[0].1.contains("unknown field `wieght`"), "{status:?}");
    weighs(7).await;
    operator.delete(&address).await;
    weighs(3).await;
    eventually("the status is removed", async || {
        operator.status().await.is_empty()
    })
    .await;
    server.stopped().await.unwrap();
}

#[tokio::test]
async fn a_restarted_server_obeys_only_a_sticky_value() {
    let world = World::new().await;
    let operator = Operator(client(&world.etcd).await);
    let (server, address) = world.start(controlled(&world)).await;
    let paused = operator.put(&address, r#"{"state":"paused"}"#).await;
    operator.reports(&address, "paused", paused).await;
    server.stopped().await.unwrap();
    let server = Registered::start("alpha", &address, controlled(&world));
    world.counts(1).await;
    let sticky = operator
        .put(&address, r#"{"state":"paused","sticky":true}"#)
        .await;
    operator.reports(&address, "paused", sticky).await;
    server.stopped().await.unwrap();

    // The key of the server is never written.
    let registration = controlled(&world);
    let mut states = registration.watch_state();
    let server = Registered::start("alpha", &address, registration);
    operator.reports(&address, "paused", sticky).await;
    assert!(matches!(
        *states.borrow_and_update(),
        RegistrationState::Paused
    ));
    let instance = format!("/gRPC/greeter/{address}");
    assert_eq!(list(&operator.0, &instance).await, []);
    operator.delete(&address).await;
    world.counts(1).await;
    server.stopped().await.unwrap();
}

/// Starts a server, and pauses it as the program can.
async fn paused_by_the_program(world: &World) -> (Registered, RegistrationHandle, String) {
    let registration = controlled(world);
    let handle = registration.handle();
    let (server, address) = world.start(registration).await;
    handle.pause().await.unwrap();
    (server, handle, address)
}

/// A pause by the application is not ended by an operator who changes only the weight.
#[tokio::test]
async fn a_pause_by_the_application_remains_while_an_operator_changes_the_weight() {
    let world = World::new().await;
    let operator = Operator(client(&world.etcd).await);
    let (server, handle, address) = paused_by_the_program(&world).await;
    let weighted = operator.put(&address, r#"{"weight":7}"#).await;
    operator.reports(&address, "serving", weighted).await;
    assert_eq!(list(&operator.0, "/gRPC/greeter/").await, []);
    handle.resume().await.unwrap();
    eventually("the server has the weight of the operator", async || {
        let instances = world.resolver.instances();
        instances.len() == 1 && instances[0].weight() == 7
    })
    .await;
    server.stopped().await.unwrap();
}

/// The server is registered only while neither the program nor an operator pauses it.
#[tokio::test]
async fn the_pauses_of_the_program_and_of_an_operator_do_not_end_each_other() {
    let world = World::new().await;
    let operator = Operator(client(&world.etcd).await);
    let (server, handle, address) = paused_by_the_program(&world).await;
    let draining = operator.put(&address, r#"{"state":"draining"}"#).await;
    operator.reports(&address, "paused", draining).await;
    let serving = operator.put(&address, r#"{"state":"serving"}"#).await;
    operator.reports(&address, "serving", serving).await;
    assert_eq!(list(&operator.0, "/gRPC/greeter/").await, []);
    handle.resume().await.unwrap();
    world.counts(1).await;
    let draining = operator.put(&address, r#"{"state":"draining"}"#).await;
    operator.reports(&address, "paused", draining).await;
    handle.resume().await.unwrap();
    assert_eq!(list(&operator.0, "/gRPC/greeter/").await, []);
    operator.delete(&address).await;
    world.counts(1).await;
    server.stopped().await.unwrap();
}

/// The roles of earlier versions have no permission for control keys.
#[tokio::test]
async fn a_server_without_the_permission_for_control_keys_is_registered() {
    let etcd = etcd().await;
    protect(&etcd).await;
    let registry = user(&etcd, "writer").await.unwrap();
    let registration = registry
        .registration("greeter")
        .address("127.0.0.1:80")
        .operator_control(PREFIX);
    let registered = timeout(SOON, registration.register()).await.unwrap();
    let registration = registered.unwrap();
    registration.set_weight(2).await.unwrap();
    registration.deregister().await.unwrap();
}

#[tokio::test]
async fn an_unusable_control_prefix_is_rejected() {
    let world = World::new().await;
    let error = async |registration: RegistrationBuilder| {
        let outcome = registration.address("127.0.0.1:80").register().await;
        outcome.unwrap_err().to_string()
    };
    let registry = &world.registry;
    for prefix in ["", "/gRPC", "/gRPC/"] {
        let error = error(registry.registration("greeter").operator_control(prefix)).await;
        assert!(error.contains("the control prefix"), "{error}");
    }
    let exact = registry
        .registration_at("/exact/key")
        .operator_control(PREFIX);
    let error = error(exact).await;
    assert!(error.contains("exact key"), "{error}");
}
