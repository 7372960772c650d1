//! Tests of the pages of names, of suspects and reports, of their limits, and of lists that are repeated.

use super::super::super::reconcile_schedule::READ_STEP;
use super::*;

const SETTLE: Duration = Duration::from_secs(5);

/// Answers the due reconciliation of the changes so that all names are requested. Returns the time.
fn names_are_requested(player: &mut Player) -> Instant {
    let due = player.machine.due().expect("a reconciliation is due");
    let next = player.machine.on_time(due);
    assert!(matches!(next, Command::Reconcile(_)), "{next:?}");
    all_names(player, due);
    due
}

/// Lists all names, and returns the time at which the suspects have settled.
fn suspects(player: &mut Player) -> Instant {
    let due = names_are_requested(player);
    let page = whole(&player.store);
    assert_eq!(player.machine.on_names(Ok(page), due), Command::Receive);
    assert_eq!(player.machine.due(), Some(due + SETTLE));
    due + SETTLE
}

fn last_event(player: &Player) -> WatchMessage {
    let event = player
        .store
        .history
        .last()
        .expect("the store has an event")
        .clone();
    message(player.store.revision, vec![event], false)
}

#[test]
fn a_list_is_repeated_once_at_a_random_time_within_a_minute() {
    let mut waits = Vec::new();
    for seed in 0..100 {
        let rng = || fastrand::Rng::with_seed(seed);
        let mut machine = Machine::new(Range::prefix(PREFIX), None, slots(), rng());
        let store = Store::new(rng());
        machine.on_wake();
        machine.on_page(Ok(whole(&store)));
        let now = Instant::now();
        machine.on_watch_opened(now);
        assert_eq!(machine.due(), None);
        machine.list_again(now);
        let due = machine.due().expect("a list is due");
        machine.list_again(now + Duration::from_secs(30));
        assert_eq!(machine.due(), Some(due), "the list is not postponed");
        let before = due
            .checked_sub(Duration::from_millis(1))
            .expect("the time is later");
        assert_eq!(machine.on_time(before), Command::Receive);
        assert!(matches!(machine.on_time(due), Command::List(_)));
        machine.on_page(Ok(whole(&store)));
        machine.on_watch_opened(due);
        assert_eq!(machine.due(), None, "one list is enough");
        waits.push(due.saturating_duration_since(now));
    }
    let minute = Duration::from_secs(60);
    assert!(waits.iter().all(|wait| *wait <= minute), "{waits:?}");
    for quarter in 0..4 {
        let from = minute / 4 * quarter;
        let within = from..from + minute / 4;
        let lists = waits.iter().filter(|wait| within.contains(wait)).count();
        assert!((10..=40).contains(&lists), "{lists} of 100 after {from:?}");
    }
}

/// The first reconciliations of clients that start together.
#[test]
fn reconciliations_begin_half_an_interval_to_one_interval_after_the_opening() {
    let mut waits = Vec::new();
    for seed in 0..200 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let now = Instant::now();
        let times = Slots::new(now, &mut rng);
        let range = Range::prefix(PREFIX);
        let mut machine = Machine::new(range, Some(RECONCILE), times, rng.fork());
        machine.on_wake();
        machine.on_page(Ok(whole(&Store::new(rng))));
        machine.on_watch_opened(now);
        let due = machine.due().expect("a reconciliation is due");
        waits.push(due.saturating_duration_since(now));
    }
    let bounds = RECONCILE / 2..=RECONCILE;
    assert!(waits.iter().all(|wait| bounds.contains(wait)), "{waits:?}");
    for fifth in 0..5 {
        let from = RECONCILE / 2 + RECONCILE / 10 * fifth;
        let within = from..from + RECONCILE / 10;
        let count = waits.iter().filter(|wait| within.contains(wait)).count();
        assert!((15..=80).contains(&count), "{count} of 200 after {from:?}");
    }
}

