//! The options and the states of a [`BalancedChannel`], and the sources of its endpoints. [`RetryPolicy`](crate::RetryPolicy) and
//! [`LbPolicy`](crate::LbPolicy) are at the root of the crate.

mod balanced;
#[cfg(feature = "__bench")]
pub mod bench;
mod builder;
mod dns;
pub(crate) mod error;
mod keep_alive;
mod keep_alive_options;
mod limit_options;
mod method_options;
mod pick_options;
mod service_config;
mod service_config_options;
mod source;

pub use crate::attributes::Attributes;
pub use crate::balance::{
    EjectionReason, EndpointState, EndpointStatus, FailurePercentageEjection, HashKey, LoadReports,
    OutlierDetection, PeerIndex, PickInfo, PickPolicy, ReadyEndpoint, ReadyEndpoints, Select,
    SuccessRateEjection, TrafficSplit,
};
pub use crate::call::retry::{HedgingPolicy, RetryBudget};
pub use crate::call::{ResponseBody, ResponseFuture, Routing, ServedBy, WaitForReady};
pub use crate::load_report::LoadReport;
pub use crate::service_config::ServiceConfig;
pub use balanced::BalancedChannel;
pub use builder::ChannelBuilder;
pub use dns::Dns;
#[cfg(feature = "dns-srv")]
pub use dns::DnsSrv;
pub(crate) use error::ChannelError;
pub use service_config::ServiceConfigMode;
pub use source::{Addresses, Discover, EndpointSource, Endpoints, SourceContext};

#[cfg(test)]
mod tests;
