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

/// Executes commands until the machine is paused or has ended, and returns them.
fn rest(pair: &mut Pair) -> Vec<Command> {
    let mut commands = Vec::new();
    while pair.machine.phase(pair.now) == Phase::Leaving {
        commands.push(pair.step());
        assert!(commands.len() < 20, "{commands:?}");
    }
    commands
}

fn deletes(commands: &[Command], index: usize) -> bool {
    commands.iter().any(|command| {
        matches!(command, Command::Delete { index: deleted, lease, .. } if *deleted == index && *lease == LeaseId::NONE)
    })
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
    pair.by_hand.push(1);
    pair.machine.on_deregister();
    assert!(matches!(pair.step(), Command::Read { .. }));
    let deleted = pair.step();
    assert!(deletes(&[deleted], 1), "{deleted:?}");
    let rest = rest(&mut pair);
    let marked = |command: &Command| matches!(command, Command::Put { leaving: true, .. });
    assert_eq!(rest.iter().filter(|command| marked(command)).count(), 1);
    assert_eq!(pair.machine.phase(pair.now), Phase::Deregistered);
}

/// The format of the keys may have no leave marker, whose put would detect the edit.
#[test]
fn an_edit_just_before_the_end_is_deleted_without_a_leave_marker() {
    let mut pair = Pair::registered();
    pair.machine.has_leave_marker = false;
    pair.by_hand.push(1);
    pair.machine.on_deregister();
    let commands = rest(&mut pair);
    assert!(deletes(&commands, 1), "{commands:?}");
    assert!(!deletes(&commands, 0), "{commands:?}");
    assert_eq!(pair.machine.phase(pair.now), Phase::Deregistered);
}

/// The put of the leave marker has succeeded, or its response was lost.
#[test]
fn an_edit_between_the_leave_marker_and_the_revoke_is_deleted() {
    for is_lost in [false, true] {
        let mut pair = Pair::registered();
        pair.machine.on_deregister();
        assert!(matches!(pair.step(), Command::Read { .. }));
        let next = pair.machine.command(pair.now);
        assert!(matches!(next, Command::Put { leaving: true, .. }));
        if is_lost {
            let lost = Err(error(EtcdErrorKind::DeadlineExceeded));
            pair.machine.on_put(true, lost, pair.now);
        } else {
            pair.step();
        }
        pair.by_hand.push(0);
        assert!(matches!(pair.step(), Command::Revoke { .. }));
        let commands = rest(&mut pair);
        assert!(deletes(&commands, 0), "{commands:?}");
        assert_eq!(pair.machine.phase(pair.now), Phase::Deregistered);
    }
}

/// A paused server must not be called. The watch reports the edit, or, if it has missed the edit, the read at its next opening finds it.
#[test]
fn a_value_written_by_hand_during_a_pause_is_deleted_at_once() {
    for is_reported in [true, false] {
        let mut pair = Pair::registered();
        pair.machine.on_pause();
        rest(&mut pair);
        assert_eq!(pair.machine.phase(pair.now), Phase::Paused);
        pair.by_hand.push(1);
        if is_reported {
            assert!(!pair.machine.on_put_by_hand(1, &by_hand(1, 90)));
        } else {
            pair.machine.on_watch_lost();
            pair.machine.on_watch_opened();
            assert!(matches!(pair.step(), Command::Read { .. }));
        }
        let deleted = pair.step();
        assert!(deletes(&[deleted], 1), "{deleted:?}");
        assert_eq!(pair.machine.phase(pair.now), Phase::Paused);
        let next = pair.machine.command(pair.now);
        assert_eq!(next, Command::Wait { until: None });
    }
}

#[test]
fn a_value_written_by_hand_during_a_pause_is_deleted_at_the_end_of_the_server() {
    let mut pair = Pair::registered();
    pair.machine.on_pause();
    rest(&mut pair);
    pair.by_hand.push(0);
    pair.machine.on_deregister();
    let commands = rest(&mut pair);
    assert!(deletes(&commands, 0), "{commands:?}");
    assert_eq!(pair.machine.phase(pair.now), Phase::Deregistered);
}

/// The read is best effort: without a response, a server without a lease ends after this one request.
#[test]
fn a_server_without_a_lease_ends_after_one_read_without_a_response() {
    let mut paused = Pair::registered();
    paused.machine.on_pause();
    rest(&mut paused);
    let mut without_lease = Pair::registered();
    without_lease.machine.lose_lease();
    for mut pair in [paused, without_lease] {
        pair.machine.on_deregister();
        let next = pair.machine.command(pair.now);
        assert!(
            matches!(next, Command::Read { deadline } if deadline <= Duration::from_millis(500)),
            "{next:?}"
        );
        let lost = Err(error(EtcdErrorKind::DeadlineExceeded));
        pair.machine.on_read(lost, pair.now);
        assert_eq!(pair.machine.phase(pair.now), Phase::Deregistered);
    }
}

