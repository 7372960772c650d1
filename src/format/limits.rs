//! The limit on the size of values.

/// Maximum size, in bytes, of a value that is read or written, and of a key that is read. The largest values of the known formats contain
/// descriptions of endpoints. Even these values are far smaller than the limit. Without the limit, one faulty writer could fill the memory
/// of every client.
pub(crate) const MAX_VALUE: usize = 64 * 1024;
