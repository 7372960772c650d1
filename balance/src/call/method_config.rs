//! The settings of each method: retries or hedging, the timeout, `wait_for_ready`, and the limits on messages.
//!
//! Two tables can set them: the options of the program, and a service config. [`MethodConfig::new`] combines both into one table, so that a
//! call needs one look-up.

use std::collections::HashMap;
use std::time::Duration;

use http::HeaderValue;

use super::retry::budget::Tokens;
use super::retry::{HedgingPolicy, RetryBudget, RetryPolicy};
use crate::transport::deadline;

/// The policy that sends calls of a method more than once.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum MethodPolicy {
    Retry(RetryPolicy),
    Hedge(HedgingPolicy),
}

/// The settings of a method. A setting that is `None` is not set.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct MethodSettings {
    pub(crate) policy: Option<MethodPolicy>,
    pub(crate) timeout: Option<MethodTimeout>,
    pub(crate) wait_for_ready: Option<bool>,
    pub(crate) max_request_bytes: Option<u32>,
    pub(crate) max_response_bytes: Option<u32>,
}

impl MethodSettings {
    /// Returns these settings, and those of `other` where these are not set.
    fn or(&self, other: &Self) -> Self {
        Self {
            policy: self.policy.as_ref().or(other.policy.as_ref()).cloned(),
            timeout: self.timeout.as_ref().or(other.timeout.as_ref()).cloned(),
            wait_for_ready: self.wait_for_ready.or(other.wait_for_ready),
            max_request_bytes: self.max_request_bytes.or(other.max_request_bytes),
            max_response_bytes: self.max_response_bytes.or(other.max_response_bytes),
        }
    }

    /// Returns whether a setting other than the policy is set.
    fn has_call_settings(&self) -> bool {
        self.timeout.is_some()
            || self.wait_for_ready.is_some()
            || self.max_request_bytes.is_some()
            || self.max_response_bytes.is_some()
    }
}

/// The timeout of a method.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct MethodTimeout {
    pub(crate) duration: Duration,
    /// The value of the header `grpc-timeout`, so that it is formatted once and not for each call.
    pub(crate) field: HeaderValue,
    /// Whether the timeout also replaces a longer timeout that the request itself sets, as the timeout of a service config does in gRPC.
    shortens_requests: bool,
}

impl MethodTimeout {
    pub(crate) fn new(duration: Duration) -> Self {
        Self {
            duration,
            field: deadline::format(duration),
            shortens_requests: false,
        }
    }

    /// Returns whether a call uses this timeout. `own` is the timeout that the request itself sets.
    pub(crate) fn replaces(&self, own: Option<Duration>) -> bool {
        own.is_none_or(|own| self.shortens_requests && self.duration < own)
    }
}

/// The settings of all methods, from one source.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct MethodTable {
    /// The settings of all methods without an entry in `named`.
    pub(crate) all: Option<MethodSettings>,
    /// The settings of a method, keyed by `package.Service/Method`, or of a service, keyed by `package.Service/`.
    pub(crate) named: HashMap<Box<str>, MethodSettings>,
}

impl MethodTable {
    /// Returns the entries for a key, from the most specific one.
    fn entries(&self, key: &str) -> impl Iterator<Item = &MethodSettings> {
        let named = self.named.get(key);
        let of_service = service(key).and_then(|service| self.named.get(service));
        // For the key of a service, both are the same entry, which is harmless.
        [named, of_service, self.all.as_ref()].into_iter().flatten()
    }

    /// Returns each setting from the most specific entry in which it is set. This is the rule for the options of a program, because each
    /// option is a call of its own.
    fn each(&self, key: &str) -> MethodSettings {
        let entries = self.entries(key);
        entries.fold(MethodSettings::default(), |settings, entry| {
            settings.or(entry)
        })
    }

    /// Returns the most specific entry. This is the rule of gRPC's service config.
    fn most_specific(&self, key: &str) -> MethodSettings {
        self.entries(key).next().cloned().unwrap_or_default()
    }

    fn settings(&self) -> impl Iterator<Item = &MethodSettings> {
        self.named.values().chain(&self.all)
    }
}

