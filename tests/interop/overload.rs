//! grpc-go as the client of an overloaded server with our limit of the concurrency.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;

use crate::peer::go;
use crate::support::soak;
use crate::workers::Process;

/// The outcome of the calls of the Go program, which makes a second attempt after a refusal. Times are in milliseconds.
#[derive(Debug, Deserialize)]
struct Outcome {
    ok: u32,
    refused: u32,
    failed: u32,
    errors: BTreeMap<String, u32>,
    /// Of the calls that succeed at the first attempt.
    p99: f64,
    pushbacks: u32,
    /// The refusals without a pushback.
    without: u32,
    retries: u32,
    /// The attempts before the time of a pushback.
    early: u32,
    shortest: f64,
    longest: f64,
}

/// Four workers that need 40 ms for a call.
#[tokio::test(flavor = "multi_thread")]
async fn a_go_client_waits_for_the_pushback_of_an_overloaded_server() {
    let Some(go) = go().await else { return };
    let (seconds, goodput, p99) = soak(
        "seconds, goodput and p99 of the overload by grpc-go",
        (5, 0.5, 160.0),
        (40, 0.85, 88.0),
    );
    let mut server = Process::start(4, Duration::from_millis(40), true).await;
    let measured = format!("{seconds}s");
    let arguments = ["overload", "-address", &server.address, "-rate", "200"];
    let arguments = [&arguments[..], &["-warm", "5s", "-measured", &measured]].concat();
    let printed = go.run_for(Duration::from_secs(seconds), &arguments).await;
    let outcome: Outcome = serde_json::from_str(&printed).unwrap();
    println!("200 calls/s for {seconds} s, at a capacity of 100 calls/s: {outcome:?}");
    assert_eq!(outcome.failed, 0, "{:?}", outcome.errors);
    assert!(server.limit().await <= 12);
    let part = f64::from(outcome.ok) / 100.0 / Duration::from_secs(seconds).as_secs_f64();
    assert!(part >= goodput, "{part}");
    assert!(outcome.p99 <= p99);
    assert!(outcome.refused > 0);
    assert!(outcome.retries > 0);
    assert_eq!((outcome.without, outcome.early), (0, 0));
    assert!(outcome.pushbacks > outcome.refused);
    // The bounds of `AdaptiveLimitLayer`.
    assert!(outcome.shortest >= 10.0 && outcome.longest <= 1_000.0);
}
