//! Runs the [`Machine`] against a simulated store. The store changes, compacts its history, lags, cuts streams at any point, splits
//! revisions into fragments, and is wiped. After any random order of these steps, the set must match the content of the store.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use proptest::prelude::{ProptestConfig, any, proptest};

use tokio::time::Instant;

use super::super::instances::Instances;
use super::listing::PAGE_CAP_MIN;
use super::machine::BACKOFF_FIRST;
use super::resume_or_relist::OPERATOR_WAIT;
use super::state::{FruitlessWatches, State};
use super::*;
use crate::error::{EtcdError, EtcdErrorKind};
use crate::format::Decoder;
use crate::keyspace::{
    Event, Header, Key, KeyValue, KeyVersion, LeaseId, ListRequest, Page, Range, Revision,
    WatchMessage,
};
use crate::slots::Slots;

mod lists;
mod reconcile;
mod table;
mod watches;

const PREFIX: &str = "/gRPC/greeter/";
const RECONCILE: Duration = Duration::from_secs(60);

/// A simulated etcd store. It keeps its whole history, including the compacted part.
#[derive(Debug)]
struct Store {
    rng: fastrand::Rng,
    history: Vec<Event>,
    revision: i64,
    compacted: i64,
    term: u64,
    /// Whether the watches of the store lose events.
    has_lost_event: bool,
    /// Whether every list succeeds and returns pages as large as requested.
    steady: bool,
}

impl Store {
    fn new(rng: fastrand::Rng) -> Self {
        Self {
            rng,
            history: Vec::new(),
            revision: 1,
            compacted: 0,
            term: 2,
            has_lost_event: false,
            steady: false,
        }
    }

    fn header(&self) -> Header {
        Header {
            cluster_id: 7,
            revision: Revision::new(self.revision),
            raft_term: self.term,
        }
    }

    /// Returns the keys as of a revision.
    fn at(&self, revision: i64) -> BTreeMap<Key, KeyValue> {
        let mut keys = BTreeMap::new();
        for event in &self.history {
            if event.mod_revision().get() > revision {
                break;
            }
            match event {
                Event::Put(kv) => keys.insert(kv.key.clone(), kv.clone()),
                Event::Delete { key, .. } => keys.remove(key),
            };
        }
        keys
    }

    /// Applies one random transaction of puts and deletes.
    fn change(&mut self) {
        let now = self.at(self.revision);
        self.revision += 1;
        let revision = Revision::new(self.revision);
        for number in (0..60).filter(|_| self.rng.u8(..) < 12).collect::<Vec<_>>() {
            let key = Key::from(format!("{PREFIX}{number:02}").as_str());
            if now.contains_key(&key) && self.rng.u8(..) < 100 {
                self.history.push(Event::Delete {
                    key,
                    mod_revision: revision,
                });
                continue;
            }
            let value = match self.rng.u8(..) {
                0..20 => "garbage".to_owned(),
                host => format!("10.0.{}.{}:80", number % 50, host % 4),
            };
            self.history.push(Event::Put(KeyValue {
                create_revision: now.get(&key).map_or(revision, |kv| kv.create_revision),
                key,
                value: value.into_bytes(),
                mod_revision: revision,
                lease: LeaseId::random(&mut self.rng),
            }));
        }
    }

    fn compact(&mut self) {
        self.compacted = self.rng.i64(self.compacted..=self.revision);
    }

    /// Restarts the store with an empty history and the same cluster id, and applies random changes. The new revision is often higher than
    /// the old one.
    fn wipe(&mut self) {
        self.history.clear();
        self.revision = 1;
        self.compacted = 0;
        for _ in 0..self.rng.u8(..60) {
            self.change();
        }
    }

    fn list(&mut self, request: &ListRequest) -> Result<Page, EtcdError> {
        let revision = match request.revision.get() {
            0 => self.revision,
            pinned if pinned < self.compacted => return Err(error(EtcdErrorKind::Compacted)),
            pinned if pinned > self.revision => {
                return Err(error(EtcdErrorKind::FutureRevision));
            }
            pinned => pinned,
        };
        match self.rng.u8(..) {
            _ if self.steady => {}
            0..20 => return Err(error(EtcdErrorKind::Unavailable)),
            20..40 if request.limit > 1 => return Err(error(EtcdErrorKind::ResponseTooLarge)),
            _ => {}
        }
        // A server may return fewer keys than requested, for example because of its own smaller limit.
        let mut limit = usize::try_from(request.limit).expect("the limit is positive");
        if !self.steady && request.written_after == Revision::ZERO {
            limit = limit.min(self.rng.usize(1..20));
        }
        let mut keys = self.at(revision);
        let range = request.range.start.clone()..request.range.end.clone();
        let count = keys.range(range).count();
        keys.retain(|_, kv| kv.mod_revision > request.written_after);
        let mut rest = keys.range(request.range.start.clone()..request.range.end.clone());
        let kvs: Vec<_> = rest
            .by_ref()
            .take(limit)
            .map(|(_, kv)| kv.clone())
            .collect();
        Ok(Page {
            header: self.header(),
            kvs,
            more: rest.next().is_some(),
            count,
        })
    }

