//! Tests of watches that lose events, and of reports about refused connections.

use proptest::prelude::{ProptestConfig, any, proptest};

use super::*;

mod limits;

impl Player {
    /// Runs the machine for the given time, without faults.
    fn rest(&mut self, time: Duration) {
        self.store.steady = true;
        let until = self.now + time;
        while self.now < until {
            self.step(false);
        }
    }

    /// Changes the store. The watch does not deliver the events.
    fn change_unseen(&mut self, change: impl FnOnce(&mut Store)) {
        assert!(self.is_idle());
        change(&mut self.store);
        self.sent = self.store.revision;
    }
}

impl Store {
    fn delete(&mut self, key: &Key) {
        self.revision += 1;
        self.history.push(Event::Delete {
            key: key.clone(),
            mod_revision: Revision::new(self.revision),
        });
    }

    fn put(&mut self, key: &Key, value: &str) {
        let now = self.at(self.revision);
        self.revision += 1;
        let revision = Revision::new(self.revision);
        self.history.push(Event::Put(KeyValue {
            create_revision: now.get(key).map_or(revision, |kv| kv.create_revision),
            key: key.clone(),
            value: value.into(),
            mod_revision: revision,
            lease: LeaseId::new(5),
        }));
    }
}

fn key(name: &str) -> Key {
    Key::from(format!("{PREFIX}{name}").as_str())
}

fn some_key(player: &Player) -> Key {
    player.machine.keys.keys().next().expect("a key").clone()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn events_that_a_watch_loses_are_found(seed in any::<u64>()) {
        let mut player = Player::new(seed);
        player.store.has_lost_event = true;
        for _ in 0..100 {
            match player.store.rng.u8(..) {
                0..90 => player.store.change(),
                90..94 => player.store.compact(),
                _ => {}
            }
            player.step(true);
            player.step(true);
        }
        player.rest(4 * RECONCILE);
        player.check();
    }

    #[test]
    fn no_key_reverts_to_an_older_revision(seed in any::<u64>()) {
        let mut player = Player::new(seed);
        player.store.has_lost_event = seed % 2 == 0;
        player.facts = Some(BTreeMap::new());
        for _ in 0..400 {
            match player.store.rng.u8(..) {
                0..60 => player.store.change(),
                60..62 => player.store.compact(),
                _ => {}
            }
            player.step(true);
        }
        player.rest(4 * RECONCILE);
        player.check();
    }
}

#[test]
fn a_lost_delete_is_found_by_the_next_reconciliation_and_the_watch_is_reopened() {
    let mut player = populated(21);
    let gone = some_key(&player);
    player.change_unseen(|store| store.delete(&gone));
    let before = player.machine.report.clone();
    player.rest(RECONCILE + Duration::from_secs(20));
    player.check();
    assert!(!player.machine.keys.contains_key(&gone));
    let report = &player.machine.report;
    assert_eq!((report.repaired, report.lists), (1, before.lists));
    assert_eq!(
        report.watches,
        before.watches + 1,
        "the watch must be reopened after a loss"
    );
    assert_eq!(report.reads, 1, "only the suspect key must be read");
}

#[test]
fn a_lost_put_is_found_by_the_next_reconciliation() {
    let mut player = populated(22);
    let changed = some_key(&player);
    player.change_unseen(|store| {
        store.put(&key("new"), "10.9.9.9:1");
        store.put(&changed, "10.9.9.9:2");
    });
    player.rest(RECONCILE + Duration::from_secs(20));
    player.check();
    assert_eq!(player.machine.report.repaired, 2);
}

/// A write with the same revision and another lease is a different write. So is a write with another revision and the same lease.
#[test]
fn a_reconciliation_compares_revisions_and_leases() {
    for difference in ["lease", "mod revision", "create revision"] {
        let mut player = populated(22);
        let due = player.machine.due().expect("a reconciliation is due");
        let request = player.machine.on_time(due);
        assert!(matches!(request, Command::Reconcile(_)), "{request:?}");
        all_names(&mut player, due);
        let mut page = whole(&player.store);
        let kv = &mut page.kvs[0];
        match difference {
            "lease" => kv.lease = LeaseId::new(77),
            "mod revision" => kv.mod_revision = Revision::new(kv.mod_revision.get() + 1),
            _ => kv.create_revision = Revision::new(kv.create_revision.get() + 1),
        }
        let reported = kv.key.clone();
        assert_eq!(player.machine.on_names(Ok(page), due), Command::Receive);
        let settle_at = player.machine.due().expect("a key is suspect");
        let mut next = player.machine.on_time(settle_at);
        if next == Command::Receive {
            next = player.machine.on_time(settle_at);
        }
        assert_eq!(next, Command::Read(reported), "{difference}");
    }
}

