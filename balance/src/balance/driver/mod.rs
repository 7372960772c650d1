//! The driver: the one task that dials, closes and replaces connections, and publishes the ready set (the connections that calls can pick).
//!
//! The state of the driver is divided into parts. Each part owns its fields and does not refer to the driver. `driver.rs` has the loop. The
//! other modules of the first group below are handlers, each with an `impl Driver`. A handler uses only the parts that it needs.

// The loop and the handlers.
mod call_demand;
mod connecting;
mod connection_events;
mod driver;
mod endpoint_changes;
mod health_watch;
mod outliers_and_quarantine;
mod publish;
mod pushbacks;
mod reconfigure;
mod silence;
mod subset_changes;
mod too_many_pings;

// The parts.
mod dials;
mod disconnect_error;
mod draining;
mod endpoint_entry;
mod event_queue;
mod outlier_schedule;
mod pending_publication;
mod quarantine;
mod ready_set_pair;
mod reported_weights;
mod resting;
mod ring_schedule;
mod scaling;
mod second_connection;
mod selection_changes;
mod selections;
mod slow_start;
mod subchannel_table;
mod subset;
mod timers;
mod zone_preference;

pub(super) use driver::Driver;
