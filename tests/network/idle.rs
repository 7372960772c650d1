//! A channel without calls.

use tokio::runtime::Handle;
use tokio::time::sleep;
use tonic_etcd::BalancedChannel;

use super::support::peer::Peer;
use super::{ms, over, say};

/// A process may have hundreds of channels, most of them without calls. Therefore a channel without calls must use little CPU time.
#[tokio::test]
async fn a_channel_without_calls_seldom_wakes_its_task() {
    let peer = Peer::good().await;
    let channel = over(BalancedChannel::builder(), &[peer.address.to_string()]).await;
    say(&channel, ms(2_000))
        .await
        .expect("the server must respond");
    // A channel counts as idle after 10 s without calls.
    sleep(ms(12_500)).await;
    let metrics = Handle::current().metrics();
    let before = metrics.worker_park_count(0);
    sleep(ms(6_000)).await;
    let wakes = metrics.worker_park_count(0) - before;
    println!("{wakes} wakes in 6 s");
    assert!(
        wakes <= 15,
        "at most 15 wakes in 6 s are expected, not {wakes}; a wake every 200 ms would be 30"
    );
    say(&channel, ms(2_000))
        .await
        .expect("the channel must still work");
}
