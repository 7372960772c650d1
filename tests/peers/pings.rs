//! PINGs to servers that close the connection if a client sends too many of them.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status, Streaming};
use tonic_etcd::BalancedChannel;

use crate::proto::{StreamingOutputCallRequest, StreamingOutputCallResponse, wanting};
use crate::servers::{Kind, Options, Server};
use crate::support::all_ready;
use crate::tap::Tap;
use crate::{Client, empty, ms, stream};

/// A bidirectional stream that sends a response only after a request.
struct Quiet {
    requests: mpsc::Sender<StreamingOutputCallRequest>,
    responses: Streaming<StreamingOutputCallResponse>,
}

impl Quiet {
    /// Opens a stream and checks that it responds.
    async fn open(channel: &BalancedChannel) -> Result<Self, Status> {
        let (requests, sent) = mpsc::channel(1);
        let first = wanting([(8, Duration::ZERO)]);
        requests.send(first).await.unwrap();
        let call = Client::new(channel.clone());
        let responses = { call }.full_duplex_call(ReceiverStream::new(sent)).await?;
        let mut responses = responses.into_inner();
        responses.message().await?;
        Ok(Self {
            requests,
            responses,
        })
    }

    /// Checks that the stream still responds.
    async fn answers(&mut self) -> Result<(), Status> {
        let request = wanting([(8, Duration::ZERO)]);
        // If the call has ended, reading the response returns the reason.
        let _ = self.requests.send(request).await;
        let response = self.responses.message().await?;
        response
            .map(drop)
            .ok_or_else(|| Status::ok("the stream has ended"))
    }
}

/// Duration of each test.
const PERIOD: Duration = Duration::from_secs(20);
/// Number of overruns, which are calls that exceed their deadline.
const OVERRUNS: usize = 12;

for_each_server!(overruns_beside_a_quiet_stream_lose_no_connection);
async fn overruns_beside_a_quiet_stream_lose_no_connection(kind: Kind) {
    let Some(server) = Server::start(kind, Options::default()).await else {
        return;
    };
    let link = Tap::start(server.address.clone()).await;
    let channel = BalancedChannel::builder()
        .addresses([link.address.to_string()])
        .connect_lazy();
    all_ready(&channel, 1).await;
    let start = Instant::now();
    let mut quiet = Quiet::open(&channel).await.unwrap();
    for _ in 0..OVERRUNS {
        let mut request = Request::new(wanting([(8, ms(5_000))]));
        request.set_timeout(ms(150));
        let status = stream(Client::new(channel.clone()), request).await;
        assert_eq!(status.unwrap_err().code(), Code::DeadlineExceeded);
    }
    sleep_until(start + PERIOD).await;
    let survived = quiet.answers().await;
    let seen = link.seen();
    println!("{kind:?}: {OVERRUNS} overruns, {seen:?}; the quiet stream: {survived:?}");
    survived.expect("the quiet stream must still respond");
    assert_eq!(
        seen.lost(),
        0,
        "{kind:?}: no connection may be closed: {seen:?}"
    );
}

/// A keep-alive interval that is shorter than the server permits loses no connection, because the channel limits its PINGs.
async fn keep_alive(kind: Kind) {
    let Some(server) = Server::start(kind, Options::default()).await else {
        return;
    };
    let link = Tap::start(server.address.clone()).await;
    let channel = BalancedChannel::builder()
        .http2_keep_alive_interval(ms(1_000))
        .keep_alive_timeout(ms(2_000))
        .addresses([link.address.to_string()])
        .connect_lazy();
    all_ready(&channel, 1).await;
    let end = Instant::now() + PERIOD;
    let (mut streams, mut broken) = (0, Vec::new());
    while Instant::now() < end {
        let mut quiet = match Quiet::open(&channel).await {
            Ok(quiet) => quiet,
            Err(status) => {
                broken.push(format!("not opened: {status:?}"));
                sleep(ms(20)).await;
                continue;
            }
        };
        streams += 1;
        tokio::select! {
            ended = quiet.responses.message() => broken.push(format!("{ended:?}")),
            () = sleep_until(end) => quiet.answers().await.expect("the last stream must respond"),
        }
    }
    let connections = link.connections();
    println!(
        "{kind:?}: keep-alive of 1 s for {PERIOD:?}: {connections} connections, {streams} streams; {broken:#?}"
    );
    // The server permits two PINGs. The channel sends another PING only after five minutes, which is longer than the test.
    assert_eq!(connections, 1, "{kind:?}: no connection may be closed");
    assert_eq!(streams, 1, "{kind:?}: the stream must survive");
    empty(Client::new(channel))
        .await
        .expect("a call must be served");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_short_keep_alive_loses_no_connection_of_grpc_go() {
    keep_alive(Kind::Go).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_short_keep_alive_loses_no_connection_of_grpc_java() {
    keep_alive(Kind::Java).await;
}
