//! Tests of the lease machine (the state machine of a registration) with a simulated etcd, which loses responses, drops leases, restarts,
//! and accepts writes of other clients to the key.

use std::time::Duration;

use proptest::prelude::{ProptestConfig, any, proptest};
use tokio::time::Instant;

use super::machine::{RETRY_MAX, SUPERSEDED_READ};
use super::state::{Lease, State, Value};
use super::*;
use crate::error::{EtcdError, EtcdErrorKind};
use crate::keyspace::{Event, Header, KeepAlive, Key, KeyValue, LeaseId, Revision};

mod answers;
mod by_hand;
mod taken_away;

const TTL: Duration = Duration::from_secs(6);

/// One key and the leases, as etcd stores them.
#[derive(Debug)]
struct Store {
    revision: i64,
    term: u64,
    key: Option<KeyValue>,
    leases: Vec<(LeaseId, Instant)>,
    /// The leases of all puts of the key, in order.
    owners: Vec<LeaseId>,
    events: Vec<Event>,
}

impl Store {
    fn new() -> Self {
        Self {
            revision: 1,
            term: 2,
            key: None,
            leases: Vec::new(),
            owners: Vec::new(),
            events: Vec::new(),
        }
    }

    fn expire(&mut self, now: Instant) {
        self.leases.retain(|(_, expires)| *expires > now);
        if let Some(kv) = &self.key
            && kv.lease != LeaseId::NONE
            && !self.leases.iter().any(|(lease, _)| *lease == kv.lease)
        {
            self.delete();
        }
    }

    fn delete(&mut self) {
        if self.key.take().is_some() {
            self.revision += 1;
            self.events.push(Event::Delete {
                key: key(),
                mod_revision: Revision::new(self.revision),
            });
        }
    }

    fn put(&mut self, lease: LeaseId) -> Revision {
        self.revision += 1;
        let revision = Revision::new(self.revision);
        let kv = KeyValue {
            key: key(),
            value: Vec::new(),
            create_revision: self.key.as_ref().map_or(revision, |kv| kv.create_revision),
            mod_revision: revision,
            lease,
        };
        self.key = Some(kv.clone());
        self.owners.push(lease);
        self.events.push(Event::Put(kv));
        revision
    }

    fn mod_revision(&self) -> Revision {
        self.key
            .as_ref()
            .map_or(Revision::ZERO, |kv| kv.mod_revision)
    }

    fn mod_lease(&self) -> Option<LeaseId> {
        self.key.as_ref().map(|kv| kv.lease)
    }

    /// Renews a lease for a client that rejects a response with a raft term below `term`.
    fn renewal(&mut self, lease: LeaseId, term: u64, now: Instant) -> Result<KeepAlive, EtcdError> {
        let header = Some(Header {
            cluster_id: 7,
            revision: Revision::new(self.revision),
            raft_term: self.term,
        });
        let found = self.leases.iter_mut().find(|(known, _)| *known == lease);
        let (_, expires) = found.ok_or_else(|| error(EtcdErrorKind::LeaseNotFound))?;
        *expires = now + TTL;
        if self.term < term {
            return Err(error(EtcdErrorKind::StaleTerm));
        }
        Ok(KeepAlive { header, ttl: TTL })
    }
}

fn key() -> Key {
    Key::from("/gRPC/greeter/a")
}

fn error(kind: EtcdErrorKind) -> EtcdError {
    EtcdError::new(kind, "test", "127.0.0.1:1", "scripted")
}

/// The result of a read by a machine that has only one key.
fn alone(kv: Option<KeyValue>, current: bool) -> Found {
    Found {
        index: 0,
        by_hand: kv.as_ref().is_some_and(|kv| kv.lease == LeaseId::NONE),
        kv,
        current,
    }
}

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Good,
    /// The request does not reach etcd.
    Lost,
    /// etcd executes the request, and the response is lost.
    AnswerLost,
}

fn delivered<T>(fate: Fate, answer: T) -> Result<T, EtcdError> {
    match fate {
        Fate::Good => Ok(answer),
        Fate::Lost | Fate::AnswerLost => Err(error(EtcdErrorKind::DeadlineExceeded)),
    }
}

