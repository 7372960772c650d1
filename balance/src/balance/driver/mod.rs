//! The driver: the one task that dials connections, handles their loss, closes them, and publishes the ready set.
//!
//! The state of the driver is divided into parts. Each part owns its fields and does not know the driver. `driver.rs` has the loop. The
//! other files with `impl Driver` connect the parts: they handle one kind of event each.

mod changes;
mod connecting;
mod connection_events;
mod demand;
mod driver;
mod exclusion;
mod health;
mod publish;
mod silence;

// The parts.
mod detection;
mod dials;
mod draining;
mod endpoint_entry;
mod events;
mod latencies;
mod publication;
mod quarantine;
mod ready_sets;
mod resting;
mod scaling;
mod second_connection;
mod slow_start;
mod subchannels;
mod timers;
mod zone_preference;

pub(super) use driver::Driver;
