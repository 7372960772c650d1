//! The health service of a registered server.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod support;

use std::time::Duration;

use support::{Registered, SOON, World, eventually};
use tokio::time::timeout;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use tonic_etcd::registration::ServerState;
use tonic_health::ServingStatus;
use tonic_health::pb::health_check_response::ServingStatus as Wire;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};
use tonic_health::server::HealthReporter;

async fn connect(address: &str) -> HealthClient<Channel> {
    let endpoint = Channel::from_shared(format!("http://{address}")).unwrap();
    HealthClient::new(endpoint.connect().await.unwrap())
}

fn of(service: &str) -> HealthCheckRequest {
    let service = service.to_owned();
    HealthCheckRequest { service }
}

async fn check(client: &mut HealthClient<Channel>, service: &str) -> Result<Wire, Status> {
    let response = client.check(of(service)).await?;
    Ok(response.into_inner().status())
}

/// Returns the next status of a watch, or `None` at its end.
async fn next(watch: &mut Streaming<HealthCheckResponse>) -> Option<Wire> {
    let next = timeout(SOON, watch.message()).await.unwrap().unwrap();
    next.map(|response| response.status())
}

async fn not_found(client: &mut HealthClient<Channel>, service: &str) {
    let status = check(client, service).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
}

#[tokio::test]
async fn watchers_receive_not_serving_before_deregistration_and_do_not_delay_the_shutdown() {
    let mut world = World::new().await;
    let reporter = HealthReporter::new();
    let serving = ServingStatus::Serving;
    reporter.set_service_status("other", serving).await;
    let registration = world
        .registration()
        .deregister_timeout(Duration::from_secs(600))
        .drain_timeout(Duration::from_secs(600))
        .health_reporter(reporter.clone());
    let states = registration.watch_server_state();
    let (mut server, address) = world.start(registration).await;
    let mut client = connect(&address).await;
    let mut watches = Vec::new();
    for service in ["", "other"] {
        let mut watch = client.watch(of(service)).await.unwrap().into_inner();
        assert_eq!(next(&mut watch).await, Some(Wire::Serving));
        watches.push(watch);
    }
    // While etcd is frozen, no key can be deleted, so the server stays in `LameDuck`.
    world.etcd.freeze(0).await.unwrap();
    server.stop();
    for watch in &mut watches {
        assert_eq!(next(watch).await, Some(Wire::NotServing));
    }
    for client in [&mut client, &mut connect(&address).await] {
        assert_eq!(check(client, "").await.unwrap(), Wire::NotServing);
        // After the stop, the reporter has no effect.
        reporter.set_service_status("other", serving).await;
        assert_eq!(check(client, "other").await.unwrap(), Wire::NotServing);
        not_found(client, "unknown").await;
    }
    assert_eq!(*states.borrow(), ServerState::LameDuck);
    world.etcd.thaw(0).await.unwrap();
    for watch in &mut watches {
        assert_eq!(next(watch).await, None, "the watch must end now");
    }
    server.stopped().await.unwrap();
    assert!(matches!(
        *states.borrow(),
        ServerState::Stopped {
            connections_cut: 0,
            ..
        }
    ));
    assert_eq!(world.keys().await, 0);
}

#[tokio::test]
async fn a_watcher_receives_not_serving_even_if_all_phases_are_instant() {
    let mut world = World::new().await;
    let registration = world
        .registration()
        .grace_period(Duration::ZERO)
        .deregister_timeout(Duration::ZERO)
        .health();
    let (server, address) = world.start(registration).await;
    let mut client = connect(&address).await;
    let mut watch = client.watch(of("greeter")).await.unwrap().into_inner();
    assert_eq!(next(&mut watch).await, Some(Wire::Serving));
    world.etcd.freeze(0).await.unwrap();
    server.stopped().await.unwrap();
    assert_eq!(next(&mut watch).await, Some(Wire::NotServing));
    assert_eq!(next(&mut watch).await, None);
    world.etcd.thaw(0).await.unwrap();
}

