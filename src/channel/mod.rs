//! Channels: where the resolver's instances meet connections.

mod stock;
