//! The network between, and peers that are not as they should be: what proxies, gateways and servers of other makes do to a channel.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a failed step is a failed test"
)]

mod answers;
mod closes;
mod deadlines;
mod doubtful;
mod errors;
mod forgotten;
mod headers;
mod outages;
mod panics;
mod peers;
mod pings;
mod places;
mod poison;
mod race;
mod runtimes;
mod servers;
mod sources;
#[path = "../support/mod.rs"]
mod support;
mod windows;

use std::net::SocketAddr;
use std::time::Duration;

use support::callers::{Callers, Failed};
use support::greeter::HelloRequest;
use support::greeter::greeter_client::GreeterClient;
use support::peer::Peer;
use support::{SOON, all_ready};
use tokio::time::timeout;
use tonic::{Code, Request, Status};
use tonic_etcd::{BalancedChannel, ChannelBuilder, EndpointStatus, RetryPolicy};

/// A channel over these addresses, all of them ready.
async fn over(builder: ChannelBuilder, addresses: &[String]) -> BalancedChannel {
    let channel = lazily(builder, addresses);
    all_ready(&channel, addresses.len()).await;
    channel
}

/// A channel over these addresses.
fn lazily(builder: ChannelBuilder, addresses: &[String]) -> BalancedChannel {
    builder
        .service("greeter")
        .seed(7)
        .addresses(addresses)
        .connect_lazy()
}

fn addresses<'a>(peers: impl IntoIterator<Item = &'a Peer>) -> Vec<String> {
    let address = |peer: &Peer| peer.address.to_string();
    peers.into_iter().map(address).collect()
}

/// A policy that does not keep a test waiting.
fn policy() -> RetryPolicy {
    let (first, max) = (Duration::from_millis(1), Duration::from_millis(5));
    RetryPolicy::new([Code::Unavailable])
        .initial_backoff(first)
        .max_backoff(max)
}

fn retrying() -> ChannelBuilder {
    BalancedChannel::builder().retry(policy())
}

fn hello() -> Request<HelloRequest> {
    Request::new(support::hello())
}

/// One unary call with a deadline.
async fn say(channel: &BalancedChannel, deadline: Duration) -> Result<(), Status> {
    let mut request = hello();
    request.set_timeout(deadline);
    send(channel, request).await
}

/// One unary call, which ends within [`SOON`] whatever happens.
async fn send(channel: &BalancedChannel, request: Request<HelloRequest>) -> Result<(), Status> {
    let mut client = GreeterClient::new(channel.clone());
    let call = timeout(SOON, client.say_hello(request));
    call.await.expect("the call ends").map(drop)
}

/// One streaming call, read to its end: how many replies there were.
async fn stream(
    mut client: GreeterClient<BalancedChannel>,
    request: Request<HelloRequest>,
) -> Result<u32, Status> {
    let read = async {
        let mut replies = client.say_hellos(request).await?.into_inner();
        let mut count = 0;
        while replies.message().await?.is_some() {
            count += 1;
        }
        Ok(count)
    };
    timeout(SOON, read).await.expect("the stream ends")
}

/// How an endpoint is now.
fn status(channel: &BalancedChannel, address: SocketAddr) -> EndpointStatus {
    let endpoints = channel.endpoints();
    let address = address.to_string();
    let found = endpoints
        .into_iter()
        .find(|endpoint| endpoint.address.as_str() == address);
    found.unwrap()
}

/// What is to be read of failed calls: how many, and the first few.
fn shown(failed: &[Failed]) -> String {
    let first: Vec<_> = failed.iter().take(3).map(|call| &call.status).collect();
    format!("{} failed: {first:?}", failed.len())
}

/// Lets callers run for a while, and fails unless all their calls went well. Says how many there were.
async fn all_well(callers: Callers, period: Duration, what: &str) -> u64 {
    tokio::time::sleep(period).await;
    let (calls, failed) = callers.stopped().await;
    println!("{what}: {calls} calls, {}", shown(&failed));
    assert!(
        failed.is_empty(),
        "{what}: of {calls} calls {}",
        shown(&failed)
    );
    calls
}

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}
