//! Deadlines that the server also enforces, with a timer that fires before the timer of the client.

use std::time::Duration;

use tokio::task::JoinSet;
use tonic::{Code, Status};
use tonic_etcd::{BalancedChannel, channel::ChannelBuilder};

use super::support::greeter::greeter_client::GreeterClient;
use super::support::peer::answer::Enforce;
use super::support::peer::{Answer, Peer};
use super::{addresses, hello, ms, over, retrying, say, status, stream};

const BUILDERS: [fn() -> ChannelBuilder; 2] = [BalancedChannel::builder, retrying];

async fn call(channel: BalancedChannel, deadline: Duration, unary: bool) -> Result<(), Status> {
    if unary {
        return say(&channel, deadline).await;
    }
    let mut request = hello();
    request.set_timeout(deadline);
    stream(GreeterClient::new(channel), request).await.map(drop)
}

/// Sends calls that all exceed their deadline, eight at a time. Returns the number of calls, and the statuses whose code is not
/// `DEADLINE_EXCEEDED`.
async fn overruns(
    channel: &BalancedChannel,
    deadline: Duration,
    unary: bool,
) -> (usize, Vec<Status>) {
    let rounds = (500 / deadline.as_millis()).clamp(2, 25);
    let (mut calls, mut wrong) = (0, Vec::new());
    for _ in 0..rounds {
        let mut open = JoinSet::new();
        for _ in 0..8 {
            open.spawn(call(channel.clone(), deadline, unary));
        }
        while let Some(outcome) = open.join_next().await {
            calls += 1;
            let error = outcome
                .unwrap()
                .expect_err("every call must exceed its deadline");
            if error.code() != Code::DeadlineExceeded {
                wrong.push(error);
            }
        }
    }
    (calls, wrong)
}

async fn enforced(how: Enforce) {
    let mut wrong = Vec::new();
    for builder in BUILDERS {
        for unary in [true, false] {
            for deadline in [ms(10), ms(50), ms(250)] {
                let peer = Peer::answering(Answer::Overrun(how)).await;
                let channel = over(builder(), &addresses([&peer])).await;
                let (calls, others) = overruns(&channel, deadline, unary).await;
                let known = status(&channel, peer.address);
                println!(
                    "{how:?}, unary {unary}, {deadline:?}: {} of {calls} calls are not DEADLINE_EXCEEDED, {} failures counted",
                    others.len(),
                    known.failures
                );
                if !others.is_empty() || known.failures > 0 {
                    wrong.push((
                        unary,
                        deadline,
                        others.len(),
                        known.failures,
                        others.into_iter().next(),
                    ));
                }
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "every call must fail with DEADLINE_EXCEEDED, and no failure may be counted: {wrong:#?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_at_the_deadline_is_the_deadline() {
    enforced(Enforce::Reset).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_status_at_the_deadline_is_the_deadline() {
    enforced(Enforce::Status).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_whose_deadline_has_passed_is_not_sent() {
    for builder in BUILDERS {
        for deadline in [Duration::ZERO, Duration::from_nanos(1)] {
            let peer = Peer::good().await;
            let channel = over(builder(), &addresses([&peer])).await;
            for unary in [true, false] {
                for _ in 0..50 {
                    let error = call(channel.clone(), deadline, unary).await;
                    let error = error.expect_err("a call whose deadline has passed must fail");
                    assert_eq!(error.code(), Code::DeadlineExceeded, "{error:?}");
                }
            }
            // If the expired calls had been sent, they would have arrived before this call.
            say(&channel, ms(2_000))
                .await
                .expect("a call with time left must succeed");
            println!(
                "{deadline:?}: {} of 100 expired calls were executed",
                peer.executed() - 1
            );
            assert_eq!(
                peer.executed(),
                1,
                "{deadline:?}: an expired call must not be executed"
            );
            assert_eq!(
                peer.requests(),
                1,
                "{deadline:?}: an expired call must not be sent"
            );
        }
    }
}

/// The deadline expires during the backoff, so no second attempt is sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_whose_deadline_passes_between_attempts_is_not_resent() {
    let wait = tonic_etcd::RetryPolicy::new([Code::Unavailable])
        .initial_backoff(ms(100))
        .max_backoff(ms(100));
    let builder = BalancedChannel::builder().retry(wait);
    let failing = Peer::answering(Answer::Fail(Code::Unavailable)).await;
    let channel = over(builder, &addresses([&failing])).await;
    for _ in 0..20 {
        let before = failing.executed();
        let error = say(&channel, ms(30))
            .await
            .expect_err("the call must fail, because its only server fails every call");
        let codes = [Code::DeadlineExceeded, Code::Unavailable];
        assert!(codes.contains(&error.code()), "{error:?}");
        tokio::time::sleep(ms(120)).await;
        assert_eq!(
            failing.executed() - before,
            1,
            "only one attempt may run, because the deadline passes during the backoff"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_long_before_the_deadline_stays_cancelled() {
    for builder in BUILDERS {
        let peer = Peer::answering(Answer::Cancel(ms(20))).await;
        let channel = over(builder(), &addresses([&peer])).await;
        for unary in [true, false] {
            for deadline in [ms(500), ms(2_000)] {
                let error = call(channel.clone(), deadline, unary).await;
                let error = error.expect_err("a call that the server cancels must fail");
                assert_eq!(error.code(), Code::Cancelled, "{error:?}");
            }
        }
        let failed = Peer::answering(Answer::Fail(Code::Cancelled)).await;
        let channel = over(builder(), &addresses([&failed])).await;
        let error = say(&channel, ms(2_000))
            .await
            .expect_err("a call that the server cancels must fail");
        assert_eq!(error.code(), Code::Cancelled, "{error:?}");
    }
}
