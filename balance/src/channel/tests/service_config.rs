//! Service configs: given in code, and reported by the source while the channel runs.

use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Status;

use super::support::{EMPTY_MESSAGE, PATIENCE, ok};
use super::*;
use crate::channel::{EndpointSource, Endpoints, ServiceConfig, SourceContext, TrafficSplit};
use crate::error::ChannelError;

/// A source of fixed endpoints, with service configs that the test sends.
struct Configured {
    endpoints: Vec<(String, Attributes)>,
    configs: mpsc::UnboundedReceiver<Option<ServiceConfig>>,
}

impl EndpointSource for Configured {
    type Attributes = Attributes;
    type Error = std::convert::Infallible;
    type Stream =
        tokio_stream::Iter<std::vec::IntoIter<Result<Change<Address, Attributes>, Self::Error>>>;

    fn start(self, _: &SourceContext) -> Result<Endpoints<Self::Stream>, tower::BoxError> {
        let changes = self.endpoints.into_iter().map(|(address, attributes)| {
            let address = address.parse().expect("an address");
            Ok(Change::Insert(address, attributes))
        });
        let changes: Vec<_> = changes.collect();
        let endpoints = Endpoints::new(tokio_stream::iter(changes));
        Ok(endpoints.service_configs(UnboundedReceiverStream::new(self.configs)))
    }
}

type Configs = mpsc::UnboundedSender<Option<ServiceConfig>>;

fn configured(addresses: impl IntoIterator<Item = String>) -> (Configs, BalancedChannel) {
    let addresses = addresses.into_iter();
    configured_with(addresses.map(|address| (address, Attributes::new())))
}

fn configured_with(
    endpoints: impl IntoIterator<Item = (String, Attributes)>,
) -> (Configs, BalancedChannel) {
    let (sender, configs) = mpsc::unbounded_channel();
    let endpoints = endpoints.into_iter().collect();
    let channel = BalancedChannel::builder()
        .service("greeter")
        .seed(7)
        .source(Configured { endpoints, configs })
        .connect_lazy();
    (sender, channel)
}

fn send(configs: &Configs, json: Option<&str>) {
    let config = json.map(|json| json.parse().expect("a valid config"));
    configs.send(config).expect("a live channel");
}

const ROUND_ROBIN: &str = r#"{"loadBalancingConfig": [{"round_robin": {}}]}"#;

/// Returns whether the calls are sent to both servers in turn.
async fn takes_turns(channel: &BalancedChannel) -> bool {
    let mut servers = Vec::new();
    for _ in 0..16 {
        servers.push(say(channel).await.expect("an answer"));
    }
    servers.windows(2).all(|pair| pair[0] != pair[1])
}

#[tokio::test]
async fn a_running_channel_changes_its_policy_and_keeps_its_connections() {
    let servers = [Greeter::start("alpha"), Greeter::start("beta")];
    let (configs, channel) = configured(servers.iter().map(Greeter::address));
    ready(&channel, 2).await;
    let since = || {
        let endpoints = channel.endpoints();
        endpoints
            .iter()
            .map(|endpoint| endpoint.since)
            .collect::<Vec<_>>()
    };
    let before = since();
    assert!(!takes_turns(&channel).await);
    for (config, expected) in [
        (Some(ROUND_ROBIN), true),
        (None, false),
        (Some(ROUND_ROBIN), true),
    ] {
        send(&configs, config);
        let changed = async { while takes_turns(&channel).await != expected {} };
        in_time("the change of the policy", changed).await;
    }
    assert_eq!(since(), before);
}

#[tokio::test]
async fn a_running_channel_changes_the_size_of_its_subset() {
    let servers = ["a", "b", "c", "d"].map(Greeter::start);
    let (configs, channel) = configured(servers.iter().map(Greeter::address));
    ready(&channel, 4).await;
    let subset = |size: u32| {
        format!(
            r#"{{"loadBalancingConfig": [{{"random_subsetting_experimental": {{
                "subsetSize": {size}, "childPolicy": [{{"round_robin": {{}}}}]
            }}}}]}}"#
        )
    };
    let size = async |expected: usize| {
        ready(&channel, expected).await;
        until("the other endpoints are gone", || {
            channel.endpoints().len() == expected
        })
        .await;
    };
    send(&configs, Some(&subset(2)));
    size(2).await;
    let since = || channel.endpoints().iter().map(|one| one.since).min();
    let before = since();
    send(&configs, Some(&subset(3)));
    size(3).await;
    assert_eq!(since(), before, "the first two must stay connected");
    assert!(say(&channel).await.is_ok());
    send(&configs, None);
    size(4).await;
    assert_eq!(since(), before);
}

