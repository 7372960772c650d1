//! Sources of endpoints that begin with an error, and stream adapters and filters between a resolver and a channel.

use std::convert::Infallible;
use std::io;

use tokio::time::Instant;
use tokio_stream::StreamExt;
use tonic::Code;
use tonic_etcd::{Address, BalancedChannel, Instance};
use tower::discover::Change;

use super::support::peer::Peer;
use super::support::{etcd, registry, within};
use super::{ms, say};

type Item = io::Result<Change<Address, Instance>>;

fn insert(address: &Address) -> Change<Address, Instance> {
    Change::Insert(address.clone(), Instance::new(address.clone()))
}

fn broken() -> Item {
    Err(io::Error::other("the zoo is closed today"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_error_of_the_source_is_not_an_empty_set() {
    let source = tokio_stream::iter([broken()]).chain(tokio_stream::pending());
    let builder = BalancedChannel::builder()
        .service("greeter")
        .startup_timeout(ms(500));
    let channel = builder.discover(source).connect_lazy();
    let began = Instant::now();
    let error = say(&channel, ms(5_000))
        .await
        .expect_err("a call must fail while no endpoint is known");
    let took = Instant::now().saturating_duration_since(began);
    println!("after {took:?}: {error:?}");
    assert_eq!(error.code(), Code::Unavailable, "{error:?}");
    assert!(
        error.message().contains("the zoo is closed today"),
        "the message must contain the error of the source: {error:?}"
    );
    assert!(
        !error.message().contains("nothing is registered"),
        "a set that is not known yet must not be reported as empty: {error:?}"
    );
    assert!(
        took >= ms(300),
        "the call must wait until the startup timeout: {took:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_recovers_from_its_first_error_serves() {
    let peer = Peer::good().await;
    let address: Address = peer.address.to_string().parse().unwrap();
    let (sender, receiver) = tokio::sync::mpsc::channel(4);
    let source = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let channel = BalancedChannel::builder()
        .service("greeter")
        .discover(source)
        .connect_lazy();
    sender.send(broken()).await.unwrap();
    let called = channel.clone();
    let call = tokio::spawn(async move { say(&called, ms(5_000)).await });
    tokio::time::sleep(ms(200)).await;
    sender.send(Ok(insert(&address))).await.unwrap();
    call.await
        .unwrap()
        .expect("the call must wait for the first endpoint and succeed");
}

/// If a source has ended after an error, the error of the call contains the source's error.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_error_of_a_source_that_has_ended_is_shown() {
    let source = tokio_stream::iter([broken()]);
    let channel = BalancedChannel::builder()
        .service("greeter")
        .discover(source)
        .connect_lazy();
    let error = say(&channel, ms(5_000))
        .await
        .expect_err("a call must fail while no endpoint is known");
    assert!(
        error.message().contains("the zoo is closed today"),
        "{error:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_over_an_adapted_stream_without_endpoints_says_that_the_source_reported_none() {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    let resolver = registry.resolver("greeter").start();
    resolver.ready().await;
    // Behind the adapter, the channel sees only a stream, and cannot detect that the set is complete and empty.
    let filtered = resolver.map(Ok::<_, Infallible>).map(Result::unwrap);
    let builder = BalancedChannel::builder()
        .service("greeter")
        .startup_timeout(ms(1_000));
    let channel = builder.discover(filtered).connect_lazy();
    let error = say(&channel, ms(5_000))
        .await
        .expect_err("a call must fail while nothing is registered");
    println!("{error:?}");
    assert!(
        error
            .message()
            .contains("the source has reported no endpoint"),
        "{error:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_says_that_the_source_reported_no_endpoint_if_a_filter_rejects_all() {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    let peer = Peer::good().await;
    let registration = registry
        .registration("greeter")
        .address(peer.address.to_string())
        .register()
        .await
        .unwrap();
    let resolver = registry.resolver("greeter").start();
    let status = resolver.watch_status();
    let filtered = resolver.filter(|_| false);
    let builder = BalancedChannel::builder()
        .service("greeter")
        .startup_timeout(ms(1_000));
    let channel = builder.discover(filtered).connect_lazy();
    within(ms(5_000), "the registry has responded", async || {
        status.borrow().state == tonic_etcd::resolver::ResolverState::Fresh
    })
    .await;
    let error = say(&channel, ms(5_000))
        .await
        .expect_err("a call must fail if the filter rejects all endpoints");
    assert!(
        error
            .message()
            .contains("the source has reported no endpoint"),
        "{error:?}"
    );
    registration.deregister().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_filter_that_accepts_some_endpoints_uses_them() {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    let (kept, dropped) = (Peer::good().await, Peer::good().await);
    let mut registrations = Vec::new();
    for peer in [&kept, &dropped] {
        let registration = registry
            .registration("greeter")
            .address(peer.address.to_string());
        registrations.push(registration.register().await.unwrap());
    }
    let wanted = kept.address.to_string();
    let filtered = registry
        .resolver("greeter")
        .start()
        .filter(move |change| match change {
            Ok(Change::Insert(address, _) | Change::Remove(address)) => address.as_str() == wanted,
            Err(_) => true,
        });
    let channel = BalancedChannel::builder()
        .service("greeter")
        .discover(filtered)
        .connect_lazy();
    for _ in 0..20 {
        say(&channel, ms(5_000))
            .await
            .expect("the accepted endpoint must serve");
    }
    assert_eq!(
        dropped.executed(),
        0,
        "the rejected endpoint must receive no call"
    );
    for registration in registrations {
        registration.deregister().await.unwrap();
    }
}

/// With the filter of the resolver, the channel detects when the set is complete. With a filter on the stream of changes, it cannot detect
/// this.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_fail_at_once_if_the_filter_of_the_resolver_accepts_no_instance() {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    let (kept, dropped) = (Peer::good().await, Peer::good().await);
    let mut registrations = Vec::new();
    for (peer, version) in [(&kept, "1.2.0"), (&dropped, "1.1.0")] {
        let registration = registry
            .registration("greeter")
            .version(version)
            .address(peer.address.to_string());
        registrations.push(registration.register().await.unwrap());
    }
    let channel = |version: &'static str| {
        let channel = registry.channel("greeter");
        channel.map_source(move |resolver| {
            resolver.filter(move |instance| instance.version() == Some(version))
        })
    };
    let served = channel("1.2.0").connect().await.unwrap();
    assert_eq!(served.endpoints().len(), 1);
    for _ in 0..20 {
        say(&served, ms(5_000))
            .await
            .expect("the accepted endpoint must serve");
    }
    assert_eq!(
        dropped.executed(),
        0,
        "the rejected endpoint must receive no call"
    );
    let none = channel("3.0.0").connect_lazy();
    let began = Instant::now();
    let error = say(&none, ms(5_000))
        .await
        .expect_err("a call must fail if no endpoint is accepted");
    assert_eq!(error.code(), Code::Unavailable);
    assert!(
        error.message().contains("nothing is registered"),
        "{error:?}"
    );
    let took = Instant::now().saturating_duration_since(began);
    assert!(
        took < ms(2_000),
        "the call must not wait for the startup timeout: {took:?}"
    );
    for registration in registrations {
        registration.deregister().await.unwrap();
    }
}