#[test]
fn a_server_that_has_written_no_key_ends_without_a_request() {
    let mut machine = Machine::new(TTL, 1, true, fastrand::Rng::with_seed(60));
    machine.on_deregister();
    assert_eq!(machine.command(Instant::now()), Command::End);
}

/// etcd deletes the keys of a lost lease, but not a value without a lease.
#[test]
fn an_edit_after_the_loss_of_the_lease_is_deleted() {
    let mut pair = Pair::registered();
    let gone = Err(error(EtcdErrorKind::LeaseNotFound));
    pair.machine.on_renewed(gone, pair.now, pair.now);
    pair.by_hand.push(1);
    pair.machine.on_deregister();
    let commands = rest(&mut pair);
    assert!(deletes(&commands, 1), "{commands:?}");
}

/// The other services of the registration remain registered.
#[test]
fn an_edit_of_the_key_of_a_removed_service_is_deleted() {
    for is_reported in [true, false] {
        let mut pair = Pair::registered();
        pair.machine.on_remove(1);
        assert!(matches!(pair.step(), Command::Delete { index: 1, .. }));
        assert!(pair.machine.is_gone(1));
        pair.by_hand.push(1);
        if is_reported {
            assert!(!pair.machine.accepts_edit(1));
            assert!(!pair.machine.on_put_by_hand(1, &by_hand(1, 90)));
            let deleted = pair.step();
            assert!(deletes(&[deleted], 1), "{deleted:?}");
            assert!(pair.machine.is_gone(1) && pair.machine.is_written());
        } else {
            pair.machine.on_deregister();
            let commands = rest(&mut pair);
            assert!(deletes(&commands, 1), "{commands:?}");
        }
    }
}

/// The watch may be closed at the time of the edit.
#[test]
fn an_edit_of_the_key_of_a_removed_service_that_a_read_finds_is_deleted() {
    let mut pair = Pair::registered();
    pair.machine.on_remove(1);
    pair.step();
    pair.machine.on_watch_opened();
    let found = |index, by_hand: bool| {
        let lease = if by_hand { LeaseId::NONE } else { pair.lease() };
        Found {
            index,
            kv: Some(KeyValue {
                lease,
                ..self::by_hand(index, 2)
            }),
            current: !by_hand,
            by_hand,
        }
    };
    assert_eq!(pair.machine.reads(), [0, 1]);
    let found = vec![found(0, false), found(1, true)];
    pair.machine.on_read(Ok(found), pair.now);
    let deleted = pair.step();
    assert!(deletes(&[deleted], 1), "{deleted:?}");
    assert!(pair.machine.is_gone(1) && pair.machine.is_written());
}

#[test]
fn a_rejected_deletion_of_an_edit_does_not_delay_the_revoke() {
    let mut pair = Pair::registered();
    pair.machine.has_leave_marker = false;
    pair.by_hand.push(0);
    pair.machine.on_deregister();
    assert!(matches!(pair.step(), Command::Read { .. }));
    let refused = Err(error(EtcdErrorKind::PermissionDenied));
    pair.machine.on_deleted(0, refused, pair.now);
    let next = pair.machine.command(pair.now);
    assert!(matches!(next, Command::Revoke { .. }), "{next:?}");
    pair.step();
    assert!(matches!(pair.step(), Command::Read { .. }));
    // The edit is still there, so the delete is repeated later.
    let Command::Wait { until: Some(until) } = pair.machine.command(pair.now) else {
        panic!("a rejected delete must not be repeated at once");
    };
    pair.now = until;
    let commands = rest(&mut pair);
    assert!(deletes(&commands, 0), "{commands:?}");
    assert_eq!(pair.machine.phase(pair.now), Phase::Deregistered);
}

/// Clients find the server all the time, as long as the lease of its other keys is valid.
#[test]
fn an_edit_is_no_loss_of_the_registration() {
    let mut pair = Pair::registered();
    let registered = pair.machine.phase(pair.now);
    assert!(matches!(registered, Phase::Registered { .. }));
    pair.machine.on_put_by_hand(1, &by_hand(1, 50));
    assert_eq!(pair.machine.phase(pair.now), registered);
    assert!(!pair.machine.is_written());
    pair.step();
    assert_eq!(pair.machine.phase(pair.now), registered);
    assert!(pair.machine.is_written());
    pair.machine.on_put_by_hand(1, &by_hand(1, 90));
    let expired = pair.now + TTL;
    assert_eq!(pair.machine.phase(expired), Phase::Registering);
}

/// The event of the edit may arrive after the request to leave, or the watch may be closed.
#[test]
fn an_edit_that_only_the_leave_marker_finds_is_deleted() {
    let mut pair = Pair::registered();
    let lease = pair.lease();
    pair.machine.on_deregister();
    assert!(matches!(pair.step(), Command::Read { .. }));
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
    rest(&mut pair);
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
    let lost = Err(error(EtcdErrorKind::Unavailable));
    pair.machine.on_read(lost, pair.now);
    assert!(matches!(pair.step(), Command::Delete { index: 1, .. }));
    assert_eq!(pair.machine.phase(pair.now), Phase::Deregistered);
}
