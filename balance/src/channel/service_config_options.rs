//! The options of a channel that concern service configs.

use super::ChannelBuilder;
use super::service_config::ServiceConfigMode;

impl<S> ChannelBuilder<S> {
    /// Sets a service config in gRPC's JSON format. It is used while the [source of the
    /// endpoints](crate::channel::Endpoints::service_configs) reports none. Default: none. If an option of this builder and the service
    /// config contain the same setting, the option applies, unless the mode is [`Prefer`](ServiceConfigMode::Prefer).
    ///
    /// If the service config cannot be used, `connect` fails with [`InvalidOption`](crate::error::ChannelError::InvalidOption), which names
    /// the field.
    ///
    /// ```
    /// use tonic_balance::BalancedChannel;
    ///
    /// let channel = BalancedChannel::builder().service_config(
    ///     r#"{
    ///         "methodConfig": [{"name": [{"service": "shop.Orders"}], "timeout": "1.5s", "waitForReady": true}],
    ///         "loadBalancingConfig": [{"round_robin": {}}]
    ///     }"#,
    /// );
    /// ```
    #[cfg(feature = "service-config")]
    #[cfg_attr(docsrs, doc(cfg(feature = "service-config")))]
    pub fn service_config(mut self, json: impl AsRef<str>) -> Self {
        match json.as_ref().parse() {
            Ok(config) => self.config.from_service.of_program = Some(config),
            Err(error) => self.config.refuse(format!("service_config: {error}")),
        }
        self
    }

    /// Sets whether a service config takes precedence over the options of this builder. Default [`ServiceConfigMode::Defaults`]: the options
    /// take precedence.
    pub fn service_config_mode(mut self, mode: ServiceConfigMode) -> Self {
        self.config.from_service.mode = mode;
        self
    }
}
