//! Derives the next command from the state of the lease machine.

use std::time::Duration;

use tokio::time::Instant;

use super::machine::{Command, DEADLINE_MAX, LEAVE_MARKER_MAX, Machine};
use super::state::{Removal, State};
use crate::keyspace::LeaseId;

impl Machine {
    /// Returns the next command.
    pub(in crate::registration) fn command(&self, now: Instant) -> Command {
        let deadline = self.deadline();
        match self.state {
            State::Leaving { leave_marker, .. } => return self.leave(leave_marker, now),
            State::Paused => return self.leave(false, now),
            _ => {}
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
            && !matches!(self.state, State::Superseded | State::Deregistered)
        {
            return Command::Wait {
                until: earliest(Some(not_before), renew_at),
            };
        }
        if let Some(delete) = self.delete_removed(now) {
            return delete;
        }
        // In these states, no live key needs an earlier lease: each live key is attached to the current lease, or belongs to another
        // server. So an earlier lease can be revoked. The revoke deletes the keys that are still attached to that earlier lease.
        if let (State::Registered | State::Superseded, Some(lease)) =
            (self.state, self.unrevoked.last())
            && is_due(self.revoke_at, now)
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

    /// Returns the next delete of a key whose service is removed, if one is due.
    fn delete_removed(&self, now: Instant) -> Option<Command> {
        self.keys.iter().enumerate().find_map(|(index, entry)| {
            let is_removed = entry.removal == Removal::Requested;
            if self.state == State::Deregistered || !is_removed || !is_due(entry.delete_at, now) {
                return None;
            }
            let lease = match &self.lease {
                _ if entry.by_hand => LeaseId::NONE,
                // While an earlier lease is not revoked, the key may still be attached to it. The delete affects only a key that is
                // attached to the current lease, so the earlier lease is revoked first.
                Some(lease) if self.unrevoked.is_empty() => lease.id,
                _ => return None,
            };
            Some(Command::Delete {
                index,
                lease,
                leave_marker: entry.held.filter(|_| self.has_leave_marker),
                deadline: self.deadline(),
            })
        })
    }

    /// Returns the next command in the states `Leaving` and `Paused`. The keys are read before the revoke and after it. So a value that was
    /// written by hand is found although the format has no leave marker, and although it was written after the marker.
    fn leave(&self, leave_marker: bool, now: Instant) -> Command {
        let deadline = self.deadline();
        if self.search {
            return Command::Read {
                deadline: deadline.min(LEAVE_MARKER_MAX),
            };
        }
        let by_hand = || self.keys.iter().enumerate().filter(|(_, key)| key.by_hand);
        if let Some((index, _)) = by_hand().find(|(_, key)| is_due(key.delete_at, now)) {
            return Command::Delete {
                index,
                lease: LeaseId::NONE,
                leave_marker: None,
                deadline,
            };
        }
        let again = by_hand().filter_map(|(_, key)| key.delete_at).min();
        let own = self.lease.map(|lease| lease.id);
        let Some(lease) = own.or(self.unrevoked.last().copied()) else {
            return Command::Wait { until: again };
        };
        if !is_due(self.not_before, now) {
            return Command::Wait {
                until: earliest(self.not_before, again),
            };
        }
        if leave_marker && own.is_some() && self.holds_keys() {
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

fn is_due(at: Option<Instant>, now: Instant) -> bool {
    at.is_none_or(|at| at <= now)
}

fn earliest(a: Option<Instant>, b: Option<Instant>) -> Option<Instant> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}
