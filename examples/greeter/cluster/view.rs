//! The picture of the cluster on a terminal, as text. This file has no I/O.

use std::time::Duration;

use super::terminal::{Canvas, Line, Style, cut};

/// What the picture shows.
#[derive(Clone, Debug, Default)]
pub struct Picture {
    /// The etcd of the cluster: its version and its address.
    pub etcd: String,
    /// What the demonstration does at the moment.
    pub title: String,
    pub elapsed: Duration,
    /// Calls per second.
    pub rate: f64,
    pub p50: Option<Duration>,
    pub p99: Option<Duration>,
    pub calls: u64,
    pub failed: u64,
    /// Number of calls that failed because a server was killed.
    pub caught: u64,
    pub servers: Vec<Server>,
    /// The events, with the latest at the end.
    pub events: Vec<Event>,
}

/// A server, as the channel of the client sees it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Server {
    /// The name in its replies. Empty before the first reply.
    pub name: String,
    pub address: String,
    /// The name of the state in gRPC, for example `READY`.
    pub state: String,
    /// Whether the address is in etcd.
    pub registered: bool,
    /// Calls per second.
    pub rate: f64,
    pub calls: u64,
    pub last_error: Option<String>,
}

/// Something that has happened.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// The time since the start.
    pub at: Duration,
    pub text: String,
}

/// Returns the lines of the picture. There are at most `height` lines, each with at most `width` columns.
pub fn frame(picture: &Picture, canvas: Canvas) -> Vec<String> {
    let mut lines = heading(picture);
    let room = canvas.height.saturating_sub(lines.len());
    lines.extend(servers(&picture.servers, room));
    let room = canvas.height.saturating_sub(lines.len());
    lines.extend(events(&picture.events, room));
    lines.truncate(canvas.height);
    lines.iter().map(|line| line.render(canvas)).collect()
}

/// Returns what has changed between two sets of servers.
pub fn changes(before: &[Server], after: &[Server]) -> Vec<String> {
    let mut changes = Vec::new();
    for server in after {
        let (address, state) = (&server.address, &server.state);
        let known = before.iter().find(|known| known.address == *address);
        let label = server.label();
        match known {
            None => changes.push(format!("{label} is known: {state}")),
            Some(known) => {
                if known.registered && !server.registered {
                    changes.push(format!("{label} has left etcd"));
                }
                if known.state != *state {
                    let reason = server.last_error.as_ref().filter(|_| state != "READY");
                    let reason = reason.map_or_else(String::new, |reason| format!(": {reason}"));
                    changes.push(format!("{label} is {state}{reason}"));
                }
            }
        }
    }
    let is_gone = |known: &&Server| !after.iter().any(|server| server.address == known.address);
    for known in before.iter().filter(is_gone) {
        changes.push(format!("{} is gone", known.label()));
    }
    changes
}

impl Server {
    fn label(&self) -> String {
        match &*self.name {
            "" => self.address.clone(),
            name => format!("{name} ({})", self.address),
        }
    }
}

fn heading(picture: &Picture) -> Vec<Line> {
    let Picture { etcd, title, .. } = picture;
    let mut failures = vec![(Style::Plain, format!("{} calls", picture.calls))];
    let style = match picture.failed {
        0 => Style::Plain,
        _ => Style::Red,
    };
    failures.push((style, format!("{} failed", picture.failed)));
    if picture.caught > 0 {
        let text = format!("{} failed at the kill", picture.caught);
        failures.push((Style::Yellow, text));
    }
    let mut pace = vec![
        (Style::Bold, format!("{:.0} calls/s", picture.rate)),
        (Style::Plain, format!("p50 {}", milliseconds(picture.p50))),
        (Style::Plain, format!("p99 {}", milliseconds(picture.p99))),
    ];
    pace.append(&mut failures);
    vec![
        Line::spaced([
            (Style::Bold, "greeter cluster".to_owned()),
            (Style::Plain, seconds(picture.elapsed)),
            (Style::Bold, title.clone()),
            (Style::Dim, format!("etcd {etcd}")),
        ]),
        Line::spaced(pace),
        Line::default(),
    ]
}

