//! The reaction to the pushback of a server: new calls are sent to other endpoints.

use http::HeaderMap;
use tokio::time::Instant;

use super::support::{Accepted, Cut, EMPTY_MESSAGE, spawn_routed};
use super::*;
use crate::RetryPolicy;
use crate::channel::{ChannelBuilder, EjectionReason, EndpointStatus, Routing, Select};

/// A server that answers calls, and refuses them while `refusal` is set: with these headers, in the head or after a message.
struct Server {
    cut: Cut,
    refusal: Arc<std::sync::Mutex<Option<Refusal>>>,
    calls: Arc<AtomicUsize>,
}

#[derive(Clone, Copy)]
struct Refusal {
    code: Code,
    pushback: &'static str,
    in_trailers: bool,
}

fn refusal(code: Code, pushback: &'static str) -> Refusal {
    Refusal {
        code,
        pushback,
        in_trailers: false,
    }
}

impl Server {
    fn start() -> Self {
        let refusal = Arc::<std::sync::Mutex<Option<Refusal>>>::default();
        let calls = Arc::<AtomicUsize>::default();
        let (refuses, counted) = (Arc::clone(&refusal), Arc::clone(&calls));
        let answer = move |call: Accepted| {
            counted.fetch_add(1, Ordering::SeqCst);
            let refusal = *refuses.lock().expect("no panic");
            async move {
                match refusal {
                    None => reply(call).await,
                    Some(refusal) => refuse(call, refusal),
                }
            }
        };
        Self {
            cut: Raw::answering(|_| (), answer),
            refusal,
            calls,
        }
    }

    fn set(&self, refusal: impl Into<Option<Refusal>>) {
        *self.refusal.lock().expect("no panic") = refusal.into();
    }

    fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }
}

fn refuse((request, mut respond): Accepted, refusal: Refusal) {
    drop(request);
    let mut fields = HeaderMap::new();
    let code = (refusal.code as i32).to_string();
    fields.insert("grpc-status", code.parse().expect("a value"));
    if !refusal.pushback.is_empty() {
        let pushback = refusal.pushback.parse().expect("a value");
        fields.insert("grpc-retry-pushback-ms", pushback);
    }
    let mut head = grpc_head();
    if refusal.in_trailers {
        let mut stream = respond.send_response(head, false).expect("a live call");
        let message = Bytes::from_static(EMPTY_MESSAGE);
        stream.send_data(message, false).expect("a live call");
        stream.send_trailers(fields).expect("a live call");
    } else {
        head.headers_mut().extend(fields);
        respond.send_response(head, true).expect("a live call");
    }
}

async fn channel_to(
    servers: &[&Server],
    configure: impl FnOnce(ChannelBuilder) -> ChannelBuilder,
) -> BalancedChannel {
    // In turn, so that each server gets calls unless it is excluded.
    let builder = BalancedChannel::builder()
        .policy(LbPolicy::WeightedRoundRobin)
        .max_pushback(Duration::from_secs(10));
    let channel = configure(builder)
        .addresses(servers.iter().map(|server| server.cut.address()))
        .connect_lazy();
    ready(&channel, servers.len()).await;
    channel
}

fn status(channel: &BalancedChannel, server: &Server) -> EndpointStatus {
    let statuses = channel.endpoints();
    let mut statuses = statuses.into_iter();
    let status = statuses.find(|status| status.address.as_str() == server.cut.address());
    status.expect("an endpoint")
}

/// Makes calls until the server has refused one.
async fn until_refused(channel: &BalancedChannel, code: Code) {
    loop {
        if let Err(status) = say(channel).await {
            assert_eq!(status.code(), code);
            return;
        }
    }
}

/// Waits until the server gets no calls because of a pushback.
async fn pushed_back(channel: &BalancedChannel, server: &Server) {
    until("the server is excluded", || {
        status(channel, server).ejection_reason == Some(EjectionReason::Pushback)
    })
    .await;
    // The ready set is published in the same step of the driver or in the next one.
    let shared = channel.0.shared();
    until("the ready set is published", || {
        shared.summary().ready == channel.endpoints().len() - 1
    })
    .await;
}