/// Executes the commands of a machine against the simulated etcd, in simulated time.
struct Player {
    store: Store,
    machine: Machine,
    now: Instant,
    rng: fastrand::Rng,
    /// Number of events that were delivered to the machine.
    seen: usize,
}

impl Player {
    fn new(seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        Self {
            store: Store::new(),
            machine: Machine::new(TTL, 1, true, rng.fork()),
            now: Instant::now(),
            rng,
            seen: 0,
        }
    }

    fn step(&mut self, fate: Fate) -> Command {
        self.store.expire(self.now);
        let command = self.machine.command(self.now);
        let sent = self.now;
        if !matches!(command, Command::Wait { .. } | Command::End) {
            let took = if fate == Fate::Good {
                Duration::from_millis(2)
            } else {
                Duration::from_millis(500)
            };
            self.now += took;
        }
        let bad = || error(EtcdErrorKind::DeadlineExceeded);
        let reached = fate != Fate::Lost;
        match command {
            Command::Grant { lease, .. } => {
                if reached && !self.store.leases.iter().any(|(known, _)| *known == lease) {
                    self.store.leases.push((lease, sent + TTL));
                }
                self.machine
                    .on_granted(lease, delivered(fate, TTL), sent, self.now);
            }
            Command::Read { .. } => {
                if fate == Fate::Good {
                    self.machine.on_term(self.store.term);
                }
                let found = self.store.key.clone();
                let found = delivered(fate, vec![alone(found, false)]);
                self.machine.on_read(found, self.now);
            }
            Command::Put { lease, leaving, .. } => {
                let expected = self.machine.puts()[0].expected;
                let mut outcome = Ok(None);
                if reached && !self.store.leases.iter().any(|(known, _)| *known == lease) {
                    outcome = Err(error(EtcdErrorKind::LeaseNotFound));
                } else if reached && self.store.mod_revision() == expected {
                    outcome = Ok(Some(self.store.put(lease)));
                }
                let outcome = if fate == Fate::Good {
                    outcome
                } else {
                    Err(bad())
                };
                self.machine.on_put(leaving, outcome, self.now);
            }
            Command::Renew { lease, term, .. } => {
                let mut outcome = Err(bad());
                if reached {
                    outcome = self.store.renewal(lease, term, sent);
                }
                let outcome = if fate == Fate::Good {
                    outcome
                } else {
                    Err(bad())
                };
                self.machine.on_renewed(outcome, sent, self.now);
            }
            Command::Revoke { lease, .. } => {
                if reached {
                    self.store.leases.retain(|(known, _)| *known != lease);
                    self.store.expire(self.now);
                }
                self.machine.on_revoked(delivered(fate, ()), self.now);
            }
            Command::Delete { lease, .. } => {
                assert_eq!(lease, LeaseId::NONE, "the only key is deleted by hand only");
                if reached && self.store.mod_lease() == Some(LeaseId::NONE) {
                    self.store.delete();
                }
                self.machine.on_deleted(0, delivered(fate, ()), self.now);
            }
            Command::Wait { until } => {
                let bound = self.now + TTL;
                self.now = until.map_or(bound, |until| until.min(bound)).max(self.now);
            }
            Command::End => {}
        }
        command
    }

    fn deliver(&mut self) {
        for event in &self.store.events[self.seen..] {
            match event {
                Event::Put(kv) if kv.lease == LeaseId::NONE => {
                    self.machine.on_put_by_hand(0, kv);
                }
                event => self.machine.on_event(0, event, self.now),
            }
        }
        self.seen = self.store.events.len();
    }

    fn is_registered(&self) -> bool {
        matches!(self.machine.phase(self.now), Phase::Registered { .. })
    }

    fn registered(seed: u64) -> Self {
        let mut player = Self::new(seed);
        for _ in 0..3 {
            player.step(Fate::Good);
        }
        assert!(player.is_registered());
        player.deliver();
        player
    }

    /// Runs without faults until the newest value is written, and returns its mod revision.
    fn settled(&mut self) -> Option<Revision> {
        while !self.machine.is_written() {
            self.step(Fate::Good);
        }
        self.deliver();
        self.store.key.as_ref().map(|kv| kv.mod_revision)
    }