#[tokio::test]
async fn a_running_channel_changes_timeouts_and_waiting() {
    let (configs, channel) = configured([refusing()]);
    until("the endpoint is failing", || {
        let endpoints = channel.endpoints();
        endpoints
            .iter()
            .any(|endpoint| endpoint.last_error.is_some())
    })
    .await;
    let code = async || say(&channel).await.expect_err("no server").code();
    assert_eq!(code().await, Code::Unavailable);
    send(
        &configs,
        Some(r#"{"methodConfig": [{"name": [{}], "timeout": "0.05s", "waitForReady": true}]}"#),
    );
    let changed = async { while code().await != Code::DeadlineExceeded {} };
    in_time("the change of the timeout", changed).await;
    send(&configs, None);
    let changed = async { while code().await != Code::Unavailable {} };
    in_time("the change of the timeout", changed).await;
}

#[tokio::test]
async fn a_running_channel_starts_and_stops_health_checks() {
    let mut server = Raw::start(|_| {});
    let (configs, channel) = configured([server.address()]);
    ready(&channel, 1).await;
    send(
        &configs,
        Some(r#"{"healthCheckConfig": {"serviceName": "greeter"}}"#),
    );
    let (request, mut respond) = server.accept().await;
    assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Watch");
    // The connection is used until its watch reports a status.
    ready(&channel, 1).await;
    let mut stream = respond.send_response(grpc_head(), false).expect("a stream");
    let not_serving = Bytes::from_static(&[0, 0, 0, 0, 2, 8, 2]);
    stream.send_data(not_serving, false).expect("a stream");
    until("the endpoint is not healthy", || {
        channel.endpoints()[0].state == EndpointState::TransientFailure
    })
    .await;
    send(&configs, None);
    ready(&channel, 1).await;
    assert_eq!(server.connections.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn an_ejection_ends_when_outlier_detection_is_disabled() {
    let alpha = Greeter::start("alpha");
    let failing = Raw::answering(
        |_| {},
        async |(_, mut respond)| {
            let head = Response::builder()
                .header("content-type", "application/grpc")
                .header("grpc-status", "14");
            let _ = respond.send_response(head.body(()).expect("a head"), true);
        },
    );
    let (configs, channel) = configured([alpha.address(), failing.address()]);
    ready(&channel, 2).await;
    send(
        &configs,
        Some(
            r#"{"loadBalancingConfig": [{"outlier_detection_experimental": {
                "interval": "0.05s", "baseEjectionTime": "600s", "maxEjectionTime": "600s", "maxEjectionPercent": 100,
                "failurePercentageEjection": {"threshold": 50, "enforcementPercentage": 100, "minimumHosts": 1, "requestVolume": 5},
                "childPolicy": [{"round_robin": {}}]
            }}]}"#,
        ),
    );
    let ejected = || channel.endpoints().iter().any(|endpoint| endpoint.ejected);
    let calls = async {
        while !ejected() {
            let _ = say(&channel).await;
        }
    };
    in_time("the ejection", calls).await;
    send(&configs, Some(ROUND_ROBIN));
    until("the ejection ends", || !ejected()).await;
}

fn with_config(server: &Greeter, json: &str) -> BalancedChannel {
    BalancedChannel::builder()
        .service_config(json)
        .addresses([server.address()])
        .connect_lazy()
}

async fn say_name(channel: &BalancedChannel, name: &str) -> Result<String, Status> {
    let mut client = GreeterClient::new(channel.clone());
    let reply = in_time("a call", client.say_hello(hello(name))).await?;
    Ok(reply.into_inner().message)
}