    fn value(&self, key: &Key) -> (Header, Option<KeyValue>) {
        (self.header(), self.at(self.revision).get(key).cloned())
    }

    fn read(&self, key: &Key) -> (Header, Option<KeyVersion>) {
        (
            self.header(),
            self.at(self.revision).get(key).map(KeyValue::version),
        )
    }

    /// Returns the messages of a watch that starts at a revision.
    fn watch(&mut self, from: i64) -> VecDeque<Result<WatchMessage, EtcdErrorKind>> {
        let lag = i64::from(self.rng.u8(..3));
        let mut header = self.header();
        header.revision = Revision::new((self.revision - lag).max(1));
        let mut messages = VecDeque::from([Ok(WatchMessage {
            header,
            created: true,
            ..WatchMessage::default()
        })]);
        if from < self.compacted {
            messages.push_back(Err(EtcdErrorKind::Compacted));
            return messages;
        }
        // A lagging member delivers events from before the requested revision again.
        let from = from - i64::from(self.rng.u8(..3)).min(from);
        let mut events: Vec<_> = self
            .history
            .iter()
            .filter(|event| event.mod_revision().get() >= from)
            .cloned()
            .collect();
        if self.has_lost_event {
            events.retain(|_| self.rng.u8(..) > 25);
        }
        let mut events = &events[..];
        while !events.is_empty() {
            let (batch, rest) = events.split_at(self.rng.usize(1..=events.len().min(30)));
            let cut = rest.first().is_some_and(|next| {
                batch.last().map(Event::mod_revision) == Some(next.mod_revision())
            });
            messages.push_back(Ok(WatchMessage {
                header: self.header(),
                events: batch.to_vec(),
                fragment: cut,
                ..WatchMessage::default()
            }));
            events = rest;
        }
        messages
    }
}

fn error(kind: EtcdErrorKind) -> EtcdError {
    EtcdError::new(kind, "test", "127.0.0.1:1", "scripted")
}

/// The machine, the simulated store, and the set that results from the machine's updates.
struct Player {
    store: Store,
    machine: Machine,
    snapshot: Instances,
    stream: VecDeque<Result<WatchMessage, EtcdErrorKind>>,
    /// Revision up to which the current stream contains every event.
    sent: i64,
    now: Instant,
    command: Command,
    /// Whether the server was restarted. If so, the next request or watch fails.
    restarted: bool,
    /// Revision of the last change of each key, for tests in which this revision must never decrease. `None` in other tests.
    facts: Option<BTreeMap<Key, Revision>>,
}

impl Player {
    fn new(seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut machine = Machine::new(Range::prefix(PREFIX), Some(RECONCILE), slots(), rng.fork());
        let command = machine.on_wake();
        Self {
            store: Store::new(rng),
            machine,
            snapshot: Instances::default(),
            stream: VecDeque::new(),
            sent: 0,
            now: Instant::now(),
            command,
            restarted: false,
            facts: None,
        }
    }

