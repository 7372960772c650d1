//! Error pages and other HTML pages that nginx returns in response to calls.

use std::net::SocketAddr;

use tokio::net::TcpListener;
use tokio::time::sleep;
use tonic::Code;
use tonic_etcd::{BalancedChannel, channel::EndpointStatus};

use crate::fronts::{Front, Kind, Setup};
use crate::support::callers::{Callers, with_deadline};
use crate::support::greeter::greeter_client::GreeterClient;
use crate::support::peer::{Manner, Peer};
use crate::support::{all_ready, hello};
use crate::{ms, shown};

/// Each entry has additional configuration of nginx, the HTTP status of its response, and the gRPC code for this response.
const ANSWERS: [(&str, &str, Code); 4] = [
    // The server behind nginx is down.
    ("", "502", Code::Unavailable),
    (
        r#"location /helloworld.Greeter/ { default_type text/html; return 200 "<html>hello</html>"; }"#,
        "200",
        Code::Unknown,
    ),
    (
        r#"location /helloworld.Greeter/ { default_type text/html; return 429 "<html>later</html>"; }"#,
        "429",
        Code::Unavailable,
    ),
    (
        r#"location /helloworld.Greeter/ { default_type text/html; return 503 "<html>not now</html>"; }"#,
        "503",
        Code::Unavailable,
    ),
];

/// Returns an address that refuses connections.
async fn nowhere() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap()
}

async fn nginx(extra: &'static str) -> Option<Front> {
    Front::start(
        Setup::of(Kind::Nginx).extra(extra),
        &[nowhere().await],
        None,
    )
    .await
}

fn status(channel: &BalancedChannel, address: &str) -> EndpointStatus {
    let endpoints = channel.endpoints().into_iter();
    let mut found = endpoints.filter(|endpoint| endpoint.address.as_str() == address);
    found.next().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_nginx_page_is_reported_with_its_code_and_origin() {
    let mut wrong = Vec::new();
    for (extra, http, code) in ANSWERS {
        let Some(front) = nginx(extra).await else {
            return;
        };
        let channel = BalancedChannel::builder()
            .addresses([front.address()])
            .connect_lazy();
        all_ready(&channel, 1).await;
        let mut client = GreeterClient::new(channel.clone());
        let error = client.say_hello(with_deadline(hello())).await.unwrap_err();
        let known = status(&channel, &front.address()).last_error;
        println!("{http}: {error:?}; last error: {known:?}");
        let named = [http, "text/html", &front.address()];
        if error.code() != code || named.iter().any(|part| !error.message().contains(part)) {
            wrong.push(format!("{http}: {error:?}"));
        }
        if !known.as_ref().is_some_and(|known| known.contains(http)) {
            wrong.push(format!("{http}: last error: {known:?}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Returns the number of calls on one endpoint, and the number of calls on all endpoints.
fn calls(channel: &BalancedChannel, address: &str) -> (u64, u64) {
    let all = channel
        .endpoints()
        .iter()
        .map(|endpoint| endpoint.calls)
        .sum();
    (status(channel, address).calls, all)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_nginx_that_answers_with_pages_gets_few_calls() {
    let mut wrong = Vec::new();
    for good in [1, 3] {
        for (extra, http, _) in ANSWERS {
            let Some(front) = nginx(extra).await else {
                return;
            };
            let mut peers = Vec::new();
            for _ in 0..good {
                // The good servers are slower, because a real reply takes longer than a page.
                let manner = Manner {
                    delay: ms(2),
                    ..Manner::default()
                };
                peers.push(Peer::start(manner).await);
            }
            let mut all = vec![front.address()];
            all.extend(peers.iter().map(|peer| peer.address.to_string()));
            let channel = BalancedChannel::builder()
                .seed(7)
                .addresses(&all)
                .connect_lazy();
            all_ready(&channel, all.len()).await;
            let callers = Callers::start(&channel, 8);
            sleep(ms(1_000)).await;
            let (bad_before, before) = calls(&channel, &front.address());
            sleep(ms(1_500)).await;
            let (bad, after) = calls(&channel, &front.address());
            let (_, failed) = callers.stopped().await;
            let (bad, all) = (bad - bad_before, after - before);
            let what = format!(
                "HTTP {http}, {good} good servers: in the 1.5 s after the first second, nginx got {bad} of {all} calls; in the whole run {}",
                shown(&failed)
            );
            println!("{what}");
            // On a busy machine, one percent may be less than the few calls that try nginx again.
            if bad * 100 > all && bad > 5 {
                wrong.push(what);
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "nginx must get at most 1 % of the calls, or five: {wrong:#?}"
    );
}