/// Which source wins if both set the same setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Precedence {
    Program,
    ServiceConfig,
}

impl Precedence {
    /// Returns the setting that wins.
    pub(crate) fn choose<T>(self, program: Option<T>, service_config: Option<T>) -> Option<T> {
        match self {
            Self::Program => program.or(service_config),
            Self::ServiceConfig => service_config.or(program),
        }
    }
}

/// The options of a program that concern methods, which the channel's builder collects.
#[derive(Clone, Debug, Default)]
pub(crate) struct ProgramMethods {
    pub(crate) table: MethodTable,
    pub(crate) budget: Option<RetryBudget>,
}

impl ProgramMethods {
    /// Returns the settings of the channel.
    pub(crate) fn all(&mut self) -> &mut MethodSettings {
        self.table.all.get_or_insert_default()
    }

    /// Returns the settings of a service or method. Returns `None` if the name is neither `package.Service` nor `package.Service/Method`.
    pub(crate) fn named(&mut self, name: &str) -> Option<&mut MethodSettings> {
        let trimmed = name.strip_prefix('/').unwrap_or(name);
        let trimmed = trimmed.strip_suffix('/').unwrap_or(trimmed);
        let parts = || trimmed.split('/');
        if parts().count() > 2 || parts().any(str::is_empty) {
            return None;
        }
        let key = if trimmed.contains('/') {
            trimmed.into()
        } else {
            format!("{trimmed}/").into_boxed_str()
        };
        Some(self.table.named.entry(key).or_default())
    }
}

/// The settings that a service config contributes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ServiceMethods<'a> {
    pub(crate) table: &'a MethodTable,
    pub(crate) budget: Option<RetryBudget>,
    pub(crate) precedence: Precedence,
}

/// The settings of all methods of a channel, combined from all sources.
#[derive(Debug)]
pub(crate) struct MethodConfig {
    all: MethodSettings,
    /// The settings, with the same keys as [`MethodTable::named`]. Each entry is complete: no setting is taken from a less specific entry.
    named: HashMap<Box<str>, MethodSettings>,
    /// Whether there is a hedging policy. If there is none, [`hedging`](Self::hedging) skips the look-up for each call.
    hedges: bool,
    /// Whether a setting other than a policy differs from the options of the channel. If there is none, [`of_call`](Self::of_call) skips the
    /// look-up for each call.
    has_call_settings: bool,
    tokens: Tokens,
}

impl MethodConfig {
    /// Combines the options of the program with a service config.
    pub(crate) fn new(program: &ProgramMethods, service: Option<ServiceMethods<'_>>) -> Self {
        let empty = MethodTable::default();
        let of_service = service.map_or(&empty, |service| service.table);
        let precedence = service.map_or(Precedence::Program, |service| service.precedence);
        let combine = |key: &str| {
            let program = program.table.each(key);
            let mut service = of_service.most_specific(key);
            match precedence {
                Precedence::Program => program.or(&service),
                Precedence::ServiceConfig => {
                    if let Some(timeout) = &mut service.timeout {
                        timeout.shortens_requests = true;
                    }
                    service.or(&program)
                }
            }
        };
        let keys = program.table.named.keys().chain(of_service.named.keys());
        let named: HashMap<_, _> = keys.map(|key| (key.clone(), combine(key))).collect();
        // No entry has an empty key, so this returns the settings of all other methods.
        let all = combine("");
        let mut of_methods = program.table.named.values().chain(of_service.settings());
        let has_call_settings = of_methods.any(MethodSettings::has_call_settings);
        let is_hedged =
            |settings: &MethodSettings| matches!(settings.policy, Some(MethodPolicy::Hedge(_)));
        let hedges = named.values().any(is_hedged) || is_hedged(&all);
        let of_config = service.and_then(|service| service.budget);
        let budget = precedence.choose(program.budget, of_config);
        Self {
            all,
            named,
            hedges,
            has_call_settings,
            tokens: Tokens::new(budget.unwrap_or_default()),
        }
    }

