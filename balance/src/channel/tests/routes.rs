//! Calls with a [`Routing`]: avoided endpoints, the endpoint that a call was sent to, reported failures, and replaced connections.

use tokio::time::Instant;
use tower::service_fn;

use super::*;
use crate::channel::Routing;

/// Makes one call with this routing.
async fn say_by(channel: &BalancedChannel, route: &Routing) -> Result<String, tonic::Status> {
    let service = service_fn(|request| channel.call_routed(route, request));
    let mut client = GreeterClient::new(service);
    let reply = in_time("a call", client.say_hello(hello("world"))).await?;
    Ok(reply.into_inner().message)
}

fn avoiding(addresses: &[&str]) -> Routing {
    let addresses = addresses.iter().map(|one| one.parse().expect("an address"));
    Routing::avoiding(addresses.collect::<Vec<Address>>())
}

#[tokio::test]
async fn avoided_endpoints_get_no_call_while_another_is_ready() {
    let servers = [
        Greeter::start("alpha"),
        Greeter::start("beta"),
        Greeter::start("gamma"),
    ];
    let [alpha, beta, gamma] = servers.each_ref().map(Greeter::address);
    let channel = over([&alpha, &beta, &gamma]);
    ready(&channel, 3).await;
    for (avoided, expected) in [
        (vec![&*alpha], vec![&beta, &gamma]),
        (vec![&alpha, &beta], vec![&gamma]),
        // If all endpoints are avoided, only the last endpoint of the list gets no call.
        (vec![&alpha, &beta, &gamma], vec![&alpha, &beta]),
    ] {
        let mut went = std::collections::BTreeSet::new();
        for _ in 0..100 {
            let route = avoiding(&avoided);
            assert_eq!(route.address(), None);
            say_by(&channel, &route).await.expect("an answer");
            went.insert(
                route
                    .address()
                    .expect("the address of the call")
                    .to_string(),
            );
        }
        let expected = expected.into_iter().cloned().collect();
        assert_eq!(went, expected, "avoiding {avoided:?}");
    }
    let [_, beta_server, gamma_server] = servers;
    beta_server.shut_down().await;
    gamma_server.shut_down().await;
    until("the other endpoints are not ready", || {
        let endpoints = channel.endpoints();
        let ready = |status: &&crate::channel::EndpointStatus| status.state == EndpointState::Ready;
        endpoints.iter().filter(ready).count() == 1
    })
    .await;
    let route = avoiding(&[&alpha]);
    say_by(&channel, &route)
        .await
        .expect("the last ready endpoint serves");
    assert_eq!(route.address(), Some(alpha.parse().expect("an address")));
}

#[tokio::test]
async fn a_reported_failure_raises_the_latency_estimate() {
    let server = Greeter::start("alpha");
    let channel = over([server.address()]);
    let route = avoiding(&[]);
    say_by(&channel, &route).await.expect("an answer");
    let latency = || channel.endpoints()[0].latency.expect("a call was made");
    // A reported failure counts as 100 ms. The first call may have taken longer, so further calls lower the measured latency first.
    while latency() > Duration::from_millis(50) {
        say_by(&channel, &route).await.expect("an answer");
    }
    let before = latency();
    route.report_failure(Instant::now(), Some(Instant::now()));
    assert!(latency() > before, "{before:?} {:?}", latency());
}

/// After `reconnect`, no further routed call is sent on the old connection. The open streams of the old connection continue.
#[tokio::test]
async fn a_replaced_connection_gets_no_new_calls_and_its_streams_continue() {
    let connections = Arc::new(AtomicUsize::new(0));
    let server = Greeter::start("alpha");
    let (address, count) = (server.address(), Arc::clone(&connections));
    let channel = BalancedChannel::builder()
        .connector(move |_| {
            count.fetch_add(1, Ordering::SeqCst);
            tokio::net::TcpStream::connect(address.clone())
        })
        .addresses(["alpha:1"])
        .connect_lazy();
    let route = avoiding(&[]);
    let (feed, requests) = mpsc::unbounded_channel();
    let mut client = GreeterClient::new(service_fn(|request| channel.call_routed(&route, request)));
    let chat = client.chat(UnboundedReceiverStream::new(requests));
    let mut replies = in_time("a stream", chat)
        .await
        .expect("a stream")
        .into_inner();
    for round in 1..=20 {
        assert_eq!(connections.load(Ordering::SeqCst), round);
        let next = avoiding(&[]);
        say_by(&channel, &next).await.expect("an answer");
        channel.reconnect(&next);
        say_by(&channel, &avoiding(&[])).await.expect("an answer");
        assert_eq!(
            connections.load(Ordering::SeqCst),
            round + 1,
            "a new connection must be open"
        );
    }
    feed.send(hello("still here")).expect("an open stream");
    let reply = in_time("a reply", replies.message()).await;
    assert!(reply.expect("a reply").is_some());
    // The channel's background task closes old connections without calls at its next periodic check. The endpoint stays ready.
    until("the old connections are closed", || {
        channel.endpoints()[0].connections == 2
    })
    .await;
    assert_eq!(channel.endpoints()[0].state, EndpointState::Ready);
}
