//! The live view of `watch`, as text. This file has no I/O.

use std::time::Duration;

use crate::terminal::{Canvas, Line, Style, cut};

/// What the view shows.
#[derive(Debug, Default)]
pub(super) struct Picture {
    pub(super) service: String,
    pub(super) sync: Sync,
    pub(super) elapsed: Duration,
    /// The instances, in the order of their addresses.
    pub(super) rows: Vec<Row>,
    /// The latest events, with the latest at the end.
    pub(super) events: Vec<String>,
}

/// Whether the set is in sync with etcd.
#[derive(Clone, Debug, Default)]
pub(super) enum Sync {
    /// etcd has not answered yet.
    #[default]
    Unknown,
    Current,
    /// It is not, for this reason.
    Trouble(String),
}

/// An instance.
#[derive(Clone, Debug, Default)]
pub(super) struct Row {
    pub(super) address: String,
    pub(super) leaving: bool,
    pub(super) weight: u32,
    pub(super) zone: String,
    pub(super) version: String,
    /// The time since its last event.
    pub(super) since: Duration,
    /// The result of `--check`, and whether the server is ready.
    pub(super) check: Option<(String, bool)>,
}

/// Returns the lines of the view. There are at most `height` lines, each with at most `width` columns.
pub(super) fn frame(picture: &Picture, canvas: Canvas) -> Vec<String> {
    let mut lines = heading(picture);
    let room = canvas.height.saturating_sub(lines.len());
    lines.extend(table(&picture.rows, room));
    let room = canvas.height.saturating_sub(lines.len() + 2);
    if room > 0 && !picture.events.is_empty() {
        lines.extend([Line::default(), Line::of(Style::Dim, "EVENTS")]);
        let latest = picture.events.len().saturating_sub(room);
        for event in &picture.events[latest..] {
            lines.push(Line::of(Style::Plain, event.clone()));
        }
    }
    lines.truncate(canvas.height);
    lines.iter().map(|line| line.render(canvas)).collect()
}

fn heading(picture: &Picture) -> Vec<Line> {
    let instances = match picture.rows.len() {
        1 => "1 instance".to_owned(),
        number => format!("{number} instances"),
    };
    let (style, sync) = match &picture.sync {
        Sync::Unknown => (Style::Yellow, "waiting for etcd".to_owned()),
        Sync::Current => (Style::Green, "in sync".to_owned()),
        Sync::Trouble(reason) => (Style::Red, reason.clone()),
    };
    vec![
        Line::spaced([
            (Style::Bold, picture.service.clone()),
            (Style::Plain, instances),
            (Style::Plain, seconds(picture.elapsed)),
            (style, sync),
        ]),
        Line::default(),
    ]
}

/// Returns the table of the instances. If they do not fit, its last line is the number of those that are left out.
fn table(rows: &[Row], room: usize) -> Vec<Line> {
    let cells = |row: &Row| {
        [
            cut(&row.address, ADDRESS),
            row.weight.to_string(),
            cut(or_dash(&row.zone), ATTRIBUTE),
            cut(or_dash(&row.version), ATTRIBUTE),
            seconds(row.since),
        ]
    };
    let shown = if rows.len() < room {
        rows.len()
    } else {
        room.saturating_sub(2)
    };
    let texts: Vec<_> = rows[..shown].iter().map(cells).collect();
    let width = |column: usize| {
        let widths = texts.iter().map(|cells| cells[column].chars().count());
        widths.fold(HEADER[column].len(), usize::max)
    };
    let widths: [usize; 5] = std::array::from_fn(width);
    let line = |cells: &[String; 5]| {
        let cells = cells.iter().zip(widths);
        let cells = cells.map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ")
    };
    let header = line(&HEADER.map(str::to_owned));
    let mut lines = vec![Line::of(Style::Dim, header)];
    for (row, cells) in rows.iter().zip(&texts) {
        let check = match &row.check {
            _ if row.leaving => (Style::Yellow, "leaving".to_owned()),
            Some((text, true)) => (Style::Green, text.clone()),
            Some((text, false)) => (Style::Red, text.clone()),
            None => (Style::Plain, String::new()),
        };
        lines.push(Line::spaced([(Style::Plain, line(cells)), check]));
    }
    if shown < rows.len() {
        let text = format!("and {} more", rows.len() - shown);
        lines.push(Line::of(Style::Dim, text));
    }
    lines
}

