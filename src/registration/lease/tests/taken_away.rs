//! Tests of the removal of single keys, of old leases that are not revoked yet, and of lease ids that another client uses.

use super::*;

/// A machine with two or more registered keys. Its commands are executed without faults.
pub(super) struct Pair {
    pub(super) machine: Machine,
    pub(super) now: Instant,
    revision: i64,
    /// The keys that have a value that was written by hand.
    pub(super) by_hand: Vec<usize>,
}

impl Pair {
    pub(super) fn registered() -> Self {
        Self::of(2)
    }

    pub(super) fn of(keys: usize) -> Self {
        let mut pair = Self {
            machine: Machine::new(TTL, keys, true, fastrand::Rng::with_seed(1)),
            now: Instant::now(),
            revision: 1,
            by_hand: Vec::new(),
        };
        for _ in 0..3 {
            pair.step();
        }
        assert!(pair.machine.is_written());
        pair
    }

    pub(super) fn lease(&self) -> LeaseId {
        self.machine.lease.expect("the machine has a lease").id
    }

    pub(super) fn step(&mut self) -> Command {
        let command = self.machine.command(self.now);
        match command {
            Command::Grant { lease, .. } => {
                let machine = &mut self.machine;
                machine.on_granted(lease, Ok(TTL), self.now, self.now);
            }
            Command::Read { .. } => {
                let found = |index| Found {
                    index,
                    kv: None,
                    current: false,
                    by_hand: self.by_hand.contains(&index),
                };
                let found = self.machine.reads().into_iter().map(found).collect();
                self.machine.on_read(Ok(found), self.now);
            }
            Command::Put { leaving, .. } => {
                self.revision += 1;
                let written = Ok(Some(Revision::new(self.revision)));
                self.machine.on_put(leaving, written, self.now);
            }
            Command::Delete { index, .. } => {
                self.by_hand.retain(|other| *other != index);
                self.machine.on_deleted(index, Ok(()), self.now);
            }
            Command::Revoke { .. } => self.machine.on_revoked(Ok(()), self.now),
            other => panic!("unexpected command: {other:?}"),
        }
        command
    }

    fn put(&self, index: usize, revision: i64) -> Event {
        Event::Put(KeyValue {
            key: Key::from(format!("/gRPC/greeter/{index}").as_str()),
            value: Vec::new(),
            create_revision: Revision::new(revision),
            mod_revision: Revision::new(revision),
            lease: self.lease(),
        })
    }
}

/// Simulates a put that was sent to a frozen member. The member applies the put after the key was deleted through another member.
#[test]
fn a_key_that_a_late_put_restores_is_deleted_again() {
    let mut pair = Pair::registered();
    pair.machine.on_remove(1);
    assert!(matches!(pair.step(), Command::Delete { index: 1, .. }));
    assert!(pair.machine.is_gone(1));
    let late = pair.put(1, 50);
    pair.machine.on_event(1, &late, pair.now);
    assert!(matches!(pair.step(), Command::Delete { index: 1, .. }));
    assert!(pair.machine.is_gone(1));
    let next = pair.machine.command(pair.now);
    assert!(matches!(next, Command::Wait { .. }), "{next:?}");
}

#[test]
fn a_rejected_deletion_does_not_affect_other_keys() {
    let mut pair = Pair::registered();
    pair.machine.on_remove(1);
    let refused = Err(error(EtcdErrorKind::PermissionDenied));
    pair.machine.on_deleted(1, refused, pair.now);
    let Command::Wait { until: Some(until) } = pair.machine.command(pair.now) else {
        panic!("a rejected deletion must not be repeated at once");
    };
    assert!(until > pair.now);
    let lost = Event::Delete {
        key: Key::from("/gRPC/greeter/0"),
        mod_revision: Revision::new(60),
    };
    pair.machine.on_event(0, &lost, pair.now);
    assert!(matches!(pair.step(), Command::Read { .. }));
    assert!(matches!(pair.step(), Command::Put { .. }));
    assert!(pair.machine.is_written());
    // After the backoff, the delete is attempted again.
    pair.now += TTL;
    while !pair.machine.is_gone(1) {
        match pair.machine.command(pair.now) {
            Command::Renew { .. } => {
                let header = Header::default();
                let renewed = Ok(KeepAlive {
                    header: Some(header),
                    ttl: TTL,
                });
                pair.machine.on_renewed(renewed, pair.now, pair.now);
            }
            _ => drop(pair.step()),
        }
    }
}

#[test]
fn a_rejected_deletion_does_not_block_another_deletion() {
    let mut pair = Pair::of(3);
    pair.machine.on_remove(1);
    let refused = Err(error(EtcdErrorKind::PermissionDenied));
    pair.machine.on_deleted(1, refused, pair.now);
    pair.machine.on_remove(2);
    assert!(matches!(pair.step(), Command::Delete { index: 2, .. }));
    assert!(pair.machine.is_gone(2) && !pair.machine.is_gone(1));
}