    /// Runs without faults until the key is registered, and returns the elapsed time.
    fn settle(&mut self) -> Duration {
        let start = self.now;
        for _ in 0..200 {
            self.store.expire(self.now);
            self.deliver();
            let held = self
                .store
                .key
                .as_ref()
                .is_some_and(|kv| self.machine.granted.contains(&kv.lease));
            if self.is_registered() && held {
                return self.now.saturating_duration_since(start);
            }
            self.step(Fate::Good);
        }
        panic!(
            "never registered again: {:?} {:?}",
            self.machine, self.store
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, ..ProptestConfig::default() })]

    #[test]
    fn the_key_is_restored_within_a_ttl_after_any_fault(seed in any::<u64>()) {
        let mut player = Player::new(seed);
        for _ in 0..150 {
            match player.rng.u8(..) {
                0..4 => player.store.delete(),
                4..8 => player.store.leases.clear(),
                8..10 => {
                    // The store is wiped.
                    player.store.leases.clear();
                    player.store.key = None;
                    player.store.revision = 1;
                    player.store.term = 2;
                    player.store.events.clear();
                    player.seen = 0;
                    player.machine.on_watch_lost();
                    player.machine.on_watch_opened();
                }
                10..12 => player.store.term += 1,
                44..46 => {
                    // The store is restored from a backup: raft terms start again, but leases still exist.
                    player.store.term = 2;
                    player.machine.on_watch_lost();
                    player.machine.on_watch_opened();
                }
                12..16 => player.machine.on_new_value(),
                16..40 => player.deliver(),
                40..44 => {
                    player.machine.on_pause();
                    player.machine.on_resume();
                }
                _ => {}
            }
            let fate = match player.rng.u8(..) {
                0..80 => Fate::Lost,
                80..120 => Fate::AnswerLost,
                _ => Fate::Good,
            };
            player.step(fate);
            assert_ne!(player.store.key.as_ref().map(|kv| kv.lease), Some(LeaseId::NONE), "the key must always have a lease");
        }
        // The faults end here. The watch on the key is opened again, and does not deliver earlier events.
        player.seen = player.store.events.len();
        player.machine.on_watch_opened();
        let took = player.settle();
        assert!(took <= TTL, "{took:?}");
    }

    #[test]
    fn a_registered_server_never_overwrites_the_key_of_another_server(seed in any::<u64>()) {
        let mut player = Player::registered(seed);
        let other = LeaseId::new(42);
        for round in 0..60 {
            if round == 20 {
                player.store.leases.push((other, player.now + Duration::from_secs(1_000_000)));
                player.store.put(other);
            }
            if player.rng.bool() {
                player.deliver();
            }
            if player.rng.u8(..) < 30 {
                player.machine.on_new_value();
            }
            let fate = if player.rng.u8(..) < 60 { Fate::AnswerLost } else { Fate::Good };
            player.step(fate);
        }
        let first = player.store.owners.iter().position(|owner| *owner == other).expect("the other server must have written the key");
        assert!(player.store.owners[first..].iter().all(|owner| *owner == other), "no later write may replace the other server's key");
        for _ in 0..20 {
            player.deliver();
            player.step(Fate::Good);
        }
        assert_eq!(player.machine.phase(player.now), Phase::Superseded(other));
        // After the lease of the other server ends, the machine claims the key.
        player.store.leases.retain(|(lease, _)| *lease != other);
        assert!(player.settle() <= TTL);
    }

    #[test]
    fn a_deregistration_leaves_no_key(seed in any::<u64>()) {
        let mut player = Player::new(seed);
        for _ in 0..player.rng.u8(0..8) {
            let fate = if player.rng.bool() { Fate::AnswerLost } else { Fate::Good };
            player.step(fate);
        }
        player.machine.on_deregister();
        for _ in 0..10 {
            let fate = if player.rng.u8(..) < 60 { Fate::Lost } else { Fate::Good };
            player.step(fate);
        }
        let mut steps = 0;
        while player.step(Fate::Good) != Command::End {
            steps += 1;
            assert!(steps < 20, "the machine must end: {:?}", player.machine);
        }
        assert_eq!(player.store.key, None);
        assert_eq!(player.machine.phase(player.now), Phase::Deregistered);
    }
}