#[tokio::test]
async fn messages_above_a_limit_fail_with_resource_exhausted() {
    let server = Greeter::start("alpha");
    // The name in the request has a prefix of two bytes, and `replies` has two bytes. The response has about 30 bytes more.
    let channel = with_config(
        &server,
        r#"{"methodConfig": [
            {"name": [{"service": "helloworld.Greeter"}], "maxRequestMessageBytes": 104},
            {"name": [{"service": "helloworld.Greeter", "method": "SayHello"}], "maxRequestMessageBytes": 104, "maxResponseMessageBytes": 104}
        ]}"#,
    );
    let name = |length| "x".repeat(length);
    assert!(say_name(&channel, &name(50)).await.is_ok());
    let too_large = say_name(&channel, &name(101)).await.expect_err("a limit");
    assert_eq!(too_large.code(), Code::ResourceExhausted);
    assert!(
        too_large
            .message()
            .contains("a request message has 105 bytes"),
        "{too_large:?}"
    );
    assert_eq!(channel.endpoints()[0].calls, 1, "the call was sent");
    let too_large = say_name(&channel, &name(100)).await.expect_err("a limit");
    assert_eq!(too_large.code(), Code::ResourceExhausted);
    assert!(
        too_large.message().contains("a response message has "),
        "{too_large:?}"
    );
    // The limits of the service apply to the other methods, so only requests have one.
    let mut client = GreeterClient::new(channel.clone());
    let requests = tokio_stream::iter([hello("a"), hello(&name(100)), hello("b")]);
    let reply = client.greet_all(requests).await.expect("an answer");
    assert!(reply.into_inner().message.len() > 104);
    let requests = tokio_stream::iter([hello("a"), hello("b"), hello("c"), hello(&name(101))]);
    let too_large = client.greet_all(requests).await.expect_err("a limit");
    assert_eq!(too_large.code(), Code::ResourceExhausted);
    idle(&channel).await;
    assert!(say_name(&channel, "world").await.is_ok());
}

#[tokio::test]
async fn an_invalid_service_config_is_reported_by_connect() {
    let server = Greeter::start("alpha");
    let channel = BalancedChannel::builder()
        .service_config(r#"{"retryThrottling": {"maxTokens": 0}}"#)
        .addresses([server.address()]);
    let error = channel.connect().await.expect_err("an invalid config");
    assert!(matches!(error, ChannelError::InvalidOption { .. }));
    let expected = "service_config: retryThrottling.maxTokens: expected a number above 0";
    assert!(error.to_string().contains(expected), "{error}");
}

#[tokio::test]
async fn the_timeout_of_a_method_replaces_that_of_the_channel() {
    let server = Raw::answering(|_| {}, async |_| std::future::pending().await);
    let channel = BalancedChannel::builder()
        .timeout(PATIENCE)
        .timeout_for("helloworld.Greeter/SayHello", Duration::from_millis(50))
        .addresses([server.address()])
        .connect_lazy();
    let (failed, time) = timed(say(&channel)).await;
    assert_eq!(
        failed.expect_err("a timeout").code(),
        Code::DeadlineExceeded
    );
    assert!(time < PATIENCE / 2, "{time:?}");
    let invalid = BalancedChannel::builder().timeout_for("a/b/c", PATIENCE);
    let invalid = invalid.addresses([server.address()]).connect().await;
    assert!(matches!(invalid, Err(ChannelError::InvalidOption { .. })));
}

/// Waits until the limit on the requests of `GreetAll` is in force, or no longer in force.
async fn limits_greet_all(channel: &BalancedChannel, expected: bool) {
    let is_limited = async || {
        let mut request = Request::new(tokio_stream::iter([hello("world")]));
        request.set_timeout(Duration::from_millis(20));
        let status = GreeterClient::new(channel.clone()).greet_all(request).await;
        status.expect_err("no answer").code() == Code::ResourceExhausted
    };
    let changed = async {
        while is_limited().await != expected {
            // A rejected call fails without a wait, and the channel's tasks run on the same thread.
            tokio::task::yield_now().await;
        }
    };
    in_time("the change of the limit", changed).await;
}

#[tokio::test]
async fn a_call_keeps_the_settings_with_which_it_was_made() {
    let mut server = Raw::start(|_| {});
    let (configs, channel) = configured([server.address()]);
    ready(&channel, 1).await;
    send(
        &configs,
        Some(
            r#"{"methodConfig": [
                {"name": [{"service": "helloworld.Greeter", "method": "GreetAll"}], "maxRequestMessageBytes": 1},
                {"name": [{}], "retryPolicy": {"maxAttempts": 2, "initialBackoff": "0.001s", "maxBackoff": "0.001s",
                    "backoffMultiplier": 1, "retryableStatusCodes": ["INTERNAL"]}}
            ]}"#,
        ),
    );
    limits_greet_all(&channel, true).await;
    let call = tokio::spawn({
        let channel = channel.clone();
        async move { say(&channel).await }
    });
    let mut accept = async || loop {
        let (request, respond) = server.accept().await;
        if request.uri().path().ends_with("/SayHello") {
            return (request, respond);
        }
    };
    let (_, mut respond) = accept().await;
    send(&configs, None);
    limits_greet_all(&channel, false).await;
    let head = Response::builder()
        .header("content-type", "application/grpc")
        .header("grpc-status", "13");
    let head = head.body(()).expect("a head");
    respond.send_response(head, true).expect("a stream");
    let (request, mut respond) = accept().await;
    assert_eq!(request.headers()["grpc-previous-rpc-attempts"], "1");
    let mut stream = respond.send_response(grpc_head(), false).expect("a stream");
    let message = Bytes::from_static(EMPTY_MESSAGE);
    stream.send_data(message, false).expect("a stream");
    stream.send_trailers(ok()).expect("a stream");
    call.await.expect("no panic").expect("an answer");
}