/// The watch delivers the events of the leave marker and of the deletion.
#[test]
fn a_deletion_is_not_repeated_after_its_event() {
    let mut pair = Pair::registered();
    pair.machine.on_remove(1);
    pair.step();
    let leave_marker = pair.put(1, 50);
    let deleted = Event::Delete {
        key: Key::from("/gRPC/greeter/1"),
        mod_revision: Revision::new(51),
    };
    pair.machine.on_event(1, &leave_marker, pair.now);
    pair.machine.on_event(1, &deleted, pair.now);
    assert!(pair.machine.is_gone(1));
    let next = pair.machine.command(pair.now);
    assert!(matches!(next, Command::Wait { .. }), "{next:?}");
}

/// Until the revoke, the key may still be attached to the old lease. A delete affects only a key that is attached to the current lease.
#[test]
fn a_key_is_deleted_after_the_old_lease_is_revoked() {
    let mut pair = Pair::registered();
    let old = pair.lease();
    pair.machine.on_pause();
    pair.machine.on_resume();
    pair.machine.on_remove(1);
    assert!(matches!(pair.step(), Command::Grant { .. }));
    assert!(matches!(pair.step(), Command::Read { .. }));
    assert!(matches!(pair.step(), Command::Put { .. }));
    let next = pair.machine.command(pair.now);
    assert!(
        matches!(next, Command::Revoke { lease, .. } if lease == old),
        "{next:?}"
    );
    assert!(!pair.machine.is_gone(1));
    pair.machine.on_revoked(Ok(()), pair.now);
    assert!(matches!(pair.step(), Command::Delete { index: 1, .. }));
}

#[test]
fn a_revoke_without_a_response_is_repeated_after_the_key_has_a_new_lease() {
    let mut player = Player::registered(20);
    let old = player.machine.lease.expect("the machine has a lease").id;
    player.machine.on_pause();
    while !matches!(player.machine.command(player.now), Command::Revoke { .. }) {
        player.step(Fate::Good);
    }
    player.step(Fate::Lost);
    player.machine.on_resume();
    player.settle();
    let revoked = player.step(Fate::Good);
    assert!(
        matches!(revoked, Command::Revoke { lease, .. } if lease == old),
        "{revoked:?}"
    );
    assert!(player.is_registered());
    assert_eq!(player.store.leases.len(), 1);
    let next = player.machine.command(player.now);
    assert!(matches!(next, Command::Wait { .. }), "{next:?}");
}

#[test]
fn a_deregistration_waits_for_the_revoke_of_the_old_lease() {
    // `steps` is the number of commands between the last resume and the deregistration. With one pause and 0 steps, the new lease is not
    // granted yet; with 1 step, it is granted; with 2 steps, the key is also read. With two pauses, there are two old leases.
    for (steps, pauses) in [(0, 1), (1, 1), (2, 1), (1, 2)] {
        let mut player = Player::registered(21);
        for _ in 0..pauses {
            player.machine.on_pause();
            while !matches!(player.step(Fate::Lost), Command::Revoke { .. }) {}
            player.machine.on_resume();
            if pauses > 1 {
                player.step(Fate::Good);
            }
        }
        for _ in 0..steps {
            player.step(Fate::Good);
        }
        player.machine.on_deregister();
        for _ in 0..10 {
            assert!(
                player.machine.phase(player.now) != Phase::Deregistered
                    || player.store.key.is_none(),
                "steps: {steps}, pauses: {pauses}"
            );
            player.step(Fate::Good);
        }
        assert_eq!(player.machine.phase(player.now), Phase::Deregistered);
        assert_eq!(player.store.leases, [], "steps: {steps}, pauses: {pauses}");
    }
}

/// Simulates one address that leads to two clusters: one cluster grants the lease, the other cluster receives the next request.
#[test]
fn a_lease_lost_immediately_after_its_grant_is_not_replaced_in_a_loop() {
    let mut player = Player::new(22);
    let start = player.now;
    let mut grants = 0;
    while player.now < start + Duration::from_secs(60) {
        player.store.leases.clear();
        grants += u32::from(matches!(player.step(Fate::Good), Command::Grant { .. }));
        assert!(grants < 200, "{grants} grants in {:?}", player.now - start);
    }
    assert!(grants > 30, "only {grants} grants");
}

#[test]
fn a_lease_id_that_is_in_use_is_not_adopted() {
    let mut player = Player::new(23);
    let exists = || Err(error(EtcdErrorKind::LeaseExists));
    let Command::Grant { lease, .. } = player.machine.command(player.now) else {
        panic!("the first command must be a grant");
    };
    // No earlier grant used this lease id.
    player
        .machine
        .on_granted(lease, exists(), player.now, player.now);
    player.now += TTL;
    let Command::Grant { lease: other, .. } = player.machine.command(player.now) else {
        panic!("another lease must be requested");
    };
    assert_ne!(other, lease);
    // An earlier grant used this lease id, so the lease is the registration's own.
    let lost = Err(error(EtcdErrorKind::DeadlineExceeded));
    player
        .machine
        .on_granted(other, lost, player.now, player.now);
    player
        .machine
        .on_granted(other, exists(), player.now, player.now);
    let next = player.machine.command(player.now);
    assert!(
        matches!(next, Command::Renew { lease, .. } if lease == other),
        "{next:?}"
    );
}