/// The watch loses the delete of one key and the put of another key, and then delivers a later change. The number of known keys is
/// therefore the same as in the store.
#[test]
fn a_lost_replacement_is_found_although_the_number_of_keys_is_the_same() {
    let mut player = populated(31);
    let gone = some_key(&player);
    player.change_unseen(|store| {
        store.delete(&gone);
        store.put(&key("replacement"), "10.9.9.9:1");
    });
    player.store.put(&key("seen"), "10.9.9.9:2");
    player.rest(RECONCILE + Duration::from_secs(20));
    player.check();
    assert_eq!(player.machine.report.repaired, 2);
}

#[test]
fn without_differences_only_every_sixteenth_reconciliation_lists_all_names() {
    let mut player = populated(32);
    player.store.put(&key("new"), "10.9.9.9:1");
    player.rest(Duration::from_secs(10));
    let known = player.machine.keys.len();
    let mut complete = 0;
    for _ in 0..64 {
        let due = player.machine.due().expect("a reconciliation is due");
        let Command::Reconcile(request) = player.machine.on_time(due) else {
            panic!("a reconciliation must be due")
        };
        player.store.steady = true;
        let page = player.store.list(&request).expect("a page");
        if request.written_after == Revision::ZERO {
            complete += 1;
            assert_eq!(page.kvs.len(), known);
        } else {
            assert!(
                page.kvs.len() <= 1,
                "no key may be returned that was not written after the last reconciliation without differences"
            );
        }
        assert_eq!(player.machine.on_names(Ok(page), due), Command::Receive);
    }
    assert_eq!(complete, 4, "every 16th reconciliation must list all names");
    assert_eq!(player.machine.report.reads, 0);
}

#[test]
fn no_key_is_repaired_while_the_watch_delivers_every_change() {
    for seed in 23..33 {
        let mut player = populated(seed);
        player.store.steady = true;
        let before = player.machine.report.clone();
        for _ in 0..300 {
            if player.store.rng.bool() {
                player.store.change();
                // The watch delivers the change at once.
                let now = player.now;
                while !player.is_idle() {
                    player.step(false);
                    player.now = now;
                }
            }
            player.step(false);
        }
        player.rest(RECONCILE);
        let report = &player.machine.report;
        assert!(report.reconciliations >= 3, "{}", report.reconciliations);
        assert_eq!(report.repaired, 0, "seed {seed}");
        assert_eq!(
            (report.lists, report.watches),
            (before.lists, before.watches)
        );
    }
}

#[test]
fn a_change_that_the_watch_delivers_late_is_awaited() {
    let mut player = populated(24);
    let late = some_key(&player);
    // The store contains the delete, but the watch has not sent it yet.
    player.store.delete(&late);
    let due = player.machine.due().expect("a reconciliation is due");
    let Command::Reconcile(request) = player.machine.on_time(due) else {
        panic!("a reconciliation must be due")
    };
    assert!(request.keys_only);
    all_names(&mut player, due);
    let page = whole(&player.store);
    assert_eq!(player.machine.on_names(Ok(page), due), Command::Receive);
    let settle_at = player.machine.due().expect("a key is suspect");
    assert_eq!(settle_at, due + Duration::from_secs(5));
    player.machine.on_message(message(
        player.store.revision,
        vec![player.store.history.last().expect("a delete").clone()],
        false,
    ));
    assert_eq!(player.machine.on_time(settle_at), Command::Receive);
    assert_eq!(player.machine.report.reads, 0);
}

fn whole(store: &Store) -> Page {
    let kvs: Vec<_> = store.at(store.revision).into_values().collect();
    Page {
        header: store.header(),
        count: kvs.len(),
        kvs,
        more: false,
    }
}

/// Answers the request for the changes with a wrong number of keys. The machine must then request all names.
fn all_names(player: &mut Player, due: Instant) {
    let changes = Page {
        header: player.store.header(),
        count: usize::MAX,
        ..Page::default()
    };
    let next = player.machine.on_names(Ok(changes), due);
    let Command::Reconcile(request) = next else {
        panic!("all names must be requested next, not {next:?}")
    };
    assert_eq!(request.written_after, Revision::ZERO);
}