    /// Returns false if all calls use the timeout and the `wait_for_ready` of the program's channel, and no policy is set.
    pub(crate) fn has_effect(&self) -> bool {
        let mut every = self.named.values().chain([&self.all]);
        self.has_call_settings || every.any(|settings| settings.policy.is_some())
    }

    /// Returns the retry policy for this path, if any.
    pub(crate) fn retry(&self, path: &str) -> Option<&RetryPolicy> {
        match self.settings(path).policy.as_ref()? {
            MethodPolicy::Retry(policy) if policy.attempt_limit() > 1 => Some(policy),
            _ => None,
        }
    }

    /// Returns the hedging policy for this path, if any.
    pub(crate) fn hedging(&self, path: &str) -> Option<&HedgingPolicy> {
        if !self.hedges {
            return None;
        }
        match self.settings(path).policy.as_ref()? {
            MethodPolicy::Hedge(policy) if policy.attempt_limit() > 1 => Some(policy),
            _ => None,
        }
    }

    /// Returns the timeout, the `wait_for_ready` and the limits for this path. Returns `None` if the options of the channel apply to all
    /// calls.
    pub(crate) fn of_call(&self, path: &str) -> Option<&MethodSettings> {
        self.has_call_settings.then(|| self.settings(path))
    }

    /// Returns the settings of the most specific entry for this path.
    fn settings(&self, path: &str) -> &MethodSettings {
        let method = path.strip_prefix('/').unwrap_or(path);
        self.named
            .get(method)
            .or_else(|| self.named.get(service(method)?))
            .unwrap_or(&self.all)
    }

    pub(in crate::call) fn tokens(&self) -> &Tokens {
        &self.tokens
    }

    /// Records a successful call in the retry budget, whether or not a policy applies to the call.
    pub(crate) fn on_success(&self) {
        self.tokens.on_success();
    }
}