/// Returns the table of the servers. If they do not fit, the last line is the number of those that are left out.
fn servers(servers: &[Server], room: usize) -> Vec<Line> {
    let name = column("SERVER", NAME, servers.iter().map(|server| &*server.name));
    let address = column(
        "ADDRESS",
        ADDRESS,
        servers.iter().map(|server| &*server.address),
    );
    let state = column("STATE", STATE, servers.iter().map(|server| &*server.state));
    let mut lines = vec![Line::of(
        Style::Dim,
        format!(
            "{:name$}  {:address$}  {:state$}  {:>7}  {:>8}",
            "SERVER", "ADDRESS", "STATE", "CALLS/S", "CALLS"
        ),
    )];
    let most = servers.iter().map(|server| server.rate).fold(1.0, f64::max);
    let shown = if servers.len() < room {
        servers.len()
    } else {
        room.saturating_sub(2)
    };
    for server in &servers[..shown] {
        let cells = [
            (
                Style::Plain,
                format!(
                    "{:name$}  {:address$}",
                    cut(&server.name, NAME),
                    cut(&server.address, ADDRESS)
                ),
            ),
            (
                state_style(server),
                format!("{:state$}", cut(&server.state, STATE)),
            ),
            (
                Style::Plain,
                format!("{:>7.0}  {:>8}", server.rate, server.calls),
            ),
            (
                Style::Green,
                "#".repeat(tenths(server.rate / most * BAR) / 10),
            ),
        ];
        lines.push(Line::spaced(cells));
    }
    if shown < servers.len() {
        let text = format!("and {} more", servers.len() - shown);
        lines.push(Line::of(Style::Dim, text));
    }
    lines
}

/// Returns the latest events that fit, with the latest at the end.
fn events(events: &[Event], room: usize) -> Vec<Line> {
    // A blank line and the title.
    let room = room.saturating_sub(2);
    if room == 0 || events.is_empty() {
        return Vec::new();
    }
    let mut lines = vec![Line::default(), Line::of(Style::Dim, "EVENTS")];
    for event in &events[events.len().saturating_sub(room)..] {
        lines.push(Line::spaced([
            (Style::Dim, format!("{:>7}", seconds(event.at))),
            (Style::Plain, event.text.clone()),
        ]));
    }
    lines
}

fn state_style(server: &Server) -> Style {
    match &*server.state {
        _ if !server.registered => Style::Yellow,
        "READY" => Style::Green,
        "TRANSIENT_FAILURE" => Style::Red,
        _ => Style::Yellow,
    }
}