#[test]
fn only_an_overdue_reconciliation_is_postponed_by_a_new_watch() {
    let mut player = populated(2);
    let due = player.machine.due().expect("a reconciliation is due");
    reopened(&mut player);
    assert_eq!(player.machine.due(), Some(due));
    for seed in 0..50 {
        let mut player = populated(seed);
        let later = player.now + 2 * RECONCILE;
        player.machine.on_watch_opened(later);
        let wait = player.machine.due().expect("a reconciliation is due") - later;
        assert!(wait >= SETTLE, "a backlog is delivered first: {wait:?}");
    }
    // With a short interval, the wait is not longer than the interval, or the start of the next slot.
    let range = Range::prefix(PREFIX);
    let (interval, rng) = (Duration::from_secs(1), fastrand::Rng::with_seed(2));
    let mut machine = Machine::new(range, Some(interval), slots(), rng.clone());
    machine.on_wake();
    machine.on_page(Ok(whole(&Store::new(rng))));
    let now = Instant::now();
    machine.on_watch_opened(now);
    let later = now + RECONCILE;
    machine.on_watch_opened(later);
    let wait = machine.due().expect("a reconciliation is due") - later;
    assert!(wait < interval * 2, "{wait:?}");
}

#[test]
fn the_pages_of_names_are_of_one_revision() {
    let mut player = populated(2);
    let due = names_are_requested(&mut player);
    let mut first = whole(&player.store);
    let mut second = first.clone();
    second.kvs = first.kvs.split_off(first.kvs.len() / 2);
    first.more = true;
    let revision = Revision::new(player.store.revision + 3);
    first.header.revision = revision;
    second.header.revision = Revision::new(player.store.revision + 6);
    let start = first.kvs.last().expect("the set has a key").key.successor();
    let next = player.machine.on_names(Ok(first), due);
    let Command::Reconcile(request) = next else {
        panic!("no further page is requested: {next:?}")
    };
    assert_eq!((request.revision, request.range.start), (revision, start));
    assert_eq!(player.machine.on_names(Ok(second), due), Command::Receive);
    assert_eq!(player.machine.report.reconciliations, 1);
    assert_eq!(player.machine.reconciler.agreed, Some(revision));
    // The keys are as listed, so only later changes are requested next.
    for ahead in [9, 12] {
        let agreed = player.machine.reconciler.agreed;
        let due = player.machine.due().expect("a reconciliation is due");
        let next = player.machine.on_time(due);
        let Command::Reconcile(request) = next else {
            panic!("{next:?}")
        };
        assert_eq!(Some(request.written_after), agreed);
        let mut none = whole(&player.store);
        none.kvs.clear();
        none.header.revision = Revision::new(player.store.revision + ahead);
        let agreed = Some(none.header.revision);
        assert_eq!(player.machine.on_names(Ok(none), due), Command::Receive);
        assert_eq!(player.machine.reconciler.agreed, agreed);
    }
    assert_eq!(player.machine.report.reconciliations, 3);
    // The next list of names begins with the first key again.
    player.store.revision += 15;
    let due = names_are_requested(&mut player);
    let page = whole(&player.store);
    assert_eq!(player.machine.on_names(Ok(page), due), Command::Receive);
    assert!(player.machine.reconciler.suspects.is_empty());
}

#[test]
fn no_further_page_is_requested_after_more_than_a_hundred_suspects() {
    for (unknown, further) in [(100, true), (101, false)] {
        let mut player = populated(2);
        let due = names_are_requested(&mut player);
        let mut page = whole(&player.store);
        for number in 0..unknown {
            let mut kv = page.kvs[0].clone();
            kv.key = key(&format!("0unknown{number:03}"));
            page.kvs.push(kv);
        }
        page.kvs.sort_by(|one, other| one.key.cmp(&other.key));
        page.more = true;
        let next = player.machine.on_names(Ok(page), due);
        assert_eq!(matches!(next, Command::Reconcile(_)), further, "{next:?}");
    }
}

