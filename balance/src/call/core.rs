//! The state that a channel shares with its calls, and the choice of the settings for a call.

use std::any::Any;
use std::sync::Arc;
use std::task::Context;
use std::time::Duration;

use http::request::Parts;
use http::uri::{Authority, Scheme};
use http::{HeaderValue, Response, Uri};

use super::http_status;
use super::live_config::LiveConfig;
use super::method_config::{MethodConfig, MethodTimeout};
use super::request::{Call, KeptBody};
use super::retry::{HedgingPolicy, RetryPolicy};
use crate::balance::{Balancer, Details, Gauges, HashKey, PickInfo, PickKey, Select, Shared, hash};
use crate::metrics::ChannelMetrics;
use crate::traces::Traces;
use crate::transport::response_body::Incoming;

/// The state that all clones of a channel and all its calls share.
pub(crate) struct Core {
    pub(crate) balancer: Balancer,
    /// The name of the service, as shown in error texts.
    pub(crate) service: String,
    pub(crate) user_agent: HeaderValue,
    pub(crate) scheme: Scheme,
    /// The authority of all calls, if set. It takes precedence over the authority of the request and of the endpoint.
    pub(crate) authority: Option<Authority>,
    /// The default timeout of calls.
    pub(crate) timeout: Option<MethodTimeout>,
    pub(crate) wait_for_ready: bool,
    pub(crate) startup_timeout: Duration,
    /// The error message of a call if the set of endpoints is still unknown after the startup timeout.
    pub(crate) unknown: &'static str,
    /// Whether the channel's tasks and the callers share one thread. If so, the tasks run only while the callers wait.
    pub(crate) is_single_threaded: bool,
    /// The settings of methods that the channel was built with; `None` if there are none.
    pub(crate) method_config: Option<Box<MethodConfig>>,
    /// The settings of methods under the current service config of the source. `None` if the source has no service configs.
    pub(crate) live_config: Option<LiveConfig>,
    /// The instruments, if metrics are enabled.
    pub(crate) metrics: Option<Arc<ChannelMetrics>>,
    /// The option for spans, if traces are enabled.
    pub(crate) traces: Option<Traces>,
    /// The gauges of the channel. The recorder reads them as long as they are owned here.
    pub(crate) _gauges: Option<Arc<Gauges>>,
    /// Returns the current failure of the source of endpoints, if any.
    pub(crate) source_error: Option<Box<dyn Fn() -> Option<String> + Send + Sync>>,
    /// The handle of the source, for the users of the channel.
    pub(crate) source_handle: Option<Box<dyn Any + Send + Sync>>,
}

impl Core {
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        self.balancer.shared()
    }

    /// Returns what the picks of a call depend on. A program that has never created a [`Select`] does not search for one.
    pub(super) fn pick_key(&self, head: &Parts) -> PickKey {
        if !Select::is_used() && !self.shared().uses_call_data() {
            return PickKey::Any;
        }
        let provided = self.shared().pick_policy();
        let call = || {
            PickInfo::new(
                head.uri.clone(),
                head.headers.clone(),
                head.extensions.clone(),
            )
        };
        let uses_hashes = self.shared().uses_hashes();
        PickKey::new(Details {
            select: head.extensions.get::<Select>().cloned(),
            hash: uses_hashes.then(|| self.hash(head)).flatten(),
            call: provided.map(|_| call()),
        })
    }

    /// Returns the hash of a call: that of its extension, or else that of the value of its header. Several values are joined by commas, as
    /// in gRFC A42.
    fn hash(&self, head: &Parts) -> Option<u64> {
        if let Some(key) = head.extensions.get::<HashKey>() {
            return Some(key.hash());
        }
        let header = self.shared().hash_header();
        let mut values = head.headers.get_all(&**header.as_ref()?).iter();
        let first = values.next()?.as_bytes();
        let mut values = values.peekable();
        if values.peek().is_none() {
            return Some(hash(first));
        }
        let others = values.flat_map(|value| [&b","[..], value.as_bytes()]);
        Some(hash(
            &std::iter::once(first)
                .chain(others)
                .collect::<Vec<_>>()
                .concat(),
        ))
    }

    /// Returns the URI of a call to an endpoint. The authority is taken from the channel, or else from the request, or else from the
    /// endpoint.
    pub(crate) fn uri(&self, request: &Uri, endpoint: &Authority) -> Option<Uri> {
        let authority = self.authority.as_ref().or(request.authority());
        let mut parts = http::uri::Parts::default();
        parts.scheme = Some(self.scheme.clone());
        parts.authority = Some(authority.unwrap_or(endpoint).clone());
        parts.path_and_query = request.path_and_query().cloned();
        Uri::from_parts(parts).ok()
    }

    /// Returns the settings of methods that a call uses: those that were in force when the call was made.
    pub(super) fn method_config<'a>(&'a self, call: &'a Call) -> Option<&'a MethodConfig> {
        let current = call.method_config.as_deref();
        current.or(self.method_config.as_deref())
    }

    /// Returns the retry policy of a call, if any.
    pub(super) fn retry<'a>(&'a self, call: &'a Call) -> Option<&'a RetryPolicy> {
        self.method_config(call)?.retry(call.path())
    }

    /// Returns the hedging policy of a call, if any.
    pub(super) fn hedging<'a>(&'a self, call: &'a Call) -> Option<&'a HedgingPolicy> {
        self.method_config(call)?.hedging(call.path())
    }

    /// Returns true if the response can be handed to the caller now. Without a retry policy, every response can. With a retry policy,
    /// returns false if the head carries a failure. It also returns false while the beginning of the response (the first 64 KiB, or all of
    /// a shorter response) is being buffered, and if the stream fails during that time. The response to a request stream is not buffered.
    pub(super) fn is_final(
        &self,
        call: &Call,
        kept: &KeptBody,
        response: &mut Response<Incoming>,
        cx: &mut Context<'_>,
    ) -> bool {
        if self.retry(call).is_none() {
            return true;
        }
        if http_status::failure(response).is_some() {
            return false;
        }
        let response = response.body_mut();
        kept.is_pumped() || (response.poll_ahead(cx).is_ready() && !response.is_broken())
    }

    /// Records a successful call in the retry budget, if there is one.
    pub(crate) fn on_success(&self) {
        if let Some(live) = &self.live_config
            && live.on_success()
        {
            return;
        }
        if let Some(method_config) = &self.method_config {
            method_config.on_success();
        }
    }

    pub(crate) fn source_error(&self) -> Option<String> {
        self.source_error
            .as_ref()
            .and_then(|source_error| source_error())
    }
}
