//! Compares the machine's response to every input in every state with `table.txt`.

use std::fmt::Write;

use super::*;

/// The only known key. It was written at revision 5 under lease 1, and the store is at revision 10.
fn known() -> KeyValue {
    KeyValue {
        key: Key::from("/gRPC/greeter/a"),
        value: b"10.9.9.9:80".to_vec(),
        create_revision: Revision::new(5),
        mod_revision: Revision::new(5),
        lease: LeaseId::new(1),
    }
}

fn header() -> Header {
    Header {
        cluster_id: 7,
        revision: Revision::new(10),
        raft_term: 2,
    }
}

fn elsewhere() -> Header {
    Header {
        cluster_id: 8,
        ..header()
    }
}

fn page(kvs: Vec<KeyValue>, more: bool) -> Page {
    Page {
        header: header(),
        count: kvs.len(),
        kvs,
        more,
    }
}

fn fresh() -> Machine {
    let range = Range::prefix(PREFIX);
    let mut machine = Machine::new(range, Some(RECONCILE), slots(), fastrand::Rng::with_seed(1));
    machine.on_wake();
    machine
}

fn reads_name_only() -> Machine {
    let mut machine = fresh();
    while !matches!(
        machine.on_page(Err(error(EtcdErrorKind::ResponseTooLarge))),
        Command::List(request) if request.keys_only
    ) {}
    machine
}

fn opening(kvs: Vec<KeyValue>) -> Machine {
    let mut machine = fresh();
    machine.on_page(Ok(page(kvs, false)));
    machine
}

fn watching(kvs: Vec<KeyValue>) -> Machine {
    let mut machine = opening(kvs);
    machine.on_watch_opened(Instant::now());
    machine
}

fn resuming(kvs: Vec<KeyValue>) -> Machine {
    let mut machine = watching(kvs);
    machine.on_watch_ended(error(EtcdErrorKind::Unavailable), Instant::now());
    machine
}