/// The number of all keys is right, and every key on the page is known.
#[test]
fn changes_agree_only_if_the_page_has_all_of_them() {
    for (more, missing, agree) in [
        (false, false, true),
        (true, false, false),
        (false, true, false),
    ] {
        let mut player = populated(2);
        player.store.put(&key("new"), "10.9.9.9:1");
        let seen = last_event(&player);
        player.machine.on_message(seen);
        let due = player.machine.due().expect("a reconciliation is due");
        let Command::Reconcile(request) = player.machine.on_time(due) else {
            panic!("no reconciliation is due")
        };
        let mut page = whole(&player.store);
        page.kvs
            .retain(|kv| kv.mod_revision > request.written_after && !missing);
        page.more = more;
        let next = player.machine.on_names(Ok(page), due);
        assert_eq!(next == Command::Receive, agree, "{more} {missing}");
    }
}

#[test]
fn suspects_of_the_first_page_are_read_although_the_second_page_fails() {
    let mut player = populated(2);
    let due = names_are_requested(&mut player);
    let mut first = whole(&player.store);
    let gone = first.kvs.remove(0).key;
    first.kvs.truncate(1);
    first.more = true;
    let next = player.machine.on_names(Ok(first), due);
    assert!(matches!(next, Command::Reconcile(_)), "{next:?}");
    let failed = Err(error(EtcdErrorKind::Unavailable));
    assert_eq!(player.machine.on_names(failed, due), Command::Receive);
    let settled = due + SETTLE;
    assert_eq!(player.machine.due(), Some(settled));
    player.machine.on_time(settled);
    assert_eq!(player.machine.on_time(settled), Command::Read(gone));
}

/// A reconciliation that a new watch or a list has interrupted leaves nothing behind: the next one lists all names from the first key.
#[test]
fn an_interrupted_reconciliation_starts_again_with_the_first_key() {
    for interrupted in ["changes", "names"] {
        let mut player = populated(2);
        if interrupted == "names" {
            let due = names_are_requested(&mut player);
            let mut first = whole(&player.store);
            first.kvs.truncate(1);
            first.more = true;
            player.machine.on_names(Ok(first), due);
        } else {
            let due = player.machine.due().expect("a reconciliation is due");
            player.machine.on_time(due);
        }
        reopened(&mut player);
        player.machine.reconciler.compared_changes = 15;
        let due = player.machine.due().expect("a reconciliation is due");
        let Command::Reconcile(request) = player.machine.on_time(due) else {
            panic!("no reconciliation is due")
        };
        assert_eq!(request.written_after, Revision::ZERO);
        let mut page = whole(&player.store);
        let gone = page.kvs.remove(0).key;
        let next = player.machine.on_names(Ok(page), due);
        assert_eq!(next, Command::Receive, "{interrupted}");
        let suspects = player.machine.reconciler.suspects.iter();
        let suspects: Vec<_> = suspects.map(|suspect| &suspect.key).collect();
        assert_eq!(suspects, [&gone], "{interrupted}");
    }
}

#[test]
fn suspects_that_differ_after_a_failed_read_are_found_again() {
    let mut player = populated(2);
    let changed = some_key(&player);
    player.change_unseen(|store| store.put(&changed, "10.9.9.9:7"));
    let settled = suspects(&mut player);
    player.machine.on_time(settled);
    let next = player.machine.on_time(settled);
    assert_eq!(next, Command::Read(changed.clone()));
    let failed = Err(error(EtcdErrorKind::Unavailable));
    player.machine.on_read(changed, failed, settled);
    let due = player.machine.due().expect("a reconciliation is due");
    let Command::Reconcile(request) = player.machine.on_time(due) else {
        panic!("no reconciliation is due")
    };
    let lost = Revision::new(player.store.revision);
    assert!(request.written_after < lost, "the change is requested");
}

/// The changes have the same number of keys as the known changes, and the number of all keys is right.
#[test]
fn a_lost_replacement_of_a_new_key_is_found() {
    let mut player = populated(2);
    player.store.put(&key("new"), "10.9.9.9:1");
    let seen = last_event(&player);
    player.machine.on_message(seen);
    player.store.delete(&key("new"));
    player.store.put(&key("replacement"), "10.9.9.9:2");
    let due = player.machine.due().expect("a reconciliation is due");
    let Command::Reconcile(request) = player.machine.on_time(due) else {
        panic!("no reconciliation is due")
    };
    player.store.steady = true;
    let page = player
        .store
        .list(&request)
        .expect("the store returns a page");
    assert_eq!((page.kvs.len(), page.count), (1, player.machine.keys.len()));
    let next = player.machine.on_names(Ok(page), due);
    assert!(matches!(next, Command::Reconcile(_)), "{next:?}");
}