/// A format may have no leave marker, and events may be delivered late or never.
#[test]
fn no_value_that_is_written_by_hand_before_the_last_revoke_outlives_the_server() {
    for seed in 0..2_000 {
        let mut player = Player::registered(seed);
        player.machine.has_leave_marker = player.rng.bool();
        for _ in 0..player.rng.u8(0..20) {
            match player.rng.u8(0..12) {
                0..2 => drop(player.store.put(LeaseId::NONE)),
                2 => player.store.leases.clear(),
                3 => player.machine.on_pause(),
                4 => player.machine.on_resume(),
                5 => player.deliver(),
                6 => drop(player.step(Fate::AnswerLost)),
                _ => drop(player.step(Fate::Good)),
            }
        }
        player.machine.on_deregister();
        let mut steps = 0;
        let mut writes = player.rng.u8(0..3);
        while player.machine.command(player.now) != Command::End {
            let has_lease = player.machine.lease.is_some();
            if writes > 0 && has_lease && player.rng.bool() {
                writes -= 1;
                player.store.put(LeaseId::NONE);
            }
            player.step(Fate::Good);
            steps += 1;
            assert!(steps < 40, "seed {seed}: {:?}", player.machine);
        }
        assert_eq!(player.store.key, None, "seed {seed}");
    }
}

#[test]
fn a_pause_and_a_resume_do_not_restore_a_server_that_is_being_deregistered() {
    for lost in 0..4 {
        let mut player = Player::registered(40);
        player.machine.on_deregister();
        for _ in 0..lost {
            player.step(Fate::Lost);
        }
        player.machine.on_pause();
        player.machine.on_resume();
        let mut steps = 0;
        while player.step(Fate::Good) != Command::End {
            steps += 1;
            assert!(steps < 20, "the machine must end: {:?}", player.machine);
        }
        assert_eq!(player.store.key, None);
    }
}

#[test]
fn a_restarted_server_takes_over_its_key_at_once() {
    let mut player = Player::new(1);
    player
        .store
        .leases
        .push((LeaseId::new(9), player.now + TTL));
    player.store.put(LeaseId::new(9));
    for _ in 0..3 {
        player.step(Fate::Good);
    }
    assert!(player.is_registered());
}

#[test]
fn a_lease_is_renewed_at_a_third_of_its_ttl_and_a_failure_is_retried_at_once() {
    let mut player = Player::registered(2);
    // The first renewal is earlier, at a random time.
    while !matches!(player.step(Fate::Good), Command::Renew { .. }) {}
    let renewed = player.now;
    while !matches!(player.machine.command(player.now), Command::Renew { .. }) {
        player.step(Fate::Good);
    }
    let waited = player.now.saturating_duration_since(renewed);
    assert!(
        waited <= TTL / 3 && waited + Duration::from_millis(20) >= TTL / 3,
        "{waited:?}"
    );
    player.step(Fate::Lost);
    let Command::Renew { deadline, .. } = player.machine.command(player.now) else {
        panic!("a failed renewal must be repeated at once")
    };
    assert_eq!(deadline, TTL / 6);
}

/// The servers of a fleet that start together do not renew their leases together.
#[test]
fn leases_that_are_granted_together_are_renewed_over_a_third_of_the_ttl() {
    let mut waits = Vec::new();
    for seed in 0..200 {
        let mut player = Player::registered(seed);
        let registered = player.now;
        while !matches!(player.machine.command(player.now), Command::Renew { .. }) {
            player.step(Fate::Good);
        }
        waits.push(player.now.saturating_duration_since(registered));
    }
    assert!(waits.iter().all(|wait| *wait <= TTL / 3), "{waits:?}");
    // This third of the TTL is divided into ten parts. At most a quarter of the renewals may fall into one part.
    let part = TTL / 30;
    for start in 0..10 {
        let within = part * start..part * (start + 1);
        let many = waits.iter().filter(|wait| within.contains(wait)).count();
        assert!(many <= 50, "{many} of 200 renewals are in {within:?}");
    }
}

#[test]
fn renewals_without_a_response_are_repeated_and_the_lease_is_kept() {
    let mut player = Player::registered(3);
    let start = player.now;
    let (mut last, mut attempts) = (None, 0);
    while player.now.saturating_duration_since(start) < TTL * 20 {
        if let Command::Renew { .. } = player.step(Fate::Lost) {
            attempts += 1;
            if let Some(last) = last.replace(player.now) {
                let gap = player.now.saturating_duration_since(last);
                assert!(gap <= TTL / 4 + TTL / 6, "two attempts were {gap:?} apart");
            }
        }
    }
    assert!(attempts >= 40, "only {attempts} attempts in twenty TTLs");
    assert_eq!(
        player.machine.phase(player.now),
        Phase::Registering,
        "a lease that may have expired must not count as registered"
    );
    assert!(
        player.machine.lease.is_some(),
        "without a response of etcd, the lease must be kept"
    );
}