#[tokio::test]
async fn a_pushback_keeps_new_calls_away_for_the_requested_time() {
    for code in [Code::Unavailable, Code::ResourceExhausted] {
        let servers = [Server::start(), Server::start()];
        let channel = channel_to(&servers.each_ref(), |builder| builder).await;
        let [busy, other] = &servers;
        busy.set(refusal(code, "400"));
        let start = Instant::now();
        until_refused(&channel, code).await;
        pushed_back(&channel, busy).await;
        busy.set(None);
        let refused = busy.calls();
        let now = status(&channel, busy);
        assert!(now.ejected, "{now}");
        let until = now.pushback_until.expect("a pushback");
        assert!(until > start && until <= Instant::now() + Duration::from_millis(400));
        assert!(now.to_string().contains("pushback for "), "{now}");
        while Instant::now() + Duration::from_millis(50) < until {
            say(&channel).await.expect("no call fails");
            assert_eq!(busy.calls(), refused, "a call was sent to the busy server");
        }
        let before = other.calls();
        assert!(before > 10, "{before} calls");
        super::until("the server is used again", || {
            !status(&channel, busy).ejected
        })
        .await;
        let ended = Instant::now();
        assert!(ended >= until && ended < until + Duration::from_secs(5));
        while busy.calls() == refused {
            say(&channel).await.expect("no call fails");
        }
        assert_eq!(status(&channel, busy).pushback_until, None);
    }
}

#[tokio::test]
async fn a_pushback_in_the_trailers_of_a_stream_keeps_new_calls_away() {
    let servers = [Server::start(), Server::start()];
    let channel = channel_to(&servers.each_ref(), |builder| builder).await;
    servers[0].set(Refusal {
        in_trailers: true,
        ..refusal(Code::ResourceExhausted, "60000")
    });
    let mut client = GreeterClient::new(channel.clone());
    loop {
        let replies = client.say_hellos(hello("world")).await.expect("a stream");
        let mut replies = replies.into_inner();
        replies
            .message()
            .await
            .expect("no error")
            .expect("a message");
        if let Err(status) = replies.message().await {
            assert_eq!(status.code(), Code::ResourceExhausted);
            break;
        }
    }
    pushed_back(&channel, &servers[0]).await;
    let refused = servers[0].calls();
    for _ in 0..50 {
        say(&channel).await.expect("no call fails");
    }
    assert_eq!(servers[0].calls(), refused);
    // `max_pushback` is ten seconds.
    let until = status(&channel, &servers[0])
        .pushback_until
        .expect("a pushback");
    assert!(until <= Instant::now() + Duration::from_secs(10));
}

#[tokio::test]
async fn other_failures_and_a_pushback_that_forbids_retries_keep_no_call_away() {
    let servers = [Server::start(), Server::start()];
    for (code, pushback) in [
        (Code::ResourceExhausted, ""),
        (Code::ResourceExhausted, "-1"),
        (Code::Unavailable, "soon"),
        (Code::ResourceExhausted, "0"),
        (Code::FailedPrecondition, "60000"),
        (Code::Internal, "60000"),
    ] {
        let channel = channel_to(&servers.each_ref(), |builder| builder).await;
        servers[0].set(refusal(code, pushback));
        for _ in 0..3 {
            until_refused(&channel, code).await;
        }
        let status = status(&channel, &servers[0]);
        assert!(
            !status.ejected && status.pushback_until.is_none(),
            "{status}"
        );
    }
    // Disabled explicitly, and by default.
    let disabled = |builder: ChannelBuilder| builder.max_pushback(Duration::ZERO);
    let by_default = BalancedChannel::builder()
        .policy(LbPolicy::WeightedRoundRobin)
        .addresses(servers.iter().map(|server| server.cut.address()))
        .connect_lazy();
    ready(&by_default, 2).await;
    for channel in [channel_to(&servers.each_ref(), disabled).await, by_default] {
        servers[0].set(refusal(Code::ResourceExhausted, "60000"));
        for _ in 0..3 {
            until_refused(&channel, Code::ResourceExhausted).await;
        }
        assert_eq!(status(&channel, &servers[0]).pushback_until, None);
    }
}

/// Makes calls until the pushback of the server has ended. It must never be excluded.
async fn never_excluded(channel: &BalancedChannel, server: &Server) {
    while status(channel, server).pushback_until.is_none() {
        let _ = say(channel).await;
    }
    while status(channel, server).pushback_until.is_some() {
        let _ = say(channel).await;
        server.set(None);
        let status = status(channel, server);
        assert!(!status.ejected, "{status}");
    }
}