#[test]
fn nothing_else_is_done_before_the_suspects_have_settled() {
    let mut player = populated(2);
    let gone = some_key(&player);
    player.change_unseen(|store| store.delete(&gone));
    let settled = suspects(&mut player);
    let before = settled.checked_sub(Duration::from_millis(1));
    let before = before.expect("the time is later");
    player.machine.reconciler.next_list = Some(before);
    assert_eq!(player.machine.on_time(before), Command::Receive);
    assert_eq!(player.machine.due(), Some(settled), "no list is due");
    // The 5 s start again with each watch.
    reopened(&mut player);
    assert_eq!(player.machine.due(), Some(player.now + SETTLE));
}

#[test]
fn a_suspect_whose_change_was_delivered_is_not_read() {
    for change in ["the listed delete", "the listed put", "a later put"] {
        let mut player = populated(2);
        let suspect = some_key(&player);
        match change {
            "the listed delete" => player.store.delete(&suspect),
            _ => player.store.put(&suspect, "10.9.9.9:1"),
        }
        let settled = suspects(&mut player);
        if change == "a later put" {
            player.store.put(&suspect, "10.9.9.9:2");
        }
        let delivered = last_event(&player);
        player.machine.on_message(delivered);
        assert_eq!(player.machine.on_time(settled), Command::Receive);
        assert!(player.machine.reconciler.reads.is_empty(), "{change}");
    }
}

#[test]
fn more_than_a_hundred_suspects_are_listed_and_the_next_watch_is_not_checked() {
    for (lost, lists) in [(100, false), (101, true)] {
        let mut player = populated(2);
        player.change_unseen(|store| {
            for number in 0..lost {
                store.put(&key(&format!("new{number}")), "10.9.9.9:6");
            }
        });
        let settled = suspects(&mut player);
        let next = player.machine.on_time(settled);
        assert_eq!(matches!(next, Command::List(_)), lists, "{lost}: {next:?}");
        if lists {
            let page = whole(&player.store);
            player.machine.on_page(Ok(page));
            let next = player.machine.on_watch_opened(settled);
            assert_eq!(next, Command::Receive);
        }
    }
}

#[test]
fn the_watch_after_a_response_of_another_store_is_not_checked() {
    for answer in ["names", "read"] {
        let mut player = populated(2);
        let mut page = whole(&player.store);
        page.header.cluster_id += 1;
        let next = if answer == "names" {
            player.machine.on_names(Ok(page), player.now)
        } else {
            let key = some_key(&player);
            let answer = Ok((page.header, None));
            player.machine.on_read(key, answer, player.now)
        };
        assert!(matches!(next, Command::List(_)), "{answer}: {next:?}");
        let page = whole(&player.store);
        player.machine.on_page(Ok(page));
        let next = player.machine.on_watch_opened(player.now);
        assert_eq!(next, Command::Receive, "{answer}");
    }
}

#[test]
fn the_watch_is_reopened_once_after_all_suspects_were_read() {
    let mut player = populated(2);
    player.change_unseen(|store| {
        store.put(&key("new1"), "10.9.9.9:1");
        store.put(&key("new2"), "10.9.9.9:2");
    });
    let mut now = suspects(&mut player);
    player.machine.on_time(now);
    for last in [false, true] {
        let Command::Read(key) = player.machine.on_time(now) else {
            panic!("a read is due")
        };
        let answer = player.store.value(&key);
        let next = player.machine.on_read(key, Ok(answer), now);
        assert_eq!(matches!(next, Command::Watch(_)), last, "{next:?}");
        now += READ_STEP;
    }
    let next = player.machine.on_watch_opened(now);
    assert!(matches!(next, Command::Check(_)), "{next:?}");
    let known = some_key(&player);
    let answer = player.store.value(&known);
    let next = player.machine.on_read(known, Ok(answer), now);
    assert_eq!(next, Command::Receive, "the watch is not opened again");
}

