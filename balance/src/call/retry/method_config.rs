//! Which policy a method has.

use std::collections::HashMap;

use super::budget::{RetryBudget, Tokens};
use super::policy::{HedgingPolicy, RetryPolicy};

/// How calls are sent more than once.
#[derive(Clone, Debug)]
pub(crate) enum MethodPolicy {
    Retry(RetryPolicy),
    Hedge(HedgingPolicy),
}

/// The policies that a channel is built with.
#[derive(Clone, Debug, Default)]
pub(crate) struct MethodConfigBuilder {
    all: Option<MethodPolicy>,
    /// By `package.Service/Method` or `package.Service`.
    named: HashMap<Box<str>, MethodPolicy>,
    budget: RetryBudget,
}

impl MethodConfigBuilder {
    pub(crate) fn set_all(&mut self, plan: MethodPolicy) {
        self.all = Some(plan);
    }

    /// Sets the plan of a service or method. Returns false if the name is that of neither.
    pub(crate) fn set(&mut self, name: &str, plan: MethodPolicy) -> bool {
        let trimmed = name.strip_prefix('/').unwrap_or(name);
        let trimmed = trimmed.strip_suffix('/').unwrap_or(trimmed);
        let parts = || trimmed.split('/');
        if parts().count() > 2 || parts().any(str::is_empty) {
            return false;
        }
        self.named.insert(trimmed.into(), plan);
        true
    }

    pub(crate) fn set_budget(&mut self, budget: RetryBudget) {
        self.budget = budget;
    }

    /// What calls see of it; none if there is no policy.
    pub(crate) fn build(self) -> Option<Box<MethodConfig>> {
        let mut plans = self.all.iter().chain(self.named.values());
        let hedges = plans.any(|plan| matches!(plan, MethodPolicy::Hedge(_)));
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
    /// Whether any plan hedges: only then a call's plan is looked for before it has failed.
    hedges: bool,
    tokens: Tokens,
}

impl MethodConfig {
    /// The policy by which calls to this path are retried, if any.
    pub(crate) fn retry(&self, path: &str) -> Option<&RetryPolicy> {
        match self.plan(path)? {
            MethodPolicy::Retry(policy) if policy.attempt_limit() > 1 => Some(policy),
            _ => None,
        }
    }

    /// The policy by which calls to this path are hedged, if any.
    pub(crate) fn hedging(&self, path: &str) -> Option<&HedgingPolicy> {
        if !self.hedges {
            return None;
        }
        match self.plan(path)? {
            MethodPolicy::Hedge(policy) if policy.attempt_limit() > 1 => Some(policy),
            _ => None,
        }
    }

    /// The most specific one.
    fn plan(&self, path: &str) -> Option<&MethodPolicy> {
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

    /// A call went well, under whichever policy or none.
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
    fn the_most_specific_policy_is_a_methods() {
        let mut plans = MethodConfigBuilder::default();
        plans.set_all(retry(Code::Unavailable));
        plans.set("a.Service", retry(Code::Aborted));
        plans.set("/a.Service/Get", retry(Code::Internal));
        plans.set(
            "b.Service/",
            MethodPolicy::Retry(RetryPolicy::new([]).max_attempts(1)),
        );
        plans.set(
            "c.Service/Get",
            MethodPolicy::Hedge(HedgingPolicy::new(2, Duration::ZERO)),
        );
        let retries = plans.build().expect("policies");
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
        assert!(retries.retry("/b.Service/Get").is_none(), "left out by 1");
        assert!(retries.retry("/c.Service/Get").is_none());
        assert!(retries.hedging("/c.Service/Get").is_some());
    }

    #[test]
    fn what_names_no_method_is_left_out() {
        let mut plans = MethodConfigBuilder::default();
        for name in ["", "/", "a//b", "a/b/c", "//a"] {
            plans.set(name, retry(Code::Unavailable));
        }
        assert!(plans.build().is_none(), "without a policy there is nothing");
    }
}