#[tokio::test]
async fn pushbacks_count_by_weight() {
    let servers = [Server::start(), Server::start()];
    let (changes, stream) = mpsc::unbounded_channel();
    let channel = BalancedChannel::builder()
        .policy(LbPolicy::WeightedRoundRobin)
        .max_pushback(Duration::from_secs(10))
        .discover(UnboundedReceiverStream::new(stream))
        .connect_lazy();
    for (server, weight) in servers.iter().zip([3, 1]) {
        let attributes = Attributes::new().with_weight(weight);
        insert(&changes, &server.cut.address(), attributes);
    }
    ready(&channel, 2).await;
    servers[0].set(refusal(Code::ResourceExhausted, "300"));
    never_excluded(&channel, &servers[0]).await;
    servers[1].set(refusal(Code::ResourceExhausted, "60000"));
    until_refused(&channel, Code::ResourceExhausted).await;
    pushed_back(&channel, &servers[1]).await;
}

#[tokio::test]
async fn a_ring_ignores_pushbacks() {
    let servers = [Server::start(), Server::start()];
    let configure = |builder: ChannelBuilder| builder.policy(LbPolicy::RingHash);
    let channel = channel_to(&servers.each_ref(), configure).await;
    servers[0].set(refusal(Code::ResourceExhausted, "300"));
    never_excluded(&channel, &servers[0]).await;
}

/// Calls that wait for the selection get the streams of its server.
#[tokio::test]
async fn a_selection_whose_servers_all_push_back_is_served() {
    let mut servers = [Raw::start(|_| ()), Raw::start(|_| ()), Raw::start(|_| ())];
    let (changes, stream) = mpsc::unbounded_channel();
    let channel = BalancedChannel::builder()
        .max_pushback(Duration::from_secs(3600))
        .max_requests_per_endpoint(1)
        .discover(UnboundedReceiverStream::new(stream))
        .connect_lazy();
    for (server, version) in servers.iter().zip(["1", "2", "2"]) {
        let attributes = Attributes::new().with_version(version);
        insert(&changes, &server.address(), attributes);
    }
    ready(&channel, 3).await;
    let call = || {
        let mut client = GreeterClient::new(channel.clone());
        let mut request = Request::new(hello("world"));
        request.extensions_mut().insert(WaitForReady::new(true));
        request.extensions_mut().insert(Select::version("1"));
        tokio::spawn(async move { client.say_hello(request).await })
    };
    let busy = &mut servers[0];
    let refused = call();
    let refusal = refusal(Code::ResourceExhausted, "3600000");
    refuse(busy.accept().await, refusal);
    let status = refused.await.expect("no panic").expect_err("a refusal");
    assert_eq!(status.code(), Code::ResourceExhausted);
    let shared = channel.0.shared();
    until("the server is excluded", || shared.summary().ready == 2).await;
    let first = call();
    let open = busy.accept().await;
    let second = call();
    until("the second call waits", || shared.waiters().waiting() == 1).await;
    reply(open).await;
    reply(in_time("the second call", busy.accept()).await).await;
    for call in [first, second] {
        call.await.expect("no panic").expect("an answer");
    }
}

/// The refusal is about the server that is about to end, and the address may already belong to the next one.
#[tokio::test]
async fn a_refusal_on_a_closing_connection_keeps_no_call_away() {
    let mut server = Raw::start(|_| ());
    let channel = BalancedChannel::builder()
        .max_pushback(Duration::from_secs(10))
        .addresses([server.address()])
        .connect_lazy();
    ready(&channel, 1).await;
    for is_replaced in [true, false] {
        let routing = Routing::avoiding([]);
        let routed = spawn_routed(&channel, &routing);
        let open = server.accept().await;
        if is_replaced {
            channel.reconnect(&routing);
            until("the connection is replaced", || {
                server.connections.load(Ordering::SeqCst) == 2
            })
            .await;
            ready(&channel, 1).await;
        }
        refuse(open, refusal(Code::ResourceExhausted, "60000"));
        let status = routed.await.expect("no panic").expect_err("a refusal");
        assert_eq!(status.code(), Code::ResourceExhausted);
        let has_pushback = channel.endpoints()[0].pushback_until.is_some();
        assert_eq!(has_pushback, !is_replaced);
    }
}

