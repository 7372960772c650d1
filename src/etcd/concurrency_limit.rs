//! Limits how many requests the resolvers of a registry, and its watches on single keys, send at the same time.

use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;

/// The concurrency limit of a registry. A resolver acquires a permit before it lists keys, opens a watch or checks a key. A
/// [`KeyWatch`](super::KeyWatch) acquires one before it opens a watch, and holds it until all watchers are created. The reads of a service
/// config or of control keys acquire one as well. Reconciliations need no limit: they are spread over minutes. The lease requests of a
/// registration, and its reads and writes of its keys, acquire none: they are few, and must not wait for those of the resolvers. Its watches
/// and its repeated reads of control keys do.
///
/// If 1 000 resolvers start at once and all of them send their requests at once, the memory of these requests is 20 kB for each resolver
/// (measured), and the allocator keeps it afterwards. With the limit, it is 2 kB, and the resolvers take 0.1 s longer to start.
#[derive(Debug)]
pub(super) struct ConcurrencyLimit(Semaphore);

impl Default for ConcurrencyLimit {
    fn default() -> Self {
        Self(Semaphore::new(PERMITS))
    }
}

impl ConcurrencyLimit {
    /// Waits for a permit, but at most for [`ACQUIRE_TIMEOUT`]. Dropping the permit releases it.
    ///
    /// After the timeout, the caller sends its request without a permit. The permits may be held by requests to a member that does not
    /// answer, or by tasks of a runtime that no thread drives.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future acquires no permit. The next call waits at the end of the queue.
    pub(super) async fn acquire(&self) -> Option<SemaphorePermit<'_>> {
        // The semaphore is never closed.
        timeout(ACQUIRE_TIMEOUT, self.0.acquire()).await.ok()?.ok()
    }
}

/// Maximum number of requests at the same time.
pub(super) const PERMITS: usize = 32;
/// Maximum wait for a permit.
pub(super) const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(1);
