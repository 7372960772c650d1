//! Joins and removals of one endpoint, from the change until picks use the new set.

use std::convert::Infallible;
use std::net::SocketAddr;

use tokio::runtime::Runtime;
use tokio::sync::mpsc::{self, UnboundedSender};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic_etcd::{Address, BalancedChannel, LbPolicy};
use tower::discover::Change;

use super::measured;
use super::peer::{in_memory, ready};

const ENDPOINTS: usize = 1_000;

pub fn join(joins: usize) {
    let set = Set::start();
    for _ in 0..joins {
        measured(|| set.join());
        set.remove();
    }
}

pub fn remove(removals: usize) {
    let set = Set::start();
    for _ in 0..removals {
        set.join();
        measured(|| set.remove());
    }
}

/// A channel to a set of endpoints. Its time is virtual, so that the steps of the driver do not depend on the speed of the machine.
struct Set {
    runtime: Runtime,
    channel: BalancedChannel,
    changes: UnboundedSender<Result<Change<Address, ()>, Infallible>>,
}

impl Set {
    fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .unwrap();
        let (changes, stream) = mpsc::unbounded_channel();
        for index in 0..ENDPOINTS {
            changes
                .send(Ok(Change::Insert(address(index), ())))
                .unwrap();
        }
        let channel = runtime.block_on(async {
            let builder = in_memory(BalancedChannel::builder(), LbPolicy::default());
            let stream = UnboundedReceiverStream::new(stream);
            let channel = builder.discover(stream).connect_lazy();
            ready(&channel, ENDPOINTS).await;
            channel
        });
        Self {
            runtime,
            channel,
            changes,
        }
    }

    fn join(&self) {
        self.apply(Change::Insert(address(ENDPOINTS), ()), ENDPOINTS + 1);
    }

    fn remove(&self) {
        self.apply(Change::Remove(address(ENDPOINTS)), ENDPOINTS);
    }

    fn apply(&self, change: Change<Address, ()>, endpoints: usize) {
        self.changes.send(Ok(change)).unwrap();
        self.runtime.block_on(ready(&self.channel, endpoints));
    }
}

/// Returns the address of an endpoint.
pub fn address(index: usize) -> Address {
    let ip = [10, 0, (index >> 8) as u8, index as u8];
    SocketAddr::from((ip, 1)).try_into().unwrap()
}
