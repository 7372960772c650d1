//! Calls over a Unix socket.
#![cfg(unix)]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

#[path = "../examples/greeter/mod.rs"]
mod greeter;

use std::time::Duration;

use greeter::greeter_client::GreeterClient;
use greeter::greeter_server::GreeterServer;
use greeter::{HelloRequest, NamedGreeter};
use tokio::net::UnixListener;
use tonic::transport::Server;
use tonic_etcd::{BalancedChannel, channel::ServedBy};

#[tokio::test]
async fn a_server_on_a_unix_socket_is_called() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("greeter.sock");
    let address = format!("unix:{}", path.display());
    let channel = BalancedChannel::builder()
        .timeout(Duration::from_secs(5))
        .addresses([&address])
        .connect_lazy();

    let mut client = GreeterClient::new(channel.clone());
    let request = || HelloRequest {
        name: "socket".to_owned(),
        ..HelloRequest::default()
    };
    let status = client.say_hello(request()).await.unwrap_err();
    assert!(status.message().contains(&address), "{status}");

    let listener = UnixListener::bind(&path).unwrap();
    let incoming = tokio_stream::wrappers::UnixListenerStream::new(listener);
    let greeter = GreeterServer::new(NamedGreeter("socket".to_owned()));
    let server = Server::builder()
        .add_service(greeter)
        .serve_with_incoming(incoming);
    let server = tokio::spawn(server);
    let mut request = tonic::Request::new(request());
    request
        .extensions_mut()
        .insert(tonic_etcd::channel::WaitForReady::new(true));
    let response = client.say_hello(request).await.unwrap();
    let served_by: &ServedBy = response.extensions().get().unwrap();
    assert_eq!(served_by.address().as_str(), address);
    server.abort();
}
