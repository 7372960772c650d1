//! Channels over nginx, haproxy and Caddy: graceful closes, idle closes, outages and reloads.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::{Instant, interval, sleep};
use tonic_etcd::{BalancedChannel, channel::ChannelBuilder};

use crate::fronts::{Front, Kind, Setup};
use crate::support::callers::{Callers, with_deadline};
use crate::support::tls::Localhost;
use crate::support::{all_ready, eventually, greeter, hello};
use crate::{all_well, ms, retrying, shown, since};

const NGINX: Setup = Setup::of(Kind::Nginx);
const NGINX_100: Setup = NGINX.extra("keepalive_requests 100;");
const HAPROXY_1S: Setup = Setup::of(Kind::Haproxy).timeout_client("1s");
const HAPROXY_5S: Setup = Setup::of(Kind::Haproxy).timeout_client("5s");
const CADDY: Setup = Setup::of(Kind::Caddy);

const CALLERS: usize = 16;

async fn greeters(count: usize) -> Vec<SocketAddr> {
    let mut addresses = Vec::new();
    for number in 0..count {
        addresses.push(greeter(&format!("greeter {number}")).await.0);
    }
    addresses
}

/// Starts proxies of one kind in front of the same greeters.
async fn fronts(
    setup: Setup,
    proxies: usize,
    servers: usize,
    tls: Option<&Localhost>,
) -> Option<Vec<Front>> {
    let greeters = greeters(servers).await;
    let mut fronts = Vec::new();
    for _ in 0..proxies {
        fronts.push(Front::start(setup, &greeters, tls).await?);
    }
    Some(fronts)
}

fn over(builder: ChannelBuilder, fronts: &[Front]) -> BalancedChannel {
    builder
        .seed(7)
        .addresses(fronts.iter().map(Front::address))
        .connect_lazy()
}

/// Runs callers without a retry policy over different numbers of proxies and servers, and over proxies with TLS.
async fn load(setup: Setup) {
    let localhost = Localhost::new();
    for (proxies, servers, tls) in [
        (1, 1, None),
        (1, 3, None),
        (3, 3, None),
        (3, 3, Some(&localhost)),
    ] {
        let Some(fronts) = fronts(setup, proxies, servers, tls).await else {
            return;
        };
        let mut builder = BalancedChannel::builder();
        if tls.is_some() {
            builder = builder.tls_config(localhost.trusted());
        }
        let channel = over(builder, &fronts);
        all_ready(&channel, proxies).await;
        let tls = tls.is_some();
        let what = format!("{setup:?}, {proxies} proxies, {servers} servers, TLS {tls}");
        all_well(Callers::start(&channel, CALLERS), ms(6_000), &what).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn graceful_closes_of_nginx_fail_no_call() {
    load(NGINX).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nginx_that_closes_after_100_requests_fails_no_call() {
    load(NGINX_100).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn haproxy_with_a_timeout_of_1_s_fails_no_call() {
    load(HAPROXY_1S).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn haproxy_with_a_timeout_of_5_s_fails_no_call() {
    load(HAPROXY_5S).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn caddy_fails_no_call() {
    load(CADDY).await;
}

/// Starts the proxies after the channel. Once all proxies are ready, no further call may fail.
async fn late(setup: Setup) {
    let greeters = greeters(2).await;
    let mut fronts = Vec::new();
    for _ in 0..3 {
        let Some(front) = Front::new(setup, &greeters, None) else {
            return;
        };
        fronts.push(front);
    }
    let channel = over(BalancedChannel::builder(), &fronts);
    let mut callers = Callers::start(&channel, CALLERS);
    sleep(ms(2_000)).await;
    let failed = callers.failed();
    assert!(
        !failed.is_empty(),
        "calls must fail before the proxies start"
    );
    for front in &mut fronts {
        front.run().await;
    }
    let started = Instant::now();
    all_ready(&channel, fronts.len()).await;
    println!("{setup:?}: all ready after {:?}", since(started));
    // Discards the failures of calls that began before all proxies were ready.
    callers.failed();
    all_well(callers, ms(3_000), &format!("{setup:?}, started late")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn proxies_that_start_late_fail_no_call_once_they_are_connected() {
    for setup in [NGINX, HAPROXY_5S, CADDY] {
        late(setup).await;
    }
}

/// Runs callers that pause between their calls for about the idle timeout of the proxy. Each caller has a connection of its own. Returns
/// the number of failed calls, and a summary.
async fn sparse(setup: Setup) -> Option<(usize, String)> {
    let fronts = fronts(setup, 1, 1, None).await?;
    let mut callers = Vec::new();
    for pause in (900..1_100).step_by(10).chain([1_500, 2_500]).map(ms) {
        let channel = over(BalancedChannel::builder(), &fronts);
        all_ready(&channel, 1).await;
        callers.push(Callers::making(&channel, 1, move |mut client| async move {
            sleep(pause).await;
            client.say_hello(with_deadline(hello())).await.map(drop)
        }));
    }
    sleep(ms(8_000)).await;
    let (mut all, mut failures) = (0, Vec::new());
    for caller in callers {
        let (calls, failed) = caller.stopped().await;
        all += calls;
        failures.extend(failed);
    }
    let what = format!("{setup:?}: of {all} sparse calls {}", shown(&failures));
    println!("{what}");
    Some((failures.len(), what))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_closes_fail_no_call_of_sparse_callers() {
    let (nginx, haproxy, caddy) = tokio::join!(
        sparse(NGINX.extra("keepalive_timeout 1s;")),
        sparse(HAPROXY_1S),
        sparse(CADDY.extra("timeouts {\n idle 1s\n }")),
    );
    let all = [nginx, haproxy, caddy].into_iter().flatten();
    let wrong: Vec<_> = all.filter(|(failed, _)| *failed > 0).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Reloads the proxy every two seconds under load.
async fn reloads(setup: Setup) {
    let Some(fronts) = fronts(setup, 1, 3, None).await else {
        return;
    };
    let channel = over(retrying(), &fronts);
    all_ready(&channel, 1).await;
    let callers = Callers::start(&channel, CALLERS);
    let mut every = interval(Duration::from_secs(2));
    for _ in 0..4 {
        every.tick().await;
        fronts[0].reload().await;
    }
    all_well(callers, ms(2_000), &format!("{setup:?}, reloads")).await;
    eventually("the endpoint is ready", async || {
        channel.wait_until_ready().await.is_ok()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reloads_of_nginx_fail_no_call_under_a_retry_policy() {
    reloads(NGINX).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reloads_of_haproxy_fail_no_call_under_a_retry_policy() {
    reloads(HAPROXY_5S).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reloads_of_caddy_fail_no_call_under_a_retry_policy() {
    reloads(CADDY).await;
}