    /// Executes one command. With `faults`, any request or watch may fail.
    fn step(&mut self, faults: bool) {
        let waiting = matches!(self.command, Command::Wait(_) | Command::RenewToken(_));
        let restarted = !waiting && std::mem::take(&mut self.restarted);
        // These commands keep the watch open. After a restart, both the request and the watch must fail.
        self.restarted |=
            restarted && matches!(self.command, Command::Reconcile(_) | Command::Read(_));
        let fault = restarted || faults && self.store.rng.u8(..) < 25;
        self.now += Duration::from_millis(self.store.rng.u64(..2_000));
        if faults && self.store.rng.u8(..) < 10 {
            let key = format!("{PREFIX}{:02}", self.store.rng.u8(..60));
            self.machine
                .on_refused_connection(&Key::from(key.as_str()), self.now);
        }
        let machine = &mut self.machine;
        self.command = match &self.command {
            Command::List(request) => {
                let mut page = self.store.list(request);
                if fault {
                    page = Err(error(EtcdErrorKind::DeadlineExceeded));
                }
                machine.on_page(page)
            }
            Command::Watch(_) if fault => {
                machine.on_watch_ended(error(EtcdErrorKind::NoLeader), self.now)
            }
            Command::Watch(revision) => {
                self.stream = self.store.watch(revision.get());
                self.sent = self.store.revision;
                machine.on_watch_opened(self.now)
            }
            Command::Receive if fault => {
                machine.on_watch_ended(error(EtcdErrorKind::Unavailable), self.now)
            }
            Command::Receive if machine.due().is_some_and(|due| due <= self.now) => {
                machine.on_time(self.now)
            }
            Command::Receive => match self.stream.pop_front() {
                Some(Ok(message)) => machine.on_message(message),
                Some(Err(kind)) => machine.on_watch_ended(error(kind), self.now),
                None if self.sent < self.store.revision => {
                    let more = self.store.watch(self.sent + 1);
                    self.stream.extend(more.into_iter().skip(1));
                    self.sent = self.store.revision;
                    Command::Receive
                }
                None => Command::Receive,
            },
            Command::Check(_) if fault => {
                machine.on_checked(Err(error(EtcdErrorKind::Unavailable)), self.now)
            }
            Command::Check(key) => machine.on_checked(Ok(self.store.read(key)), self.now),
            Command::Reconcile(request) => {
                let page = if fault {
                    Err(error(EtcdErrorKind::Unavailable))
                } else {
                    self.store.list(request)
                };
                machine.on_names(page, self.now)
            }
            Command::Read(key) if fault => machine.on_read(
                key.clone(),
                Err(error(EtcdErrorKind::Unavailable)),
                self.now,
            ),
            Command::Read(key) => machine.on_read(key.clone(), Ok(self.store.value(key)), self.now),
            Command::RenewToken(wait) | Command::Wait(wait) => {
                assert!(*wait >= BACKOFF_FIRST / 2, "the wait {wait:?} is too short");
                self.now += *wait;
                match self.command {
                    Command::RenewToken(_) => {
                        let unavailable = || error(EtcdErrorKind::Unavailable);
                        machine.on_token(if fault { Err(unavailable()) } else { Ok(()) })
                    }
                    _ => machine.on_wake(),
                }
            }
        };
        let before = self.snapshot.len();
        let update = self.machine.take_update();
        if let Some(facts) = &mut self.facts {
            for event in &update {
                let (key, revision) = match event {
                    Event::Put(kv) => (&kv.key, kv.mod_revision),
                    Event::Delete { key, mod_revision } => (key, *mod_revision),
                };
                let before = facts.insert(key.clone(), revision);
                assert!(
                    before <= Some(revision),
                    "{key} reverts to an older revision: {before:?}, {event:?}"
                );
            }
        }
        let silent = update.is_empty();
        self.snapshot
            .apply(update, self.machine.range(), &Decoder::default());
        assert!(
            !silent || self.snapshot.len() == before,
            "the set must not change without an update"
        );
    }

    fn is_idle(&self) -> bool {
        self.command == Command::Receive
            && self.stream.is_empty()
            && self.sent == self.store.revision
    }