#[test]
fn a_put_older_than_a_read_does_not_restore_the_key() {
    let mut player = populated(25);
    let gone = some_key(&player);
    player.machine.on_refused_connection(&gone, player.now);
    let before = player.store.revision;
    // The key is written once more and then deleted. The read returns this result before the watch delivers either event.
    player.store.put(&gone, "10.9.9.9:3");
    let put = player.store.history.last().expect("a put").clone();
    player.store.delete(&gone);
    let due = player.machine.due().expect("a read is due");
    assert!(due <= player.now + Duration::from_secs(2));
    assert_eq!(player.machine.on_time(due), Command::Read(gone.clone()));
    let answer = player.store.value(&gone);
    player.machine.on_read(gone.clone(), Ok(answer), due);
    assert!(matches!(
        &player.machine.take_update()[..],
        [Event::Delete { .. }]
    ));
    player
        .machine
        .on_message(message(before + 1, vec![put], false));
    assert_eq!(player.machine.take_update(), [], "the key must not return");
    // A later registration restores the key.
    player.store.put(&gone, "10.9.9.9:4");
    let again = player.store.history.last().expect("a put").clone();
    player
        .machine
        .on_message(message(before + 3, vec![again.clone()], false));
    assert_eq!(player.machine.take_update(), [again]);
    assert!(player.machine.tombstones.is_empty());
}

/// Returns a machine that has listed this number of keys, all with one address, and that does not reconcile. Also returns its store.
fn listed(keys: usize) -> (Machine, Store) {
    let mut machine = Machine::new(
        Range::prefix(PREFIX),
        None,
        slots(),
        fastrand::Rng::with_seed(26),
    );
    let mut store = Store::new(fastrand::Rng::with_seed(26));
    for number in 0..keys {
        store.put(&key(&format!("{number:04}")), "10.9.9.9:5");
    }
    machine.on_wake();
    machine.on_page(Ok(whole(&store)));
    (machine, store)
}

#[test]
fn a_thousand_reported_keys_are_read_at_a_limited_rate() {
    let (mut machine, store) = listed(1_000);
    let start = Instant::now();
    machine.on_watch_opened(start);
    let keys: Vec<_> = machine.keys.keys().cloned().collect();
    let mut now = start;
    let mut read = BTreeMap::new();
    while now < start + Duration::from_secs(30) {
        for key in &keys {
            machine.on_refused_connection(key, now);
        }
        if machine.due().is_some_and(|due| due <= now)
            && let Command::Read(key) = machine.on_time(now)
        {
            let last = read.insert(key.clone(), now);
            // After an accepted report about a key, further reports about it are ignored for 10 s. The reads of a key are not exactly
            // 10 s apart, because each read is delayed by a random time of up to 2 s.
            assert!(last.is_none_or(|last| now >= last + Duration::from_secs(8)));
            let answer = store.value(&key);
            assert_eq!(machine.on_read(key, Ok(answer), now), Command::Receive);
        }
        now += Duration::from_millis(5);
    }
    let reads = machine.report.reads;
    assert!((200..=300).contains(&reads), "{reads} reads in 30 s");
    assert_eq!(machine.report.repaired, 0);
}

/// When a server crashes, the connections of all clients are refused at once.
#[test]
fn reads_of_many_clients_after_a_crash_are_spread_over_two_seconds() {
    let waits: Vec<_> = (0..100)
        .map(|seed| {
            let mut player = populated(seed);
            let reported = some_key(&player);
            let now = player.now;
            player.machine.on_refused_connection(&reported, now);
            let due = player.machine.due().expect("a read is due");
            due.saturating_duration_since(now)
        })
        .collect();
    for quarter in 0..4 {
        let from = Duration::from_millis(500) * quarter;
        let to = from + Duration::from_millis(500);
        let reads = waits.iter().filter(|wait| (from..to).contains(wait));
        let reads = reads.count();
        assert!(
            (10..=40).contains(&reads),
            "{reads} of 100 reads are due from {from:?} to {to:?}"
        );
    }
}