#[test]
fn a_read_is_not_sent_early_and_not_without_a_pause() {
    let mut player = populated(2);
    let mut keys = player.machine.keys.keys().cloned();
    let (one, other) = (
        keys.next().expect("the set has a key"),
        keys.next().expect("the set has a key"),
    );
    player.machine.on_refused_connection(&one, player.now);
    player.machine.on_refused_connection(&other, player.now);
    let due = player.machine.due().expect("a read is due");
    let before = due
        .checked_sub(Duration::from_millis(1))
        .expect("the time is later");
    assert_eq!(player.machine.on_time(before), Command::Receive);
    let now = player.now + Duration::from_secs(2);
    let Command::Read(first) = player.machine.on_time(now) else {
        panic!("a read is due")
    };
    let answer = player.store.value(&first);
    player.machine.on_read(first, Ok(answer), now);
    assert_eq!(player.machine.on_time(now), Command::Receive);
    assert_eq!(player.machine.due(), Some(now + READ_STEP));
}

#[test]
fn a_key_that_is_reported_again_within_ten_seconds_is_not_read_again() {
    for (millis, reads) in [(9_999, 0), (10_000, 1)] {
        let mut player = populated(2);
        let reported = some_key(&player);
        player.machine.on_refused_connection(&reported, player.now);
        player.machine.reconciler.reads.clear();
        let later = player.now + Duration::from_millis(millis);
        player.machine.on_refused_connection(&reported, later);
        assert_eq!(player.machine.reconciler.reads.len(), reads, "{millis}");
    }
}

#[test]
fn reports_of_many_keys_are_limited() {
    let (mut machine, store) = listed(300);
    let mut now = Instant::now();
    machine.on_watch_opened(now);
    let keys: Vec<_> = machine.keys.keys().cloned().collect();
    for keys in keys.chunks(100) {
        for key in keys {
            machine.on_refused_connection(key, now);
        }
        assert_eq!(machine.reconciler.reads.len(), 100);
        machine.on_refused_connection(&store.history[0].key().clone(), now);
        machine.on_refused_connection(&store.history[299].key().clone(), now);
        assert_eq!(machine.reconciler.reads.len(), 100, "the reads are limited");
        assert!(machine.reconciler.reported.len() <= 100, "so are the times");
        machine.reconciler.reads.clear();
        now += Duration::from_secs(10);
    }
}

#[test]
fn a_list_ends_every_doubt() {
    let mut player = populated(2);
    let (gone, reported) = (some_key(&player), player.machine.newest());
    player.change_unseen(|store| store.delete(&gone));
    let settled = suspects(&mut player);
    player.machine.on_time(settled);
    let reported = reported.expect("the set has a key");
    player.machine.on_refused_connection(&reported, settled);
    player.store.put(&key("new"), "10.9.9.9:1");
    player.machine.reconciler.compared_changes = 15;
    player.machine.reconciler.has_lost_event = true;
    let lost = player.machine.reconciler.suspects.is_empty();
    assert!(lost && !player.machine.reconciler.confirming.is_empty());
    for _ in 0..2 {
        let compacted = error(EtcdErrorKind::Compacted);
        player.machine.on_watch_ended(compacted, settled);
        player.machine.on_wake();
        let page = whole(&player.store);
        player.machine.on_page(Ok(page));
        player.machine.on_watch_opened(settled);
        let reconciler = &player.machine.reconciler;
        assert!(reconciler.reads.is_empty() && reconciler.confirming.is_empty());
        assert!(reconciler.suspects.is_empty() && reconciler.settle_at.is_none());
        assert!(!reconciler.has_lost_event);
        // The next reconciliation compares the changes since the list.
        let due = player.machine.due().expect("a reconciliation is due");
        let Command::Reconcile(request) = player.machine.on_time(due) else {
            panic!("no reconciliation is due")
        };
        assert_eq!(request.written_after.get(), player.store.revision);
        // The second list finds suspects that have not settled yet.
        all_names(&mut player, due);
        let mut page = whole(&player.store);
        page.kvs.remove(0);
        player.machine.on_names(Ok(page), due);
        assert!(player.machine.reconciler.settle_at.is_some());
    }
}