    /// Runs the machine until it is idle. Then checks that the set contains no deleted key, and that it contains the current value of each
    /// key if this value is good (can be decoded). If the current value is bad, the value in the set is not checked: the machine may have
    /// missed the last good value, because a bad one replaced it before the machine listed the key.
    fn check(&mut self) {
        for _ in 0..10_000 {
            if self.is_idle() {
                break;
            }
            self.step(false);
        }
        assert!(
            self.is_idle(),
            "the machine does not become idle: {:?}",
            self.command
        );
        let decoder = Decoder::default();
        let listed = self.store.at(self.store.revision);
        let good: BTreeMap<_, _> = listed
            .iter()
            .filter_map(|(key, kv)| Some((key.clone(), decoder.decode(&kv.value).ok()?.address)))
            .collect();
        for address in good.values() {
            assert!(self.snapshot.get(address).is_some(), "{address} is missing");
        }
        for instance in self.snapshot.instances() {
            let key = Key::from(instance.location().expect("a location").key());
            assert!(listed.contains_key(&key), "{key} must be deleted");
            if let Some(address) = good.get(&key) {
                assert_eq!(instance.address(), address, "{key} has an old value");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn the_set_matches_the_store_after_any_faults(seed in any::<u64>()) {
        let mut player = Player::new(seed);
        for _ in 0..200 {
            match player.store.rng.u8(..) {
                0..90 => player.store.change(),
                90..94 => player.store.compact(),
                94..96 => player.store.term += 1,
                96 => {
                    // A wiped server is also a restarted server, so every request and watch in progress fails.
                    player.store.wipe();
                    player.restarted = true;
                }
                _ => player.step(true),
            }
            player.step(true);
        }
        player.check();
    }
}

/// Runs the machine until it is idle.
fn listed(player: &mut Player) {
    for _ in 0..1_000 {
        if player.is_idle() {
            return;
        }
        player.step(false);
    }
    panic!("the machine does not become idle");
}

fn populated(seed: u64) -> Player {
    let mut player = Player::new(seed);
    for _ in 0..10 {
        player.store.change();
    }
    listed(&mut player);
    assert!(player.snapshot.len() > 0);
    player
}

fn put(key: &str, revision: i64) -> Event {
    Event::Put(KeyValue {
        key: Key::from(format!("{PREFIX}{key}").as_str()),
        value: b"10.9.9.9:80".to_vec(),
        create_revision: Revision::new(revision),
        mod_revision: Revision::new(revision),
        lease: LeaseId::new(1),
    })
}

fn message(revision: i64, events: Vec<Event>, fragment: bool) -> WatchMessage {
    let header = Header {
        cluster_id: 7,
        revision: Revision::new(revision),
        raft_term: 2,
    };
    WatchMessage {
        header,
        events,
        fragment,
        ..WatchMessage::default()
    }
}

/// Ends the watch and opens it again. Returns the key that the machine then checks.
fn reopened(player: &mut Player) -> Key {
    let revision = player.machine.report.revision.unwrap();
    let wait = player
        .machine
        .on_watch_ended(error(EtcdErrorKind::Unavailable), player.now);
    assert!(matches!(wait, Command::Wait(_)));
    assert!(
        player.machine.report.trouble.is_some(),
        "the report must contain the error"
    );
    assert_eq!(player.machine.on_wake(), Command::Watch(revision));
    match player.machine.on_watch_opened(player.now) {
        Command::Check(key) => key,
        other => panic!("a new watch must start with a check, not {other:?}"),
    }
}

#[test]
fn a_watch_that_ends_is_resumed_without_a_list() {
    let mut player = populated(1);
    let lists = player.machine.report.lists;
    let key = reopened(&mut player);
    let answer = player.store.read(&key);
    assert_eq!(
        player.machine.on_checked(Ok(answer), player.now),
        Command::Receive
    );
    assert_eq!(player.machine.report.lists, lists);
}

#[test]
fn a_store_with_another_history_is_listed_again() {
    for damage in [
        "revision",
        "term",
        "cluster",
        "gone",
        "lease",
        "mod revision",
        "create revision",
        "value",
    ] {
        let mut player = populated(2);
        let key = reopened(&mut player);
        let (mut header, found) = player.store.read(&key);
        let mut found = found.expect("the key exists");
        match damage {
            "revision" => header.revision = Revision::new(header.revision.get() - 1),
            "term" => header.raft_term -= 1,
            "cluster" => header.cluster_id += 1,
            "lease" => found.lease = LeaseId::new(1),
            "mod revision" => found.mod_revision = Revision::new(1),
            "create revision" => found.create_revision = Revision::new(1),
            "value" => found.digest = found.digest.map(|digest| digest ^ 1),
            _ => {}
        }
        let answer = (header, (damage != "gone").then_some(found));
        let next = player.machine.on_checked(Ok(answer), player.now);
        assert!(matches!(next, Command::List(_)), "{damage}: {next:?}");
    }
}

/// The revision of the restored store is higher than that of the last read, and lower than that of the last event of the watch.
#[test]
fn a_store_restored_to_a_revision_before_the_last_event_is_listed_again() {
    let mut player = populated(2);
    let seen = player.machine.last_header.revision.get();
    let brought = put("later", seen + 50);
    player
        .machine
        .on_message(message(seen + 50, vec![brought], false));
    let gone = Event::Delete {
        key: Key::from(format!("{PREFIX}later").as_str()),
        mod_revision: Revision::new(seen + 60),
    };
    player
        .machine
        .on_message(message(seen + 60, vec![gone], false));
    let key = reopened(&mut player);
    // The key written last is unchanged.
    let (mut header, found) = player.store.read(&key);
    header.revision = Revision::new(seen + 30);
    let next = player.machine.on_checked(Ok((header, found)), player.now);
    assert!(matches!(next, Command::List(_)), "{next:?}");
}

/// A server that ends each watch after one message must cause neither a busy loop nor long waits.
#[test]
fn a_watch_closed_after_each_message_is_reopened_within_a_second() {
    let mut player = populated(2);
    for _ in 0..10 {
        reopened(&mut player);
    }
    let mut waits = Vec::new();
    for _ in 0..20 {
        let next = player.machine.report.revision.unwrap().get() + 1;
        let event = put("again", next);
        player.machine.on_message(message(next, vec![event], false));
        let ended = error(EtcdErrorKind::Unavailable);
        let Command::Wait(wait) = player.machine.on_watch_ended(ended, player.now) else {
            panic!("the end of a watch must cause a wait")
        };
        waits.push(wait);
        player.machine.on_wake();
        player.machine.on_watch_opened(player.now);
    }
    let within = BACKOFF_FIRST / 2..=Duration::from_secs(1);
    assert!(waits.iter().all(|wait| within.contains(wait)), "{waits:?}");
}

/// Runs one watch of a store that is `ahead` revisions ahead of R, the revision at which the watch was opened. If `brings` is true, the
/// watch delivers an event. The watch ends with the error `end` after `lives` seconds. Returns whether the machine then requests a list.
fn is_followed_by_a_list(
    player: &mut Player,
    ahead: i64,
    brings: bool,
    end: EtcdErrorKind,
    lives: u64,
) -> bool {
    let revision = player.machine.report.revision.unwrap().get();
    player.machine.on_watch_opened(player.now);
    player
        .machine
        .on_message(message(revision + ahead, vec![], false));
    if brings {
        let event = put("some", revision + 1);
        let some = message(revision + ahead, vec![event], false);
        player.machine.on_message(some);
    }
    let then = player.now + Duration::from_secs(lives);
    let wait = player.machine.on_watch_ended(error(end), then);
    assert!(matches!(wait, Command::Wait(_)), "{wait:?}");
    matches!(player.machine.on_wake(), Command::List(_))
}

/// If a watch could not deliver a backlog in time, a further watch would probably not deliver it in time either.
#[test]
fn a_watch_without_progress_on_a_backlog_is_replaced_by_a_list() {
    let silent = EtcdErrorKind::DeadlineExceeded;
    for (ahead, brings, lives, lists) in [
        (5_000, false, 8, true),
        (0, false, 8, false),
        (5_000, true, 8, false),
        (5_000, false, 60, false),
    ] {
        let mut player = populated(2);
        reopened(&mut player);
        let mut once = || is_followed_by_a_list(&mut player, ahead, brings, silent, lives);
        assert!(!once(), "one such watch must not cause a list");
        assert_eq!(once(), lists, "{:?}", (ahead, brings, lives));
    }
    // If three watches in a row are cut before they deliver anything, the third one causes a list.
    let cut = EtcdErrorKind::Unavailable;
    let mut player = populated(2);
    reopened(&mut player);
    for (brings, lists) in [
        (false, false),
        (false, false),
        (true, false),
        (false, false),
        (false, false),
        (false, true),
    ] {
        let listed = is_followed_by_a_list(&mut player, 5_000, brings, cut, 1);
        assert_eq!(listed, lists);
    }
}

/// A fruitless watch delivers nothing although the store is at a higher revision. Possibly, the revision is higher only because of writes
/// to keys outside the prefix, and all watches are cut early. The lists must then become less frequent.
#[test]
fn lists_after_fruitless_watches_become_less_frequent() {
    let mut fruitless = FruitlessWatches::default();
    let mut lists = Vec::new();
    for _ in 0..6 {
        let mut watches = 1;
        while !fruitless.must_list(false) {
            watches += 1;
        }
        lists.push(watches);
    }
    assert_eq!(lists, [3, 6, 12, 24, 48, 48]);
}

#[test]
fn the_key_written_last_is_checked() {
    let mut player = populated(2);
    let newest = player.machine.keys.iter();
    let newest = newest.max_by_key(|(_, known)| known.mod_revision);
    let newest = newest.map(|(key, _)| key.clone());
    assert!(player.machine.keys.len() > 1);
    assert_eq!(Some(reopened(&mut player)), newest);
}

#[test]
fn every_linearizable_response_raises_the_known_revision() {
    let header = |player: &Player, ahead: i64| Header {
        revision: Revision::new(player.store.revision + ahead),
        ..player.store.header()
    };
    for answer in ["check", "names", "read"] {
        let mut player = populated(2);
        let ahead = header(&player, 100);
        let key = reopened(&mut player);
        let found = player.store.value(&key).1;
        let checked = |found: &Option<KeyValue>| found.as_ref().map(KeyValue::version);
        let first = match answer {
            "check" => player
                .machine
                .on_checked(Ok((ahead, checked(&found))), player.now),
            "names" => {
                let kvs = player.store.at(player.store.revision).into_values();
                let kvs: Vec<_> = kvs.collect();
                let page = Page {
                    header: ahead,
                    count: kvs.len(),
                    kvs,
                    more: false,
                };
                player.machine.on_names(Ok(page), player.now)
            }
            _ => player
                .machine
                .on_read(key, Ok((ahead, found.clone())), player.now),
        };
        assert_eq!(first, Command::Receive, "{answer}");
        reopened(&mut player);
        let behind = header(&player, 99);
        let next = player
            .machine
            .on_checked(Ok((behind, checked(&found))), player.now);
        assert!(
            matches!(next, Command::List(_)),
            "a lower revision after a {answer} must cause a list, not {next:?}"
        );
    }
}

#[test]
fn after_a_failed_check_and_a_list_the_next_watch_is_not_checked() {
    let mut player = populated(2);
    let key = reopened(&mut player);
    let (header, _) = player.store.read(&key);
    let mut command = player.machine.on_checked(Ok((header, None)), player.now);
    while let Command::List(request) = &command {
        let page = loop {
            if let Ok(page) = player.store.list(request) {
                break page;
            }
        };
        command = player.machine.on_page(Ok(page));
    }
    assert!(matches!(command, Command::Watch(_)));
    let next = player.machine.on_watch_opened(player.now);
    assert_eq!(next, Command::Receive, "the watch must not be checked");
}

#[test]
fn a_key_written_again_under_its_lease_passes_the_check() {
    let mut player = populated(2);
    let key = reopened(&mut player);
    let (header, found) = player.store.read(&key);
    let mut found = found.expect("the key exists");
    found.mod_revision = Revision::new(header.revision.get() + 5);
    assert_eq!(
        player
            .machine
            .on_checked(Ok((header, Some(found))), player.now),
        Command::Receive
    );
}

#[test]
fn a_watch_that_cannot_be_checked_is_reopened_and_checked_again() {
    let mut player = populated(2);
    reopened(&mut player);
    let next = player
        .machine
        .on_checked(Err(error(EtcdErrorKind::Unavailable)), player.now);
    assert!(matches!(next, Command::Wait(_)), "{next:?}");
    let again = player.machine.on_wake();
    assert!(matches!(again, Command::Watch(_)), "{again:?}");
    assert!(matches!(
        player.machine.on_watch_opened(player.now),
        Command::Check(_)
    ));
}

#[test]
fn an_empty_set_is_listed_again_when_its_watch_ends() {
    let mut player = Player::new(3);
    listed(&mut player);
    player
        .machine
        .on_watch_ended(error(EtcdErrorKind::Unavailable), player.now);
    assert!(matches!(player.machine.on_wake(), Command::List(_)));
}

#[test]
fn a_watch_header_does_not_advance_the_revision() {
    let mut player = populated(4);
    let revision = player.machine.report.revision.unwrap().get();
    player
        .machine
        .on_message(message(revision + 1_000, Vec::new(), false));
    assert_eq!(player.machine.report.revision.unwrap().get(), revision);
    player.machine.on_message(message(
        revision + 1_000,
        vec![put("a", revision + 5)],
        false,
    ));
    assert_eq!(player.machine.report.revision.unwrap().get(), revision + 5);
}

#[test]
fn a_fragmented_revision_is_applied_atomically() {
    let mut player = populated(5);
    let revision = player.machine.report.revision.unwrap().get();
    let events = vec![put("a", revision + 1), put("b", revision + 2)];
    player
        .machine
        .on_message(message(revision + 2, events, true));
    assert_eq!(
        player.machine.take_update(),
        [put("a", revision + 1)],
        "the second revision is not complete, so its event must wait"
    );
    player
        .machine
        .on_watch_ended(error(EtcdErrorKind::Unavailable), player.now);
    assert_eq!(
        player.machine.report.revision.unwrap().get(),
        revision + 1,
        "the next watch must start before the incomplete revision"
    );

    let mut player = populated(5);
    player
        .machine
        .on_message(message(revision + 2, vec![put("b", revision + 2)], true));
    assert!(player.machine.take_update().is_empty());
    player
        .machine
        .on_message(message(revision + 2, vec![put("c", revision + 2)], false));
    assert_eq!(
        player.machine.take_update(),
        [put("b", revision + 2), put("c", revision + 2)]
    );
}

#[test]
fn old_events_are_ignored() {
    let mut player = populated(6);
    let revision = player.machine.report.revision.unwrap().get();
    player
        .machine
        .on_message(message(revision, vec![put("old", revision - 1)], false));
    assert!(player.machine.take_update().is_empty());
}

#[test]
fn a_lagging_member_causes_one_check_and_no_list() {
    let mut player = populated(7);
    // A new watch is used, because the current watch may have caused a check already.
    let key = reopened(&mut player);
    let answer = player.store.read(&key);
    player.machine.on_checked(Ok(answer), player.now);
    let revision = player.machine.report.revision.unwrap().get();
    let Command::Check(key) = player
        .machine
        .on_message(message(revision - 1, Vec::new(), false))
    else {
        panic!("a message with a lower revision must cause a check")
    };
    let answer = player.store.read(&key);
    assert_eq!(
        player.machine.on_checked(Ok(answer), player.now),
        Command::Receive
    );
    assert_eq!(
        player
            .machine
            .on_message(message(revision - 1, Vec::new(), false)),
        Command::Receive,
        "one watch must cause at most one check"
    );
}

#[test]
fn a_list_compacted_three_times_is_no_longer_pinned_to_a_revision() {
    let mut machine = Machine::new(
        Range::prefix(PREFIX),
        None,
        slots(),
        fastrand::Rng::with_seed(8),
    );
    let page = |revision: i64| {
        let Event::Put(kv) = put("a", 1) else {
            panic!("the event is not a put")
        };
        let header = Header {
            cluster_id: 7,
            revision: Revision::new(revision),
            raft_term: 2,
        };
        Page {
            header,
            kvs: vec![kv],
            more: true,
            count: 2,
        }
    };
    machine.on_wake();
    for round in 0..4 {
        let Command::List(second) = machine.on_page(Ok(page(10 + round))) else {
            panic!("the next page must be requested")
        };
        let pinned = if round < 3 { 10 + round } else { 0 };
        assert_eq!(second.revision.get(), pinned, "round {round}");
        if round < 3 {
            assert!(matches!(
                machine.on_page(Err(error(EtcdErrorKind::Compacted))),
                Command::Wait(_)
            ));
            machine.on_wake();
        }
    }
    let last = Page {
        more: false,
        ..page(99)
    };
    assert_eq!(
        machine.on_page(Ok(last)),
        Command::Watch(Revision::new(13)),
        "the watch must start at the revision of the first page"
    );
}

#[test]
fn pages_that_are_too_large_are_halved_and_a_single_large_key_is_skipped() {
    let mut machine = Machine::new(
        Range::prefix(PREFIX),
        None,
        slots(),
        fastrand::Rng::with_seed(9),
    );
    let mut command = machine.on_wake();
    let mut limits = Vec::new();
    let reads_name_only = loop {
        let Command::List(request) = command else {
            panic!("a list was expected, not {command:?}")
        };
        if request.keys_only {
            break request;
        }
        limits.push(request.limit);
        command = machine.on_page(Err(error(EtcdErrorKind::ResponseTooLarge)));
    };
    assert_eq!(limits, [500, 250, 125, 62, 31, 15, 7, 3, 1]);
    assert_eq!(reads_name_only.limit, 1);
    let Event::Put(kv) = put("huge", 1) else {
        panic!("the event is not a put")
    };
    let next = machine.on_page(Ok(Page {
        kvs: vec![kv.clone()],
        more: true,
        ..Page::default()
    }));
    let Command::List(next) = next else {
        panic!("a list was expected, not {next:?}")
    };
    assert_eq!(
        next.range.start,
        kv.key.successor(),
        "the next page must start after the skipped key"
    );
    assert!(!next.keys_only);
    machine.on_page(Ok(Page::default()));
    assert_eq!(
        (machine.report.oversized, machine.take_update().len()),
        (1, 0)
    );
}

#[test]
fn a_rejected_watch_renews_the_token_once_and_is_then_retried_slowly() {
    let mut player = populated(10);
    let first = player
        .machine
        .on_watch_ended(error(EtcdErrorKind::PermissionDenied), player.now);
    assert!(
        matches!(first, Command::RenewToken(wait) if wait < Duration::from_secs(1)),
        "{first:?}"
    );
    assert!(matches!(player.machine.on_wake(), Command::Watch(_)));
    let second = player
        .machine
        .on_watch_ended(error(EtcdErrorKind::PermissionDenied), player.now);
    assert!(
        matches!(second, Command::Wait(wait) if wait >= OPERATOR_WAIT / 2),
        "{second:?}"
    );
}

/// After a change of the etcd users, the watches of all clients are rejected at the same time.
#[test]
fn token_renewals_of_many_clients_are_spread() {
    let mut waits: Vec<_> = (0..100)
        .map(|seed| {
            let mut player = populated(seed);
            let refused = error(EtcdErrorKind::InvalidToken);
            match player.machine.on_watch_ended(refused, player.now) {
                Command::RenewToken(wait) => wait,
                other => panic!("a token renewal was expected, not {other:?}"),
            }
        })
        .collect();
    waits.sort_unstable();
    waits.dedup();
    assert!(waits.len() > 90, "{} of 100 waits differ", waits.len());
    assert!(waits[waits.len() - 1] >= waits[0] * 3 / 2, "{waits:?}");
}

#[test]
fn a_failed_token_renewal_is_retried_without_the_slow_wait() {
    let mut player = populated(11);
    player
        .machine
        .on_watch_ended(error(EtcdErrorKind::InvalidToken), player.now);
    let failed = Err(error(EtcdErrorKind::Unavailable));
    assert!(matches!(player.machine.on_token(failed), Command::Watch(_)));
    let next = player
        .machine
        .on_watch_ended(error(EtcdErrorKind::InvalidToken), player.now);
    assert!(matches!(next, Command::RenewToken(_)), "{next:?}");
}

#[test]
fn a_wrong_password_is_retried_slowly_and_reported() {
    let mut player = populated(11);
    for _ in 0..5 {
        let refused = player
            .machine
            .on_watch_ended(error(EtcdErrorKind::InvalidToken), player.now);
        assert!(matches!(refused, Command::RenewToken(_)), "{refused:?}");
        let wrong = Err(error(EtcdErrorKind::BadCredentials));
        let next = player.machine.on_token(wrong);
        assert!(
            matches!(next, Command::Wait(wait) if wait >= OPERATOR_WAIT / 2),
            "a wrong password must cause a long wait, not {next:?}"
        );
        let trouble = player.machine.report.trouble.as_ref();
        let kind = trouble.map(EtcdError::kind);
        assert_eq!(kind, Some(EtcdErrorKind::BadCredentials));
        assert!(matches!(player.machine.on_wake(), Command::Watch(_)));
    }
}

#[test]
fn an_event_that_is_too_large_causes_a_list_and_is_skipped() {
    let mut player = populated(12);
    let revision = player.machine.report.revision.unwrap().get();
    player
        .machine
        .on_watch_ended(error(EtcdErrorKind::ResponseTooLarge), player.now);
    let Command::List(_) = player.machine.on_wake() else {
        panic!("an event that is too large must cause a list")
    };
    let header = Header {
        cluster_id: 7,
        revision: Revision::new(revision + 1),
        raft_term: 2,
    };
    let page = Page {
        header,
        ..Page::default()
    };
    let next = player.machine.on_page(Ok(page));
    assert_eq!(
        next,
        Command::Watch(Revision::new(revision + 2)),
        "the watch must start after the skipped event"
    );
}

#[test]
fn a_key_whose_new_value_is_too_large_keeps_its_last_good_value() {
    let mut machine = Machine::new(
        Range::prefix(PREFIX),
        None,
        slots(),
        fastrand::Rng::with_seed(13),
    );
    let Event::Put(kv) = put("a", 2) else {
        panic!("the event is not a put")
    };
    let header = Header {
        cluster_id: 7,
        revision: Revision::new(5),
        raft_term: 2,
    };
    let page = |kv: &KeyValue| Page {
        header,
        kvs: vec![kv.clone()],
        more: false,
        count: 1,
    };
    machine.on_wake();
    machine.on_page(Ok(page(&kv)));
    assert_eq!(machine.take_update().len(), 1);
    machine.on_watch_ended(error(EtcdErrorKind::Compacted), Instant::now());
    for _ in 0..2 {
        machine.on_wake();
        let mut next = machine.on_page(Err(error(EtcdErrorKind::ResponseTooLarge)));
        while !matches!(&next, Command::List(request) if request.keys_only) {
            next = machine.on_page(Err(error(EtcdErrorKind::ResponseTooLarge)));
        }
        let larger = KeyValue {
            mod_revision: Revision::new(4),
            ..kv.clone()
        };
        machine.on_page(Ok(page(&larger)));
        assert!(machine.take_update().is_empty(), "no key must change");
        assert_eq!(machine.report.oversized, 1, "the key must be counted once");
        machine.on_watch_ended(error(EtcdErrorKind::Compacted), Instant::now());
    }
}

#[test]
fn pages_that_time_out_become_smaller() {
    let mut machine = Machine::new(
        Range::prefix(PREFIX),
        None,
        slots(),
        fastrand::Rng::with_seed(14),
    );
    let mut command = machine.on_wake();
    for _ in 0..10 {
        machine.on_page(Err(error(EtcdErrorKind::DeadlineExceeded)));
        command = machine.on_wake();
    }
    let Command::List(request) = command else {
        panic!("a list was expected, not {command:?}")
    };
    assert_eq!(request.limit, PAGE_CAP_MIN);
}

fn slots() -> Slots {
    Slots::new(Instant::now(), &mut fastrand::Rng::with_seed(1))
}
