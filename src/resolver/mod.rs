//! Finds the instances of a service: lists the keys under a prefix, watches them, and publishes every change.
//!
//! Each prefix has a state machine without I/O (`watcher`), and one task that executes the commands of this machine. All prefixes share one
//! set of instances (`instances`). Subscribers receive the newest state, not a queue of changes: each [`Resolver`] records the addresses
//! that have changed since its last poll. A slow subscriber may miss intermediate states, but it never misses the final state and never
//! blocks a task.

mod builder;
mod cache;
mod feedback;
mod gauges;
mod handle;
mod hold;
mod instances;
mod metrics;
mod options;
mod resolver;
mod running;
mod service_config;
mod status;
mod store;
mod task;
mod watcher;

pub use builder::ResolverBuilder;
pub use feedback::ResolverFeedback;
pub use handle::ResolverHandle;
pub use resolver::Resolver;
pub(crate) use running::RunningResolvers;
pub use service_config::ServiceConfigStatus;
pub use status::{RejectedKey, ResolverState, ResolverStatus};