#[test]
fn after_an_outage_registrations_are_spread_and_a_single_loss_is_repaired_at_once() {
    let mut waits = Vec::new();
    for seed in 0..200 {
        let mut player = Player::registered(seed);
        let start = player.now;
        while player.now.saturating_duration_since(start) < TTL * 2 {
            player.step(Fate::Lost);
        }
        waits.push(player.settle());
    }
    let late = waits.iter().filter(|wait| **wait > TTL / 6).count();
    assert!(
        (40..160).contains(&late),
        "of 200 servers, about half must wait for more than a sixth of the TTL, not {late}"
    );

    let mut player = Player::registered(1);
    player.store.leases.clear();
    let took = player.settle();
    assert!(
        took <= Duration::from_millis(50),
        "a lease that was revoked by hand must be replaced at once, not after {took:?}"
    );
    player.store.delete();
    let took = player.settle();
    assert!(
        took <= Duration::from_millis(50),
        "a key that was deleted must be put back at once, not after {took:?}"
    );
}

#[test]
fn a_response_from_an_old_raft_term_renews_nothing() {
    let mut player = Player::registered(4);
    let keep_alive = |raft_term| KeepAlive {
        header: Some(Header {
            cluster_id: 7,
            revision: Revision::new(1),
            raft_term,
        }),
        ttl: TTL,
    };
    player
        .machine
        .on_renewed(Ok(keep_alive(5)), player.now, player.now);
    let expires = player.machine.expires();
    let later = player.now + Duration::from_secs(1);
    let stale = || Err(error(EtcdErrorKind::StaleTerm));
    player.machine.on_renewed(stale(), later, later);
    assert_eq!(player.machine.expires(), expires);
    let again = player.machine.command(later);
    assert!(
        matches!(again, Command::Renew { term: 5, .. }),
        "the renewal must be repeated at once, not {again:?}"
    );
}

#[test]
fn a_restored_store_is_detected() {
    let mut player = Player::registered(10);
    player.store.term = 9;
    while player.machine.term != 9 {
        player.step(Fate::Good);
    }
    // A restored store contains old data: an older version of a key, leases that still exist, and terms that start again.
    let backup = player.store.key.clone();
    player.machine.on_new_value();
    let written = player.settled();
    assert!(written > backup.as_ref().map(|kv| kv.mod_revision));
    player.store.key = backup;
    player.store.term = 2;
    let (lease, before) = (player.machine.lease, player.machine.expires());
    let writes = player.store.owners.len();
    let start = player.now;
    while player.now < start + TTL {
        player.step(Fate::Good);
    }
    assert!(player.is_registered(), "{:?}", player.machine);
    assert!(
        player.machine.expires() > before,
        "the renewals must extend the lease"
    );
    assert_eq!(
        player.machine.lease.map(|lease| lease.id),
        lease.map(|lease| lease.id),
        "the lease must be kept"
    );
    assert_eq!(
        player.store.owners.len(),
        writes + 1,
        "the value must be written again exactly once"
    );
    // A later change of the key is still detected.
    player.store.delete();
    player.settle();
}

#[test]
fn a_renewed_lease_expires_one_ttl_after_the_renewal_was_sent() {
    let mut player = Player::registered(5);
    let sent = player.now;
    let answered = sent + Duration::from_secs(1);
    let answer = KeepAlive {
        header: None,
        ttl: TTL,
    };
    player.machine.on_renewed(Ok(answer), sent, answered);
    assert_eq!(player.machine.expires(), Some(sent + TTL));
}

#[test]
fn a_full_store_and_a_lost_leader_are_transient_errors() {
    for kind in [
        EtcdErrorKind::NoSpace,
        EtcdErrorKind::NoLeader,
        EtcdErrorKind::Unavailable,
    ] {
        let mut player = Player::registered(6);
        let lease = player.machine.lease.map(|lease| lease.id);
        player
            .machine
            .on_renewed(Err(error(kind)), player.now, player.now);
        assert_eq!(
            player.machine.lease.map(|lease| lease.id),
            lease,
            "the lease must be kept after {kind:?}"
        );
        assert!(player.is_registered());
    }
}