/// With one server, and while too many servers are in pushback, all servers get calls.
#[tokio::test]
async fn pushbacks_of_too_many_endpoints_are_ignored() {
    let refuses = refusal(Code::ResourceExhausted, "60000");
    for count in 1..=4 {
        let servers: Vec<_> = (0..count).map(|_| Server::start()).collect();
        let all: Vec<_> = servers.iter().collect();
        let channel = channel_to(&all, |builder| builder).await;
        let ejected = || channel.endpoints().iter().filter(|one| one.ejected).count();
        let mut expected = 0;
        for (number, server) in (1..).zip(&servers) {
            server.set(refuses);
            // While the pushbacks are ignored, calls are refused at any of these servers.
            while status(&channel, server).pushback_until.is_none() {
                until_refused(&channel, Code::ResourceExhausted).await;
            }
            let is_ignored = if expected > 0 {
                3 * number > 2 * count
            } else {
                2 * number > count
            };
            expected = if is_ignored { 0 } else { number };
            until("the pushbacks are counted", || ejected() == expected).await;
            let recorded = channel.endpoints();
            let recorded = recorded.iter().filter(|one| one.pushback_until.is_some());
            assert_eq!(recorded.count(), number);
        }
        for server in &servers {
            server.set(None);
        }
        let before: Vec<_> = servers.iter().map(Server::calls).collect();
        for _ in 0..10 * count {
            say(&channel).await.expect("no call fails");
        }
        for (server, before) in servers.iter().zip(before) {
            assert!(server.calls() > before, "a server gets no calls");
        }
    }
}

#[tokio::test]
async fn the_only_server_that_answers_is_used_despite_its_pushback() {
    let servers = [Server::start(), Server::start()];
    let channel = channel_to(&servers.each_ref(), |builder| builder).await;
    let [busy, other] = servers;
    busy.set(refusal(Code::ResourceExhausted, "60000"));
    until_refused(&channel, Code::ResourceExhausted).await;
    pushed_back(&channel, &busy).await;
    busy.set(None);
    let before = busy.calls();
    let lost = other.cut.address();
    drop(other);
    until("the other server is lost", || {
        let statuses = channel.endpoints();
        let mut statuses = statuses.iter();
        statuses.any(|one| one.address.as_str() == lost && one.state != EndpointState::Ready)
    })
    .await;
    while busy.calls() == before {
        let _ = say(&channel).await;
    }
    say(&channel).await.expect("an answer");
}

#[tokio::test]
async fn a_new_generation_of_an_endpoint_ends_its_pushback() {
    let servers = [Server::start(), Server::start()];
    let (changes, stream) = mpsc::unbounded_channel();
    let hour = Duration::from_secs(3600);
    let channel = BalancedChannel::builder()
        .max_pushback(hour)
        .discover(UnboundedReceiverStream::new(stream))
        .connect_lazy();
    for server in &servers {
        let attributes = Attributes::new().with_generation(1);
        insert(&changes, &server.cut.address(), attributes);
    }
    ready(&channel, 2).await;
    servers[0].set(refusal(Code::ResourceExhausted, "3600000"));
    until_refused(&channel, Code::ResourceExhausted).await;
    pushed_back(&channel, &servers[0]).await;
    let attributes = Attributes::new().with_generation(2);
    insert(&changes, &servers[0].cut.address(), attributes);
    until("the pushback has ended", || {
        let status = status(&channel, &servers[0]);
        !status.ejected && status.pushback_until.is_none()
    })
    .await;
}

/// A retry after a pushback is sent to the other server, and later calls are as well.
#[tokio::test]
async fn a_retried_refusal_keeps_other_calls_away_as_well() {
    let servers = [Server::start(), Server::start()];
    let policy = RetryPolicy::new([Code::ResourceExhausted]);
    let channel = channel_to(&servers.each_ref(), |builder| builder.retry(policy)).await;
    servers[0].set(refusal(Code::ResourceExhausted, "100"));
    while servers[0].calls() == 0 {
        say(&channel).await.expect("a retry");
    }
    let refused = servers[0].calls();
    assert_eq!(refused, 1);
    servers[0].set(refusal(Code::ResourceExhausted, "60000"));
    while servers[0].calls() == 1 {
        let call = tokio::time::timeout(Duration::from_millis(100), say(&channel));
        let _ = call.await;
    }
    pushed_back(&channel, &servers[0]).await;
    for _ in 0..20 {
        say(&channel).await.expect("no call fails");
    }
    assert_eq!(servers[0].calls(), 2);
}
