//! Keeps a server registered: writes its key under a lease, renews the lease, verifies the key, and restores the key after a loss.
//!
//! The module `lease` contains the state machine of a registration, which does no I/O. One task executes the commands of this machine.

mod builder;
mod control;
mod entry;
mod handle;
mod lease;
mod metrics;
mod registration;
mod serve_options;
mod status;
mod task;
mod ttl;

pub use builder::RegistrationBuilder;
pub use handle::RegistrationHandle;
pub use registration::Registration;
#[cfg(feature = "health")]
pub(crate) use serve_options::Health;
pub(crate) use serve_options::ServeOptions;
pub use serve_options::ServerState;
pub use status::RegistrationState;
