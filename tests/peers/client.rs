//! gRPC's interop cases through a channel, against each server.

use std::time::Duration;

use tokio::time::timeout;
use tonic::Status;
use tonic_etcd::BalancedChannel;

use crate::cases::{CASES, Case, large};
use crate::compression;
use crate::servers::{Kind, Options, Server};
use crate::since;
use crate::support::tls::Localhost;
use crate::support::{SOON, all_ready};

/// Runs each case in its own task and fails if a case has failed.
async fn pass(what: &str, channel: &BalancedChannel, cases: &[Case]) {
    let mut failed = Vec::new();
    for (name, case) in cases {
        let running = tokio::spawn(timeout(SOON, case(channel.clone())));
        match running.await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => failed.push(format!("{name}: the case does not end")),
            Err(panic) => failed.push(format!("{name}: {panic}")),
        }
    }
    println!("{what}: {} cases, {} failed", cases.len(), failed.len());
    assert!(!cases.is_empty(), "{what}: at least one case must run");
    assert!(failed.is_empty(), "{what}: {failed:#?}");
}

async fn every_case(kind: Kind, tls: Option<&Localhost>) {
    let options = Options {
        tls,
        ..Options::default()
    };
    let Some(server) = Server::start(kind, options).await else {
        return;
    };
    let mut builder = BalancedChannel::builder();
    if let Some(localhost) = tls {
        builder = builder.tls_config(localhost.trusted());
    }
    let channel = builder.addresses([&server.address]).connect_lazy();
    all_ready(&channel, 1).await;
    let what = format!("{kind:?}, TLS {}", tls.is_some());
    pass(&what, &channel, &CASES).await;

    // The server of grpc-go has no compressor, and rejects a compressed request.
    if kind == Kind::Go {
        let status = compression::refused(channel.clone()).await;
        println!("{what}: a compressed request is rejected: {status:?}");
        return;
    }
    // The other servers list the cases with compressed requests as unsupported, because they accept an uncompressed request that announces
    // compression. `compression::REQUESTS` has these cases without that request, so the cases run although they are listed as unsupported.
    let mut compressed = compression::REQUESTS.to_vec();
    let unsupported = kind.unsupported().await;
    let is_supported = |(name, _): &&Case| !unsupported.iter().any(|other| other == name);
    compressed.extend(compression::RESPONSES_IN_GZIP.iter().filter(is_supported));
    pass(&format!("{what}, gzip"), &channel, &compressed).await;
}

for_each_server!(every_case_passes);
async fn every_case_passes(kind: Kind) {
    every_case(kind, None).await;
}

for_each_server!(every_case_passes_over_tls);
async fn every_case_passes_over_tls(kind: Kind) {
    every_case(kind, Some(&Localhost::new())).await;
}

for_each_server!(a_soak_fails_no_call);
/// The cases `rpc_soak` and `channel_soak`, with a limited number of calls.
async fn a_soak_fails_no_call(kind: Kind) {
    let Some(server) = Server::start(kind, Options::default()).await else {
        return;
    };
    let lazily = || {
        BalancedChannel::builder()
            .addresses([&server.address])
            .connect_lazy()
    };
    let channel = lazily();
    let mut slowest = Duration::ZERO;
    let mut failed: Vec<Status> = Vec::new();
    for call in 0..220 {
        let channel = if call < 200 {
            channel.clone()
        } else {
            lazily()
        };
        let start = tokio::time::Instant::now();
        failed.extend(large(channel).await.err());
        slowest = slowest.max(since(start));
    }
    println!(
        "{kind:?}: 200 calls and 20 channels, {} failed; the slowest call took {slowest:?}",
        failed.len()
    );
    assert!(failed.is_empty(), "{kind:?}: {failed:?}");
}
