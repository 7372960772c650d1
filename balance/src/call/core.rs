//! The state that all clones of a channel, and its calls, share.

use std::sync::Arc;
use std::task::Context;
use std::time::Duration;

use http::uri::{Authority, Scheme};
use http::{HeaderValue, Response, Uri};

use super::request::{Call, KeptBody};
use super::response_head;
use super::retry::method_config::MethodConfig;
use super::retry::{HedgingPolicy, RetryPolicy};
use crate::balance::{Balancer, Shared};
use crate::transport::response_body::Incoming;

/// What all clones of a channel, and its calls, share.
pub(crate) struct Core {
    pub(crate) balancer: Balancer,
    /// For messages.
    pub(crate) service: String,
    pub(crate) user_agent: HeaderValue,
    pub(crate) scheme: Scheme,
    /// In place of an endpoint's own.
    pub(crate) authority: Option<Authority>,
    /// The deadline of a call that names none, and the header that says so.
    pub(crate) timeout: Option<(Duration, HeaderValue)>,
    pub(crate) wait_for_ready: bool,
    pub(crate) startup_timeout: Duration,
    /// Why a call fails when the startup timeout has passed and no set of endpoints is known.
    pub(crate) unknown: &'static str,
    /// Whether the channel's tasks share one thread with its callers, and so do not run while the callers do not wait.
    pub(crate) is_single_threaded: bool,
    /// None without a policy, which is then all that it costs.
    pub(crate) method_config: Option<Box<MethodConfig>>,
    /// What ails the source of endpoints, if anything.
    pub(crate) trouble: Option<Box<dyn Fn() -> Option<String> + Send + Sync>>,
}

impl Core {
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        self.balancer.shared()
    }

    /// Where a call to an endpoint is addressed to. A request with an authority of its own keeps it unless the channel has one.
    pub(crate) fn uri(&self, request: &Uri, endpoint: &Authority) -> Option<Uri> {
        let authority = self.authority.as_ref().or(request.authority());
        let mut parts = http::uri::Parts::default();
        parts.scheme = Some(self.scheme.clone());
        parts.authority = Some(authority.unwrap_or(endpoint).clone());
        parts.path_and_query = request.path_and_query().cloned();
        Uri::from_parts(parts).ok()
    }

    /// The policy by which a call is retried.
    pub(super) fn retry(&self, call: &Call) -> Option<&RetryPolicy> {
        self.method_config.as_ref()?.retry(call.path())
    }

    /// The policy by which a call is hedged.
    pub(super) fn hedging(&self, call: &Call) -> Option<&HedgingPolicy> {
        self.method_config.as_ref()?.hedging(call.path())
    }

    /// Whether a response is the caller's as it is; else a policy has a say in it, or the rest of it is to be waited for.
    pub(super) fn is_final(
        &self,
        call: &Call,
        kept: &KeptBody,
        response: &mut Response<Incoming>,
        cx: &mut Context<'_>,
    ) -> bool {
        if self.method_config.is_none() || self.retry(call).is_none() {
            return true;
        }
        if response_head::failure(response).is_some() {
            return false;
        }
        let response = response.body_mut();
        kept.is_pumped() || (response.poll_ahead(cx).is_ready() && !response.is_broken())
    }

    /// A call went well.
    pub(crate) fn on_success(&self) {
        if let Some(method_config) = &self.method_config {
            method_config.on_success();
        }
    }

    pub(crate) fn trouble(&self) -> Option<String> {
        self.trouble.as_ref().and_then(|trouble| trouble())
    }
}
