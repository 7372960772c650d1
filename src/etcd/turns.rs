//! Limits how many requests the resolvers of a registry send at the same time.

use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;

/// The turns of a registry: a resolver waits for one before each request.
///
/// If 1 000 resolvers start at once and all of them send their requests at once, the memory of these requests is 20 kB for each resolver
/// (measured), and the allocator keeps it afterwards. With the limit, it is 2 kB, and the resolvers take 0.1 s longer to start.
#[derive(Debug)]
pub(super) struct Turns(Semaphore);

impl Default for Turns {
    fn default() -> Self {
        Self(Semaphore::new(TURNS))
    }
}

impl Turns {
    /// Waits for a turn, but at most for [`TURN_TIMEOUT`]. The turn ends when the result is dropped.
    ///
    /// After the timeout, the caller sends its request without a turn. The turns may be held by requests to a member that does not answer,
    /// or by tasks of a runtime that no thread drives.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future takes no turn. The next call waits at the end of the queue.
    pub(super) async fn next(&self) -> Option<SemaphorePermit<'_>> {
        // The semaphore is never closed.
        timeout(TURN_TIMEOUT, self.0.acquire()).await.ok()?.ok()
    }
}

/// Maximum number of requests at the same time.
pub(super) const TURNS: usize = 32;
/// Maximum wait for a turn.
pub(super) const TURN_TIMEOUT: Duration = Duration::from_secs(1);