#[test]
fn a_pause_marks_the_key_as_leaving_and_a_resume_uses_a_new_lease() {
    let mut player = Player::registered(7);
    player.machine.on_pause();
    assert!(matches!(player.step(Fate::Good), Command::Read { .. }));
    assert!(matches!(
        player.step(Fate::Good),
        Command::Put { leaving: true, .. }
    ));
    assert!(matches!(player.step(Fate::Good), Command::Revoke { .. }));
    assert!(matches!(player.step(Fate::Good), Command::Read { .. }));
    assert_eq!(player.machine.phase(player.now), Phase::Paused);
    assert_eq!(player.store.key, None);
    assert_eq!(
        player.machine.command(player.now),
        Command::Wait { until: None }
    );
    player.machine.on_resume();
    assert!(player.settle() <= Duration::from_millis(50));
}

#[test]
fn changes_missed_while_the_watch_was_closed_are_found_by_a_read() {
    let mut player = Player::registered(8);
    let other = LeaseId::new(42);
    player.store.leases.push((other, player.now + TTL * 1_000));
    player.store.put(other);
    player.deliver();
    assert_eq!(player.machine.phase(player.now), Phase::Superseded(other));
    player.machine.on_watch_lost();
    player.store.leases.clear();
    player.store.expire(player.now);
    // The machine misses the event, because the watch that is opened now delivers only later events.
    player.seen = player.store.events.len();
    player.machine.on_watch_opened();
    assert!(player.settle() <= Duration::from_millis(50));
}

#[test]
fn a_key_of_another_server_is_polled_if_it_cannot_be_watched() {
    let mut player = Player::registered(9);
    let other = LeaseId::new(42);
    player.store.leases.push((other, player.now + TTL * 1_000));
    player.store.put(other);
    player.deliver();
    player.machine.on_watch_lost();
    player.store.key = None;
    player.store.revision += 1;
    assert!(player.settle() <= SUPERSEDED_READ + Duration::from_secs(1));
}

#[test]
fn raft_terms_start_again_after_a_wipe() {
    let mut player = Player::registered(10);
    player.store.term = 9;
    while player.machine.term != 9 {
        player.step(Fate::Good);
    }
    player.store.term = 2;
    player.store.leases.clear();
    player.store.key = None;
    let expires = {
        player.settle();
        player.machine.expires()
    };
    for _ in 0..10 {
        player.step(Fate::Good);
    }
    assert!(
        player.machine.expires() > expires,
        "the renewals must extend the lease"
    );
    assert!(player.is_registered());
}

#[test]
fn a_rejected_renewal_is_retried_while_the_lease_is_valid() {
    let mut player = Player::registered(11);
    let start = player.now;
    let mut tries = 0;
    while player.now < start + TTL / 2 {
        match player.machine.command(player.now) {
            Command::Renew { .. } => {
                tries += 1;
                let refused = Err(error(EtcdErrorKind::PermissionDenied));
                player.machine.on_renewed(refused, player.now, player.now);
            }
            Command::Wait { until: Some(until) } => player.now = until,
            other => panic!("unexpected command: {other:?}"),
        }
    }
    assert!(tries >= 3, "only {tries} attempts");
    assert!(
        player.settle() <= TTL / 4,
        "the lease must survive a short outage"
    );
    assert_eq!(player.store.owners.len(), 1, "the key must never be lost");
}

#[test]
fn a_put_whose_response_was_lost_is_not_repeated() {
    let mut player = Player::new(12);
    player.step(Fate::Good);
    player.step(Fate::Good);
    assert!(matches!(player.step(Fate::AnswerLost), Command::Put { .. }));
    let found = player.store.key.clone();
    player
        .machine
        .on_read(Ok(vec![alone(found, true)]), player.now);
    assert!(player.is_registered() && player.machine.is_written());
}

