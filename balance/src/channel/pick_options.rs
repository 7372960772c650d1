//! The options for the choice of endpoints: traffic split, consistent hash and a policy of the program.

use std::sync::Arc;

#[cfg(doc)]
use super::ChannelError;
use super::builder::ChannelBuilder;
use super::{PickPolicy, TrafficSplit};
#[cfg(doc)]
use crate::balance::LbPolicy;
use crate::balance::ProvidedPolicy;

impl<S> ChannelBuilder<S> {
    /// Sets a policy of the program, which picks the endpoint of each attempt. If it returns `None`, the policy set with
    /// [`policy`](Self::policy) picks. Default: none. The policy receives a copy of the headers and the extensions of each call.
    pub fn pick_policy(mut self, policy: impl PickPolicy) -> Self {
        self.config.options.pick_policy = Some(ProvidedPolicy(Arc::new(policy)));
        self
    }

    /// Sets the header whose value is the key of a call for [`LbPolicy::RingHash`] (gRFC A76), for example `x-customer-id`. The values of a
    /// repeated header are joined by commas. The extension [`HashKey`](crate::channel::HashKey) of a request takes precedence. Default:
    /// none. If the name is not a valid header name, the channel is [invalid](ChannelError::InvalidOption). Other policies ignore the header.
    pub fn request_hash_header(mut self, name: impl AsRef<str>) -> Self {
        match name.as_ref().parse() {
            Ok(name) => self.config.options.hash_header = Some(name),
            Err(_) => self.config.refuse(format!(
                "request_hash_header is {:?}, which is not the name of a header",
                name.as_ref()
            )),
        }
        self
    }

    /// Splits the calls between groups of endpoints, for example 5 % to a new version. Default: no split. A split that is not valid (two
    /// parts with the same labels, all weights 0, or more than 64 parts) makes the channel [invalid](ChannelError::InvalidOption).
    ///
    /// A service config can set a split as well. The [mode](Self::service_config_mode) decides which one applies.
    pub fn split(mut self, split: TrafficSplit) -> Self {
        if let Some(reason) = split.invalid_reason() {
            self.config.refuse(reason);
        }
        self.config.options.splits.of_program = split;
        self
    }
}
