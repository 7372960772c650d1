//! Tests of lists: the size of the pages, the key that is checked, and what a failed list keeps.

use super::*;

fn machine(seed: u64) -> Machine {
    Machine::new(
        Range::prefix(PREFIX),
        None,
        slots(),
        fastrand::Rng::with_seed(seed),
    )
}

fn kv(name: &str, revision: i64) -> KeyValue {
    let Event::Put(kv) = put(name, revision) else {
        panic!("a put")
    };
    kv
}

fn page(revision: i64, kvs: Vec<KeyValue>, more: bool) -> Page {
    Page {
        header: message(revision, Vec::new(), false).header,
        count: kvs.len(),
        kvs,
        more,
    }
}

fn list(command: Command) -> ListRequest {
    let Command::List(request) = command else {
        panic!("no list is requested: {command:?}")
    };
    request
}

#[test]
fn pages_grow_again_after_a_page_was_received() {
    let mut machine = machine(40);
    machine.on_wake();
    for _ in 0..3 {
        machine.on_page(Err(error(EtcdErrorKind::ResponseTooLarge)));
    }
    let mut limits = Vec::new();
    for number in 0..5 {
        let some = kv(&format!("{number}"), 1);
        limits.push(list(machine.on_page(Ok(page(9, vec![some], true)))).limit);
    }
    assert_eq!(limits, [124, 248, 496, 500, 500]);
}

#[test]
fn only_a_timeout_limits_the_size_of_pages_until_the_list_is_complete() {
    let mut machine = machine(41);
    machine.on_wake();
    machine.on_page(Err(error(EtcdErrorKind::Unavailable)));
    assert_eq!(list(machine.on_wake()).limit, 500);
    machine.on_page(Err(error(EtcdErrorKind::DeadlineExceeded)));
    assert_eq!(list(machine.on_wake()).limit, 250);
    let next = machine.on_page(Ok(page(9, vec![kv("a", 1)], true)));
    assert_eq!(list(next).limit, 250, "the pages do not grow again");
    machine.on_page(Ok(page(9, vec![kv("b", 1)], false)));
    machine.on_watch_ended(error(EtcdErrorKind::Compacted), Instant::now());
    machine.on_wake();
    let next = machine.on_page(Ok(page(9, vec![kv("a", 1)], true)));
    assert_eq!(list(next).limit, 500, "the next list starts afresh");
}

#[test]
fn a_list_ends_with_a_page_without_keys() {
    let mut machine = machine(42);
    machine.on_wake();
    let next = machine.on_page(Ok(page(9, Vec::new(), true)));
    assert_eq!(next, Command::Watch(Revision::new(9)));
}

/// If the store is wiped between two pages, the keys of the second page are from the new store.
#[test]
fn the_newest_key_of_the_first_page_is_checked() {
    let mut machine = machine(43);
    machine.on_wake();
    machine.on_page(Ok(page(9, vec![kv("a", 8), kv("b", 3)], true)));
    machine.on_page(Ok(page(20, vec![kv("c", 15)], false)));
    let next = machine.on_watch_opened(Instant::now());
    assert_eq!(next, Command::Check(kv("a", 8).key));
}

#[test]
fn a_list_that_fails_starts_again_with_the_first_page() {
    for kind in [
        EtcdErrorKind::Compacted,
        EtcdErrorKind::FutureRevision,
        EtcdErrorKind::DeadlineExceeded,
        EtcdErrorKind::Unavailable,
    ] {
        let mut machine = machine(44);
        let first = list(machine.on_wake());
        let next = list(machine.on_page(Ok(page(9, vec![kv("gone", 1)], true))));
        assert_ne!(next.range.start, first.range.start);
        let wait = machine.on_page(Err(error(kind)));
        assert!(matches!(wait, Command::Wait(_)), "{kind:?}: {wait:?}");
        let again = list(machine.on_wake());
        assert_eq!(again.range.start, first.range.start, "{kind:?}");
        assert_eq!(again.revision, Revision::ZERO, "{kind:?}");
        machine.on_page(Ok(page(12, vec![kv("a", 1)], false)));
        assert_eq!(machine.take_update(), [put("a", 1)], "{kind:?}");
    }
}

