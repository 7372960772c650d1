//! Parses a service config.

use std::str::FromStr;

use serde_json::Value;

use super::config::{Parsed, ServiceConfig};
use super::error::ServiceConfigError;
use super::load_balancing::load_balancing;
use super::methods::method_table;
use super::node::Node;
use crate::call::method_config::MethodTable;
use crate::call::retry::RetryBudget;

impl FromStr for ServiceConfig {
    type Err = ServiceConfigError;

    /// Parses a service config in gRPC's JSON format.
    ///
    /// # Errors
    ///
    /// Returns an error if the text is not JSON, if a field has a value of the wrong type or out of its range, if two entries have the same
    /// name, or if no policy in `loadBalancingConfig` is known.
    fn from_str(json: &str) -> Result<Self, ServiceConfigError> {
        let value: Value = serde_json::from_str(json).map_err(|error| {
            // The message contains a position, and no text of the config.
            ServiceConfigError::new("", format!("the service config is not JSON: {error}"))
        })?;
        let root = Node::root(&value);
        let methods = match root.field("methodConfig")? {
            Some(entries) => method_table(&entries)?,
            None => MethodTable::default(),
        };
        let throttling = root.field("retryThrottling")?;
        let health_check = match root.field("healthCheckConfig")? {
            Some(check) => check.field("serviceName")?,
            None => None,
        };
        Ok(Self::new(Parsed {
            methods,
            retry_throttling: throttling.as_ref().map(retry_throttling).transpose()?,
            health_check: health_check
                .map(|name| name.text().map(str::to_owned))
                .transpose()?,
            balancing: load_balancing(&root)?,
            json: json.to_owned(),
        }))
    }
}

/// Parses `retryThrottling`, with the limits of gRFC A6.
fn retry_throttling(node: &Node<'_>) -> Result<RetryBudget, ServiceConfigError> {
    const TOKENS: &str = "a number above 0 and at most 1000";
    const RATIO: &str = "a number above 0";
    let field = |name, expected, is_valid: fn(f64) -> bool| match node.field(name)? {
        Some(field) => field.number(expected, is_valid),
        None => Err(node.missing(name, expected)),
    };
    let tokens = field("maxTokens", TOKENS, |tokens| {
        tokens > 0.0 && tokens <= 1_000.0
    })?;
    let ratio = field("tokenRatio", RATIO, |ratio| ratio > 0.0)?;
    Ok(RetryBudget::of_service_config(tokens, ratio))
}
