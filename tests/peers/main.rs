//! Tests with real servers, proxies and a name server: grpc-go, grpc-java, grpcio, grpc-js, nginx, haproxy, Caddy, dnsmasq. `make interop`
//! installs and builds them, and runs these tests. They are not part of `make test`.
#![cfg(feature = "tls")]
#![allow(
    unreachable_pub,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a failed step is a failed test, and no other target uses the modules"
)]

/// Creates one test for each kind of server. Each test runs the given async function of the module, which takes the kind.
macro_rules! for_each_server {
    ($test:ident) => {
        mod $test {
            use crate::servers::Kind;

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn tonic() {
                super::$test(Kind::Tonic).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn grpc_go() {
                super::$test(Kind::Go).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn grpc_java() {
                super::$test(Kind::Java).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn grpcio() {
                super::$test(Kind::Grpcio).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn grpc_js() {
                super::$test(Kind::Js).await;
            }
        }
    };
}

mod ages;
mod answers;
mod cases;
mod client;
mod compression;
mod deadlines;
#[cfg(feature = "dns-srv")]
mod dns;
mod echo;
mod fronts;
mod metadata;
mod negative;
mod pings;
mod process;
mod proto;
mod proxies;
mod raw;
mod server;
mod servers;
mod service;
mod sidecar;
#[path = "../support/mod.rs"]
mod support;
mod tap;

use std::time::Duration;

use support::callers::{Callers, Failed};
use tokio::time::{Instant, sleep, timeout};
use tonic::{Code, Request, Status};
use tonic_etcd::{BalancedChannel, RetryPolicy, channel::ChannelBuilder};

type Client = proto::test_service_client::TestServiceClient<BalancedChannel>;

/// Returns a channel builder with a retry policy. Its backoff is short, to keep the tests quick.
fn retrying() -> ChannelBuilder {
    let policy = RetryPolicy::new([Code::Unavailable])
        .initial_backoff(ms(1))
        .max_backoff(ms(5));
    BalancedChannel::builder().retry(policy)
}

/// Starts callers of the test service.
fn calling<Fut>(
    channel: &BalancedChannel,
    callers: usize,
    call: impl Fn(Client) -> Fut + Clone + Send + 'static,
) -> Callers
where
    Fut: Future<Output = Result<(), Status>> + Send,
{
    let client = Client::new(channel.clone());
    Callers::making(channel, callers, move |_| call(client.clone()))
}

/// Sends one empty unary call with a deadline.
async fn empty(mut client: Client) -> Result<(), Status> {
    let request = support::callers::with_deadline(proto::Empty {});
    client.empty_call(request).await.map(drop)
}

/// Sends one streaming call, reads it to its end and returns the number of responses.
async fn stream(
    mut client: Client,
    request: Request<proto::StreamingOutputCallRequest>,
) -> Result<usize, Status> {
    let read = async {
        let mut responses = client.streaming_output_call(request).await?.into_inner();
        let mut count = 0;
        while responses.message().await?.is_some() {
            count += 1;
        }
        Ok(count)
    };
    timeout(support::SOON, read)
        .await
        .expect("the stream must end")
}

/// Summarizes failed calls: their number and the first few statuses.
fn shown(failed: &[Failed]) -> String {
    let first: Vec<_> = failed.iter().take(3).map(|call| &call.status).collect();
    format!("{} failed: {first:?}", failed.len())
}

/// Runs callers for a while and fails unless all their calls succeed. Returns the number of calls.
async fn all_well(callers: Callers, period: Duration, what: &str) -> u64 {
    sleep(period).await;
    let (calls, failed) = callers.stopped().await;
    println!("{what}: {calls} calls, {}", shown(&failed));
    assert!(
        failed.is_empty(),
        "{what}: of {calls} calls {}",
        shown(&failed)
    );
    calls
}

fn since(start: Instant) -> Duration {
    Instant::now().saturating_duration_since(start)
}

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}
