//! Tests of messages and events of a watch, and of the waits after its end.

use super::*;

/// A machine whose watch is open and checked.
fn watching(seed: u64) -> Player {
    let mut player = populated(seed);
    let key = reopened(&mut player);
    let answer = player.store.read(&key);
    let next = player.machine.on_checked(Ok(answer), player.now);
    assert_eq!(next, Command::Receive);
    player
}

fn revision(player: &Player) -> i64 {
    player
        .machine
        .report
        .revision
        .expect("the prefix was listed")
        .get()
}

fn version(event: &Event) -> KeyVersion {
    let Event::Put(kv) = event else {
        panic!("a put")
    };
    kv.version()
}

/// Ends a watch that was open for `lives`, and returns the wait before the next watch.
fn wait_after(player: &mut Player, lives: Duration) -> Duration {
    player.machine.on_wake();
    player.machine.on_watch_opened(player.now);
    let ended = error(EtcdErrorKind::Unavailable);
    match player.machine.on_watch_ended(ended, player.now + lives) {
        Command::Wait(wait) => wait,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_waits_grow_until_a_watch_was_open_for_ten_seconds() {
    for (lives, healthy) in [(9_999, false), (10_000, true)] {
        let mut player = populated(2);
        let mut waits = Vec::new();
        for _ in 0..8 {
            waits.push(wait_after(&mut player, Duration::ZERO));
        }
        assert!(waits[7] > Duration::from_secs(1), "{waits:?}");
        let wait = wait_after(&mut player, Duration::from_millis(lives));
        assert_eq!(wait <= BACKOFF_FIRST, healthy, "{lives} ms: {wait:?}");
    }
}

#[test]
fn a_healthy_watch_is_not_fruitless_and_ends_the_count() {
    let mut player = populated(2);
    reopened(&mut player);
    let cut = EtcdErrorKind::Unavailable;
    for lives in [1, 1, 60, 1, 1] {
        let listed = is_followed_by_a_list(&mut player, 5_000, false, cut, lives);
        assert!(!listed, "after {lives} s");
    }
    assert!(is_followed_by_a_list(&mut player, 5_000, false, cut, 1));
}

#[test]
fn a_revision_that_the_store_does_not_have_is_listed() {
    for kind in [EtcdErrorKind::Compacted, EtcdErrorKind::FutureRevision] {
        let mut player = watching(2);
        player.machine.on_watch_ended(error(kind), player.now);
        let next = player.machine.on_wake();
        assert!(matches!(next, Command::List(_)), "{kind:?}: {next:?}");
    }
}

#[test]
fn nothing_is_due_while_no_watch_is_open() {
    let mut player = populated(2);
    assert!(player.machine.due().is_some());
    let ended = error(EtcdErrorKind::Unavailable);
    player.machine.on_watch_ended(ended, player.now);
    assert_eq!(player.machine.due(), None);
    player.machine.on_wake();
    assert_eq!(player.machine.due(), None, "the watch is not open yet");
    player.machine.on_watch_opened(player.now);
    assert!(player.machine.due().is_some());
}

/// A store without cluster ids, and a message without a revision, show nothing about the store.
#[test]
fn a_message_without_a_revision_or_a_cluster_causes_no_check() {
    let mut player = watching(2);
    let mut unknown = message(revision(&player), Vec::new(), false);
    unknown.header.cluster_id = 0;
    assert_eq!(player.machine.on_message(unknown), Command::Receive);
    let unknown = message(0, Vec::new(), false);
    assert_eq!(player.machine.on_message(unknown), Command::Receive);
}

#[test]
fn an_event_of_another_cluster_does_not_raise_the_known_revision() {
    let mut player = watching(2);
    let at = revision(&player);
    let event = put("foreign", at + 50);
    let mut foreign = message(at + 50, vec![event.clone()], false);
    foreign.header.cluster_id = 8;
    let next = player.machine.on_message(foreign);
    assert!(matches!(next, Command::Check(_)), "{next:?}");
    let header = message(at + 10, Vec::new(), false).header;
    let answer = Ok((header, Some(version(&event))));
    let next = player.machine.on_checked(answer, player.now);
    assert_eq!(next, Command::Receive, "the first cluster is used");
}

#[test]
fn a_message_does_not_lower_the_known_revision() {
    let mut player = populated(2);
    let at = revision(&player);
    let key = reopened(&mut player);
    let found = player.store.read(&key).1;
    let header = |ahead: i64| message(at + ahead, Vec::new(), false).header;
    let next = player
        .machine
        .on_checked(Ok((header(100), found)), player.now);
    assert_eq!(next, Command::Receive);
    let event = put("a", at + 5);
    player
        .machine
        .on_message(message(at + 100, vec![event.clone()], false));
    reopened(&mut player);
    let answer = Ok((header(50), Some(version(&event))));
    let next = player.machine.on_checked(answer, player.now);
    assert!(matches!(next, Command::List(_)), "{next:?}");
}

/// A later write shows that the store is the same only if it has the same lease, because another server can use the key.
#[test]
fn a_key_written_again_by_another_client_is_a_store_change() {
    for (before, after) in [(0, 0), (1, 2)] {
        let mut player = watching(2);
        let at = revision(&player);
        let lease = LeaseId::new(before);
        let Event::Put(kv) = put("a", at + 1) else {
            panic!("a put")
        };
        let event = Event::Put(KeyValue { lease, ..kv });
        player
            .machine
            .on_message(message(at + 1, vec![event.clone()], false));
        reopened(&mut player);
        let mut found = version(&event);
        found.mod_revision = Revision::new(at + 5);
        found.lease = LeaseId::new(after);
        let header = message(at + 9, Vec::new(), false).header;
        let next = player
            .machine
            .on_checked(Ok((header, Some(found))), player.now);
        assert!(matches!(next, Command::List(_)), "{before}: {next:?}");
    }
}

#[test]
fn a_message_ends_the_trouble_and_the_series_of_rejections() {
    let mut player = watching(2);
    for _ in 0..2 {
        let refused = error(EtcdErrorKind::InvalidToken);
        let next = player.machine.on_watch_ended(refused, player.now);
        assert!(matches!(next, Command::RenewToken(_)), "{next:?}");
        let trouble = player.machine.report.trouble.as_ref();
        let kind = trouble.map(EtcdError::kind);
        assert_eq!(kind, Some(EtcdErrorKind::InvalidToken));
        player.machine.on_token(Ok(()));
        player.machine.on_watch_opened(player.now);
        let at = revision(&player);
        player.machine.on_message(message(at, Vec::new(), false));
        assert!(player.machine.report.trouble.is_none());
    }
}

#[test]
fn a_failure_that_needs_an_operator_is_retried_within_half_a_minute() {
    for seed in 0..50 {
        let mut player = populated(seed);
        let wrong = error(EtcdErrorKind::BadCredentials);
        let Command::Wait(wait) = player.machine.on_token(Err(wrong)) else {
            panic!("a wait")
        };
        assert!(wait <= Duration::from_secs(30), "{wait:?}");
    }
}

/// etcd can divide the events of one revision among several messages.
#[test]
fn later_events_of_the_last_revision_are_applied() {
    let mut player = watching(2);
    let at = revision(&player);
    for name in ["a", "b"] {
        let event = put(name, at + 1);
        player
            .machine
            .on_message(message(at + 1, vec![event.clone()], false));
        assert_eq!(player.machine.take_update(), [event]);
    }
}

#[test]
fn events_older_than_a_read_change_nothing() {
    let mut player = watching(2);
    let at = revision(&player);
    let Event::Put(kv) = put("a", at + 5) else {
        panic!("a put")
    };
    let key = kv.key.clone();
    let header = message(at + 5, Vec::new(), false).header;
    player
        .machine
        .on_read(key.clone(), Ok((header, Some(kv))), player.now);
    assert_eq!(player.machine.take_update(), [put("a", at + 5)]);
    let deleted = |key: &Key, revision: i64| Event::Delete {
        key: key.clone(),
        mod_revision: Revision::new(revision),
    };
    let old = vec![put("a", at + 2), deleted(&key, at + 3)];
    player.machine.on_message(message(at + 5, old, false));
    assert_eq!(player.machine.take_update(), []);
    let unknown = Key::from(format!("{PREFIX}unknown").as_str());
    let unknown = vec![deleted(&unknown, at + 6)];
    player.machine.on_message(message(at + 6, unknown, false));
    assert_eq!(player.machine.take_update(), [], "the key is not known");
}

/// The message contains the put, which is older than the read, and events that are later than the read.
#[test]
fn a_put_older_than_a_read_is_dropped_although_later_events_follow_it() {
    let mut player = watching(2);
    let at = revision(&player);
    let key = player.machine.newest().expect("the set has a key");
    let header = message(at + 2, Vec::new(), false).header;
    player
        .machine
        .on_read(key.clone(), Ok((header, None)), player.now);
    player.machine.take_update();
    let Event::Put(kv) = put("a", at + 1) else {
        panic!("a put")
    };
    let old = Event::Put(KeyValue { key, ..kv });
    let later = put("later", at + 5);
    let events = vec![old, later.clone()];
    player.machine.on_message(message(at + 5, events, false));
    assert_eq!(player.machine.take_update(), [later]);
    assert!(player.machine.tombstones.is_empty());
}

#[test]
fn a_deletion_that_was_read_hides_older_puts_until_the_watch_has_reached_it() {
    let mut player = watching(2);
    let at = revision(&player);
    let key = player.machine.newest().expect("the set has a key");
    let header = message(at + 5, Vec::new(), false).header;
    player
        .machine
        .on_read(key.clone(), Ok((header, None)), player.now);
    player.machine.take_update();
    let Event::Put(kv) = put("a", at + 3) else {
        panic!("a put")
    };
    let old = Event::Put(KeyValue { key, ..kv });
    let earlier = put("earlier", at + 1);
    for event in [earlier.clone(), old] {
        let event = message(at + 5, vec![event], false);
        player.machine.on_message(event);
    }
    assert_eq!(player.machine.take_update(), [earlier]);
}
