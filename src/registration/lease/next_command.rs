//! Derives the next command from the state of the lease machine.

use std::time::Duration;

use tokio::time::Instant;

use super::machine::{Command, DEADLINE_MAX, LEAVE_MARKER_MAX, Machine};
use super::state::{KeyEntry, Removal, State};
use crate::keyspace::LeaseId;

impl Machine {
    /// Returns the next command.
    pub(in crate::registration) fn command(&self, now: Instant) -> Command {
        let deadline = self.deadline();
        if let State::Leaving { leave_marker, .. } = self.state {
            return self.leave(leave_marker, now);
        }
        if let Some(lease) = &self.lease
            && self.keeps_lease()
            && lease.renew_at <= now
        {
            return Command::Renew {
                lease: lease.id,
                term: self.term,
                deadline,
            };
        }
        let renew_at = self
            .lease
            .filter(|_| self.keeps_lease())
            .map(|lease| lease.renew_at);
        if let Some(not_before) = self.not_before.filter(|not_before| *not_before > now)
            && !matches!(
                self.state,
                State::Superseded | State::Paused | State::Deregistered
            )
        {
            return Command::Wait {
                until: earliest(Some(not_before), renew_at),
            };
        }
        let is_due = |at: Option<Instant>| at.is_none_or(|at| at <= now);
        let due = |entry: &KeyEntry| entry.removal == Removal::Requested && is_due(entry.delete_at);
        // While an earlier lease is not revoked, a key to be deleted may still be attached to it. A delete affects only a key that is
        // attached to the current lease, so the earlier lease is revoked first.
        if let Some(index) = self.keys.iter().position(due)
            && let Some(lease) = &self.lease
            && self.unrevoked.is_empty()
        {
            let entry = &self.keys[index];
            return Command::Delete {
                index,
                lease: if entry.by_hand {
                    LeaseId::NONE
                } else {
                    lease.id
                },
                leave_marker: entry.held.filter(|_| self.has_leave_marker),
                deadline,
            };
        }
        // In these states, no live key needs an earlier lease: each live key is attached to the current lease, or belongs to another
        // server. So an earlier lease can be revoked. The revoke deletes the keys that are still attached to that earlier lease.
        if let (State::Registered | State::Superseded, Some(lease)) =
            (self.state, self.unrevoked.last())
            && is_due(self.revoke_at)
        {
            let lease = *lease;
            return Command::Revoke { lease, deadline };
        }
        let deletions = self
            .keys
            .iter()
            .filter(|entry| entry.removal == Removal::Requested);
        let deletions = deletions.filter_map(|entry| entry.delete_at);
        let revoke_at = self.revoke_at.filter(|_| !self.unrevoked.is_empty());
        let again = deletions.chain(revoke_at).filter(|at| *at > now).min();
        match (self.state, &self.lease) {
            (State::Granting { lease }, _) => Command::Grant { lease, deadline },
            (State::Putting, Some(lease)) => Command::Put {
                lease: lease.id,
                leaving: false,
                deadline,
            },
            (State::Registered, Some(_))
                if self
                    .live_entries()
                    .any(|entry| entry.is_pending() && entry.foreign.is_none()) =>
            {
                Command::Read { deadline }
            }
            (State::Reading | State::Putting, _) => Command::Read { deadline },
            (State::Registered, _) => Command::Wait {
                until: earliest(renew_at, again),
            },
            // The watch reports the deletion of another server's key. The reads, one every 5 s to 10 s, detect the deletion even if the
            // watch cannot be opened.
            (State::Superseded, _) => match self.not_before {
                Some(not_before) if not_before > now => Command::Wait {
                    until: earliest(Some(not_before), again),
                },
                _ => Command::Read { deadline },
            },
            (State::Paused | State::Leaving { .. }, _) => Command::Wait { until: None },
            (State::Deregistered, _) => Command::End,
        }
    }

    fn leave(&self, leave_marker: bool, now: Instant) -> Command {
        let deadline = self.deadline();
        let own = self.lease.map(|lease| lease.id);
        if self.changed_while_leaving {
            return Command::Read {
                deadline: deadline.min(LEAVE_MARKER_MAX),
            };
        }
        let by_hand = self.keys.iter().position(|entry| entry.by_hand);
        if let Some(index) = by_hand
            && self.not_before.is_none_or(|not_before| not_before <= now)
        {
            return Command::Delete {
                index,
                lease: LeaseId::NONE,
                leave_marker: None,
                deadline,
            };
        }
        let Some(lease) = own.or(self.unrevoked.last().copied()) else {
            return Command::Wait {
                until: self.not_before.filter(|_| by_hand.is_some()),
            };
        };
        if let Some(not_before) = self.not_before.filter(|not_before| *not_before > now) {
            return Command::Wait {
                until: Some(not_before),
            };
        }
        if leave_marker && own.is_some() {
            return Command::Put {
                lease,
                leaving: true,
                deadline: deadline.min(LEAVE_MARKER_MAX),
            };
        }
        Command::Revoke { lease, deadline }
    }

    /// Returns the timeout of a request: a sixth of the TTL, at most 2 s. If a renewal exceeds this timeout, there is still time to send it
    /// again, to another member, before the lease expires.
    pub(super) fn deadline(&self) -> Duration {
        let ttl = self.lease.map_or(self.ttl, |lease| lease.ttl);
        (ttl / 6).min(DEADLINE_MAX)
    }

    fn keeps_lease(&self) -> bool {
        matches!(
            self.state,
            State::Reading | State::Putting | State::Registered
        )
    }
}

fn earliest(a: Option<Instant>, b: Option<Instant>) -> Option<Instant> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}
