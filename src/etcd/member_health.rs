//! The failure records of members. Requests avoid a member with recent failures while other members are available.
//!
//! The balanced channel observes only connections, and the connection to a failing member may look healthy. A member that has lost its
//! cluster, is not an etcd, or has a stalled disk can be recognised only by its responses or by the lack of them.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use tonic_balance::Address;

/// The kind of a request. Each kind has its own channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Traffic {
    /// Requests for keys, and watches.
    Keys,
    Leases,
}

/// The failure records of all members.
#[derive(Debug, Default)]
pub(super) struct MemberHealth(HashMap<Address, FailureRecord>);

/// The failure record of a member.
#[derive(Debug)]
struct FailureRecord {
    failed: Instant,
    /// The time for which requests avoid the member.
    penalty: Duration,
    /// The number of consecutive requests without a response, for each kind of request.
    unanswered: [u32; 2],
}

/// The kind of a failure of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// The member returned an error, or its connection broke.
    Error,
    /// The member did not respond in time.
    Timeout,
    /// The member was silent on a watch stream for so long that its connection must be replaced.
    StreamTimeout,
}

impl MemberHealth {
    /// Records a response that shows no failure of the member.
    pub(super) fn on_answer(&mut self, member: &Address, traffic: Traffic) {
        let Some(record) = self.0.get_mut(member) else {
            return;
        };
        record.penalty = Duration::ZERO;
        // One address may lead to a different member on each connection. So a response on one channel does not clear the count of the other
        // channel.
        record.unanswered[traffic as usize] = 0;
        if record.unanswered == [0; 2] {
            self.0.remove(member);
        }
    }

    /// Records a failure. Returns whether the connection to the member must be replaced. If the address is that of a load balancer or of a
    /// Kubernetes Service, the new connection may reach another member. If it reaches the same member, the cost is one handshake.
    pub(super) fn on_failure(
        &mut self,
        member: &Address,
        traffic: Traffic,
        failure: Failure,
        now: Instant,
    ) -> bool {
        let record = self.0.entry(member.clone()).or_insert(FailureRecord {
            failed: now,
            penalty: Duration::ZERO,
            unanswered: [0; 2],
        });
        // A failure during a penalty restarts the penalty but does not double it, so that requests that fail at the same time count as one
        // failure.
        if now >= record.failed + record.penalty {
            record.penalty = (record.penalty * 2).clamp(FIRST_PENALTY, LONGEST_PENALTY);
        }
        record.failed = now;
        let unanswered = &mut record.unanswered[traffic as usize];
        *unanswered = match failure {
            Failure::Error => 0,
            Failure::Timeout => *unanswered + 1,
            Failure::StreamTimeout => MAX_UNANSWERED,
        };
        let must_reconnect = *unanswered >= MAX_UNANSWERED;
        if must_reconnect {
            *unanswered = 0;
        }
        must_reconnect
    }

    /// Returns the members that requests avoid. The member with the most recent failure is last.
    pub(super) fn avoided(&self, now: Instant) -> Vec<Address> {
        let mut avoided: Vec<_> = self
            .0
            .iter()
            .filter(|(_, record)| now < record.failed + record.penalty)
            .collect();
        avoided.sort_by_key(|(_, record)| record.failed);
        avoided
            .into_iter()
            .map(|(member, _)| member.clone())
            .collect()
    }
}

/// Duration of the first penalty. It is longer than an election: if the members have failed because the cluster had no leader, they are
/// healthy again when the penalty ends.
const FIRST_PENALTY: Duration = Duration::from_secs(5);
/// Limit on the duration of a penalty. With this limit, a member that always fails costs one attempt per minute.
const LONGEST_PENALTY: Duration = Duration::from_secs(60);
/// Number of consecutive requests without a response after which a connection is replaced. One missing response is not enough, because its
/// cause may be a stalled disk.
const MAX_UNANSWERED: u32 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    fn member(port: u16) -> Address {
        format!("127.0.0.1:{port}").parse().expect("an address")
    }

    #[test]
    fn a_failing_member_is_avoided_longer_each_time_until_it_responds() {
        let (mut health, mut now) = (MemberHealth::default(), Instant::now());
        for seconds in [5, 10, 20, 40, 60, 60] {
            for _ in 0..3 {
                health.on_failure(&member(1), Traffic::Keys, Failure::Error, now);
            }
            now += Duration::from_secs(seconds);
            let before = now.checked_sub(Duration::from_millis(1)).expect("in range");
            assert_eq!(health.avoided(before), [member(1)], "{seconds} s penalty");
            assert!(health.avoided(now).is_empty(), "{seconds} s penalty");
        }
        health.on_failure(&member(1), Traffic::Keys, Failure::Error, now);
        health.on_answer(&member(1), Traffic::Keys);
        assert!(health.avoided(now).is_empty());
        health.on_failure(&member(1), Traffic::Keys, Failure::Error, now);
        assert!(health.avoided(now + FIRST_PENALTY).is_empty());
    }

    #[test]
    fn the_member_that_failed_last_is_tried_last() {
        let (mut health, now) = (MemberHealth::default(), Instant::now());
        for (port, millis) in [(1, 0), (2, 1), (3, 2), (1, 3)] {
            let at = now + Duration::from_millis(millis);
            health.on_failure(&member(port), Traffic::Keys, Failure::Error, at);
        }
        let avoided = health.avoided(now + Duration::from_millis(4));
        assert_eq!(avoided, [member(2), member(3), member(1)]);
    }

    #[test]
    fn a_connection_is_replaced_after_two_request_timeouts_or_one_watch_timeout() {
        let (mut health, now) = (MemberHealth::default(), Instant::now());
        let mut fails = |traffic, failure| health.on_failure(&member(1), traffic, failure, now);
        assert!(!fails(Traffic::Keys, Failure::Timeout));
        assert!(
            !fails(Traffic::Leases, Failure::Timeout),
            "the channel for leases must count separately"
        );
        assert!(
            !fails(Traffic::Keys, Failure::Error),
            "an error must count as a response"
        );
        assert!(!fails(Traffic::Keys, Failure::Timeout));
        assert!(fails(Traffic::Keys, Failure::Timeout));
        assert!(
            !fails(Traffic::Keys, Failure::Timeout),
            "a new connection must start without timeouts"
        );
        assert!(fails(Traffic::Keys, Failure::StreamTimeout));
        // A response on the channel for keys does not clear the earlier timeout on the channel for leases.
        health.on_answer(&member(1), Traffic::Keys);
        assert!(
            health.avoided(now).is_empty(),
            "a member that has responded must not be avoided"
        );
        let fails = health.on_failure(&member(1), Traffic::Leases, Failure::Timeout, now);
        assert!(fails, "a second timeout must replace the connection");
    }

    #[test]
    fn one_watch_timeout_is_enough_and_a_response_ends_the_count() {
        let (mut health, now) = (MemberHealth::default(), Instant::now());
        let watch = Failure::StreamTimeout;
        assert!(health.on_failure(&member(1), Traffic::Keys, watch, now));
        for _ in 0..3 {
            let silent = Failure::Timeout;
            let replaced = health.on_failure(&member(2), Traffic::Keys, silent, now);
            assert!(!replaced, "the timeouts are not consecutive");
            health.on_answer(&member(2), Traffic::Keys);
        }
    }
}