#[tokio::test]
async fn a_server_is_ready_once_it_is_registered_and_not_while_it_is_paused() {
    let mut world = World::new().await;
    // Nothing is registered while etcd is frozen, but the server serves.
    world.etcd.freeze(0).await.unwrap();
    let registration = world
        .registration()
        .ttl(Duration::from_secs(2))
        .startup_timeout(Duration::from_secs(60))
        .health();
    let (handle, states) = (registration.handle(), registration.watch_state());
    let server = Registered::start("alpha", "127.0.0.1:0", registration);
    let address = handle.address().await.unwrap();
    let mut client = connect(address.as_str()).await;
    let mut watch = client.watch(of("readiness")).await.unwrap().into_inner();
    assert_eq!(next(&mut watch).await, Some(Wire::NotServing));
    let unready = check(&mut client, "readiness").await.unwrap();
    assert_eq!(unready, Wire::NotServing);
    for alive in ["", "greeter"] {
        assert_eq!(check(&mut client, alive).await.unwrap(), Wire::Serving);
    }
    world.etcd.thaw(0).await.unwrap();
    assert_eq!(next(&mut watch).await, Some(Wire::Serving));
    assert_eq!(
        check(&mut client, "readiness").await.unwrap(),
        Wire::Serving
    );

    handle.pause().await.unwrap();
    assert_eq!(next(&mut watch).await, Some(Wire::NotServing));
    assert_eq!(check(&mut client, "").await.unwrap(), Wire::Serving);
    handle.resume().await.unwrap();
    assert_eq!(next(&mut watch).await, Some(Wire::Serving));

    // An outage of etcd that is longer than the TTL does not make the server unready: clients still use it.
    world.etcd.freeze(0).await.unwrap();
    eventually("the registration is lost", async || {
        !states.borrow().is_registered()
    })
    .await;
    assert_eq!(
        check(&mut client, "readiness").await.unwrap(),
        Wire::Serving
    );
    world.etcd.thaw(0).await.unwrap();
    server.stopped().await.unwrap();
    assert_eq!(next(&mut watch).await, Some(Wire::NotServing));
    assert_eq!(next(&mut watch).await, None);
}

#[tokio::test]
async fn a_reporter_can_make_a_registered_server_unready() {
    let world = World::new().await;
    let reporter = HealthReporter::new();
    let not_serving = ServingStatus::NotServing;
    reporter.set_service_status("readiness", not_serving).await;
    let registration = world.registration().health_reporter(reporter.clone());
    let (server, address) = world.start(registration).await;
    let mut client = connect(&address).await;
    let mut watch = client.watch(of("readiness")).await.unwrap().into_inner();
    assert_eq!(next(&mut watch).await, Some(Wire::NotServing));
    let serving = ServingStatus::Serving;
    reporter.set_service_status("readiness", serving).await;
    assert_eq!(next(&mut watch).await, Some(Wire::Serving));
    server.stopped().await.unwrap();
}

#[tokio::test]
async fn the_health_service_is_served_only_if_enabled() {
    let world = World::new().await;
    let (server, address) = world.start(world.registration()).await;
    let error = check(&mut connect(&address).await, "").await.unwrap_err();
    assert_eq!(error.code(), Code::Unimplemented);
    server.stopped().await.unwrap();
    world.counts(0).await;
    // The health service also reports the status of an additional service, under its name.
    let registration = world.registration().health().additional_service("further");
    let (server, address) = world.start(registration).await;
    let mut client = connect(&address).await;
    for service in ["", "greeter", "further"] {
        assert_eq!(check(&mut client, service).await.unwrap(), Wire::Serving);
    }
    not_found(&mut client, "unknown").await;
    server.stopped().await.unwrap();
    // A registration at an exact key has no service name whose status could be reported. The server must start nevertheless.
    let registration = world.registry.registration_at("/greeter/1").health();
    let mut states = registration.watch_server_state();
    let server = Registered::start("alpha", "127.0.0.1:0", registration);
    let serving = states.wait_for(|state| *state == ServerState::Serving);
    drop(timeout(SOON, serving).await.unwrap().unwrap());
    server.stopped().await.unwrap();
}

#[tokio::test]
async fn the_status_of_a_health_reporter_is_served() {
    let world = World::new().await;
    let reporter = HealthReporter::new();
    let registration = world.registration().health_reporter(reporter.clone());
    let (server, address) = world.start(registration).await;
    let mut client = connect(&address).await;
    not_found(&mut client, "greeter").await;
    let (serving, not_serving) = (ServingStatus::Serving, ServingStatus::NotServing);
    reporter.set_service_status("greeter", serving).await;
    let mut watch = client.watch(of("greeter")).await.unwrap().into_inner();
    assert_eq!(next(&mut watch).await, Some(Wire::Serving));
    reporter.set_service_status("greeter", not_serving).await;
    assert_eq!(next(&mut watch).await, Some(Wire::NotServing));
    reporter.set_service_status("greeter", serving).await;
    assert_eq!(next(&mut watch).await, Some(Wire::Serving));
    reporter.clone().clear_service_status("greeter").await;
    assert_eq!(next(&mut watch).await, None, "the watch must end");
    server.stopped().await.unwrap();
}