#[test]
fn a_list_that_fails_keeps_its_cause() {
    for kind in [EtcdErrorKind::Compacted, EtcdErrorKind::Unavailable] {
        let mut player = populated(2);
        let revision = player.store.revision;
        let too_large = error(EtcdErrorKind::ResponseTooLarge);
        player.machine.on_watch_ended(too_large, player.now);
        player.machine.on_wake();
        player.machine.on_page(Err(error(kind)));
        player.machine.on_wake();
        let next = player
            .machine
            .on_page(Ok(page(revision, Vec::new(), false)));
        let after = Command::Watch(Revision::new(revision + 1));
        assert_eq!(next, after, "{kind:?}: the event is not delivered again");

        let mut player = populated(2);
        let key = reopened(&mut player);
        let (header, _) = player.store.read(&key);
        player.machine.on_checked(Ok((header, None)), player.now);
        player.machine.on_page(Err(error(kind)));
        player.machine.on_wake();
        let listed = page(revision, vec![kv("a", 1)], false);
        player.machine.on_page(Ok(listed));
        let next = player.machine.on_watch_opened(player.now);
        assert_eq!(next, Command::Receive, "{kind:?}: one list is enough");
    }
}

#[test]
fn the_watch_after_the_list_of_an_empty_set_is_checked() {
    let mut player = Player::new(3);
    listed(&mut player);
    let ended = error(EtcdErrorKind::Unavailable);
    player.machine.on_watch_ended(ended, player.now);
    player.machine.on_wake();
    player.machine.on_page(Ok(page(9, vec![kv("a", 8)], false)));
    let next = player.machine.on_watch_opened(player.now);
    assert_eq!(next, Command::Check(kv("a", 8).key));
}

#[test]
fn keys_that_a_list_does_not_contain_are_deleted() {
    let mut machine = machine(45);
    machine.on_wake();
    machine.on_page(Ok(page(9, vec![kv("a", 8), kv("b", 3)], false)));
    machine.take_update();
    machine.on_watch_ended(error(EtcdErrorKind::Compacted), Instant::now());
    machine.on_wake();
    machine.on_page(Ok(page(20, vec![kv("a", 8)], false)));
    let deleted = Event::Delete {
        key: kv("b", 3).key,
        mod_revision: Revision::new(20),
    };
    assert_eq!(machine.take_update(), [put("a", 8), deleted]);
}

/// The revisions of a store that was wiped start again, and are lower than those of the deletions that were read in the old store.
#[test]
fn deletions_that_were_read_before_a_list_do_not_hide_later_writes() {
    let mut player = populated(2);
    let key = player.machine.newest().expect("the set has a key");
    let header = player.store.header();
    player
        .machine
        .on_read(key.clone(), Ok((header, None)), player.now);
    let compacted = error(EtcdErrorKind::Compacted);
    player.machine.on_watch_ended(compacted, player.now);
    player.machine.on_wake();
    player.machine.on_page(Ok(page(2, Vec::new(), false)));
    player.machine.take_update();
    let again = Event::Put(KeyValue {
        key,
        ..kv("again", 3)
    });
    player
        .machine
        .on_message(message(3, vec![again.clone()], false));
    assert_eq!(player.machine.take_update(), [again]);
}

#[test]
fn a_complete_list_is_reported_and_ends_the_trouble() {
    let mut machine = machine(46);
    machine.on_wake();
    machine.on_page(Err(error(EtcdErrorKind::Unavailable)));
    machine.on_wake();
    assert!(!machine.report.listed && machine.report.trouble.is_some());
    assert_eq!(machine.report.revision, None);
    machine.on_page(Ok(page(9, vec![kv("a", 8)], false)));
    assert!(machine.report.listed && machine.report.trouble.is_none());
    assert_eq!(machine.report.revision, Some(Revision::new(9)));
}

#[test]
fn only_a_key_that_was_listed_with_its_value_can_be_compared() {
    let mut machine = machine(47);
    let mut next = machine.on_wake();
    while !list(next).keys_only {
        next = machine.on_page(Err(error(EtcdErrorKind::ResponseTooLarge)));
    }
    machine.on_page(Ok(page(9, vec![kv("large", 8)], true)));
    let small = KeyValue {
        key: kv("small", 8).key,
        ..kv("large", 8)
    };
    machine.on_page(Ok(page(9, vec![small.clone()], false)));
    assert!(machine.knows_value(&small.key));
    assert!(!machine.knows_value(&kv("large", 8).key));
    assert!(!machine.knows_value(&kv("unknown", 8).key));
}
