//! Limits on what is read and written.

/// Largest value that is read or written. The largest known format, with descriptions of its endpoints, stays far below. Without this
/// limit, one faulty writer could fill the memory of every client.
pub(crate) const MAX_VALUE: usize = 64 * 1024;
