//! Request streams that panic.

use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic_etcd::{BalancedChannel, channel::ChannelBuilder};

use super::support::callers::Callers;
use super::support::greeter::HelloRequest;
use super::support::greeter::greeter_client::GreeterClient;
use super::support::peer::Peer;
use super::{addresses, all_well, ms, over, retrying, support};

/// A request stream that panics at message `at`. The pauses between its messages ensure that it is polled in the background.
fn panicking(at: u32) -> impl tokio_stream::Stream<Item = HelloRequest> {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        for number in 0..10 {
            tokio::time::sleep(ms(10)).await;
            if sender.send(number).await.is_err() {
                return;
            }
        }
    });
    ReceiverStream::new(receiver).map(move |number| {
        assert!(number != at, "a panic in a stream");
        support::hello()
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_stream_that_panics_fails_only_its_own_call() {
    for builder in [BalancedChannel::builder as fn() -> ChannelBuilder, retrying] {
        let peer = Peer::good().await;
        let channel = over(builder(), &addresses([&peer])).await;
        let callers = Callers::start(&channel, 4);
        for at in [0, 1, 5] {
            for streaming in [false, true] {
                let mut client = GreeterClient::new(channel.clone());
                // A panic in the caller's own task is visible to the caller.
                let call = tokio::spawn(async move {
                    if streaming {
                        let mut replies = client.chat(panicking(at)).await?.into_inner();
                        while replies.message().await?.is_some() {}
                        return Ok(());
                    }
                    client.greet_all(panicking(at)).await.map(drop)
                });
                let ended = timeout(ms(1_000), call).await;
                let ended = ended.unwrap_or_else(|_| {
                    panic!(
                        "a call whose stream panics at message {at} (streaming {streaming}) hangs"
                    )
                });
                match ended {
                    Ok(outcome) => {
                        let status = outcome.expect_err("the request was incomplete");
                        println!("message {at}, streaming {streaming}: {status:?}");
                    }
                    Err(error) => assert!(error.is_panic(), "{error}"),
                }
            }
        }
        all_well(callers, ms(200), "beside panics").await;
        assert_eq!(peer.connections(), 1, "the connection is still open");
    }
}
