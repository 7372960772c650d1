//! Channels and registries that outlive the runtime on which they were created, and runtimes that run only during a call.

use std::sync::OnceLock;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;
use tonic_etcd::{BalancedChannel, Registry};

use super::support::etcd;
use super::support::greeter::greeter_client::GreeterClient;
use super::support::greeter::with_causes;
use super::support::peer::{Manner, Peer};
use super::{addresses, ms, over, say, support};

fn runtime() -> Runtime {
    Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

/// Asserts that an outcome was returned before its timeout, and that it is a success or an error that names the runtime.
fn served_or_explained<T, E: std::error::Error + 'static>(
    what: &str,
    outcome: Result<Result<T, E>, tokio::time::error::Elapsed>,
) {
    let outcome = outcome.unwrap_or_else(|_| panic!("{what} hangs once its runtime has ended"));
    if let Err(error) = outcome {
        let text = with_causes(&error);
        println!("{what}: {text}");
        assert!(
            text.contains("runtime"),
            "{what}: the error must name the runtime: {text}"
        );
    } else {
        println!("{what}: served");
    }
}

const BOUND: Duration = Duration::from_secs(2);

#[test]
fn a_channel_whose_runtime_has_ended_serves_or_fails_at_once() {
    static CHANNEL: OnceLock<BalancedChannel> = OnceLock::new();
    let servers = runtime();
    let peer = servers.block_on(Peer::good());
    let first = runtime();
    let channel = first.block_on(over(BalancedChannel::builder(), &addresses([&peer])));
    let channel = CHANNEL.get_or_init(|| channel);
    first.block_on(say(channel, ms(1_000))).unwrap();
    drop(first);
    let second = runtime();
    second.block_on(async {
        for call in 0..3 {
            let mut client = GreeterClient::new(channel.clone());
            let outcome = timeout(BOUND, client.say_hello(support::hello())).await;
            served_or_explained(&format!("call {call}"), outcome);
        }
        served_or_explained(
            "wait_until_ready()",
            timeout(BOUND, channel.wait_until_ready()).await,
        );
    });
    let _entered = servers.enter();
    drop(peer);
}

/// The runtime of a channel ends while the channel has no connection and a call waits. The call must end in time.
#[test]
fn a_waiting_call_fails_when_the_runtime_of_its_channel_ends() {
    let first = runtime();
    let second = runtime();
    // No server ever answers at this address.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let entered = first.enter();
    let builder = BalancedChannel::builder().wait_for_ready(true);
    let channel = builder
        .service("greeter")
        .addresses([address])
        .connect_lazy();
    drop(entered);
    let called = channel.clone();
    let waiting = second.spawn(async move {
        let mut client = GreeterClient::new(called);
        timeout(BOUND + ms(500), client.say_hello(support::hello())).await
    });
    // The call must be waiting when the runtime ends.
    std::thread::sleep(ms(300));
    drop(first);
    let outcome = second.block_on(waiting).unwrap();
    served_or_explained("a waiting call", outcome);
}

#[test]
fn a_registry_whose_first_runtime_has_ended_serves_or_fails_at_once() {
    static REGISTRY: OnceLock<Registry> = OnceLock::new();
    let machine = runtime();
    let etcd = machine.block_on(etcd());
    let peer = machine.block_on(Peer::good());
    let first = runtime();
    let registry = first.block_on(Registry::connect(etcd.endpoints())).unwrap();
    let registry = REGISTRY.get_or_init(|| registry);
    first.block_on(async {
        registry.resolver("greeter").start().ready().await;
    });
    drop(first);
    let second = runtime();
    second.block_on(async {
        let address = peer.address.to_string();
        let registration = registry.registration("greeter").address(address);
        let registered = timeout(ms(5_000), registration.register()).await;
        let kept = registered.as_ref().is_ok_and(Result::is_ok);
        let registration = match registered {
            Ok(Ok(registration)) => Some(registration),
            other => {
                served_or_explained("register()", other);
                None
            }
        };
        let connected = timeout(ms(5_000), registry.channel("greeter").connect()).await;
        if kept && let Ok(Ok(channel)) = &connected {
            say(channel, ms(2_000))
                .await
                .expect("a channel that is connected must serve");
        }
        served_or_explained("channel().connect()", connected);
        if let Some(registration) = registration {
            let ended = timeout(ms(5_000), registration.deregister()).await;
            served_or_explained("deregister()", ended);
        }
    });
    let _entered = machine.enter();
    drop((etcd, peer));
}

/// A library for Python or C uses a channel in this way: the runtime of the library runs only during a call.
#[test]
fn a_server_that_was_restarted_between_two_block_ons_serves_the_second() {
    let machine = runtime();
    let mut peer = machine.block_on(Peer::good());
    let address = peer.address.to_string();
    let caller = Builder::new_current_thread().enable_all().build().unwrap();
    let channel = caller.block_on(over(BalancedChannel::builder(), &addresses([&peer])));
    let mut failed = Vec::new();
    for round in 0..5 {
        caller
            .block_on(say(&channel, ms(2_000)))
            .expect("the first call of a round must succeed");
        peer = machine.block_on(async {
            peer.stopped().await;
            Peer::at(&address, Manner::default()).await
        });
        // The program does other work, and nothing drives the channel.
        std::thread::sleep(ms(100));
        if let Err(status) = caller.block_on(say(&channel, ms(2_000))) {
            failed.push((round, status));
            // This failure must not affect the next round.
            let recovered = caller.block_on(async {
                support::within(ms(5_000), "the server has recovered", async || {
                    say(&channel, ms(500)).await.is_ok()
                })
                .await
            });
            println!("round {round}: recovered after {recovered:?}");
        }
    }
    println!(
        "after {} of 5 restarts, the first call failed",
        failed.len()
    );
    assert!(
        failed.is_empty(),
        "pending events must be processed before a call is sent: {failed:?}"
    );
    let _entered = machine.enter();
    drop(peer);
}