/// Returns the service in `package.Service/Method`, with the slash.
fn service(method: &str) -> Option<&str> {
    method.rfind('/').and_then(|slash| method.get(..=slash))
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    fn retry(code: Code) -> MethodPolicy {
        MethodPolicy::Retry(RetryPolicy::new([code]))
    }

    fn timeout(seconds: u64) -> MethodTimeout {
        MethodTimeout::new(Duration::from_secs(seconds))
    }

    fn set(methods: &mut ProgramMethods, name: &str, policy: MethodPolicy) {
        methods.named(name).expect("a valid name").policy = Some(policy);
    }

    #[test]
    fn a_method_uses_the_most_specific_policy() {
        let mut methods = ProgramMethods::default();
        methods.all().policy = Some(retry(Code::Unavailable));
        set(&mut methods, "a.Service", retry(Code::Aborted));
        set(&mut methods, "/a.Service/Get", retry(Code::Internal));
        let once = RetryPolicy::new([]).max_attempts(1);
        set(&mut methods, "b.Service/", MethodPolicy::Retry(once));
        let hedged = HedgingPolicy::new(2, Duration::ZERO);
        set(&mut methods, "c.Service/Get", MethodPolicy::Hedge(hedged));
        let retries = MethodConfig::new(&methods, None);
        for (path, code) in [
            ("/a.Service/Get", Code::Internal),
            ("/a.Service/Put", Code::Aborted),
            ("/a.Service2/Get", Code::Unavailable),
            ("/", Code::Unavailable),
            ("", Code::Unavailable),
        ] {
            let policy = retries.retry(path).expect("a policy");
            assert!(policy.covers(code), "{path}: {policy:?}");
            assert!(retries.hedging(path).is_none());
            assert!(retries.of_call(path).is_none());
        }
        assert!(
            retries.retry("/b.Service/Get").is_none(),
            "a limit of one attempt must disable retries"
        );
        assert!(retries.retry("/c.Service/Get").is_none());
        assert!(retries.hedging("/c.Service/Get").is_some());
    }

    #[test]
    fn names_that_match_no_method_are_rejected() {
        let mut methods = ProgramMethods::default();
        for name in ["", "/", "a//b", "a/b/c", "//a"] {
            assert!(methods.named(name).is_none(), "{name:?}");
        }
        assert!(!MethodConfig::new(&methods, None).has_effect());
    }

    /// The program sets a timeout for the channel and a policy for one method. The service config sets a timeout for the service and a
    /// policy for all methods.
    fn both(precedence: Precedence) -> MethodConfig {
        let mut methods = ProgramMethods::default();
        methods.all().timeout = Some(timeout(1));
        set(&mut methods, "a.Service/Get", retry(Code::Aborted));
        let of_service = MethodSettings {
            timeout: Some(timeout(2)),
            wait_for_ready: Some(true),
            ..MethodSettings::default()
        };
        let of_all = MethodSettings {
            policy: Some(retry(Code::Internal)),
            max_request_bytes: Some(7),
            ..MethodSettings::default()
        };
        let table = MethodTable {
            all: Some(of_all),
            named: HashMap::from([("a.Service/".into(), of_service)]),
        };
        let service = ServiceMethods {
            table: &table,
            budget: None,
            precedence,
        };
        MethodConfig::new(&methods, Some(service))
    }

    #[test]
    fn the_preferred_source_wins_for_each_setting() {
        let seconds = |config: &MethodConfig, path| {
            let settings = config.of_call(path).expect("settings");
            settings
                .timeout
                .as_ref()
                .expect("a timeout")
                .duration
                .as_secs()
        };
        let covers = |config: &MethodConfig, path, code| {
            config.retry(path).is_some_and(|policy| policy.covers(code))
        };
        let config = both(Precedence::Program);
        assert_eq!(seconds(&config, "/a.Service/Get"), 1);
        assert_eq!(seconds(&config, "/b.Service/Get"), 1);
        assert!(covers(&config, "/a.Service/Get", Code::Aborted));
        let config = both(Precedence::ServiceConfig);
        assert_eq!(seconds(&config, "/a.Service/Get"), 2);
        assert_eq!(seconds(&config, "/b.Service/Get"), 1);
        for precedence in [Precedence::Program, Precedence::ServiceConfig] {
            let config = both(precedence);
            // The entry of the service has no policy, and an entry of a service config is used as a whole, so the policy for all methods
            // does not apply to the service.
            assert!(covers(&config, "/a.Service/Get", Code::Aborted));
            assert!(config.retry("/a.Service/Put").is_none());
            assert!(covers(&config, "/b.Service/Get", Code::Internal));
            let settings = config.of_call("/a.Service/Put").expect("settings");
            assert_eq!(settings.wait_for_ready, Some(true));
            assert_eq!(settings.max_request_bytes, None);
            let settings = config.of_call("/b.Service/Put").expect("settings");
            assert_eq!(settings.max_request_bytes, Some(7));
        }
    }

    #[test]
    fn only_a_preferred_service_config_shortens_the_timeout_of_a_request() {
        let own = |seconds| Some(Duration::from_secs(seconds));
        for (precedence, shortened) in [
            (Precedence::Program, [false, false]),
            (Precedence::ServiceConfig, [true, false]),
        ] {
            let config = both(precedence);
            let settings = config.of_call("/a.Service/Get").expect("settings");
            let timeout = settings.timeout.as_ref().expect("a timeout");
            assert!(timeout.replaces(None));
            assert_eq!(
                [timeout.replaces(own(3)), timeout.replaces(own(1))],
                shortened
            );
        }
    }

    #[test]
    fn the_timeout_of_a_method_leaves_the_policy_of_the_channel_in_force() {
        let mut methods = ProgramMethods::default();
        methods.all().policy = Some(retry(Code::Unavailable));
        methods
            .named("a.Service/Get")
            .expect("a valid name")
            .timeout = Some(timeout(3));
        let config = MethodConfig::new(&methods, None);
        assert!(config.retry("/a.Service/Get").is_some());
        let settings = config.of_call("/a.Service/Get").expect("settings");
        assert_eq!(settings.timeout, Some(timeout(3)));
        let settings = config.of_call("/a.Service/Put").expect("settings");
        assert_eq!(settings.timeout, None);
    }
}
