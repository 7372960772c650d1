//! The retry and hedging policy of each method.

use std::collections::HashMap;

use super::budget::{RetryBudget, Tokens};
use super::policy::{HedgingPolicy, RetryPolicy};

/// The policy that sends calls of a method more than once.
#[derive(Clone, Debug)]
pub(crate) enum MethodPolicy {
    Retry(RetryPolicy),
    Hedge(HedgingPolicy),
}

/// The policies that the channel's builder collects.
#[derive(Clone, Debug, Default)]
pub(crate) struct MethodConfigBuilder {
    all: Option<MethodPolicy>,
    /// Policies, keyed by `package.Service/Method` or `package.Service`.
    named: HashMap<Box<str>, MethodPolicy>,
    budget: RetryBudget,
}

impl MethodConfigBuilder {
    pub(crate) fn set_all(&mut self, policy: MethodPolicy) {
        self.all = Some(policy);
    }

    /// Sets the policy of a service or method. Returns true if the policy was set, and false if the name is neither `package.Service` nor
    /// `package.Service/Method`.
    pub(crate) fn set(&mut self, name: &str, policy: MethodPolicy) -> bool {
        let trimmed = name.strip_prefix('/').unwrap_or(name);
        let trimmed = trimmed.strip_suffix('/').unwrap_or(trimmed);
        let parts = || trimmed.split('/');
        if parts().count() > 2 || parts().any(str::is_empty) {
            return false;
        }
        self.named.insert(trimmed.into(), policy);
        true
    }

    pub(crate) fn set_budget(&mut self, budget: RetryBudget) {
        self.budget = budget;
    }

    /// Builds the policies for calls. Returns `None` if no policy is set.
    pub(crate) fn build(self) -> Option<Box<MethodConfig>> {
        let mut policies = self.all.iter().chain(self.named.values());
        let hedges = policies.any(|policy| matches!(policy, MethodPolicy::Hedge(_)));
        (self.all.is_some() || !self.named.is_empty()).then(|| {
            Box::new(MethodConfig {
                hedges,
                tokens: Tokens::new(self.budget),
                all: self.all,
                named: self.named,
            })
        })
    }
}

/// The policies of a channel.
#[derive(Debug)]
pub(crate) struct MethodConfig {
    all: Option<MethodPolicy>,
    named: HashMap<Box<str>, MethodPolicy>,
    /// Whether there is a hedging policy. If there is none, [`hedging`](Self::hedging) skips the look-up for each call.
    hedges: bool,
    tokens: Tokens,
}

impl MethodConfig {
    /// Returns the retry policy for this path, if any.
    pub(crate) fn retry(&self, path: &str) -> Option<&RetryPolicy> {
        match self.policy(path)? {
            MethodPolicy::Retry(policy) if policy.attempt_limit() > 1 => Some(policy),
            _ => None,
        }
    }

    /// Returns the hedging policy for this path, if any.
    pub(crate) fn hedging(&self, path: &str) -> Option<&HedgingPolicy> {
        if !self.hedges {
            return None;
        }
        match self.policy(path)? {
            MethodPolicy::Hedge(policy) if policy.attempt_limit() > 1 => Some(policy),
            _ => None,
        }
    }

    /// Returns the most specific policy for this path.
    fn policy(&self, path: &str) -> Option<&MethodPolicy> {
        let method = path.strip_prefix('/').unwrap_or(path);
        let service = || method.rsplit_once('/').map(|(service, _)| service);
        self.named
            .get(method)
            .or_else(|| self.named.get(service()?))
            .or(self.all.as_ref())
    }

    pub(in crate::call) fn tokens(&self) -> &Tokens {
        &self.tokens
    }

    /// Records a successful call in the retry budget, whether or not a policy applies to the call.
    pub(crate) fn on_success(&self) {
        self.tokens.on_success();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tonic::Code;

    use super::*;

    fn retry(code: Code) -> MethodPolicy {
        MethodPolicy::Retry(RetryPolicy::new([code]))
    }

    #[test]
    fn a_method_uses_the_most_specific_policy() {
        let mut policies = MethodConfigBuilder::default();
        policies.set_all(retry(Code::Unavailable));
        policies.set("a.Service", retry(Code::Aborted));
        policies.set("/a.Service/Get", retry(Code::Internal));
        policies.set(
            "b.Service/",
            MethodPolicy::Retry(RetryPolicy::new([]).max_attempts(1)),
        );
        policies.set(
            "c.Service/Get",
            MethodPolicy::Hedge(HedgingPolicy::new(2, Duration::ZERO)),
        );
        let retries = policies.build().expect("policies");
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
        }
        assert!(
            retries.retry("/b.Service/Get").is_none(),
            "a limit of one attempt must disable retries"
        );
        assert!(retries.retry("/c.Service/Get").is_none());
        assert!(retries.hedging("/c.Service/Get").is_some());
    }

    #[test]
    fn names_that_match_no_method_are_ignored() {
        let mut policies = MethodConfigBuilder::default();
        for name in ["", "/", "a//b", "a/b/c", "//a"] {
            policies.set(name, retry(Code::Unavailable));
        }
        assert!(policies.build().is_none(), "a policy was set");
    }
}
