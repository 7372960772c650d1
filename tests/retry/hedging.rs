//! Hedged attempts of calls that take long.

use super::*;

const DELAY: Duration = Duration::from_millis(20);
/// Longer than any test.
const NEVER: Duration = Duration::from_secs(60);

fn hedged(attempts: u32, delay: Duration) -> ChannelBuilder {
    BalancedChannel::builder().hedge(HedgingPolicy::new(attempts, delay))
}

#[tokio::test]
async fn a_call_to_a_hanging_server_is_hedged_and_the_losing_attempt_is_cancelled() {
    let servers = [
        Server::always(Act::Hang).await,
        Server::always(Act::Reply).await,
    ];
    let channel = over(hedged(2, DELAY), &servers).await;
    for _ in 0..30 {
        let start = Instant::now();
        say(&channel).await.expect("the other server responds");
        let took = Instant::now().saturating_duration_since(start);
        assert!(took < Duration::from_secs(5), "{took:?}");
    }
    assert!(servers[0].count() > 0);
    assert_eq!(
        servers[1].count(),
        30,
        "this server must receive each call exactly once"
    );
    let lost = servers[0].count();
    eventually("the losing attempts are cancelled", async || {
        servers[0].cancelled() == lost
    })
    .await;
    // Usually, the first attempt is sent to the server that hangs, and the hedge to the server that replies. If the first attempt is sent
    // to the server that replies, but the reply takes longer than the delay, the hedge is sent to the server that hangs.
    let copies = |server: &Server| {
        let calls = server.calls();
        let copies = calls.iter().filter(|seen| seen.previous.is_some());
        copies.count()
    };
    assert_eq!(copies(&servers[1]), lost - copies(&servers[0]));
    idle(&channel).await;
}

/// If a client calls rarely, each connection has been silent before a call, so the channel checks the connection with a PING.
#[tokio::test(flavor = "multi_thread")]
async fn a_ping_check_after_a_silence_does_not_use_up_a_hedge() {
    let servers = [
        Server::always(Act::Hang).await,
        Server::always(Act::Reply).await,
    ];
    let channel = over(hedged(2, DELAY), &servers).await;
    for _ in 0..4 {
        sleep(Duration::from_millis(1200)).await;
        let status = say_within(&channel, Some(Duration::from_secs(5))).await;
        status.expect("the other server responds");
    }
    assert_eq!(servers[1].count(), 4);
}

#[tokio::test]
async fn hedges_are_limited_by_the_policy_and_sent_to_different_servers() {
    let mut servers = Vec::new();
    for _ in 0..5 {
        servers.push(Server::always(Act::Hang).await);
    }
    let channel = over(hedged(3, Duration::ZERO), &servers).await;
    let status = say_within(&channel, Some(Duration::from_secs(2))).await;
    let status = status.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert!(status.message().contains("(3 attempts: "), "{status}");
    assert_eq!(count(&servers), 3);
    assert!(servers.iter().all(|server| server.count() <= 1));
    idle(&channel).await;
}

#[tokio::test]
async fn a_lone_server_gets_no_hedge() {
    let servers = [Server::always(Act::Slow(DELAY * 5)).await];
    let channel = over(hedged(5, DELAY), &servers).await;
    say(&channel).await.unwrap();
    assert_eq!(count(&servers), 1);
}

#[tokio::test]
async fn a_non_fatal_failure_sends_the_next_hedge_at_once() {
    let servers = [
        Server::always(DOWN).await,
        Server::always(Act::Reset(Reason::REFUSED_STREAM)).await,
        Server::always(Act::Reply).await,
    ];
    // A server that answers with REFUSED_STREAM has not processed the attempt, so this attempt does not count toward the limit of two.
    let channel = over(hedged(2, NEVER), &servers).await;
    for _ in 0..30 {
        say(&channel)
            .await
            .expect("the last server serves the call");
    }
    assert!(servers[0].count() > 0 && servers[1].count() > 0);
    idle(&channel).await;

    let servers = [Server::always(DOWN).await, Server::always(DOWN).await];
    let channel = over(hedged(5, NEVER), &servers).await;
    let status = say(&channel).await.unwrap_err();
    assert!(
        status.message().starts_with("as told (2 attempts: "),
        "{status}"
    );
}

#[tokio::test]
async fn a_fatal_failure_ends_the_call() {
    let fatal = Act::Fail(Code::InvalidArgument, &[]);
    let servers = [Server::always(fatal).await, Server::always(Act::Hang).await];
    let channel = over(hedged(2, Duration::ZERO), &servers).await;
    for _ in 0..10 {
        let status = say(&channel).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    }
    idle(&channel).await;
}

#[tokio::test]
async fn pushback_delays_or_stops_hedges() {
    let later = Act::Fail(Code::Unavailable, &[("grpc-retry-pushback-ms", "200")]);
    let servers = [
        Server::always(later.clone()).await,
        Server::always(later).await,
    ];
    let channel = over(hedged(2, NEVER), &servers).await;
    say(&channel).await.unwrap_err();
    let (one, other) = (servers[0].calls()[0].at, servers[1].calls()[0].at);
    let apart = one.max(other).saturating_duration_since(one.min(other));
    assert!(apart >= Duration::from_millis(200), "{apart:?}");

    let never = Act::Fail(Code::Unavailable, &[("grpc-retry-pushback-ms", "-1")]);
    let servers = [
        Server::always(never.clone()).await,
        Server::always(never).await,
    ];
    let channel = over(hedged(2, NEVER), &servers).await;
    say(&channel).await.unwrap_err();
    assert_eq!(count(&servers), 1);
}

#[tokio::test]
async fn the_retry_budget_limits_hedges() {
    let servers = [Server::always(DOWN).await, Server::always(DOWN).await];
    let builder = hedged(2, DELAY).retry_budget(RetryBudget::new(10, 0.001));
    let channel = over(builder, &servers).await;
    for _ in 0..50 {
        say(&channel).await.unwrap_err();
    }
    let copies = count(&servers) - 50;
    assert!((1..=4).contains(&copies), "{copies} copies");
}

#[tokio::test]
async fn an_unfinished_request_stream_is_not_hedged() {
    let servers = [
        Server::always(Act::Slow(DELAY * 5)).await,
        Server::always(Act::Slow(DELAY * 5)).await,
    ];
    let channel = over(hedged(2, DELAY), &servers).await;
    let mut client = GreeterClient::new(channel.clone());
    let (feed, requests) = mpsc::unbounded_channel();
    feed.send(hello("one")).unwrap();
    let call = client.greet_all(UnboundedReceiverStream::new(requests));
    let (outcome, ()) = tokio::join!(call, async {
        eventually("the message is sent", async || count(&servers) > 0).await;
        sleep(DELAY * 2).await;
        drop(feed);
    });
    outcome.unwrap();
    assert_eq!(count(&servers), 1);
}