/// Returns the width of a column: that of its longest text, up to a limit.
fn column<'a>(title: &str, most: usize, texts: impl Iterator<Item = &'a str>) -> usize {
    let widths = texts.map(|text| cut(text, most).chars().count());
    widths.fold(title.len(), usize::max)
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

fn milliseconds(time: Option<Duration>) -> String {
    time.map_or_else(
        || "-".to_owned(),
        |time| format!("{:.1} ms", time.as_secs_f64() * 1_000.0),
    )
}

/// Returns ten times a small number, rounded down. A conversion with `as` would need a reason for the lints.
fn tenths(number: f64) -> usize {
    (0..=(10 * BAR_COLUMNS))
        .take_while(|tenth| f64::from(*tenth) <= number * 10.0)
        .count()
        .saturating_sub(1)
}

/// Maximum widths of the columns.
const NAME: usize = 16;
const ADDRESS: usize = 32;
const STATE: usize = 17;
/// The width of the bar of the busiest server.
const BAR: f64 = 20.0;
const BAR_COLUMNS: i32 = 20;

#[cfg(test)]
mod tests {
    use super::*;

    const WIDE: Canvas = Canvas {
        width: 100,
        height: 30,
        colour: false,
    };

    fn server(name: &str, state: &str) -> Server {
        Server {
            name: name.to_owned(),
            address: format!("10.0.0.5:{}", 50_000 + name.len()),
            state: state.to_owned(),
            registered: true,
            rate: 600.0,
            calls: 1_234,
            last_error: None,
        }
    }

    fn picture() -> Picture {
        Picture {
            etcd: "3.4.23 at 127.0.0.1:2379".to_owned(),
            title: "delta has joined".to_owned(),
            elapsed: Duration::from_millis(7_340),
            rate: 1_200.4,
            p50: Some(Duration::from_micros(412)),
            p99: Some(Duration::from_micros(2_100)),
            calls: 8_000,
            failed: 0,
            caught: 3,
            servers: vec![
                server("alpha", "READY"),
                server("epsilon", "TRANSIENT_FAILURE"),
            ],
            events: vec![Event {
                at: Duration::from_secs(5),
                text: "alpha is READY".to_owned(),
            }],
        }
    }

    #[test]
    fn the_frame_shows_the_pace_the_servers_and_the_events() {
        let expected = "\
greeter cluster  7.3 s  delta has joined  etcd 3.4.23 at 127.0.0.1:2379
1200 calls/s  p50 0.4 ms  p99 2.1 ms  8000 calls  0 failed  3 failed at the kill

SERVER   ADDRESS         STATE              CALLS/S     CALLS
alpha    10.0.0.5:50005  READY                  600      1234  ####################
epsilon  10.0.0.5:50007  TRANSIENT_FAILURE      600      1234  ####################

EVENTS
  5.0 s  alpha is READY";
        assert_eq!(frame(&picture(), WIDE).join("\n"), expected);
    }

    #[test]
    fn no_line_is_wider_and_no_frame_is_higher_than_the_terminal() {
        let mut picture = picture();
        picture.servers = vec![server(&"long".repeat(20), "READY"); 40];
        for width in 0..120 {
            for height in 0..50 {
                let canvas = Canvas {
                    width,
                    height,
                    ..WIDE
                };
                let lines = frame(&picture, canvas);
                assert!(lines.len() <= height, "{width} x {height}: {lines:?}");
                for line in lines {
                    assert!(line.chars().count() <= width, "{width} x {height}: {line}");
                }
            }
        }
    }

    #[test]
    fn a_cut_text_ends_with_a_mark_and_rows_that_do_not_fit_are_counted() {
        let mut picture = picture();
        picture.servers = vec![server(&"long".repeat(20), "READY"); 40];
        let narrow = Canvas {
            width: 30,
            height: 12,
            ..WIDE
        };
        let lines = frame(&picture, narrow);
        assert!(lines[0].ends_with('…'), "{lines:?}");
        assert!(lines[4].starts_with("longlonglonglon…  10."), "{lines:?}");
        assert_eq!(lines[11], "and 33 more");
    }

    #[test]
    fn colours_are_absent_if_they_are_disabled_and_add_no_columns() {
        let plain = frame(&picture(), WIDE);
        assert!(!plain.concat().contains('\x1b'), "{plain:?}");
        let coloured = frame(
            &picture(),
            Canvas {
                colour: true,
                ..WIDE
            },
        );
        assert!(
            coloured[4].contains("\x1b[32mREADY            \x1b[0m"),
            "{coloured:?}"
        );
        for (plain, coloured) in plain.iter().zip(&coloured) {
            let codes = ["0", "1", "2", "31", "32", "33"];
            let stripped = codes.iter().fold(coloured.clone(), |text, code| {
                text.replace(&format!("\x1b[{code}m"), "")
            });
            assert_eq!(stripped.trim_end(), plain);
        }
    }

    #[test]
    fn names_addresses_and_errors_cannot_control_the_terminal() {
        let mut picture = picture();
        picture.servers[0].name = "a\x1b[2J".to_owned();
        picture.servers[1].address = "\u{202e}evil\r\n".to_owned();
        picture.events[0].text = "\u{9b}31m \u{4e16}".to_owned();
        let text = frame(&picture, WIDE).join("\n");
        assert!(text.contains("a\\u{1b}[2J"), "{text}");
        assert!(text.contains("\\u{9b}31m \\u{4e16}"), "{text}");
        let is_allowed = |letter: char| " \n…".contains(letter) || letter.is_ascii_graphic();
        assert!(text.chars().all(is_allowed), "{text}");
    }

    #[test]
    fn changes_of_the_servers_become_events() {
        let (alpha, beta) = (server("alpha", "READY"), server("beta", "READY"));
        let connecting = Server {
            name: String::new(),
            ..server("alpha", "CONNECTING")
        };
        let connecting = Server {
            address: alpha.address.clone(),
            ..connecting
        };
        assert_eq!(
            changes(&[], std::slice::from_ref(&connecting)),
            ["10.0.0.5:50005 is known: CONNECTING"]
        );
        assert_eq!(
            changes(&[connecting, beta.clone()], std::slice::from_ref(&alpha)),
            [
                "alpha (10.0.0.5:50005) is READY",
                "beta (10.0.0.5:50004) is gone"
            ]
        );
        let failed = Server {
            state: "TRANSIENT_FAILURE".to_owned(),
            registered: false,
            last_error: Some("refused".to_owned()),
            ..beta.clone()
        };
        assert_eq!(
            changes(std::slice::from_ref(&beta), &[failed]),
            [
                "beta (10.0.0.5:50004) has left etcd",
                "beta (10.0.0.5:50004) is TRANSIENT_FAILURE: refused"
            ]
        );
        assert!(changes(std::slice::from_ref(&beta), std::slice::from_ref(&beta)).is_empty());
    }
}
