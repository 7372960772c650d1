//! A *poisoned call*, which is a call whose metadata are too large for the server or the proxy, beside unrelated callers (*bystanders*).

use tokio::time::sleep;
use tonic::metadata::AsciiMetadataKey;
use tonic::{Code, Request, Status};
use tonic_etcd::{BalancedChannel, channel::ChannelBuilder};

use crate::fronts::{self, Front, Setup};
use crate::proto::Empty;
use crate::servers::{Kind, Options, Server};
use crate::service::{InProcess, router};
use crate::support::all_ready;
use crate::support::callers::Failed;
use crate::support::tls::Localhost;
use crate::tap::Tap;
use crate::{Client, calling, empty, ms, retrying, shown};

const SIZES: [usize; 4] = [12_000, 20_000, 120_000, 1_000_000];
const BYSTANDERS: usize = 16;
/// Limit on the connections that one call may end: the shared connection, and a connection that the call has to itself.
const MOST: usize = 2;

async fn poisoned(channel: &BalancedChannel, bytes: usize) -> Result<(), Status> {
    let mut request = Request::new(Empty {});
    request.set_timeout(ms(3_000));
    // The metadata are split over several values, like cookies and tokens.
    for part in 0..4 {
        let key = format!("x-part-{part}");
        let key = AsciiMetadataKey::from_bytes(key.as_bytes()).unwrap();
        let value = "0123456789abcdef".repeat(bytes / 64);
        request.metadata_mut().insert(key, value.parse().unwrap());
    }
    let mut client = Client::new(channel.clone());
    client.empty_call(request).await.map(drop)
}

/// The sizes of metadata that a server or a proxy accepts, and its reaction to larger metadata.
#[derive(Clone, Copy)]
struct Limits {
    /// Metadata of up to this size must succeed.
    accepts: usize,
    /// Metadata of at least this size must fail. Between the two sizes, both outcomes are valid.
    refuses: usize,
    /// Whether the proxy may answer a bystander with a page of its own. Such a call does not count as a failure of the channel.
    answers_for_itself: bool,
    /// Whether the server never answers a rejected call, so that the call ends with its deadline.
    leaves_without_an_answer: bool,
}

const fn limits(accepts: usize, refuses: usize) -> Limits {
    Limits {
        accepts,
        refuses,
        answers_for_itself: false,
        leaves_without_an_answer: false,
    }
}

async fn poison(
    what: &str,
    builder: ChannelBuilder,
    address: &str,
    limits: &Limits,
) -> Vec<String> {
    let link = Tap::start(address.to_owned()).await;
    let channel = builder.addresses([link.address.to_string()]).connect_lazy();
    all_ready(&channel, 1).await;
    let mut bystanders = calling(&channel, BYSTANDERS, empty);
    let mut wrong = Vec::new();
    sleep(ms(200)).await;
    for bytes in SIZES {
        let before = link.connections();
        let outcome = poisoned(&channel, bytes).await;
        sleep(ms(300)).await;
        let ended = link.connections() - before;
        let what = format!("{what}, {bytes} bytes");
        let failed = bystanders.failed();
        let (proxys, failed): (Vec<_>, Vec<_>) = failed
            .into_iter()
            .partition(|failed| limits.answers_for_itself && is_from_proxy(failed));
        println!(
            "{what}: {ended} connections; bystanders: {}, and {} that the proxy has answered; {outcome:?}",
            shown(&failed),
            proxys.len(),
        );
        if !failed.is_empty() {
            wrong.push(format!("{what}: bystanders: {}", shown(&failed)));
        }
        if ended > MOST {
            wrong.push(format!("{what}: {ended} connections"));
        }
        match outcome {
            Ok(()) if bytes < limits.refuses => {}
            Err(status)
                if bytes > limits.accepts
                    && (status.code() == Code::DeadlineExceeded)
                        == limits.leaves_without_an_answer => {}
            other => wrong.push(format!("{what}: {other:?}")),
        }
    }
    let (calls, failed) = bystanders.stopped().await;
    println!("{what}: {calls} calls of bystanders");
    if !failed.is_empty() {
        wrong.push(format!("{what}: after the large call: {}", shown(&failed)));
    }
    empty(Client::new(channel))
        .await
        .expect("a small call must still be served");
    wrong
}

/// Returns whether a proxy has answered a call with its own page.
fn is_from_proxy(failed: &Failed) -> bool {
    failed.status.message().contains("502")
}

async fn with_and_without_a_policy(
    what: &str,
    address: &str,
    tls: Option<&Localhost>,
    limits: Limits,
) {
    let secured = |builder: ChannelBuilder| match tls {
        Some(localhost) => builder.tls_config(localhost.trusted()),
        None => builder,
    };
    let what = format!("{what}, TLS {}", tls.is_some());
    let builder = secured(BalancedChannel::builder());
    let mut wrong = poison(&what, builder, address, &limits).await;
    let what = format!("{what}, retries");
    wrong.extend(poison(&what, secured(retrying()), address, &limits).await);
    assert!(wrong.is_empty(), "{wrong:#?}");
}

for_each_server!(metadata_that_a_server_rejects_fail_no_other_call);
async fn metadata_that_a_server_rejects_fail_no_other_call(kind: Kind) {
    let localhost = Localhost::new();
    for tls in [None, Some(&localhost)] {
        refused_by(kind, tls).await;
    }
}

async fn refused_by(kind: Kind, tls: Option<&Localhost>) {
    let options = Options {
        tls,
        ..Options::default()
    };
    let Some(server) = Server::start(kind, options).await else {
        return;
    };
    let limits = match kind {
        Kind::Tonic => limits(12_000, 20_000),
        Kind::Go => limits(1_000_000, usize::MAX),
        Kind::Java => limits(0, 12_000),
        // Up to 16 KiB, grpcio rejects metadata at random.
        Kind::Grpcio => limits(0, 20_000),
        // grpc-js limits each value. Above the limit it sends a GOAWAY, keeps the connection open, and never answers the call.
        Kind::Js => Limits {
            leaves_without_an_answer: true,
            ..limits(120_000, 1_000_000)
        },
    };
    with_and_without_a_policy(&format!("{kind:?}"), &server.address, tls, limits).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metadata_beyond_8_kib_that_grpc_go_rejects_fail_no_other_call() {
    let options = Options {
        max_metadata: Some(8_192),
        ..Options::default()
    };
    let Some(server) = Server::start(Kind::Go, options).await else {
        return;
    };
    with_and_without_a_policy("grpc-go, 8 KiB", &server.address, None, limits(0, 12_000)).await;
}

/// Sends metadata that are rejected by a proxy, or by the tonic server behind it.
async fn through(kind: fronts::Kind, limits: Limits) {
    let server = InProcess::start(router(Options::default())).await;
    let localhost = Localhost::new();
    for tls in [None, Some(&localhost)] {
        let Some(front) = Front::start(Setup::of(kind), &[server.address], tls).await else {
            return;
        };
        with_and_without_a_policy(&format!("{kind:?}"), &front.address(), tls, limits).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metadata_that_nginx_rejects_fail_no_other_call() {
    through(fronts::Kind::Nginx, limits(0, 120_000)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metadata_that_haproxy_rejects_fail_no_other_call() {
    through(fronts::Kind::Haproxy, limits(0, 120_000)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metadata_that_caddy_rejects_fail_no_other_call() {
    let limits = Limits {
        answers_for_itself: true,
        ..limits(0, 120_000)
    };
    through(fronts::Kind::Caddy, limits).await;
}
