//! The limit on the size of values.

/// Maximum size of a value that is read or written, and of a key that is read, in bytes. Even the values of the largest known format, which
/// contain descriptions of endpoints, are far smaller. Without this limit, one faulty writer could fill the memory of every client.
pub(crate) const MAX_VALUE: usize = 64 * 1024;
