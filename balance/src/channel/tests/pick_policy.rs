//! A policy that the program provides.

use super::*;
use crate::RetryPolicy;
use crate::channel::{PickInfo, PickPolicy, ReadyEndpoints};

/// Picks an endpoint of the tenant in the header `x-tenant`.
struct ByTenant;

impl PickPolicy for ByTenant {
    fn pick(&self, call: &PickInfo, endpoints: &ReadyEndpoints<'_>) -> Option<usize> {
        assert_eq!(call.path(), "/helloworld.Greeter/SayHello");
        assert!(!endpoints.is_empty());
        let tenant = call.headers().get("x-tenant")?.to_str().ok()?;
        if tenant == "out of range" {
            return Some(endpoints.len());
        }
        let own = endpoints.iter().enumerate().filter(|(_, endpoint)| {
            endpoint.is_usable() && endpoint.attributes().label("tenant") == Some(tenant)
        });
        own.min_by_key(|(_, endpoint)| endpoint.in_flight())
            .map(|(index, _)| index)
    }
}

async fn say_as(channel: &BalancedChannel, tenant: &str) -> Result<String, tonic::Status> {
    let mut client = GreeterClient::new(channel.clone());
    let mut request = Request::new(hello("world"));
    let value = tenant.parse().expect("a value");
    request.metadata_mut().insert("x-tenant", value);
    let message = in_time("a call", client.say_hello(request)).await?;
    let message = message.into_inner().message;
    Ok(message.rsplit(' ').next().unwrap_or_default().to_owned())
}

fn of(tenant: &str) -> Attributes {
    Attributes::new().with_label("tenant", tenant)
}

#[tokio::test]
async fn a_policy_of_the_program_picks_by_a_header_and_falls_back_to_the_channels() {
    let (changes, stream) = mpsc::unbounded_channel();
    let channel = BalancedChannel::builder()
        .pick_policy(ByTenant)
        .policy(LbPolicy::WeightedRoundRobin)
        .retry(RetryPolicy::new([Code::Unavailable]))
        .discover(UnboundedReceiverStream::new(stream))
        .connect_lazy();
    let servers = ["alpha", "beta", "gamma"].map(Greeter::start);
    for (server, tenant) in servers.iter().zip(["red", "red", "blue"]) {
        insert(&changes, &server.address(), of(tenant));
    }
    ready(&channel, 3).await;
    for _ in 0..30 {
        let red = say_as(&channel, "red").await.expect("an answer");
        assert!(["alpha", "beta"].contains(&&*red), "{red}");
        let blue = say_as(&channel, "blue").await.expect("an answer");
        assert_eq!(blue, "gamma");
    }
    for tenant in ["green", "out of range"] {
        let mut served = std::collections::BTreeSet::new();
        for _ in 0..3 {
            served.insert(say_as(&channel, tenant).await.expect("an answer"));
        }
        assert_eq!(served.len(), 3, "the channel's policy takes turns");
    }
    // A retry is not sent to the endpoint where the call has failed, even if the policy has no other endpoint.
    let refusing = Raw::answering(
        |_| {},
        |(_, mut respond)| async move {
            let head = Response::builder()
                .header("content-type", "application/grpc")
                .header("grpc-status", "14");
            let _ = respond.send_response(head.body(()).expect("a head"), true);
        },
    );
    insert(&changes, &refusing.address(), of("yellow"));
    ready(&channel, 4).await;
    for _ in 0..5 {
        say_as(&channel, "yellow").await.expect("another endpoint");
    }
}

/// Makes a call whose response is kept open by its body. Returns the address of its server as well.
async fn open_as(
    channel: BalancedChannel,
    tenant: &str,
) -> (String, Response<crate::channel::ResponseBody>) {
    use tower::Service;
    let request = http::Request::post("/helloworld.Greeter/SayHello")
        .header("x-tenant", tenant)
        .body(tonic::body::Body::empty())
        .expect("a request");
    let response = in_time("a head", channel.clone().call(request)).await;
    let response = response.expect("a response");
    let served_by = response.extensions().get::<ServedBy>();
    let address = served_by.expect("the endpoint").address().to_string();
    (address, response)
}

/// Starts a server that allows one call on each connection, and sends only the head of each response.
fn narrow() -> support::Cut {
    Raw::answering(
        |builder| {
            builder.max_concurrent_streams(1);
        },
        async |(_, mut respond)| {
            let stream = respond.send_response(grpc_head(), false);
            let mut stream = stream.expect("a stream");
            let _ = std::future::poll_fn(|cx| stream.poll_reset(cx)).await;
        },
    )
}

#[tokio::test]
async fn a_call_that_waits_gets_the_endpoint_that_its_policy_prefers() {
    let (changes, stream) = mpsc::unbounded_channel();
    let channel = BalancedChannel::builder()
        .pick_policy(ByTenant)
        .discover(UnboundedReceiverStream::new(stream))
        .connect_lazy();
    let (red, blue) = (narrow(), narrow());
    insert(&changes, &red.address(), of("red"));
    insert(&changes, &blue.address(), of("blue"));
    ready(&channel, 2).await;
    // The channel opens two connections to each of the servers.
    let (mut at_red, mut at_blue) = (Vec::new(), Vec::new());
    for _ in 0..4 {
        let (address, response) = open_as(channel.clone(), "red").await;
        if address == red.address() {
            at_red.push(response);
        } else {
            at_blue.push(response);
        }
    }
    assert_eq!((at_red.len(), at_blue.len()), (2, 2));
    let call = tokio::spawn({
        let channel = channel.clone();
        async move { open_as(channel, "red").await.0 }
    });
    until("the call waits", || {
        channel.0.shared().waiters().waiting() == 1
    })
    .await;
    // The call is woken by the stream that becomes free first, and runs after both are free.
    at_blue.pop();
    at_red.pop();
    assert_eq!(call.await.expect("no panic"), red.address());
}

/// Counts its picks.
struct Counting(Arc<AtomicUsize>);

impl PickPolicy for Counting {
    fn pick(&self, _: &PickInfo, _: &ReadyEndpoints<'_>) -> Option<usize> {
        self.0.fetch_add(1, Ordering::SeqCst);
        None
    }
}

#[tokio::test]
async fn a_call_with_a_selection_does_not_pick_while_nothing_changes() {
    use crate::channel::Select;
    let picks = Arc::new(AtomicUsize::new(0));
    let (changes, stream) = mpsc::unbounded_channel();
    let channel = BalancedChannel::builder()
        .pick_policy(Counting(Arc::clone(&picks)))
        .discover(UnboundedReceiverStream::new(stream))
        .connect_lazy();
    let server = narrow();
    insert(&changes, &server.address(), of("red"));
    ready(&channel, 1).await;
    let _held = [
        open_as(channel.clone(), "red").await,
        open_as(channel.clone(), "red").await,
    ];
    let mut request = Request::new(hello("world"));
    request
        .extensions_mut()
        .insert(Select::label("tenant", "red"));
    let mut client = GreeterClient::new(channel.clone());
    tokio::spawn(async move { client.say_hello(request).await });
    until("the call waits", || {
        channel.0.shared().waiters().waiting() == 1
    })
    .await;
    tokio::time::pause();
    let before = picks.load(Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let picks = picks.load(Ordering::SeqCst) - before;
    // A publication may still be due at the begin.
    assert!(picks <= 2, "{picks} picks");
}
