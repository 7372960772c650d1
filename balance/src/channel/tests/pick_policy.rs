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
