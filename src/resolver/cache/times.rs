//! When the cache is read and written.

use std::time::Duration;

/// The time to wait for etcd after the start before the cache or the seeds are used. A member on the same continent answers in less time.
pub(in crate::resolver) const CACHE_DELAY: Duration = Duration::from_millis(50);
/// The time between a change and the write of the cache file. Changes in quick succession then cause only one write.
pub(in crate::resolver) const WRITE_DELAY: Duration = Duration::from_secs(1);
/// Timeout of a read, for example on a network file system that does not respond.
pub(in crate::resolver) const READ_TIMEOUT: Duration = Duration::from_secs(5);
/// The time after which a write that failed is repeated, for example on a full disk.
pub(in crate::resolver) const WRITE_AGAIN: Duration = Duration::from_secs(60);
