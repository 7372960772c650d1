//! Panics in the code of users: request streams and transports.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic_etcd::{BalancedChannel, channel::ChannelBuilder};

use super::support::callers::Callers;
use super::support::greeter::HelloRequest;
use super::support::greeter::greeter_client::GreeterClient;
use super::support::peer::Peer;
use super::support::within;
use super::{addresses, all_well, ms, over, retrying, say, support};

/// A request stream that panics at message `at`. The pauses between its messages ensure that a background task polls it.
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
        assert!(number != at, "the stream panics on purpose");
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
                // If the stream panics in the task of the caller, the `JoinHandle` returns the panic.
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
                        let status = outcome.expect_err("an incomplete request must fail its call");
                        println!("message {at}, streaming {streaming}: {status:?}");
                    }
                    Err(error) => assert!(error.is_panic(), "{error}"),
                }
            }
        }
        all_well(callers, ms(200), "beside panics").await;
        assert_eq!(peer.connections(), 1, "the connection must not be replaced");
    }
}

/// A transport whose reads panic once `faulty` is set.
struct Fragile {
    socket: TcpStream,
    faulty: Arc<AtomicBool>,
}

impl AsyncRead for Fragile {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let faulty = self.faulty.load(Ordering::SeqCst);
        assert!(!faulty, "the transport panics on purpose");
        Pin::new(&mut self.socket).poll_read(cx, buf)
    }
}

impl AsyncWrite for Fragile {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_whose_task_has_panicked_is_replaced() {
    let peer = Peer::good().await;
    let faulty = Arc::new(AtomicBool::new(false));
    let shared = Arc::clone(&faulty);
    let builder = BalancedChannel::builder().connector(move |address| {
        let faulty = Arc::clone(&shared);
        async move {
            let socket = TcpStream::connect(address.as_str()).await?;
            Ok(Fragile { socket, faulty })
        }
    });
    let channel = over(builder, &addresses([&peer])).await;
    say(&channel, ms(2_000))
        .await
        .expect("a call before the panic must succeed");
    faulty.store(true, Ordering::SeqCst);
    // The task of the connection panics during this call. The call must end nevertheless.
    let outcome = say(&channel, ms(2_000)).await;
    outcome.expect_err("the task of the connection must have panicked");
    faulty.store(false, Ordering::SeqCst);
    within(ms(5_000), "a new connection serves", async || {
        say(&channel, ms(500)).await.is_ok()
    })
    .await;
    assert!(peer.connections() >= 2, "the connection must be replaced");
}