type Start = (&'static str, fn() -> Machine);

const STATES: [Start; 7] = [
    ("Listing", fresh),
    ("Listing a name", reads_name_only),
    ("Opening", || opening(vec![known()])),
    ("Watching", || watching(vec![known()])),
    ("Watching, empty", || watching(Vec::new())),
    ("Resuming", || resuming(vec![known()])),
    ("Resuming, empty", || resuming(Vec::new())),
];

type Input = (&'static str, fn(&mut Machine, Instant) -> Command);

fn ended(machine: &mut Machine, kind: EtcdErrorKind, now: Instant) -> Command {
    machine.on_watch_ended(error(kind), now)
}

const INPUTS: [Input; 30] = [
    ("woken", |machine, _| machine.on_wake()),
    ("last page", |machine, _| {
        machine.on_page(Ok(page(vec![known()], false)))
    }),
    ("page, and more", |machine, _| {
        machine.on_page(Ok(page(vec![known()], true)))
    }),
    ("page too large", |machine, _| {
        machine.on_page(Err(error(EtcdErrorKind::ResponseTooLarge)))
    }),
    ("page compacted", |machine, _| {
        machine.on_page(Err(error(EtcdErrorKind::Compacted)))
    }),
    ("page failed", |machine, _| {
        machine.on_page(Err(error(EtcdErrorKind::Unavailable)))
    }),
    ("watch opened", |machine, now| machine.on_watch_opened(now)),
    ("message", |machine, _| {
        machine.on_message(message(11, vec![put("a", 11)], false))
    }),
    ("message, lower revision", |machine, _| {
        machine.on_message(message(9, Vec::new(), false))
    }),
    ("message, another cluster", |machine, _| {
        let mut other = message(11, Vec::new(), false);
        other.header = elsewhere();
        machine.on_message(other)
    }),
    ("ended", |machine, now| {
        ended(machine, EtcdErrorKind::Unavailable, now)
    }),
    ("ended, compacted", |machine, now| {
        ended(machine, EtcdErrorKind::Compacted, now)
    }),
    ("ended, too large", |machine, now| {
        ended(machine, EtcdErrorKind::ResponseTooLarge, now)
    }),
    ("ended, refused", |machine, now| {
        ended(machine, EtcdErrorKind::InvalidToken, now)
    }),
    ("checked, the same", |machine, now| {
        machine.on_checked(Ok((header(), Some(known().version()))), now)
    }),
    ("checked, gone", |machine, now| {
        machine.on_checked(Ok((header(), None)), now)
    }),
    ("checked, another cluster", |machine, now| {
        machine.on_checked(Ok((elsewhere(), Some(known().version()))), now)
    }),
    ("check failed", |machine, now| {
        machine.on_checked(Err(error(EtcdErrorKind::Unavailable)), now)
    }),
    ("fresh token", |machine, _| machine.on_token(Ok(()))),
    ("no fresh token", |machine, _| {
        machine.on_token(Err(error(EtcdErrorKind::Unavailable)))
    }),
    ("no fresh token, wrong password", |machine, _| {
        machine.on_token(Err(error(EtcdErrorKind::BadCredentials)))
    }),
    ("refused connection, read due", |machine, now| {
        machine.on_refused_connection(&known().key, now);
        machine.on_time(now + Duration::from_secs(2))
    }),
    ("reconciliation due", |machine, now| {
        machine.on_time(now + RECONCILE)
    }),
    ("names, the same", |machine, now| {
        machine.on_names(Ok(page(vec![known()], false)), now)
    }),
    ("names, and more", |machine, now| {
        machine.on_names(Ok(page(vec![known()], true)), now)
    }),
    ("names, another cluster", |machine, now| {
        let mut other = page(vec![known()], false);
        other.header = elsewhere();
        machine.on_names(Ok(other), now)
    }),
    ("names failed", |machine, now| {
        machine.on_names(Err(error(EtcdErrorKind::Unavailable)), now)
    }),
    ("read, the same", |machine, _| {
        machine.on_read(known().key, Ok((header(), Some(known()))), Instant::now())
    }),
    ("read, gone", |machine, _| {
        machine.on_read(known().key, Ok((header(), None)), Instant::now())
    }),
    ("read, another cluster", |machine, _| {
        machine.on_read(
            known().key,
            Ok((elsewhere(), Some(known()))),
            Instant::now(),
        )
    }),
];

fn command(command: &Command) -> &'static str {
    match command {
        Command::List(request) if request.keys_only => "list a name",
        Command::List(_) => "list",
        Command::Watch(_) => "watch",
        Command::Receive => "receive",
        Command::Check(_) => "check",
        Command::Reconcile(_) => "compare",
        Command::Read(_) => "read",
        Command::RenewToken(_) => "renew token",
        Command::Wait(_) => "wait",
    }
}

fn state(machine: &Machine) -> &'static str {
    match &machine.state {
        State::Listing(_) => "Listing",
        State::Watching(watching) if watching.opened.is_none() => "Opening",
        State::Watching(_) => "Watching",
        State::Resuming { .. } => "Resuming",
    }
}

fn change(update: &[Event]) -> &'static str {
    match update {
        [] => "",
        [Event::Put(_)] => "+",
        [Event::Delete { .. }] => "-",
        _ => "many",
    }
}

/// Returns the table of the machine's actual behaviour. For each input and state, the table contains the command, the next state, and
/// whether a key was put (`+`) or deleted (`-`).
fn table() -> String {
    let mut table = String::new();
    for (input, play) in INPUTS {
        writeln!(table, "{input}").expect("a write to a string succeeds");
        for (start, machine) in STATES {
            let mut machine = machine();
            machine.take_update();
            let next = play(&mut machine, Instant::now());
            let outcome = format!("{} {}", state(&machine), change(&machine.take_update()));
            writeln!(
                table,
                "    {start:<16} {:<12} {}",
                command(&next),
                outcome.trim_end()
            )
            .expect("a write to a string succeeds");
        }
    }
    table
}

#[test]
fn the_machine_handles_every_input_in_every_state_as_in_the_table() {
    let (is, expected) = (table(), include_str!("table.txt"));
    for (is, expected) in is.lines().zip(expected.lines()) {
        if is != expected {
            println!("is       {is}\nexpected {expected}");
        }
    }
    assert!(is == expected, "the table has changed. It is now:\n{is}");
}