/// Returns the server of each of a few keys; `None` if calls with the same key were sent to different servers.
async fn servers_of_keys(channel: &BalancedChannel) -> Option<Vec<String>> {
    let mut client = GreeterClient::new(channel.clone());
    let mut servers = Vec::new();
    for key in 0..8 {
        let mut used = Vec::new();
        for _ in 0..5 {
            let mut request = Request::new(hello("world"));
            let value = format!("customer-{key}").parse().expect("a value");
            request.metadata_mut().insert("x-customer", value);
            let reply = in_time("a call", client.say_hello(request)).await;
            used.push(reply.expect("an answer").into_inner().message);
        }
        used.dedup();
        if used.len() > 1 {
            return None;
        }
        servers.extend(used);
    }
    Some(servers)
}

#[tokio::test]
async fn a_running_channel_changes_to_the_consistent_hash_and_back() {
    let greeters = ["alpha", "beta", "gamma"].map(Greeter::start);
    let (configs, channel) = configured(greeters.iter().map(Greeter::address));
    ready(&channel, 3).await;
    assert_eq!(servers_of_keys(&channel).await, None);
    let built = BalancedChannel::builder()
        .policy(LbPolicy::RingHash)
        .request_hash_header("x-customer")
        .addresses(greeters.iter().map(Greeter::address))
        .connect_lazy();
    ready(&built, 3).await;
    let expected = servers_of_keys(&built).await;
    assert!(expected.is_some());
    send(
        &configs,
        Some(
            r#"{"loadBalancingConfig": [{"ring_hash_experimental": {"requestHashHeader": "X-Customer"}}]}"#,
        ),
    );
    let changed = async { while servers_of_keys(&channel).await != expected {} };
    in_time("the change to the consistent hash", changed).await;
    send(&configs, None);
    let changed = async { while servers_of_keys(&channel).await.is_some() {} };
    in_time("the change of the policy", changed).await;
}

/// Waits until calls are sent to exactly these servers.
async fn served_by(channel: &BalancedChannel, expected: &[&str]) {
    let changed = async {
        while tally(channel, 30)
            .await
            .keys()
            .map(String::as_str)
            .ne(expected.iter().copied())
        {}
    };
    in_time("the change of the split", changed).await;
}

#[tokio::test]
async fn a_running_channel_changes_its_split() {
    let greeters = ["alpha", "beta"].map(Greeter::start);
    let versions = ["1.1", "1.2"].map(|version| Attributes::new().with_version(version));
    let (configs, channel) = configured_with(greeters.iter().map(Greeter::address).zip(versions));
    ready(&channel, 2).await;
    let shares = |canary: u32, rest: u32| {
        format!(
            r#"{{"loadBalancingConfig": [{{"split_experimental": {{
                "split": [{{"label": {{"version": "1.2"}}, "weight": {canary}}}, {{"weight": {rest}}}],
                "childPolicy": [{{"round_robin": {{}}}}]
            }}}}]}}"#
        )
    };
    send(&configs, Some(&shares(0, 1)));
    served_by(&channel, &["alpha"]).await;
    send(&configs, Some(&shares(1, 0)));
    served_by(&channel, &["beta"]).await;
    // By default, the split of the program takes precedence, and that of the service config applies again without it.
    let of_program = TrafficSplit::new().version("1.1", 1);
    channel.set_split(of_program).expect("valid");
    served_by(&channel, &["alpha"]).await;
    channel.set_split(TrafficSplit::new()).expect("valid");
    served_by(&channel, &["beta"]).await;
    send(&configs, None);
    served_by(&channel, &["alpha", "beta"]).await;
}
