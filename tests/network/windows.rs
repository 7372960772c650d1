//! Streams whose responses the caller does not read, and other calls on the same connection.

use tonic_etcd::BalancedChannel;

use super::support::greeter::HelloRequest;
use super::support::greeter::greeter_client::GreeterClient;
use super::support::peer::{Manner, Peer};
use super::{addresses, ms, over, say};

/// The responses of each stream are larger than its flow-control window. So the server cannot send all of them before they are read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unread_streams_do_not_stop_other_calls() {
    let big = Manner {
        reply: 64 * 1024,
        ..Manner::default()
    };
    let peer = Peer::start(big).await;
    let channel = over(BalancedChannel::builder(), &addresses([&peer])).await;
    let mut unread = Vec::new();
    for _ in 0..72 {
        let mut client = GreeterClient::new(channel.clone());
        let wanted = HelloRequest {
            name: String::new(),
            replies: 18,
        };
        unread.push(client.say_hellos(wanted).await.unwrap().into_inner());
    }
    peer.set(Manner::default());
    let mut failed = 0;
    // The windows fill up during these calls.
    for _ in 0..40 {
        failed += usize::from(say(&channel, ms(500)).await.is_err());
        tokio::time::sleep(ms(20)).await;
        if failed == 3 {
            break;
        }
    }
    println!(
        "{failed} of 40 calls failed with {} unread streams",
        unread.len()
    );
    assert_eq!(
        failed, 0,
        "no other call may fail while the streams are not read"
    );
    assert_eq!(peer.connections(), 1, "all calls must use one connection");
    // Once a stream is read, the server sends the messages that did not fit into the window.
    let mut last = unread.pop().unwrap();
    let mut replies = 0;
    while last.message().await.unwrap().is_some() {
        replies += 1;
    }
    assert_eq!(
        replies, 18,
        "the stream must yield all its messages when it is read at last"
    );
}
