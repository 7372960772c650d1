//! Deadlines that expire while the server still works.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::{Code, Request};
use tonic_etcd::BalancedChannel;

use crate::proto::wanting;
use crate::servers::{Kind, Options, Server};
use crate::support::all_ready;
use crate::tap::Tap;
use crate::{Client, ms, since, stream};

const CALLS: usize = 100;
const AT_ONCE: usize = 10;

/// Sends calls with a deadline. With `streams`, each call gets its first response at once and its second response after one second.
/// Otherwise, it gets one response after one second. Returns the number of calls per outcome, and the duration of the slowest call.
async fn overruns(
    channel: &BalancedChannel,
    deadline: Duration,
    streams: bool,
) -> (BTreeMap<String, usize>, Duration) {
    let second = Duration::from_secs(1);
    let mut callers = JoinSet::new();
    for _ in 0..AT_ONCE {
        let client = Client::new(channel.clone());
        callers.spawn(async move {
            let mut outcomes = Vec::new();
            for _ in 0..CALLS / AT_ONCE {
                let responses = if streams {
                    vec![(8, Duration::ZERO), (8, second)]
                } else {
                    vec![(8, second)]
                };
                let mut request = Request::new(wanting(responses));
                request.set_timeout(deadline);
                let start = Instant::now();
                let outcome = stream(client.clone(), request).await;
                outcomes.push((outcome, since(start)));
            }
            outcomes
        });
    }
    let mut codes = BTreeMap::new();
    let mut slowest = Duration::ZERO;
    for (outcome, took) in callers.join_all().await.into_iter().flatten() {
        slowest = slowest.max(took);
        let code = match outcome {
            Err(status) if status.code() == Code::DeadlineExceeded => "DeadlineExceeded".to_owned(),
            Err(status) => format!("{status:?}"),
            Ok(count) => format!("{count} responses"),
        };
        *codes.entry(code).or_default() += 1;
    }
    (codes, slowest)
}

for_each_server!(a_deadline_that_passes_is_deadline_exceeded);
async fn a_deadline_that_passes_is_deadline_exceeded(kind: Kind) {
    let Some(server) = Server::start(kind, Options::default()).await else {
        return;
    };
    let link = Tap::start(server.address.clone()).await;
    let channel = BalancedChannel::builder()
        .addresses([link.address.to_string()])
        .connect_lazy();
    all_ready(&channel, 1).await;
    let mut wrong = Vec::new();
    for deadline in [10, 50, 250].map(ms) {
        for streams in [false, true] {
            let (codes, slowest) = overruns(&channel, deadline, streams).await;
            let what = format!("{kind:?}, {deadline:?}, streams {streams}: {codes:?}");
            println!("{what}, at most {slowest:?}");
            if codes.get("DeadlineExceeded") != Some(&CALLS) {
                wrong.push(what);
            }
        }
    }
    let seen = link.seen();
    println!("{kind:?}: {seen:?}");
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert_eq!(
        seen.lost(),
        0,
        "{kind:?}: no connection may be closed: {seen:?}"
    );
}
