//! Headers that apply to a connection and not to a call. Gateways copy such headers into the metadata of a call.

use http::{HeaderName, HeaderValue, Request};
use tonic::body::Body;
use tonic_etcd::{BalancedChannel, channel::ChannelBuilder};
use tower::util::MapRequest;

use super::support::greeter::greeter_client::GreeterClient;
use super::support::peer::Peer;
use super::{addresses, over, retrying, support};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_of_a_connection_do_not_fail_a_call() {
    let mut wrong = Vec::new();
    for builder in [BalancedChannel::builder as fn() -> ChannelBuilder, retrying] {
        for (name, value) in [
            ("connection", "keep-alive"),
            ("connection", "close, x-hop"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "keep-alive"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("te", "x"),
            ("te", "gzip, trailers"),
            ("content-length", "3"),
            ("content-length", "999999"),
            ("host", "example.com"),
        ] {
            let peer = Peer::good().await;
            let channel = over(builder(), &addresses([&peer])).await;
            // The headers are inserted below the generated client, which removes some of them itself.
            let copied = MapRequest::new(channel, move |mut request: Request<Body>| {
                let name = HeaderName::from_static(name);
                request
                    .headers_mut()
                    .insert(name, HeaderValue::from_static(value));
                request
            });
            let mut client = GreeterClient::new(copied);
            let call = tokio::time::timeout(support::SOON, client.say_hello(support::hello()));
            if let Err(status) = call.await.expect("the call must end") {
                wrong.push((name, value, status));
            }
        }
    }
    for (name, value, status) in &wrong {
        println!("{name}: {value}: {:?} {}", status.code(), status.message());
    }
    assert!(
        wrong.is_empty(),
        "headers that HTTP/2 forbids must be removed: {} failed",
        wrong.len()
    );
}

/// Each call has two headers that apply to a connection, and one other header.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_survives_calls_with_several_connection_headers() {
    let peer = Peer::good().await;
    let channel = over(BalancedChannel::builder(), &addresses([&peer])).await;
    let copied = MapRequest::new(channel.clone(), move |mut request: Request<Body>| {
        for (name, value) in [
            ("connection", "close"),
            ("upgrade", "h2c"),
            ("x-kept", "yes"),
        ] {
            let name = HeaderName::from_static(name);
            request
                .headers_mut()
                .append(name, HeaderValue::from_static(value));
        }
        request
    });
    let mut client = GreeterClient::new(copied);
    for _ in 0..10 {
        client
            .say_hello(support::hello())
            .await
            .expect("a call with such headers must succeed");
    }
    assert_eq!(peer.connections(), 1, "all calls must use one connection");
    assert_eq!(peer.executed(), 10);
    assert_eq!(peer.kept(), 10, "other headers must be sent");
}
