//! etcd, the keys of the servers, and the control plane of tonic-xds.

use std::time::Duration;

use etcd_client::Client;
use tokio::process::Command;
use tonic_etcd::testing::Etcd;

use super::process::{Output, Programs};

pub const SERVICE: &str = "peers";

pub struct World<'a> {
    pub programs: &'a Programs,
    _etcd: Etcd,
    endpoint: String,
    client: Client,
    /// The control plane and its address.
    plane: Option<(Output, String)>,
}

impl<'a> World<'a> {
    /// Starts etcd with a key for each server.
    pub async fn start(programs: &'a Programs, addresses: &[String]) -> Self {
        let etcd = Etcd::start().await.unwrap();
        let client = Client::connect(etcd.endpoints(), None).await.unwrap();
        let mut world = Self {
            programs,
            endpoint: etcd.endpoints().remove(0),
            _etcd: etcd,
            client,
            plane: None,
        };
        for address in addresses {
            world.put(address).await;
        }
        if programs.tonic_xds.is_some() {
            let mut command = Command::new(&programs.go);
            command.args(["ads", world.etcd(), SERVICE]);
            let mut output = Output::start(command);
            let address = output.line(Duration::ZERO).await;
            world.plane = Some((output, address));
        }
        world
    }

    pub fn etcd(&self) -> &str {
        &self.endpoint
    }

    pub fn plane(&self) -> Option<&str> {
        let (_, address) = self.plane.as_ref()?;
        Some(address)
    }

    /// Registers a server, in the format of etcd's own naming package.
    pub async fn put(&self, address: &str) {
        let value = format!("{{\"Op\":0,\"Addr\":\"{address}\",\"Metadata\":null}}");
        let put = self.client.kv_client().put(key(address), value, None).await;
        put.unwrap();
    }

    pub async fn delete(&self, address: &str) {
        let delete = self.client.kv_client().delete(key(address), None).await;
        delete.unwrap();
    }
}

fn key(address: &str) -> String {
    format!("/gRPC/{SERVICE}/{address}")
}
