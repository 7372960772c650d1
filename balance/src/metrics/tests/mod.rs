//! A recorder in memory, for tests.

pub(crate) mod memory;
