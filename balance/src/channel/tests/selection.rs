//! Calls that select endpoints with a [`Select`], and the traffic split.

use super::*;
use crate::channel::{Select, TrafficSplit};

/// Makes a call with this selection.
async fn say_to(channel: &BalancedChannel, select: &Select) -> Result<String, tonic::Status> {
    let mut client = GreeterClient::new(channel.clone());
    let mut request = Request::new(hello("world"));
    request.extensions_mut().insert(select.clone());
    let reply = in_time("a call", client.say_hello(request)).await?;
    let message = reply.into_inner().message;
    Ok(message.rsplit(' ').next().unwrap_or_default().to_owned())
}

fn version(version: &str) -> Attributes {
    Attributes::new().with_version(version)
}

/// A canary with the version 1.2, beside three servers with the version 1.1.
struct Canary {
    changes: Changes,
    channel: BalancedChannel,
    server: Greeter,
    _stable: [Greeter; 3],
}

impl Canary {
    async fn start() -> Self {
        let (changes, stream) = mpsc::unbounded_channel();
        let channel = BalancedChannel::builder()
            // This policy ignores latencies, which differ on a busy machine.
            .policy(LbPolicy::WeightedRoundRobin)
            .discover(UnboundedReceiverStream::new(stream))
            .connect_lazy();
        let canary = Greeter::start("canary");
        let stable = ["alpha", "beta", "gamma"].map(Greeter::start);
        insert(&changes, &canary.address(), version("1.2"));
        for server in &stable {
            insert(&changes, &server.address(), version("1.1"));
        }
        ready(&channel, 4).await;
        Self {
            changes,
            channel,
            server: canary,
            _stable: stable,
        }
    }

    /// Makes this many calls, and returns the share of the canary. Panics if a call fails.
    async fn share(&self, calls: u32) -> f64 {
        let mut canary = 0;
        let mut callers = JoinSet::new();
        for _ in 0..CALLERS {
            let channel = self.channel.clone();
            callers.spawn(async move { tally(&channel, (calls / CALLERS) as usize).await });
        }
        while let Some(tally) = callers.join_next().await {
            let tally = tally.expect("no call fails");
            canary += tally.get("canary").copied().unwrap_or_default();
        }
        f64::from(u32::try_from(canary).expect("few calls")) / f64::from(calls)
    }

    /// Waits until calls use the split that gives the canary all or no calls.
    async fn split_applies(&self, all: bool) {
        let deadline = tokio::time::Instant::now() + support::PATIENCE;
        loop {
            let share = self.share(CALLERS * 5).await;
            if (all && share >= 1.0) || (!all && share <= 0.0) {
                return;
            }
            assert!(
                tokio::time::Instant::now() < deadline,
                "the split is not applied: {share}"
            );
        }
    }
}

const CALLERS: u32 = 8;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_with_a_selection_is_sent_only_to_matching_endpoints() {
    let world = Canary::start().await;
    let channel = &world.channel;
    let labels = Select::labels([("version", "1.2")]);
    let address = Select::address(world.server.address().parse().expect("an address"));
    for select in [Select::version("1.2"), labels, address] {
        for _ in 0..50 {
            let reply = say_to(channel, &select).await;
            assert_eq!(reply.expect("an answer"), "canary", "{select:?}");
        }
    }
    let stable = Select::version("1.1");
    let mut others = std::collections::BTreeSet::new();
    for _ in 0..100 {
        others.insert(say_to(channel, &stable).await.expect("an answer"));
    }
    let expected = ["alpha", "beta", "gamma"].map(str::to_owned);
    assert_eq!(others, expected.into(), "all matching endpoints get calls");
    assert!(tally(channel, 100).await.contains_key("canary"));
}

#[tokio::test]
async fn a_selection_without_a_match_fails_at_once_and_names_what_is_there() {
    let world = Canary::start().await;
    let (failed, took) = timed(say_to(&world.channel, &Select::version("1.3"))).await;
    let status = failed.expect_err("no endpoint matches");
    assert_eq!(status.code(), Code::Unavailable);
    let expected = r#"no endpoint has version "1.3"; there are 3 x version "1.1", version "1.2""#;
    assert!(status.message().contains(expected), "{}", status.message());
    assert!(took < Duration::from_secs(5), "after {took:?}");
    for _ in 0..20 {
        let select = Select::version("1.3").or_any();
        say_to(&world.channel, &select)
            .await
            .expect("any endpoint serves");
    }
    let address = Select::address("10.0.0.5:1".parse().expect("an address"));
    let status = say_to(&world.channel, &address).await.expect_err("unknown");
    let expected = "no endpoint has the address 10.0.0.5:1; there are";
    assert!(status.message().contains(expected), "{}", status.message());
}

