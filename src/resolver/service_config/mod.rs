//! The service config of a service, in the key `<control prefix><service>/config`: watched, parsed, and passed to channels.

mod state;
mod status;
mod task;

pub use status::ServiceConfigStatus;
pub(super) use task::{ConfigPublisher, follow};