#[test]
fn puts_to_a_full_store_are_retried_with_growing_waits() {
    let mut player = Player::registered(13);
    player.machine.on_new_value();
    let start = player.now;
    let mut puts = 0;
    while player.now < start + TTL {
        if let Command::Put { .. } = player.machine.command(player.now) {
            puts += 1;
            player
                .machine
                .on_put(false, Err(error(EtcdErrorKind::NoSpace)), player.now);
        } else {
            player.step(Fate::Good);
        }
    }
    assert!((3..15).contains(&puts), "{puts} puts in one TTL");
}

/// Runs without faults until the next read of the keys. Returns the number of renewals before that read.
fn renewals_between_reads(player: &mut Player) -> u32 {
    let mut renewals = 0;
    loop {
        match player.step(Fate::Good) {
            Command::Renew { .. } => renewals += 1,
            Command::Read { .. } => return renewals,
            _ => {}
        }
    }
}

#[test]
fn watched_keys_are_read_every_minute_and_unwatched_keys_after_each_renewal() {
    let mut player = Player::registered(14);
    // The lease is renewed every 2 s.
    for (watched, renewals) in [(true, 15..=31), (false, 1..=1), (true, 15..=31)] {
        if watched {
            player.machine.on_watch_opened();
        } else {
            player.machine.on_watch_lost();
        }
        // Skips the first interval, because a read follows the opening of the watch.
        renewals_between_reads(&mut player);
        for _ in 0..2 {
            let between = renewals_between_reads(&mut player);
            assert!(
                renewals.contains(&between),
                "watched: {watched}, {between} renewals between two reads"
            );
        }
    }
}

/// For the duration `time`, answers every renewal with an error of this kind. Returns the number of attempts and the longest wait between
/// two attempts.
fn failing_renewals(player: &mut Player, kind: EtcdErrorKind, time: Duration) -> (u32, Duration) {
    let (start, mut last, mut tries, mut longest) = (player.now, player.now, 0, Duration::ZERO);
    while player.now < start + time {
        match player.machine.command(player.now) {
            Command::Renew { deadline, .. } => {
                longest = longest.max(player.now.saturating_duration_since(last));
                tries += 1;
                assert!(deadline <= Duration::from_secs(2), "{deadline:?}");
                player
                    .machine
                    .on_renewed(Err(error(kind)), player.now, player.now);
                last = player.now;
            }
            Command::Wait { until: Some(until) } => player.now = until,
            other => panic!("unexpected command: {other:?}"),
        }
    }
    (tries, longest)
}

#[test]
fn with_a_long_ttl_failed_renewals_are_still_retried_every_few_seconds() {
    let ttl = Duration::from_secs(600);
    let mut player = Player::registered(15);
    let (lease, now) = (player.machine.lease, player.now);
    player.machine = Machine::new(ttl, 1, true, fastrand::Rng::with_seed(15));
    player.machine.keys[0].held = Some(Revision::new(1));
    player.machine.keys[0].value = Value::Written;
    player.machine.state = State::Registered;
    player.machine.lease = lease.map(|lease| Lease {
        ttl,
        expires: now + ttl,
        renew_at: now,
        ..lease
    });
    let time = Duration::from_secs(120);
    let (attempts, longest) = failing_renewals(&mut player, EtcdErrorKind::DeadlineExceeded, time);
    assert!(
        f64::from(attempts) >= time.div_duration_f64(RETRY_MAX).floor(),
        "only {attempts} attempts in {time:?}"
    );
    assert!(longest <= RETRY_MAX, "{longest:?}");
}

#[test]
fn after_the_expiry_a_rejected_renewal_is_retried_once_or_twice_per_ttl() {
    let mut player = Player::registered(16);
    failing_renewals(&mut player, EtcdErrorKind::PermissionDenied, TTL);
    let time = TTL * 100;
    let (tries, longest) = failing_renewals(&mut player, EtcdErrorKind::PermissionDenied, time);
    assert!(
        (100..=201).contains(&tries),
        "{tries} attempts in a hundred TTLs"
    );
    assert!(longest <= TTL, "{longest:?}");
}

#[test]
fn a_lease_that_is_not_found_is_replaced_at_once() {
    let mut player = Player::registered(17);
    let gone = Err(error(EtcdErrorKind::LeaseNotFound));
    player.machine.on_renewed(gone, player.now, player.now);
    let next = player.machine.command(player.now);
    assert!(matches!(next, Command::Grant { .. }), "{next:?}");
}
