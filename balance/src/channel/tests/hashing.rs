//! Calls by consistent hash.

use super::*;
use crate::channel::{HashKey, Select};

/// Returns a channel with [`LbPolicy::RingHash`], and the sender of its endpoint changes.
fn hashed() -> (Changes, BalancedChannel) {
    let (changes, stream) = mpsc::unbounded_channel();
    let channel = BalancedChannel::builder()
        .service("greeter")
        .policy(LbPolicy::RingHash)
        .request_hash_header("x-customer")
        .discover(UnboundedReceiverStream::new(stream))
        .connect_lazy();
    (changes, channel)
}

async fn send(channel: &BalancedChannel, request: Request<HelloRequest>) -> String {
    let mut client = GreeterClient::new(channel.clone());
    let reply = in_time("a call", client.say_hello(request)).await;
    let message = reply.expect("no call fails").into_inner().message;
    message.rsplit(' ').next().unwrap_or_default().to_owned()
}

fn keyed(key: &str) -> Request<HelloRequest> {
    let mut request = Request::new(hello("world"));
    request.extensions_mut().insert(HashKey::new(key));
    request
}

/// Returns the server of each of these keys.
async fn servers(channel: &BalancedChannel, keys: usize) -> Vec<String> {
    let mut servers = Vec::new();
    for key in 0..keys {
        servers.push(send(channel, keyed(&format!("customer-{key}"))).await);
    }
    servers
}

#[tokio::test]
async fn a_key_is_sent_to_the_same_server_by_every_channel_and_after_a_restart() {
    let greeters = ["alpha", "beta", "gamma", "delta"].map(Greeter::start);
    let (changes, channel) = hashed();
    for greeter in &greeters {
        // The names are those that the servers keep under every address.
        let name = greeter.name().to_owned();
        let attributes = Attributes::new().with_hash_key(name);
        insert(&changes, &greeter.address(), attributes);
    }
    ready(&channel, 4).await;
    let before = servers(&channel, 200).await;
    let used: std::collections::BTreeSet<_> = before.iter().collect();
    assert_eq!(used.len(), 4, "every server has keys");
    assert_eq!(servers(&channel, 200).await, before);
    // These values are the same in every version of this library.
    assert_eq!(before[..8], GOLDEN);
    drop(channel);
    let (changes, channel) = hashed();
    for greeter in greeters.iter().rev() {
        let attributes = Attributes::new().with_hash_key(greeter.name().to_owned());
        insert(&changes, &greeter.address(), attributes);
    }
    ready(&channel, 4).await;
    assert_eq!(servers(&channel, 200).await, before);
    // The value of the header is the same key.
    for (key, server) in before.iter().enumerate().take(20) {
        let mut request = Request::new(hello("world"));
        let value = format!("customer-{key}").parse().expect("a value");
        request.metadata_mut().insert("x-customer", value);
        assert_eq!(&send(&channel, request).await, server);
    }
    // Calls without a key are sent to every server.
    assert_eq!(tally(&channel, 200).await.len(), 4);
}

const GOLDEN: [&str; 8] = [
    "delta", "gamma", "beta", "delta", "gamma", "gamma", "gamma", "beta",
];

#[tokio::test]
async fn the_keys_of_a_removed_endpoint_are_spread_and_return_with_it() {
    let greeters = ["alpha", "beta", "gamma", "delta"].map(Greeter::start);
    let (changes, channel) = hashed();
    for greeter in &greeters {
        insert(&changes, &greeter.address(), Attributes::new());
    }
    ready(&channel, 4).await;
    let before = servers(&channel, 200).await;
    remove(&changes, &greeters[0].address());
    until("the endpoint is removed", || channel.endpoints().len() == 3).await;
    let without = servers(&channel, 200).await;
    let mut heirs = std::collections::BTreeSet::new();
    for (before, without) in before.iter().zip(&without) {
        if before == "alpha" {
            heirs.insert(without);
        } else {
            assert_eq!(before, without, "no other key moves");
        }
    }
    assert_eq!(heirs.len(), 3, "all others share the keys");
    insert(&changes, &greeters[0].address(), Attributes::new());
    ready(&channel, 4).await;
    assert_eq!(servers(&channel, 200).await, before);
}

#[tokio::test]
async fn the_first_call_of_a_selection_is_sent_to_the_server_of_its_key() {
    const KEYS: usize = 12;
    let greeters = ["alpha", "beta", "gamma", "delta"].map(Greeter::start);
    let (changes, channel) = hashed();
    for greeter in &greeters {
        let attributes = Attributes::new().with_hash_key(greeter.name().to_owned());
        let labels = (0..KEYS).map(|key| key.to_string());
        let attributes = labels.fold(attributes, |all, key| all.with_label(key, "yes"));
        insert(&changes, &greeter.address(), attributes);
    }
    ready(&channel, 4).await;
    let expected = servers(&channel, KEYS).await;
    for (key, expected) in expected.iter().enumerate() {
        // All servers match the selection, and no call has used it before.
        let mut request = keyed(&format!("customer-{key}"));
        let select = Select::label(key.to_string(), "yes");
        let select = if key % 2 == 0 {
            select
        } else {
            select.or_any()
        };
        request.extensions_mut().insert(select);
        assert_eq!(&send(&channel, request).await, expected);
    }
    let mut request = keyed("customer-1");
    request.extensions_mut().insert(Select::version("none"));
    let mut client = GreeterClient::new(channel.clone());
    let status = in_time("a call", client.say_hello(request)).await;
    let status = status.expect_err("no server matches");
    assert!(status.message().contains("version"), "{status:?}");
}
