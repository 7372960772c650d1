//! The channel, its builder, and the sources of its endpoints.

mod balanced;
#[cfg(feature = "__bench")]
pub mod bench;
mod builder;
mod error;
mod keep_alive;
mod keep_alive_options;
mod retry_options;
mod source;

pub use balanced::BalancedChannel;
pub use builder::ChannelBuilder;
pub use error::ChannelError;
pub use source::{Addresses, Discover, EndpointSource, Endpoints};

#[cfg(test)]
mod tests;
