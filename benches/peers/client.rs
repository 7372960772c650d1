//! The client process of this project's channel.

use tonic_etcd::{BalancedChannel, LbPolicy, Registry};

use super::callers::{Caller, Load};
use super::greeter::HelloRequest;
use super::greeter::greeter_client::GreeterClient;

pub async fn run(etcd: &str, service: &str, policy: &str, load: Load) {
    let policy = match policy {
        "latency" => LbPolicy::Latency,
        "least_request" => LbPolicy::LeastRequest,
        "weighted_round_robin" => LbPolicy::WeightedRoundRobin,
        policy => panic!("unknown policy {policy}"),
    };
    let registry = Registry::connect([etcd]).await.unwrap();
    let channel = registry.channel(service).policy(policy).connect_lazy();
    load.run(GreeterClient::new(channel)).await;
}

impl Caller for GreeterClient<BalancedChannel> {
    async fn call(&mut self, name: String) -> bool {
        self.say_hello(HelloRequest { name, replies: 0 })
            .await
            .is_ok()
    }
}
