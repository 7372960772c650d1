//! The options of a channel that can differ between methods: retries, hedging and timeouts.

use std::time::Duration;

use super::ChannelBuilder;
use crate::call::method_config::{MethodPolicy, MethodSettings, MethodTimeout};
use crate::call::retry::{HedgingPolicy, RetryBudget, RetryPolicy};

impl<S> ChannelBuilder<S> {
    /// Enables retries of failed calls. Retries are disabled by default, because the server may have processed a failed call. Calls that
    /// the server certainly did not process are sent again even if retries are disabled.
    ///
    /// A method uses the most specific policy: the policy of the method, else that of its service, else that of the channel. If a policy is
    /// set more than once for the same method, service or channel, the last policy applies.
    ///
    /// ```
    /// use tonic::Code;
    /// use tonic_balance::{BalancedChannel, RetryPolicy};
    ///
    /// let channel = BalancedChannel::builder()
    ///     .retry(RetryPolicy::new([Code::Unavailable]))
    ///     // This method must not run twice.
    ///     .retry_for("shop.Orders/Pay", RetryPolicy::new([]));
    /// ```
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.config.methods.all().policy = Some(MethodPolicy::Retry(policy));
        self
    }

    /// Sets the retry policy of one service (`package.Service`) or one method (`package.Service/Method`), as [`retry`](Self::retry) does
    /// for the channel. If the name has neither form, `connect` fails with [`InvalidOption`](crate::error::ChannelError::InvalidOption).
    pub fn retry_for(self, name: impl Into<String>, policy: RetryPolicy) -> Self {
        self.set_method_policy(&name.into(), MethodPolicy::Retry(policy))
    }

    /// Enables hedging: a slow call is sent again while the first attempt is still open, and the first response is used. Hedging is
    /// disabled by default. Enable hedging only if every method of the channel can safely run more than once. The hedging policy replaces
    /// the channel's [`RetryPolicy`].
    pub fn hedge(mut self, policy: HedgingPolicy) -> Self {
        self.config.methods.all().policy = Some(MethodPolicy::Hedge(policy));
        self
    }

    /// Sets the hedging policy of one service (`package.Service`) or one method (`package.Service/Method`), as [`hedge`](Self::hedge) does
    /// for the channel. If the name has neither form, `connect` fails with [`InvalidOption`](crate::error::ChannelError::InvalidOption).
    ///
    /// ```
    /// use std::time::Duration;
    /// use tonic_balance::{BalancedChannel, channel::HedgingPolicy};
    ///
    /// let policy = HedgingPolicy::new(2, Duration::from_millis(20));
    /// let channel = BalancedChannel::builder().hedge_for("helloworld.Greeter/SayHello", policy);
    /// ```
    pub fn hedge_for(self, name: impl Into<String>, policy: HedgingPolicy) -> Self {
        self.set_method_policy(&name.into(), MethodPolicy::Hedge(policy))
    }

    /// Sets the limit on the load that all retries and hedges together add to failing servers. The default is [`RetryBudget::default`].
    pub fn retry_budget(mut self, budget: RetryBudget) -> Self {
        self.config.methods.budget = Some(budget);
        self
    }

    /// Sets the default timeout of calls of one service (`package.Service`) or one method (`package.Service/Method`), as
    /// [`timeout`](Self::timeout) does for the channel. The most specific timeout applies. If the name has neither form, `connect` fails
    /// with [`InvalidOption`](crate::error::ChannelError::InvalidOption). Default: the timeout of the channel.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tonic_balance::BalancedChannel;
    ///
    /// let channel = BalancedChannel::builder()
    ///     .timeout(Duration::from_secs(1))
    ///     .timeout_for("shop.Orders/Export", Duration::from_secs(60));
    /// ```
    pub fn timeout_for(self, name: impl Into<String>, timeout: Duration) -> Self {
        self.set_for_method(&name.into(), |settings| {
            settings.timeout = Some(MethodTimeout::new(timeout));
        })
    }

    fn set_method_policy(self, name: &str, policy: MethodPolicy) -> Self {
        self.set_for_method(name, |settings| settings.policy = Some(policy))
    }

    fn set_for_method(mut self, name: &str, set: impl FnOnce(&mut MethodSettings)) -> Self {
        match self.config.methods.named(name) {
            Some(settings) => set(settings),
            None => self.config.refuse(format!(
                "{name:?} names no service and no method; write package.Service or package.Service/Method"
            )),
        }
        self
    }
}