fn or_dash(text: &str) -> &str {
    if text.is_empty() { "-" } else { text }
}

/// Returns a time with one decimal below 100 s.
pub(super) fn seconds(time: Duration) -> String {
    match time.as_secs() {
        0..100 => format!("{:.1} s", time.as_secs_f64()),
        seconds => format!("{seconds} s"),
    }
}

const HEADER: [&str; 5] = ["ADDRESS", "WEIGHT", "ZONE", "VERSION", "SINCE"];
/// Maximum widths of the columns.
const ADDRESS: usize = 40;
const ATTRIBUTE: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    const WIDE: Canvas = Canvas {
        width: 100,
        height: 30,
        colour: false,
    };

    fn row(address: &str) -> Row {
        Row {
            address: address.to_owned(),
            weight: 3,
            zone: "eu-1a".to_owned(),
            since: Duration::from_millis(2_340),
            ..Row::default()
        }
    }

    fn picture() -> Picture {
        let ready = Row {
            check: Some(("serving (0.6 ms)".to_owned(), true)),
            ..row("10.0.0.5:50051")
        };
        let leaving = Row {
            leaving: true,
            since: Duration::from_secs(1_000),
            ..row("10.0.0.6:80")
        };
        Picture {
            service: "helloworld.Greeter".to_owned(),
            elapsed: Duration::from_millis(12_300),
            rows: vec![ready, leaving],
            events: vec!["10:00:00 + 10.0.0.5:50051".to_owned()],
            sync: Sync::Current,
        }
    }

    #[test]
    fn the_view_shows_the_instances_and_the_events() {
        let expected = "\
helloworld.Greeter  2 instances  12.3 s  in sync

ADDRESS         WEIGHT  ZONE   VERSION  SINCE
10.0.0.5:50051  3       eu-1a  -        2.3 s   serving (0.6 ms)
10.0.0.6:80     3       eu-1a  -        1000 s  leaving

EVENTS
10:00:00 + 10.0.0.5:50051";
        assert_eq!(frame(&picture(), WIDE).join("\n"), expected);
    }

    #[test]
    fn the_view_fits_any_terminal_and_counts_what_it_leaves_out() {
        let mut picture = picture();
        picture.rows = vec![row(&"long.".repeat(20)); 50];
        for (width, height) in [(0, 0), (1, 1), (20, 3), (30, 10), (200, 80)] {
            let canvas = Canvas {
                width,
                height,
                ..WIDE
            };
            let lines = frame(&picture, canvas);
            assert!(lines.len() <= height, "{width} x {height}: {lines:?}");
            let is_narrow = |line: &String| line.chars().count() <= width;
            assert!(lines.iter().all(is_narrow), "{width} x {height}: {lines:?}");
        }
        let small = Canvas { height: 10, ..WIDE };
        assert_eq!(frame(&picture, small)[9], "and 44 more");
    }

    #[test]
    fn zones_versions_and_results_cannot_control_the_terminal() {
        let mut picture = picture();
        picture.rows[0].zone = "\u{1b}[2J".to_owned();
        picture.rows[0].check = Some(("\u{7}".to_owned(), false));
        picture.sync = Sync::Trouble("a\nb".to_owned());
        let lines = frame(&picture, WIDE);
        assert!(lines[0].ends_with("a\\u{a}b"), "{lines:?}");
        assert!(lines[3].contains("\\u{1b}[2J"), "{lines:?}");
        assert!(lines[3].ends_with("\\u{7}"), "{lines:?}");
        let has_control = |line: &String| line.chars().any(char::is_control);
        assert!(!lines.iter().any(has_control), "{lines:?}");
    }
}
