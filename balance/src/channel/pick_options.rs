//! The options for the choice of endpoints: traffic split, consistent hash, load reports and a policy of the program.

use std::sync::Arc;

#[cfg(doc)]
use super::ChannelError;
use super::builder::ChannelBuilder;
use super::{LoadReports, PickPolicy, TrafficSplit};
#[cfg(doc)]
use crate::balance::LbPolicy;
use crate::balance::ProvidedPolicy;

impl<S> ChannelBuilder<S> {
    /// Sets a policy of the program, which picks the endpoint of each attempt. Where it picks none, the [`policy`](Self::policy) does. Default:
    /// none. The policy receives a copy of the headers and the extensions of each call.
    pub fn pick_policy(mut self, policy: impl PickPolicy) -> Self {
        self.config.options.pick_policy = Some(ProvidedPolicy(Arc::new(policy)));
        self
    }

    /// Reads the load reports that servers send with their responses (ORCA, gRFC A51). Disabled by default.
    ///
    /// - [`LbPolicy::Latency`] counts the calls of all clients that are in flight at an endpoint, if the endpoint reports them.
    /// - [`LbPolicy::WeightedRoundRobin`] multiplies the weight of an endpoint by the weight that gRFC A58 computes from its reports.
    /// - The last report is visible to a [`PickPolicy`], and in [`EndpointStatus`](crate::channel::EndpointStatus).
    ///
    /// An endpoint that sends no reports counts as an average one. The reports of the out-of-band service of ORCA are not read.
    pub fn load_reports(mut self, reports: LoadReports) -> Self {
        self.config.load_reports = Some(reports);
        self
    }

    /// Sets the header whose value is the key of a call for [`LbPolicy::RingHash`] (gRFC A76), for example `x-customer-id`. The values of a
    /// repeated header are joined by commas. The extension [`HashKey`](crate::channel::HashKey) of a request takes precedence. Default:
    /// none. If the name is not a valid header name, the channel is [invalid](ChannelError::InvalidOption). Other policies ignore the header.
    pub fn request_hash_header(mut self, name: impl AsRef<str>) -> Self {
        match name.as_ref().parse() {
            Ok(name) => self.config.hash_header = Some(name),
            Err(_) => self.config.refuse(format!(
                "request_hash_header is {:?}, which is not the name of a header",
                name.as_ref()
            )),
        }
        self
    }

    /// Splits the calls between groups of endpoints, for example 5 % to a new version. Default: no split. A split that is not valid (two
    /// parts with the same labels, all weights 0, or more than 64 parts) makes the channel [invalid](ChannelError::InvalidOption).
    pub fn split(mut self, split: TrafficSplit) -> Self {
        if let Some(reason) = split.invalid_reason() {
            self.config.refuse(reason);
        }
        self.config.options.split = split;
        self
    }
}