#[tokio::test]
async fn a_selection_follows_changes_of_labels_and_endpoints() {
    let world = Canary::start().await;
    let (channel, select) = (&world.channel, Select::version("1.2"));
    assert_eq!(say_to(channel, &select).await.expect("an answer"), "canary");
    // The endpoint gets another version, without a new connection.
    insert(&world.changes, &world.server.address(), version("1.3"));
    let next = Select::version("1.3");
    // Waits for the endpoint, because the change may not be applied yet.
    until_served(channel, &next).await;
    let status = say_to(channel, &select).await.expect_err("no match");
    assert!(status.message().contains("1.3"), "{}", status.message());
    // A call waits for an endpoint that matches and is being connected.
    remove(&world.changes, &world.server.address());
    let late = Greeter::start("late");
    insert(&world.changes, &late.address(), version("1.2"));
    until_served(channel, &select).await;
    assert_eq!(say_to(channel, &select).await.expect("an answer"), "late");
    late.shut_down().await;
    let mut gone = None;
    while gone.is_none() {
        gone = say_to(channel, &select).await.err();
    }
    let status = gone.expect("an error");
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    let reply = say_to(channel, &select.or_any()).await;
    reply.expect("any endpoint serves");
}

async fn until_served(channel: &BalancedChannel, select: &Select) {
    let served = async {
        while say_to(channel, select).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    in_time("a matching endpoint", served).await;
}

#[tokio::test]
async fn a_selected_call_waits_for_a_stream_of_a_matching_endpoint() {
    let (changes, channel) = fed();
    let mut narrow = Raw::start(|builder| {
        builder.max_concurrent_streams(1);
    });
    let other = Greeter::start("other");
    insert(&changes, &narrow.address(), version("1.2"));
    insert(&changes, &other.address(), version("1.1"));
    ready(&channel, 2).await;
    let select = Select::version("1.2");
    let mut calls = JoinSet::new();
    for _ in 0..5 {
        let (channel, select) = (channel.clone(), select.clone());
        calls.spawn(async move { say_to(&channel, &select).await });
    }
    // Each call gets the only stream after the call before it has ended, and none is sent to the other server.
    for _ in 0..5 {
        reply(narrow.accept().await).await;
    }
    while let Some(call) = calls.join_next().await {
        assert_eq!(call.expect("no panic").expect("an answer"), "");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_split_sends_its_share_to_a_version_and_changes_while_calls_run() {
    let world = Canary::start().await;
    let split = |canary| {
        TrafficSplit::new()
            .version("1.2", canary)
            .rest(100 - canary)
    };
    let set = |canary| world.channel.set_split(split(canary)).expect("valid");
    set(0);
    world.split_applies(false).await;
    // The standard deviation of the share is 0.15 % of 20 000 calls with 5 %, and 0.8 % of 4 000 calls with 50 %.
    for (percent, calls, tolerance) in [(5_u32, 20_000, 0.005), (50, 4_000, 0.03)] {
        set(percent);
        // Calls until the new split applies would blur the share.
        until("the split is applied", || {
            world.channel.0.shared().has_applied_split()
        })
        .await;
        let share = world.share(calls).await;
        let expected = f64::from(percent) / 100.0;
        assert!(
            (share - expected).abs() < tolerance,
            "{share} of {expected}"
        );
    }
    let status = world.channel.set_split(TrafficSplit::new().rest(0));
    let error = status.expect_err("a split without weight").to_string();
    assert!(error.contains("all weights"), "{error}");
    world
        .channel
        .set_split(TrafficSplit::new())
        .expect("no split");
    until("the split has ended", || {
        world.channel.0.shared().has_applied_split()
    })
    .await;
    let share = world.share(4_000).await;
    assert!(share > 0.1, "the canary is an ordinary endpoint: {share}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_part_of_a_split_without_a_ready_endpoint_gives_its_share_to_the_others() {
    let world = Canary::start().await;
    let split = TrafficSplit::new().version("1.2", 50).rest(50);
    world.channel.set_split(split).expect("valid");
    until("the split is applied", || {
        world.channel.0.shared().has_applied_split()
    })
    .await;
    let address = world.server.address();
    assert!(world.share(400).await > 0.3);
    // The calls of the canary that are in flight finish, and the stable version takes its share.
    remove(&world.changes, &address);
    world.split_applies(false).await;
    insert(&world.changes, &address, version("1.2"));
    ready(&world.channel, 4).await;
    let deadline = tokio::time::Instant::now() + support::PATIENCE;
    while world.share(400).await < 0.3 {
        assert!(tokio::time::Instant::now() < deadline, "no calls again");
    }
    // A selection takes precedence over the split.
    let split = TrafficSplit::new().version("1.2", 0).rest(1);
    world.channel.set_split(split).expect("valid");
    world.split_applies(false).await;
    let reply = say_to(&world.channel, &Select::version("1.2")).await;
    assert_eq!(reply.expect("an answer"), "canary");
}

/// Returns a channel with a traffic split, and the sender of its endpoint changes.
fn split(split: TrafficSplit) -> (Changes, BalancedChannel) {
    let (changes, stream) = mpsc::unbounded_channel();
    let channel = BalancedChannel::builder()
        .service("greeter")
        .seed(7)
        .split(split)
        .discover(UnboundedReceiverStream::new(stream))
        .connect_lazy();
    (changes, channel)
}

#[tokio::test]
async fn a_call_that_waits_is_not_sent_to_a_part_without_a_weight() {
    let (changes, channel) = split(TrafficSplit::new().version("1.2", 0).rest(1));
    let canary = Greeter::start("canary");
    insert(&changes, &canary.address(), version("1.2"));
    // The call waits while the canary is being connected.
    let status = say(&channel).await.expect_err("only the canary is ready");
    assert_eq!(status.code(), Code::Unavailable);
    let expected = "no part of the traffic split has a ready endpoint";
    assert!(status.message().contains(expected), "{}", status.message());
    let stable = Greeter::start("stable");
    insert(&changes, &stable.address(), version("1.1"));
    ready(&channel, 2).await;
    assert_eq!(tally(&channel, 20).await["stable"], 20);
}

/// Makes calls in the background that select this version, until the server allows no more. The server allows one call on each connection,
/// and the channel opens two connections.
async fn fill(channel: &BalancedChannel, server: &mut Raw, of: &str) -> [support::Accepted; 2] {
    let mut accept = async || {
        let (channel, select) = (channel.clone(), Select::version(of));
        tokio::spawn(async move { say_to(&channel, &select).await });
        server.accept().await
    };
    [accept().await, accept().await]
}

fn waiting(channel: &BalancedChannel) -> usize {
    channel.0.shared().waiters().waiting()
}

#[tokio::test]
async fn a_call_that_waits_for_a_part_gets_no_stream_of_another_part() {
    // A part with this weight is practically never drawn.
    let (changes, channel) = split(TrafficSplit::new().version("1.2", 1).rest(u32::MAX));
    let mut canary = Raw::start(|_| {});
    let mut stable = Raw::start(|builder| {
        builder.max_concurrent_streams(1);
    });
    insert(&changes, &canary.address(), version("1.2"));
    insert(&changes, &stable.address(), version("1.1"));
    ready(&channel, 2).await;
    let selected = tokio::spawn({
        let channel = channel.clone();
        async move { say_to(&channel, &Select::version("1.2")).await }
    });
    let at_canary = canary.accept().await;
    let [first, second] = fill(&channel, &mut stable, "1.1").await;
    let call = tokio::spawn({
        let channel = channel.clone();
        async move { say(&channel).await }
    });
    until("the call waits", || waiting(&channel) == 1).await;
    reply(at_canary).await;
    selected.await.expect("no panic").expect("an answer");
    assert_eq!(waiting(&channel), 1, "the call was sent to the canary");
    reply(first).await;
    reply(stable.accept().await).await;
    call.await.expect("no panic").expect("an answer");
    assert!(canary.try_accept().is_none());
    reply(second).await;
    idle(&channel).await;
}

#[tokio::test]
async fn a_call_that_waits_keeps_the_part_that_it_has_drawn() {
    const CALLS: usize = 80;
    let (changes, channel) = split(TrafficSplit::new().version("1.2", 1).rest(1));
    let mut canary = Raw::start(|_| {});
    let mut stable = Raw::start(|builder| {
        builder.max_concurrent_streams(1);
    });
    insert(&changes, &canary.address(), version("1.2"));
    insert(&changes, &stable.address(), version("1.1"));
    ready(&channel, 2).await;
    let _held = fill(&channel, &mut stable, "1.1").await;
    let mut calls = JoinSet::new();
    for _ in 0..CALLS {
        let channel = channel.clone();
        calls.spawn(async move { say(&channel).await });
    }
    let mut at_canary = Vec::new();
    until("each call is sent or waits", || {
        at_canary.extend(std::iter::from_fn(|| canary.try_accept()));
        at_canary.len() + waiting(&channel) == CALLS
    })
    .await;
    // Half of the calls are expected at the canary, and seven eighths if each call draws three times. The standard deviation is 4.5.
    let share = at_canary.len();
    assert!((25..=55).contains(&share), "{share} calls at the canary");
}

#[tokio::test]
async fn calls_that_wait_follow_a_new_split() {
    let (changes, channel) = split(TrafficSplit::new().version("1.2", 0).rest(1));
    let mut canary = Raw::start(|_| {});
    let mut stable = Raw::start(|builder| {
        builder.max_concurrent_streams(1);
    });
    insert(&changes, &canary.address(), version("1.2"));
    insert(&changes, &stable.address(), version("1.1"));
    ready(&channel, 2).await;
    let _held = fill(&channel, &mut stable, "1.1").await;
    let call = tokio::spawn({
        let channel = channel.clone();
        async move { say(&channel).await }
    });
    until("the call waits", || waiting(&channel) == 1).await;
    let to_canary = TrafficSplit::new().version("1.2", 1).rest(0);
    channel.set_split(to_canary).expect("valid");
    reply(canary.accept().await).await;
    call.await.expect("no panic").expect("an answer");
}
