//! The options of a channel that concern sending calls again.

use super::ChannelBuilder;
use crate::call::retry::method_config::MethodPolicy;
use crate::call::retry::{HedgingPolicy, RetryBudget, RetryPolicy};

impl<S> ChannelBuilder<S> {
    /// Sends calls again that have failed. Off by default: the server may have processed them. Calls that it certainly has not are sent
    /// again in any case.
    ///
    /// A method has one policy, of the most specific name: what is said of the method itself, else of its service, else of the channel; of
    /// what is said twice, the last.
    ///
    /// ```
    /// use tonic::Code;
    /// use tonic_balance::{BalancedChannel, RetryPolicy};
    ///
    /// let channel = BalancedChannel::builder()
    ///     .retry(RetryPolicy::new([Code::Unavailable]))
    ///     // One that must not run twice.
    ///     .retry_for("shop.Orders/Pay", RetryPolicy::new([]));
    /// ```
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.config.methods.set_all(MethodPolicy::Retry(policy));
        self
    }

    /// As [`retry`](Self::retry), for the methods of one service, `package.Service`, or one method, `package.Service/Method`. With
    /// a name that is neither, the channel is [invalid](crate::ChannelError::InvalidOption).
    pub fn retry_for(self, name: impl Into<String>, policy: RetryPolicy) -> Self {
        self.plan(&name.into(), MethodPolicy::Retry(policy))
    }

    /// Sends copies of calls that take long, and takes the first answer. Off by default: only for channels all of whose methods may run
    /// twice. It takes the place of a [`RetryPolicy`].
    pub fn hedge(mut self, policy: HedgingPolicy) -> Self {
        self.config.methods.set_all(MethodPolicy::Hedge(policy));
        self
    }

    /// As [`hedge`](Self::hedge), for the methods of one service, `package.Service`, or one method, `package.Service/Method`. With
    /// a name that is neither, the channel is [invalid](crate::ChannelError::InvalidOption).
    ///
    /// ```
    /// use std::time::Duration;
    /// use tonic_balance::{BalancedChannel, HedgingPolicy};
    ///
    /// let policy = HedgingPolicy::new(2, Duration::from_millis(20));
    /// let channel = BalancedChannel::builder().hedge_for("helloworld.Greeter/SayHello", policy);
    /// ```
    pub fn hedge_for(self, name: impl Into<String>, policy: HedgingPolicy) -> Self {
        self.plan(&name.into(), MethodPolicy::Hedge(policy))
    }

    /// What all retries and hedges together may add to the load of servers that fail. Default [`RetryBudget::default`].
    pub fn retry_budget(mut self, budget: RetryBudget) -> Self {
        self.config.methods.set_budget(budget);
        self
    }

    fn plan(mut self, name: &str, plan: MethodPolicy) -> Self {
        if !self.config.methods.set(name, plan) {
            self.config.refuse(format!(
                "{name:?} names no service and no method; write package.Service or package.Service/Method"
            ));
        }
        self
    }
}
