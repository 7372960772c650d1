//! Tests of single responses and events: which times they count from, and what they leave unchanged.

use super::taken_away::Pair;
use super::*;

#[allow(
    clippy::unnecessary_wraps,
    reason = "the machine takes the outcome of a renewal"
)]
fn renewed(ttl: Duration, term: u64) -> Result<KeepAlive, EtcdError> {
    let header = Some(Header {
        cluster_id: 7,
        revision: Revision::new(1),
        raft_term: term,
    });
    Ok(KeepAlive { header, ttl })
}

fn put(lease: LeaseId, revision: i64) -> Event {
    Event::Put(KeyValue {
        key: key(),
        value: Vec::new(),
        create_revision: Revision::new(revision),
        mod_revision: Revision::new(revision),
        lease,
    })
}

fn deleted(revision: i64) -> Event {
    Event::Delete {
        key: key(),
        mod_revision: Revision::new(revision),
    }
}

fn refused<T>() -> Result<T, EtcdError> {
    Err(error(EtcdErrorKind::PermissionDenied))
}

fn timed_out<T>() -> Result<T, EtcdError> {
    Err(error(EtcdErrorKind::DeadlineExceeded))
}

/// Returns the time of the next renewal, which is the next command.
fn next_renewal(machine: &Machine, now: Instant) -> Instant {
    match machine.command(now) {
        Command::Wait { until: Some(until) } => {
            let next = machine.command(until);
            assert!(matches!(next, Command::Renew { .. }), "{next:?}");
            until
        }
        Command::Renew { .. } => now,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_granted_lease_counts_from_the_time_its_grant_was_sent() {
    for seed in 0..50 {
        let mut player = Player::new(seed);
        let Command::Grant { lease, .. } = player.machine.command(player.now) else {
            panic!("no grant")
        };
        let (sent, now) = (player.now, player.now + TTL / 2);
        player.machine.on_granted(lease, Ok(TTL), sent, now);
        assert_eq!(player.machine.expires(), Some(sent + TTL));
        let next = player.machine.command(now);
        assert!(matches!(next, Command::Renew { .. }), "{next:?}");
    }
}

/// etcd may have granted the lease although the response was lost. With another id, that lease would remain.
#[test]
fn a_failed_grant_is_repeated_with_the_same_id_and_is_no_lease() {
    let mut player = Player::new(30);
    let first = player.machine.command(player.now);
    let Command::Grant { lease, .. } = first else {
        panic!("{first:?}")
    };
    for _ in 0..3 {
        let now = player.now;
        player.machine.on_granted(lease, timed_out(), now, now);
        assert_eq!(player.machine.expires(), None);
        player.now += TTL;
        assert_eq!(player.machine.command(player.now), first);
    }
}

#[test]
fn a_rejected_grant_is_retried_twice_per_ttl_and_at_least_twice_a_minute() {
    for (ttl, least, most) in [(6, 3, 6), (600, 15, 30)] {
        let ttl = Duration::from_secs(ttl);
        let now = Instant::now();
        let mut machine = Machine::new(ttl, 1, true, fastrand::Rng::with_seed(31));
        let Command::Grant { lease, .. } = machine.command(now) else {
            panic!("no grant")
        };
        machine.on_granted(lease, refused(), now, now);
        let Command::Wait { until: Some(until) } = machine.command(now) else {
            panic!("no wait")
        };
        let wait = until.saturating_duration_since(now).as_secs_f64();
        assert!((f64::from(least)..=f64::from(most)).contains(&wait));
        assert!(machine.last_error.is_some());
        assert_eq!(machine.failures, 1);
    }
}

#[test]
fn a_rejected_renewal_with_a_long_ttl_is_retried_twice_a_minute_after_the_expiry() {
    let mut player = Player::registered(32);
    player.machine.ttl = TTL * 100;
    player
        .machine
        .lease
        .as_mut()
        .expect("the machine has a lease")
        .ttl = TTL * 100;
    failing_renewals(&mut player, EtcdErrorKind::PermissionDenied, TTL);
    let kind = EtcdErrorKind::PermissionDenied;
    let (_, longest) = failing_renewals(&mut player, kind, TTL * 300);
    assert!(longest <= Duration::from_secs(30), "{longest:?}");
}

#[test]
fn the_last_sixty_four_leases_are_remembered() {
    let mut player = Player::new(33);
    let mut leases = Vec::new();
    for _ in 0..70 {
        let Command::Grant { lease, .. } = player.machine.command(player.now) else {
            panic!("no grant")
        };
        leases.push(lease);
        let now = player.now;
        player.machine.on_granted(lease, Ok(TTL), now, now);
        let gone = Err(error(EtcdErrorKind::LeaseNotFound));
        player.machine.on_renewed(gone, now, now);
        player.now += TTL;
    }
    assert_eq!(player.machine.granted, leases[6..]);
}

#[test]
fn a_renewal_is_due_a_third_of_the_ttl_after_the_last_was_sent() {
    let mut player = Player::registered(34);
    let (sent, now) = (player.now, player.now + Duration::from_secs(1));
    player.machine.on_watch_opened();
    player.machine.on_renewed(renewed(TTL, 2), sent, now);
    player
        .machine
        .on_read(Ok(vec![alone(player.store.key.clone(), true)]), now);
    assert_eq!(next_renewal(&player.machine, now), sent + TTL / 3);
}

#[test]
fn a_renewal_never_lowers_the_known_raft_term() {
    let mut player = Player::registered(35);
    let now = player.now;
    player.machine.on_renewed(renewed(TTL, 5), now, now);
    player.machine.on_renewed(renewed(TTL, 3), now, now);
    let next = player.machine.command(now + TTL);
    assert!(matches!(next, Command::Renew { term: 5, .. }), "{next:?}");
}

#[test]
fn after_an_outage_the_keys_are_read_and_the_renewals_of_a_fleet_are_spread() {
    let mut waits = Vec::new();
    for seed in 0..100 {
        let mut player = Player::registered(seed);
        player.machine.on_watch_opened();
        let now = player.now;
        let found = || Ok(vec![alone(player.store.key.clone(), true)]);
        player.machine.on_read(found(), now);
        player.machine.on_renewed(renewed(TTL, 2), now, now);
        let next = player.machine.command(now);
        assert!(matches!(next, Command::Wait { .. }), "{next:?}");
        player.machine.on_renewed(timed_out(), now, now);
        let short = TTL / 2;
        player.machine.on_renewed(renewed(short, 2), now, now);
        let next = player.machine.command(now);
        assert!(matches!(next, Command::Read { .. }), "{next:?}");
        player.machine.on_read(found(), now);
        let next = next_renewal(&player.machine, now);
        waits.push(next.saturating_duration_since(now));
        // The outage is over: the next failure is the first of a series, and the next success is followed by no read.
        player.machine.on_renewed(timed_out(), now, now);
        let next = player.machine.command(now);
        assert!(matches!(next, Command::Renew { .. }), "{next:?}");
    }
    waits.sort_unstable();
    let third = TTL / 2 / 3;
    assert!(waits.iter().all(|wait| *wait <= third), "{waits:?}");
    assert!(waits[10] < third && waits[10] < waits[40], "{waits:?}");
}

/// A fleet that cannot renew its leases registers again over a third of the TTL, even if the lease of a server was never confirmed.
#[test]
fn an_unconfirmed_lease_that_is_lost_in_an_outage_is_replaced_at_a_random_time() {
    let mut longest = Duration::ZERO;
    for seed in 0..50 {
        let mut player = Player::new(seed);
        player.step(Fate::Good);
        player.machine.on_watch_lost();
        let gone = Err(error(EtcdErrorKind::LeaseNotFound));
        player.machine.on_renewed(gone, player.now, player.now);
        if let Command::Wait { until: Some(until) } = player.machine.command(player.now) {
            longest = longest.max(until.saturating_duration_since(player.now));
        }
    }
    assert!(longest > TTL / 6, "{longest:?}");
}

#[test]
fn a_read_that_ends_after_the_beginning_of_a_pause_does_not_end_the_pause() {
    let mut player = Player::registered(36);
    player.machine.on_pause();
    let found = vec![alone(player.store.key.clone(), true)];
    player.machine.on_read(Ok(found), player.now);
    assert_eq!(player.machine.phase(player.now), Phase::Leaving);
}

#[test]
fn a_key_that_a_read_does_not_find_is_no_longer_registered() {
    let mut player = Player::registered(37);
    let found = vec![alone(None, false)];
    player.machine.on_read(Ok(found), player.now);
    assert_eq!(player.machine.phase(player.now), Phase::Registering);
}

/// The put succeeded although its response was lost. The key of a server that writes it after that is not overwritten.
#[test]
fn a_key_that_was_found_with_its_own_value_counts_as_written() {
    let mut player = Player::new(38);
    player.step(Fate::Good);
    player.step(Fate::Good);
    player.step(Fate::AnswerLost);
    let found = vec![alone(player.store.key.clone(), true)];
    player.machine.on_read(Ok(found), player.now);
    let other = LeaseId::new(42);
    player.store.put(other);
    let found = vec![alone(player.store.key.clone(), false)];
    player.machine.on_read(Ok(found), player.now);
    assert_eq!(player.machine.phase(player.now), Phase::Superseded(other));
}

#[test]
fn old_events_of_a_key_and_events_of_its_own_put_cause_no_request() {
    let mut player = Player::registered(39);
    let held = player.machine.keys[0].held.expect("the key is held");
    let lease = player.machine.lease.expect("the machine has a lease").id;
    let (now, before) = (player.now, held.get() - 1);
    let old = [put(LeaseId::new(42), before), deleted(before)];
    for event in old.iter().chain([&put(lease, held.get() + 1)]) {
        player.machine.on_event(0, event, now);
        assert!(player.is_registered(), "{event:?}");
        next_renewal(&player.machine, now);
    }
    let raised = Some(Revision::new(held.get() + 1));
    assert_eq!(player.machine.keys[0].held, raised);
    // The delete of an older version of the key is an old event as well.
    player.machine.on_event(0, &deleted(held.get() + 1), now);
    assert!(player.is_registered());
}

/// A put that the registration sent under its last lease is applied late, and replaces the key.
#[test]
fn a_put_under_an_earlier_lease_is_not_the_put_of_another_server() {
    let mut player = Player::registered(40);
    let earlier = player.machine.lease.expect("the machine has a lease").id;
    player.machine.on_pause();
    player.machine.on_resume();
    player.settle();
    let late = put(earlier, 1_000);
    let now = player.now;
    player.machine.on_event(0, &late, now);
    assert!(player.is_registered());
    while let Command::Revoke { .. } = player.machine.command(now) {
        player.machine.on_revoked(Ok(()), now);
    }
    let next = player.machine.command(now);
    assert!(matches!(next, Command::Read { .. }), "{next:?}");
    // While another server has the key, such a put does not count either.
    let other = LeaseId::new(42);
    let found = vec![alone(None, false)];
    player.machine.on_read(Ok(found), now);
    player.settle();
    for (lease, owner) in [(42, 42), (43, 43)] {
        let event = put(LeaseId::new(lease), 2_000 + lease);
        player.machine.on_event(0, &event, now);
        let owner = Phase::Superseded(LeaseId::new(owner));
        assert_eq!(player.machine.phase(now), owner);
    }
    player.machine.on_event(0, &put(earlier, 3_000), now);
    let owner = Phase::Superseded(LeaseId::new(43));
    assert_eq!(player.machine.phase(now), owner, "not {other:?}");
}

#[test]
fn a_key_of_another_server_is_read_every_five_to_ten_seconds() {
    let mut player = Player::registered(41);
    let event = put(LeaseId::new(42), 1_000);
    for _ in 0..20 {
        player.machine.on_event(0, &event, player.now);
        let Command::Wait { until: Some(until) } = player.machine.command(player.now) else {
            panic!("no wait")
        };
        let wait = until.saturating_duration_since(player.now);
        let bounds = SUPERSEDED_READ / 2..=SUPERSEDED_READ;
        assert!(bounds.contains(&wait), "{wait:?}");
        let next = player.machine.command(until);
        assert!(matches!(next, Command::Read { .. }), "{next:?}");
    }
    assert_eq!(
        player.machine.expires(),
        None,
        "the lease expires by itself"
    );
    assert_eq!(player.machine.unrevoked, []);
}

#[test]
fn the_other_keys_stay_registered_if_one_belongs_to_another_server() {
    let mut pair = Pair::registered();
    let (now, lease) = (pair.now, pair.lease());
    let other = LeaseId::new(42);
    pair.machine.on_event(1, &put(other, 1_000), now);
    assert_eq!(pair.machine.phase(now), Phase::Superseded(other));
    assert_eq!(pair.lease(), lease);
    let next = next_renewal(&pair.machine, now);
    assert!(next <= now + TTL / 3, "the lease is renewed");
    // A new value is written to the key that is still its own.
    pair.machine.on_new_value();
    assert!(matches!(pair.machine.command(now), Command::Read { .. }));
    let found = |index, lease, revision| {
        let Event::Put(kv) = put(lease, revision) else {
            panic!("a put")
        };
        Found {
            index,
            kv: Some(kv),
            current: false,
            by_hand: false,
        }
    };
    let found = vec![found(0, lease, 2), found(1, other, 1_000)];
    pair.machine.on_read(Ok(found), now);
    let indexes: Vec<_> = pair.machine.puts().iter().map(|put| put.index).collect();
    assert_eq!(indexes, [0]);
    assert!(matches!(pair.step(), Command::Put { .. }));
    let next = pair.machine.command(now);
    assert!(matches!(next, Command::Wait { .. }), "{next:?}");
}

/// The lease is needed until the removed key is deleted, so it is not left to expire.
#[test]
fn a_key_that_is_being_removed_is_deleted_although_another_server_has_the_rest() {
    let mut pair = Pair::registered();
    let (now, lease) = (pair.now, pair.lease());
    pair.machine.on_remove(1);
    pair.machine.on_deleted(1, timed_out(), now);
    pair.machine.on_event(0, &put(LeaseId::new(42), 1_000), now);
    let next = pair.machine.command(now);
    let revokes = matches!(next, Command::Revoke { lease: revoked, .. } if revoked == lease);
    assert!(revokes, "{next:?}");
}

#[test]
fn events_of_another_lease_and_old_events_do_not_change_a_removal() {
    let mut pair = Pair::registered();
    let now = pair.now;
    pair.machine.on_remove(1);
    pair.machine.on_event(1, &deleted(1), now);
    assert!(!pair.machine.is_gone(1), "the key was written later");
    assert!(matches!(pair.step(), Command::Delete { index: 1, .. }));
    pair.machine.on_event(1, &put(LeaseId::new(42), 1_000), now);
    assert!(pair.machine.is_gone(1), "another server has the key");
}

#[test]
fn many_keys_are_written_and_marked_as_leaving_in_batches_of_a_hundred() {
    for fails in [false, true] {
        let now = Instant::now();
        let mut machine = Machine::new(TTL, 150, true, fastrand::Rng::with_seed(42));
        let Command::Grant { lease, .. } = machine.command(now) else {
            panic!("no grant")
        };
        machine.on_granted(lease, Ok(TTL), now, now);
        let none = |index| Found {
            index,
            kv: None,
            current: false,
            by_hand: false,
        };
        let found = machine.live().map(none).collect();
        machine.on_read(Ok(found), now);
        for (batch, revision) in [(100, 2), (50, 3)] {
            assert!(!machine.is_written());
            let next = machine.command(now);
            assert!(matches!(next, Command::Put { leaving: false, .. }));
            assert_eq!(machine.puts().len(), batch);
            machine.on_put(false, Ok(Some(Revision::new(revision))), now);
        }
        assert!(machine.is_written());
        machine.on_deregister();
        machine.on_read(timed_out(), now);
        for batch in [100, 50] {
            let next = machine.command(now);
            assert!(
                matches!(next, Command::Put { leaving: true, deadline, .. } if deadline <= Duration::from_millis(500))
            );
            assert_eq!(machine.puts().len(), batch);
            if fails {
                machine.on_put(true, timed_out(), now);
                break;
            }
            machine.on_put(true, Ok(Some(Revision::new(4))), now);
        }
        let next = machine.command(now);
        assert!(matches!(next, Command::Revoke { .. }), "{fails}: {next:?}");
    }
}

fn grant(machine: &mut Machine, now: Instant) {
    let Command::Grant { lease, .. } = machine.command(now) else {
        panic!("no grant")
    };
    machine.on_granted(lease, Ok(TTL), now, now);
}

fn lease_not_found(machine: &mut Machine, now: Instant) {
    let gone = Err(error(EtcdErrorKind::LeaseNotFound));
    machine.on_renewed(gone, now, now);
}

#[test]
fn a_lost_lease_ends_the_registration_and_the_next_lease_begins_without_a_term() {
    let mut player = Player::registered(43);
    let now = player.now;
    player.machine.on_renewed(renewed(TTL, 9), now, now);
    lease_not_found(&mut player.machine, now);
    assert_eq!(player.machine.phase(now), Phase::Registering);
    assert_eq!(player.machine.expires(), None);
    assert!(player.machine.last_error.is_some());
    assert_eq!(player.machine.failures, 1);
    grant(&mut player.machine, now);
    assert!(player.machine.last_error.is_none());
    let next = player.machine.command(now + TTL);
    assert!(matches!(next, Command::Renew { term: 0, .. }), "{next:?}");
}

#[test]
fn a_lease_lost_after_a_renewal_that_followed_a_disturbance_is_replaced_at_once() {
    for seed in 0..20 {
        let mut player = Player::new(seed);
        let now = player.now;
        grant(&mut player.machine, now);
        player.machine.on_watch_lost();
        player.machine.on_renewed(renewed(TTL, 2), now, now);
        lease_not_found(&mut player.machine, now);
        let next = player.machine.command(now);
        assert!(matches!(next, Command::Grant { .. }), "{next:?}");
    }
}

#[test]
fn requests_have_a_sixth_of_the_ttl_that_etcd_has_chosen() {
    let mut player = Player::registered(44);
    let now = player.now;
    player.machine.on_renewed(renewed(TTL / 2, 2), now, now);
    let next = player.machine.command(now + TTL);
    let Command::Renew { deadline, .. } = next else {
        panic!("{next:?}")
    };
    assert_eq!(deadline, TTL / 12);
}

/// etcd may have applied the put, so its expected revision is not known to be right.
#[test]
fn a_failed_put_is_followed_by_a_read() {
    let mut player = Player::new(45);
    player.step(Fate::Good);
    player.step(Fate::Good);
    player.machine.on_put(false, timed_out(), player.now);
    let Command::Wait { until: Some(until) } = player.machine.command(player.now) else {
        panic!("no wait")
    };
    let next = player.machine.command(until);
    assert!(matches!(next, Command::Read { .. }), "{next:?}");
}

#[test]
fn each_success_ends_the_report_of_the_failure_and_the_growth_of_the_waits() {
    for success in ["put", "renewal", "delete", "revoke"] {
        let mut pair = Pair::registered();
        let now = pair.now;
        match success {
            "delete" => pair.machine.on_remove(1),
            "revoke" => {
                pair.machine.on_pause();
                pair.machine.on_resume();
                while !pair.machine.is_written() {
                    pair.step();
                }
            }
            _ => {}
        }
        let fails = |pair: &mut Pair| {
            pair.machine.on_read(timed_out(), now);
            pair.machine.not_before.expect("the machine waits") - now
        };
        for _ in 0..8 {
            fails(&mut pair);
        }
        assert!(pair.machine.last_error.is_some());
        assert_eq!(pair.machine.failures, 8);
        match success {
            "put" => {
                pair.machine.state = State::Putting;
                let written = Ok(Some(Revision::new(9)));
                pair.machine.on_put(false, written, now);
            }
            "renewal" => pair.machine.on_renewed(renewed(TTL, 2), now, now),
            "delete" => pair.machine.on_deleted(1, Ok(()), now),
            _ => {
                pair.machine.not_before = None;
                let next = pair.machine.command(now);
                assert!(matches!(next, Command::Revoke { .. }), "{next:?}");
                pair.machine.on_revoked(Ok(()), now);
            }
        }
        assert!(pair.machine.last_error.is_none(), "{success}");
        assert_eq!(pair.machine.not_before, None, "{success}");
        let wait = fails(&mut pair);
        assert!(wait <= Duration::from_millis(100), "{success}: {wait:?}");
    }
}

#[test]
fn failures_of_renewals_are_counted_and_reported() {
    let mut player = Player::registered(46);
    player
        .machine
        .on_renewed(timed_out(), player.now, player.now);
    let error = player.machine.last_error.as_ref().map(EtcdError::kind);
    assert_eq!(error, Some(EtcdErrorKind::DeadlineExceeded));
    assert_eq!(player.machine.failures, 1);
}

#[test]
fn a_pause_of_a_superseded_registration_forgets_the_other_server() {
    let mut player = Player::registered(47);
    let now = player.now;
    player
        .machine
        .on_event(0, &put(LeaseId::new(42), 1_000), now);
    player.machine.on_pause();
    assert!(matches!(player.step(Fate::Good), Command::Read { .. }));
    assert_eq!(player.machine.phase(now), Phase::Paused);
    player.machine.on_resume();
    assert_eq!(player.machine.phase(now), Phase::Registering);
}

#[test]
fn a_removed_key_that_is_put_late_is_marked_as_leaving_before_its_deletion() {
    for has_leave_marker in [true, false] {
        let mut pair = Pair::registered();
        let now = pair.now;
        pair.machine.has_leave_marker = has_leave_marker;
        pair.machine.on_remove(1);
        pair.step();
        let lease = pair.lease();
        pair.machine.on_event(1, &put(lease, 50), now);
        let next = pair.machine.command(now);
        let Command::Delete { leave_marker, .. } = next else {
            panic!("{next:?}")
        };
        let expected = has_leave_marker.then_some(Revision::new(50));
        assert_eq!(leave_marker, expected);
    }
}

#[test]
fn a_key_that_another_server_had_is_registered_after_its_own_put() {
    let mut pair = Pair::registered();
    let (now, lease) = (pair.now, pair.lease());
    let other = LeaseId::new(42);
    pair.machine.on_event(1, &put(other, 1_000), now);
    pair.machine.on_event(1, &put(lease, 1_001), now);
    let phase = pair.machine.phase(now);
    assert!(matches!(phase, Phase::Registered { .. }), "{phase:?}");
    pair.machine.on_event(1, &put(other, 1_002), now);
    assert_eq!(pair.machine.phase(now), Phase::Superseded(other));
    pair.machine.on_event(1, &deleted(1_003), now);
    assert_eq!(pair.machine.phase(now), Phase::Registering);
    let next = pair.machine.command(now);
    assert!(matches!(next, Command::Read { .. }), "{next:?}");
}

#[test]
fn a_ttl_of_more_than_a_day_counts_as_a_day() {
    let day = Duration::from_secs(24 * 60 * 60);
    let mut player = Player::new(48);
    let now = player.now;
    let Command::Grant { lease, .. } = player.machine.command(now) else {
        panic!("no grant")
    };
    player.machine.on_granted(lease, Ok(day * 2), now, now);
    assert_eq!(player.machine.expires(), Some(now + day));
    let later = now + TTL;
    player.machine.on_renewed(renewed(day * 2, 2), later, later);
    assert_eq!(player.machine.expires(), Some(later + day));
}

#[test]
fn a_registration_ends_with_its_lease_and_begins_with_the_put_under_the_next() {
    let mut player = Player::registered(49);
    let expires = player.machine.expires().expect("the machine has a lease");
    let before = expires.checked_sub(Duration::from_millis(1));
    let phase = player.machine.phase(before.expect("the time is later"));
    assert!(matches!(phase, Phase::Registered { .. }), "{phase:?}");
    assert_eq!(player.machine.phase(expires), Phase::Registering);
    let now = player.now;
    lease_not_found(&mut player.machine, now);
    grant(&mut player.machine, now);
    assert_eq!(player.machine.phase(now), Phase::Registering);
    player.settle();
}

#[test]
fn a_deleted_key_is_not_registered_until_it_is_put_again() {
    let mut player = Player::registered(50);
    let now = player.now;
    player.machine.on_event(0, &deleted(1_000), now);
    assert_eq!(player.machine.phase(now), Phase::Registering);
    assert!(!player.machine.is_written(), "the key is read first");
    // The same applies to the key of another server, once that server has deleted it.
    let mut player = Player::registered(50);
    player
        .machine
        .on_event(0, &put(LeaseId::new(42), 1_000), now);
    player.machine.on_event(0, &deleted(1_001), now);
    assert_eq!(player.machine.phase(now), Phase::Registering);
}

#[test]
fn only_keys_of_the_registration_are_marked_as_leaving() {
    let mut pair = Pair::of(3);
    let now = pair.now;
    pair.machine.on_event(1, &put(LeaseId::new(42), 1_000), now);
    pair.machine.on_remove(2);
    pair.machine.on_deregister();
    assert!(matches!(pair.step(), Command::Read { .. }));
    let next = pair.machine.command(now);
    assert!(matches!(next, Command::Put { leaving: true, .. }));
    let indexes: Vec<_> = pair.machine.puts().iter().map(|put| put.index).collect();
    assert_eq!(indexes, [0]);
}

#[test]
fn a_key_that_is_removed_before_the_first_grant_is_gone() {
    let mut machine = Machine::new(TTL, 2, true, fastrand::Rng::with_seed(51));
    assert!(!machine.is_gone(1));
    machine.on_remove(1);
    assert!(machine.is_gone(1));
}

#[test]
fn a_key_is_removed_once_and_the_last_removal_ends_the_registration() {
    let mut pair = Pair::registered();
    pair.machine.on_remove(1);
    pair.step();
    pair.machine.on_remove(1);
    assert!(pair.machine.is_gone(1), "it is not deleted again");
    pair.machine.on_remove(0);
    assert_eq!(pair.machine.phase(pair.now), Phase::Leaving);
    assert!(matches!(pair.step(), Command::Read { .. }));
    pair.machine.on_put(true, timed_out(), pair.now);
    pair.machine.on_revoked(timed_out(), pair.now);
    let next = pair.machine.command(pair.now);
    let Command::Wait { until: Some(until) } = next else {
        panic!("the revoke is repeated at once: {next:?}")
    };
    let next = pair.machine.command(until);
    assert!(matches!(next, Command::Revoke { .. }), "{next:?}");
    pair.machine.on_revoked(Ok(()), until);
    pair.machine.on_read(timed_out(), until);
    assert!(pair.machine.is_gone(0) && pair.machine.last_error.is_none());
    pair.machine.on_pause();
    assert_eq!(pair.machine.phase(until), Phase::Deregistered, "for good");
}

#[test]
fn the_leave_marker_is_written_once_and_only_if_the_format_has_one() {
    let mut player = Player::registered(52);
    player.machine.on_pause();
    assert!(matches!(player.step(Fate::Good), Command::Read { .. }));
    let first = player.step(Fate::Good);
    assert!(matches!(first, Command::Put { leaving: true, .. }));
    player.machine.on_deregister();
    let next = player.machine.command(player.now);
    assert!(matches!(next, Command::Revoke { .. }), "{next:?}");

    let mut player = Player::registered(52);
    player.machine.has_leave_marker = false;
    player.machine.on_deregister();
    assert!(matches!(player.step(Fate::Good), Command::Read { .. }));
    let next = player.machine.command(player.now);
    assert!(matches!(next, Command::Revoke { .. }), "{next:?}");
}

#[test]
fn the_last_eight_leases_without_a_confirmed_revoke_are_kept() {
    let mut player = Player::registered(53);
    let mut leases = Vec::new();
    for _ in 0..10 {
        leases.push(player.machine.lease.expect("the machine has a lease").id);
        player.machine.on_pause();
        player.machine.on_resume();
        let now = player.now;
        grant(&mut player.machine, now);
    }
    assert_eq!(player.machine.unrevoked, leases[2..]);
}

#[test]
fn a_failed_request_delays_neither_a_renewal_nor_a_deregistration() {
    let mut player = Player::registered(54);
    let now = player.now;
    player.machine.on_watch_opened();
    player.machine.on_read(refused(), now);
    let next = next_renewal(&player.machine, now);
    assert!(next <= now + TTL / 3);
    player.machine.on_deregister();
    let next = player.machine.command(now);
    assert!(!matches!(next, Command::Wait { .. }), "{next:?}");
}

#[test]
fn a_failed_deletion_and_a_failed_revoke_are_repeated_when_they_are_due() {
    let mut pair = Pair::of(3);
    let (now, old) = (pair.now, pair.lease());
    pair.machine.on_remove(1);
    pair.machine.on_deleted(1, timed_out(), now);
    let until = |machine: &Machine, now| match machine.command(now) {
        Command::Wait { until: Some(until) } => {
            assert!(until > now && until <= now + Duration::from_secs(3));
            until
        }
        other => panic!("{other:?}"),
    };
    let due = until(&pair.machine, now);
    assert!(due <= now + Duration::from_millis(100));
    let next = pair.machine.command(due);
    assert!(matches!(next, Command::Delete { index: 1, .. }), "{next:?}");
    // The revoke of the earlier lease precedes the deletion. It fails as well, and then both are due at different times.
    pair.machine.on_pause();
    pair.machine.on_resume();
    while !pair.machine.is_written() {
        pair.step();
    }
    pair.machine.on_remove(2);
    pair.machine.on_deleted(2, timed_out(), pair.now);
    for _ in 0..2 {
        let next = pair.machine.command(pair.now);
        let revokes = matches!(next, Command::Revoke { lease, .. } if lease == old);
        assert!(revokes, "{next:?}");
        pair.machine.on_revoked(timed_out(), pair.now);
        while let Command::Wait { .. } = pair.machine.command(pair.now) {
            pair.now = until(&pair.machine, pair.now);
        }
    }
}

#[test]
fn a_failed_revoke_of_a_superseded_registration_is_repeated_when_it_is_due() {
    let mut pair = Pair::registered();
    let now = pair.now;
    pair.machine.on_remove(1);
    pair.machine.on_deleted(1, timed_out(), now);
    pair.machine.on_event(0, &put(LeaseId::new(42), 1_000), now);
    pair.machine.on_revoked(timed_out(), now);
    let Command::Wait { until: Some(until) } = pair.machine.command(now) else {
        panic!("the revoke is repeated at once")
    };
    assert!(until < now + Duration::from_secs(1), "{:?}", until - now);
}
