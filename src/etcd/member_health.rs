//! What is held against members: which of them a request is kept from while there are others.
//!
//! The channel knows of connections. That a member has lost its cluster, that it is no etcd, or that its disk hangs shows in its answers
//! alone, or in their absence, and its connection is as good as any.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use tonic_balance::Address;

/// Which connection a request goes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Traffic {
    /// Keys and watches.
    Keys,
    Leases,
}

/// How all members stand.
#[derive(Debug, Default)]
pub(super) struct MemberHealth(HashMap<Address, Standing>);

/// How a member stands that has failed.
#[derive(Debug)]
struct Standing {
    failed: Instant,
    /// For how long it is avoided.
    penalty: Duration,
    /// Requests in a row that it has left without an answer, by their connection.
    silent: [u32; 2],
}

/// How a member has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// It has said so, or its connection broke.
    Error,
    /// It has not answered in time.
    Timeout,
    /// It has not answered for so long that nothing more is expected of its connection.
    StreamTimeout,
}

impl MemberHealth {
    /// The member has answered as it should.
    pub(super) fn on_answer(&mut self, member: &Address, traffic: Traffic) {
        let Some(standing) = self.0.get_mut(member) else {
            return;
        };
        standing.penalty = Duration::ZERO;
        // Behind one address each connection may lead to another member: an answer over one says nothing of the other.
        standing.silent[traffic as usize] = 0;
        if standing.silent == [0; 2] {
            self.0.remove(member);
        }
    }

    /// The member has failed. Says whether its connection is to be left for a new one: behind the only address of a balancer or a service
    /// another member may answer then, and one that is really the same has lost nothing but a handshake.
    pub(super) fn on_failure(
        &mut self,
        member: &Address,
        traffic: Traffic,
        failure: Failure,
        now: Instant,
    ) -> bool {
        let standing = self.0.entry(member.clone()).or_insert(Standing {
            failed: now,
            penalty: Duration::ZERO,
            silent: [0; 2],
        });
        // Of many requests that fail together one counts.
        if now >= standing.failed + standing.penalty {
            standing.penalty = (standing.penalty * 2).clamp(FIRST, LONGEST);
        }
        standing.failed = now;
        let silent = &mut standing.silent[traffic as usize];
        *silent = match failure {
            Failure::Error => 0,
            Failure::Timeout => *silent + 1,
            Failure::StreamTimeout => SILENT,
        };
        let give_up = *silent >= SILENT;
        if give_up {
            *silent = 0;
        }
        give_up
    }

    /// The members that requests are kept from, the one that has failed last at the end.
    pub(super) fn avoided(&self, now: Instant) -> Vec<Address> {
        let mut avoided: Vec<_> = self
            .0
            .iter()
            .filter(|(_, standing)| now < standing.failed + standing.penalty)
            .collect();
        avoided.sort_by_key(|(_, standing)| standing.failed);
        avoided
            .into_iter()
            .map(|(member, _)| member.clone())
            .collect()
    }
}

/// Longer than an election, after which members of a cluster that has lost its leader are as good as before.
const FIRST: Duration = Duration::from_secs(5);
/// A member that fails each time it is tried costs one request of those of a minute its first try.
const LONGEST: Duration = Duration::from_secs(60);
/// Requests in a row without an answer after which a connection is given up. One alone may be a disk that has stalled.
const SILENT: u32 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    fn member(port: u16) -> Address {
        format!("127.0.0.1:{port}").parse().expect("valid")
    }

    #[test]
    fn who_fails_is_avoided_for_longer_each_time_until_it_answers() {
        let (mut health, mut now) = (MemberHealth::default(), Instant::now());
        for seconds in [5, 10, 20, 40, 60, 60] {
            for _ in 0..3 {
                health.on_failure(&member(1), Traffic::Keys, Failure::Error, now);
            }
            now += Duration::from_secs(seconds);
            let before = now.checked_sub(Duration::from_millis(1)).expect("later");
            assert_eq!(health.avoided(before), [member(1)], "{seconds}");
            assert!(health.avoided(now).is_empty(), "{seconds}");
        }
        health.on_failure(&member(1), Traffic::Keys, Failure::Error, now);
        health.on_answer(&member(1), Traffic::Keys);
        assert!(health.avoided(now).is_empty());
        health.on_failure(&member(1), Traffic::Keys, Failure::Error, now);
        assert!(health.avoided(now + FIRST).is_empty());
    }

    #[test]
    fn the_last_to_fail_is_the_last_to_be_asked() {
        let (mut health, now) = (MemberHealth::default(), Instant::now());
        for (port, millis) in [(1, 0), (2, 1), (3, 2), (1, 3)] {
            let at = now + Duration::from_millis(millis);
            health.on_failure(&member(port), Traffic::Keys, Failure::Error, at);
        }
        let avoided = health.avoided(now + Duration::from_millis(4));
        assert_eq!(avoided, [member(2), member(3), member(1)]);
    }

    #[test]
    fn a_connection_is_left_after_two_silent_requests_in_a_row_or_a_mute_watch() {
        let (mut health, now) = (MemberHealth::default(), Instant::now());
        let mut fails = |traffic, failure| health.on_failure(&member(1), traffic, failure, now);
        assert!(!fails(Traffic::Keys, Failure::Timeout));
        assert!(!fails(Traffic::Leases, Failure::Timeout), "it has its own");
        assert!(!fails(Traffic::Keys, Failure::Error), "that is an answer");
        assert!(!fails(Traffic::Keys, Failure::Timeout));
        assert!(fails(Traffic::Keys, Failure::Timeout));
        assert!(
            !fails(Traffic::Keys, Failure::Timeout),
            "the new one is new"
        );
        assert!(fails(Traffic::Keys, Failure::StreamTimeout));
        // The lease's request above is not forgotten for what came over the other connection.
        health.on_answer(&member(1), Traffic::Keys);
        assert!(health.avoided(now).is_empty(), "it has answered");
        let fails = health.on_failure(&member(1), Traffic::Leases, Failure::Timeout, now);
        assert!(fails, "the second in a row");
    }
}
