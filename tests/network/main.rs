//! The network between client and server, and peers that misbehave: effects of proxies, gateways and servers of other implementations on a
//! channel.
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
mod idle;
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
use tonic_etcd::{
    BalancedChannel, RetryPolicy,
    channel::{ChannelBuilder, EndpointStatus},
};

/// Returns a channel over these addresses once all of them are ready.
async fn over(builder: ChannelBuilder, addresses: &[String]) -> BalancedChannel {
    let channel = lazily(builder, addresses);
    all_ready(&channel, addresses.len()).await;
    channel
}

/// Returns a channel over these addresses.
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

/// Returns a retry policy with a short backoff, to keep the tests quick.
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

/// Sends one unary call with a deadline.
async fn say(channel: &BalancedChannel, deadline: Duration) -> Result<(), Status> {
    let mut request = hello();
    request.set_timeout(deadline);
    send(channel, request).await
}

/// Sends one unary call, which must end within [`SOON`].
async fn send(channel: &BalancedChannel, request: Request<HelloRequest>) -> Result<(), Status> {
    let mut client = GreeterClient::new(channel.clone());
    let call = timeout(SOON, client.say_hello(request));
    call.await.expect("the call must end").map(drop)
}

/// Sends one streaming call, reads it to its end and returns the number of replies.
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
    timeout(SOON, read).await.expect("the stream must end")
}

/// Returns the current status of an endpoint.
fn status(channel: &BalancedChannel, address: SocketAddr) -> EndpointStatus {
    let endpoints = channel.endpoints();
    let address = address.to_string();
    let found = endpoints
        .into_iter()
        .find(|endpoint| endpoint.address.as_str() == address);
    found.unwrap()
}

/// Summarizes failed calls: their number and the first few statuses.
fn shown(failed: &[Failed]) -> String {
    let first: Vec<_> = failed.iter().take(3).map(|call| &call.status).collect();
    format!("{} failed: {first:?}", failed.len())
}

/// Runs callers for a while and fails unless all their calls succeed. Returns the number of calls.
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
