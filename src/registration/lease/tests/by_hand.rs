//! Tests of values that an operator writes by hand, without a lease.

use super::taken_away::Pair;
use super::*;

fn by_hand(index: usize, revision: i64) -> KeyValue {
    KeyValue {
        key: Key::from(format!("/gRPC/greeter/{index}").as_str()),
        value: Vec::new(),
        create_revision: Revision::new(1),
        mod_revision: Revision::new(revision),
        lease: LeaseId::NONE,
    }
}

#[test]
fn a_value_written_by_hand_is_replaced_under_the_lease() {
    let mut pair = Pair::registered();
    pair.machine.on_put_by_hand(1, &by_hand(1, 50));
    assert!(!pair.machine.is_written());
    let expected = Revision::new(50);
    assert_eq!(pair.machine.puts(), [Put { index: 1, expected }]);
    assert!(matches!(pair.step(), Command::Put { .. }));
    assert!(pair.machine.is_written());
}

#[test]
fn a_value_written_by_hand_that_a_read_finds_is_replaced_under_the_lease() {
    let mut pair = Pair::registered();
    let own = |index| Found {
        index,
        kv: Some(KeyValue {
            lease: pair.lease(),
            ..by_hand(index, 2)
        }),
        current: true,
        by_hand: false,
    };
    let found = Found {
        index: 1,
        kv: Some(by_hand(1, 50)),
        current: false,
        by_hand: true,
    };
    let found = vec![own(0), found];
    pair.machine.on_watch_opened();
    pair.machine.on_read(Ok(found), pair.now);
    let expected = Revision::new(50);
    assert_eq!(pair.machine.puts(), [Put { index: 1, expected }]);
    pair.step();
    assert!(pair.machine.is_written());
}

/// The event of an earlier put can be delayed.
#[test]
fn a_value_written_by_hand_before_the_last_own_put_is_ignored() {
    let mut pair = Pair::registered();
    pair.machine.on_put_by_hand(1, &by_hand(1, 1));
    assert!(pair.machine.is_written());
}

/// The revoke of the lease does not delete a key without a lease.
#[test]
fn a_value_written_by_hand_is_deleted_when_the_server_leaves() {
    let mut pair = Pair::registered();
    pair.machine.on_put_by_hand(1, &by_hand(1, 50));
    pair.machine.on_deregister();
    let deleted = pair.step();
    assert!(
        matches!(deleted, Command::Delete { index: 1, lease, .. } if lease == LeaseId::NONE),
        "{deleted:?}"
    );
    while let Command::Put { leaving: true, .. } = pair.machine.command(pair.now) {
        let written = Ok(Some(Revision::new(60)));
        pair.machine.on_put(true, written, pair.now);
    }
    let command = pair.machine.command(pair.now);
    assert!(matches!(command, Command::Revoke { .. }), "{command:?}");
    pair.machine.on_revoked(Ok(()), pair.now);
    assert_eq!(pair.machine.phase(pair.now), Phase::Deregistered);
}

/// The event of the edit may arrive after the request to leave, or the watch may be closed.
#[test]
fn an_edit_that_only_the_leave_marker_finds_is_deleted() {
    let mut pair = Pair::registered();
    let lease = pair.lease();
    pair.machine.on_deregister();
    assert!(matches!(
        pair.machine.command(pair.now),
        Command::Put { leaving: true, .. }
    ));
    // Nothing was written, because one of the keys has another revision.
    pair.machine.on_put(true, Ok(None), pair.now);
    assert!(matches!(
        pair.machine.command(pair.now),
        Command::Read { .. }
    ));
    let own = Found {
        index: 0,
        kv: Some(KeyValue {
            lease,
            ..by_hand(0, 2)
        }),
        current: true,
        by_hand: false,
    };
    let edited = Found {
        index: 1,
        kv: Some(by_hand(1, 50)),
        current: false,
        by_hand: true,
    };
    pair.machine.on_read(Ok(vec![own, edited]), pair.now);
    assert!(matches!(
        pair.machine.command(pair.now),
        Command::Delete {
            index: 1,
            lease: LeaseId::NONE,
            ..
        }
    ));
    pair.machine.on_deleted(1, Ok(()), pair.now);
    assert!(matches!(
        pair.machine.command(pair.now),
        Command::Revoke { .. }
    ));
    pair.machine.on_revoked(Ok(()), pair.now);
    assert_eq!(pair.machine.phase(pair.now), Phase::Deregistered);
}

/// The read is best effort: without an answer, the lease is revoked.
#[test]
fn without_an_answer_to_the_read_the_lease_is_still_revoked() {
    let mut pair = Pair::registered();
    pair.machine.on_deregister();
    pair.machine.on_put(true, Ok(None), pair.now);
    let lost = Err(error(EtcdErrorKind::Unavailable));
    pair.machine.on_read(lost, pair.now);
    assert!(matches!(
        pair.machine.command(pair.now),
        Command::Revoke { .. }
    ));
}

#[test]
fn a_value_written_by_hand_is_deleted_with_the_removed_service() {
    let mut pair = Pair::registered();
    pair.machine.on_put_by_hand(1, &by_hand(1, 50));
    pair.machine.on_remove(1);
    let deleted = pair.step();
    assert!(
        matches!(deleted, Command::Delete { index: 1, lease, .. } if lease == LeaseId::NONE),
        "{deleted:?}"
    );
    assert!(pair.machine.is_gone(1));
}

/// The lease can expire while the deregistration waits.
#[test]
fn without_a_lease_a_value_written_by_hand_is_still_deleted() {
    let mut pair = Pair::registered();
    pair.machine.on_put_by_hand(1, &by_hand(1, 50));
    pair.machine.lose_lease();
    pair.machine.on_deregister();
    assert!(matches!(pair.step(), Command::Delete { index: 1, .. }));
    assert_eq!(pair.machine.phase(pair.now), Phase::Deregistered);
}