/// No message of the watch is received while a key is read. So there must be a pause between two reads.
#[test]
fn the_watch_is_polled_between_two_slow_reads() {
    let mut player = populated(26);
    let keys: Vec<_> = player.machine.keys.keys().cloned().collect();
    for key in &keys {
        player.machine.on_refused_connection(key, player.now);
    }
    let mut now = player.now + Duration::from_secs(3);
    for failed in [false, true] {
        let Command::Read(key) = player.machine.on_time(now) else {
            panic!("a read must be due");
        };
        now += Duration::from_secs(2);
        let answer = if failed {
            Err(error(EtcdErrorKind::DeadlineExceeded))
        } else {
            Ok(player.store.value(&key))
        };
        assert_eq!(player.machine.on_read(key, answer, now), Command::Receive);
        let due = player.machine.due().expect("another read is due");
        let wait = due.saturating_duration_since(now);
        // After a failed read, the wait is longer, because the next read would probably fail as well.
        let least = Duration::from_millis(if failed { 5_000 } else { 100 });
        assert!(wait >= least, "{wait:?}");
        now = due;
    }
}

/// After an outage of etcd, the reconciliations of all clients are overdue. They are spread over one interval, so that their rate is about
/// the same as before the outage.
#[test]
fn reconciliations_due_during_an_outage_are_spread_over_an_interval() {
    const CLIENTS: u64 = 200;
    let mut waits = Vec::new();
    for seed in 0..CLIENTS {
        let mut player = populated(seed);
        let later = player.now + 2 * RECONCILE;
        player
            .machine
            .on_watch_ended(error(EtcdErrorKind::Unavailable), player.now);
        player.machine.on_wake();
        player.machine.on_watch_opened(later);
        let due = player.machine.due().expect("a reconciliation is due");
        waits.push(due.saturating_duration_since(later));
    }
    assert!(waits.iter().all(|wait| *wait <= RECONCILE), "{waits:?}");
    for tenth in 0..10 {
        let part = RECONCILE / 10;
        let within = waits
            .iter()
            .filter(|wait| (part * tenth..part * (tenth + 1)).contains(*wait));
        let count = within.count();
        assert!(
            (5..=50).contains(&count),
            "{count} of {CLIENTS} reconciliations are in tenth {tenth} of the interval"
        );
    }
}

#[test]
fn a_read_answered_by_another_store_causes_a_list() {
    for damage in ["revision", "cluster", "mod revision"] {
        let mut player = populated(27);
        let reported = player.machine.newest().expect("a key");
        let (mut header, found) = player.store.value(&reported);
        let mut found = found.expect("the key exists");
        match damage {
            "revision" => header.revision = Revision::new(header.revision.get() - 1),
            "cluster" => header.cluster_id += 1,
            _ => found.mod_revision = Revision::new(1),
        }
        let next = player
            .machine
            .on_read(reported, Ok((header, Some(found))), player.now);
        assert!(matches!(next, Command::List(_)), "{damage}: {next:?}");
    }
}

#[test]
fn a_failed_reconciliation_changes_nothing_and_is_repeated_later() {
    let mut player = populated(28);
    let due = player.machine.due().expect("a reconciliation is due");
    assert!(matches!(player.machine.on_time(due), Command::Reconcile(_)));
    let failed = Err(error(EtcdErrorKind::Unavailable));
    assert_eq!(player.machine.on_names(failed, due), Command::Receive);
    assert!(player.machine.report.trouble.is_none());
    assert!(player.machine.due() > Some(due + RECONCILE / 2 - Duration::from_secs(1)));
    assert!(player.machine.take_update().is_empty());
}

#[test]
fn intervals_of_any_length_are_accepted() {
    for interval in [Duration::ZERO, Duration::MAX] {
        let range = Range::prefix(PREFIX);
        let mut machine =
            Machine::new(range, Some(interval), slots(), fastrand::Rng::with_seed(30));
        machine.on_wake();
        machine.on_page(Ok(whole(&Store::new(fastrand::Rng::with_seed(30)))));
        let now = Instant::now();
        machine.on_watch_opened(now);
        assert!(machine.due() > Some(now), "{interval:?}");
    }
}

#[test]
fn lost_changes_of_more_than_a_hundred_keys_cause_a_list() {
    let mut player = populated(29);
    player.change_unseen(|store| {
        for number in 0..150 {
            store.put(&key(&format!("new{number}")), "10.9.9.9:6");
        }
    });
    let lists = player.machine.report.lists;
    player.rest(RECONCILE + Duration::from_secs(20));
    player.check();
    assert_eq!(player.machine.report.lists, lists + 1);
    assert_eq!(player.machine.report.reads, 0);
}
