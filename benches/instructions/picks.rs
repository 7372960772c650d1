//! Picks whose permit is released at once.

use std::hint::black_box;
use std::time::Duration;

use tokio::runtime::Builder;
use tonic_etcd::__bench::{answered, pick, pick_hashed};
use tonic_etcd::{BalancedChannel, LbPolicy};
use tower::discover::Change;

use super::changes::address;
use super::measured;
use super::peer::{in_memory, ready};

pub fn run(policy: LbPolicy, endpoints: usize, picks: usize) {
    measure(policy, endpoints, picks, |channel, _| pick(channel));
}

/// Picks by the hash of the number of the pick.
pub fn run_hashed(endpoints: usize, picks: usize) {
    measure(LbPolicy::RingHash, endpoints, picks, |channel, number| {
        pick_hashed(channel, &number.to_le_bytes())
    });
}

fn measure(
    policy: LbPolicy,
    endpoints: usize,
    picks: usize,
    pick: impl Fn(&BalancedChannel, usize) -> bool,
) {
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let changes = (0..endpoints)
        .map(|index| Ok::<_, std::convert::Infallible>(Change::Insert(address(index), ())));
    let changes: Vec<_> = changes.collect();
    let channel = runtime.block_on(async {
        let builder = in_memory(BalancedChannel::builder(), policy);
        let channel = builder.discover(tokio_stream::iter(changes)).connect_lazy();
        ready(&channel, endpoints).await;
        channel
    });
    // The latencies differ, so that picks compare them.
    for _ in 0..endpoints * 10 {
        answered(&channel, Duration::from_micros(fastrand::u64(500..1_500)));
    }
    measured(|| {
        for number in 0..picks {
            assert!(black_box(pick(black_box(&channel), number)));
        }
    });
}
