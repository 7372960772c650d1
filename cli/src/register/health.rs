//! Decides when a server that fails its checks is deregistered, and when it is registered again.

/// What to do after a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Deregister,
    Register,
}

/// Counts failed checks.
#[derive(Debug)]
pub(super) struct Health {
    limit: u32,
    failures: u32,
}

impl Health {
    /// Creates the state of a server that is registered.
    pub(super) fn new(limit: u32) -> Self {
        Self { limit, failures: 0 }
    }

    /// Handles the result of a check. A single failure has no effect, because a busy server may miss one check.
    pub(super) fn on_check(&mut self, responds: bool) -> Option<Action> {
        if responds {
            let was_deregistered = self.failures >= self.limit;
            self.failures = 0;
            return was_deregistered.then_some(Action::Register);
        }
        self.failures = self.failures.saturating_add(1);
        (self.failures == self.limit).then_some(Action::Deregister)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_in_a_row_deregister_and_one_success_registers() {
        let mut health = Health::new(2);
        let actions: Vec<_> = [true, false, true, false, false, false, true, true]
            .into_iter()
            .map(|responds| health.on_check(responds))
            .collect();
        let (out, back) = (Some(Action::Deregister), Some(Action::Register));
        assert_eq!(actions, [None, None, None, None, out, None, back, None]);
    }
}
