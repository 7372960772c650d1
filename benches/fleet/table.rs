//! The table of the scenarios, with computed figures for larger fleets.

use std::time::Duration;

use super::fleet::Right;
use super::metrics::Measured;
use super::options::default_ttl;

/// The sizes of the larger fleets for which figures are computed.
const SIZES: [usize; 2] = [1_000, 10_000];
/// Number of keys in one page of a list.
const PAGE: usize = 500;

/// The measurement of one scenario.
#[derive(Debug)]
pub struct Row {
    pub name: String,
    /// Number of clients, and also of servers.
    pub number: usize,
    pub measured: Measured,
    /// Number of complete lists that all clients together have made.
    pub lists: u64,
    pub right: Option<Right>,
    pub scale: Scale,
    /// Whether the TTL depends on the number of servers.
    pub has_default_ttl: bool,
}

/// How the figures of a scenario grow with the fleet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Each client or server adds the same number per second.
    Rate,
    /// Each client or server adds the same number in total.
    Total,
    /// As `Total`, but each change of a server causes an event for each client, so the events grow with clients times servers.
    Changes,
    /// The scenario determines the rates; the size of the fleet does not. No figures for larger fleets are computed.
    None,
}

/// A number of messages, and the mark of the rule by which the number grows with the fleet. `LEGEND` explains the marks.
struct Figure(f64, &'static str);

impl Row {
    /// Returns the numbers of messages for a fleet of this size, computed from the measured fleet.
    fn messages(&self, number: usize) -> Vec<Figure> {
        let counters = &self.measured.counters;
        let factor = number as f64 / self.number as f64;
        let pages = |number: usize| (number + 1).div_ceil(PAGE) as f64;
        let lists = self.lists as f64;
        let range = counters.received("Range") - lists * pages(self.number);
        let range = (range + lists * pages(number)) * factor;
        let watch = counters.received("Watch");
        // Each creation and each cancellation of a watcher has one response, which is not an event.
        let events = (counters.sent("Watch") - watch).max(0.0);
        let linear = |method| Figure(counters.received(method) * factor, "");
        let listed = if self.lists > 0 { "+" } else { "" };
        let event = if self.scale == Scale::Changes {
            Figure(events * factor * factor, "*")
        } else {
            Figure(events * factor, "")
        };
        vec![
            Figure(range, listed),
            Figure(
                (counters.received("Put") + counters.received("Txn")) * factor,
                "",
            ),
            linear("LeaseGrant"),
            linear("LeaseRevoke"),
            self.renewals(number),
            Figure(watch * factor, ""),
            event,
            linear("Authenticate"),
        ]
    }

    /// Returns the number of renewals of a fleet of this size.
    fn renewals(&self, number: usize) -> Figure {
        let linear =
            self.measured.counters.received("LeaseKeepAlive") * number as f64 / self.number as f64;
        if !self.has_default_ttl || self.scale != Scale::Rate {
            return Figure(linear, "");
        }
        let ttl = |number| default_ttl(number).as_secs_f64();
        Figure(linear * ttl(self.number) / ttl(number), "~")
    }

    /// Prints that the scenario is complete.
    pub fn print_progress(&self) {
        let seconds = self.measured.time.as_secs_f64();
        println!("{}: measured for {seconds:.1} s", self.name);
    }

    /// Prints the row of the measured fleet.
    fn print(&self) {
        let (counters, gauges) = (&self.measured.counters, &self.measured.gauges);
        let seconds = self.measured.time.as_secs_f64();
        let cell = |count: f64| {
            if count == 0.0 {
                return short(count);
            }
            format!("{} ({}/s)", short(count), short(count / seconds))
        };
        let mut cells = vec![
            format!("{}, {}", self.name, self.number),
            format!("{seconds:.1} s"),
        ];
        cells.extend(
            self.messages(self.number)
                .iter()
                .map(|figure| cell(figure.0)),
        );
        cells.push(cell(counters.requests()));
        let peak = self.measured.peak;
        cells.push(peak.map_or_else(String::new, |peak| format!("{}/s", short(peak))));
        cells.push(format!(
            "{:.2} s, {:.1} %",
            counters.cpu,
            counters.cpu / seconds * 100.0
        ));
        cells.push(format!("{:.0} MB", gauges.memory / 1e6));
        cells.push(format!("{:.2} MB", counters.bytes / 1e6));
        cells.push(self.lists.to_string());
        cells.push(gauges.connections.to_string());
        let streams = gauges.watch_streams.iter().map(ToString::to_string);
        let streams = streams.collect::<Vec<_>>().join(" + ");
        cells.push(format!("{}, {streams}", gauges.watchers));
        cells.push(self.right.map_or_else(String::new, |right| {
            format!("{}, {}", time(right.half), time(right.all))
        }));
        println!("| {} |", cells.join(" | "));
    }

    /// Prints the row of a larger fleet.
    fn print_scaled(&self, number: usize) {
        let seconds = self.measured.time.as_secs_f64();
        let is_rate = self.scale == Scale::Rate;
        let cell = |figure: &Figure| {
            let Figure(count, mark) = figure;
            let mark = if *count > 0.0 { mark } else { "" };
            if is_rate {
                format!("{}/s{mark}", short(count / seconds))
            } else {
                format!("{}{mark}", short(*count))
            }
        };
        let mut cells = vec![format!("- computed, {number}"), String::new()];
        let messages = self.messages(number);
        cells.extend(messages.iter().map(cell));
        cells.push(cell(&Figure(self.requests(number), "")));
        let factor = number as f64 / self.number as f64;
        let requests = self.requests(number) / self.requests(self.number);
        let peak = self.measured.peak.filter(|_| self.lists == 0);
        cells.push(peak.map_or_else(String::new, |peak| format!("{}/s", short(peak * requests))));
        let connections = self.measured.gauges.connections as f64 * factor;
        // The CPU time for events and lists does not grow linearly with the number of processes. So the CPU time is computed only for
        // `Rate`, and for `Total` without lists. It grows with the number of requests.
        let cpu = self.measured.counters.cpu * requests;
        cells.push(match self.scale {
            Scale::Rate => format!("{:.0} %", cpu / seconds * 100.0),
            Scale::Total if self.lists == 0 => format!("{cpu:.1} s"),
            _ => String::new(),
        });
        cells.extend([
            String::new(),
            String::new(),
            short(self.lists as f64 * factor),
            short(connections),
            String::new(),
            String::new(),
        ]);
        println!("| {} |", cells.join(" | "));
    }

    /// Returns the messages that etcd receives from a fleet of this size.
    pub fn requests(&self, number: usize) -> f64 {
        let messages = self.messages(number);
        let sent_by_etcd = messages[EVENTS].0;
        messages.iter().map(|figure| figure.0).sum::<f64>() - sent_by_etcd
    }

    /// Returns the requests per second of a fleet of this size.
    pub fn rate(&self, number: usize) -> f64 {
        self.requests(number) / self.measured.time.as_secs_f64()
    }
}

/// Prints the table.
pub fn print(rows: &[Row]) {
    println!("\n| {} |", HEADER.join(" | "));
    println!("|{}", "---|".repeat(HEADER.len()));
    for row in rows {
        row.print();
        if row.scale != Scale::None {
            for number in SIZES {
                row.print_scaled(number);
            }
        }
    }
    println!("{LEGEND}");
}

fn time(time: Duration) -> String {
    if time < Duration::from_secs(1) {
        format!("{} ms", time.as_millis())
    } else {
        format!("{:.1} s", time.as_secs_f64())
    }
}

/// Formats a number as an integer with its digits in groups of three. A number below 9.95 has one decimal digit, unless that digit is 0.
fn short(number: f64) -> String {
    if number == 0.0 {
        return "0".to_owned();
    }
    let digits = if number < 9.95 { 1 } else { 0 };
    let text = format!("{number:.digits$}");
    let (whole, rest) = text
        .split_once('.')
        .map_or((text.as_str(), ""), |(whole, rest)| (whole, rest));
    let mut grouped = String::new();
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index).is_multiple_of(3) {
            grouped.push(' ');
        }
        grouped.push(digit);
    }
    if !rest.is_empty() && rest != "0" {
        grouped.push('.');
        grouped.push_str(rest);
    }
    grouped
}

/// The index of the events in [`Row::messages`].
const EVENTS: usize = 6;

const HEADER: [&str; 19] = [
    "Scenario, clients and servers",
    "Time",
    "Range",
    "Put, Txn",
    "LeaseGrant",
    "LeaseRevoke",
    "LeaseKeepAlive",
    "Watch requests",
    "Watch events",
    "Authenticate",
    "Requests",
    "Most requests in 1 s",
    "etcd CPU",
    "etcd memory",
    "Sent by etcd",
    "Lists",
    "Connections",
    "Watchers, streams",
    "Time until half, all of the processes are right",
];

const LEGEND: &str = "
All figures are of etcd: of all members together, except the CPU in percent, which is of one core. \"Requests\" are all messages that etcd
receives; each message of a stream counts. \"Watch requests\" create and cancel watchers; each has one response. \"Watch events\" are the other
messages of watches, which etcd sends. \"Lists\" are complete lists by clients. Processes are clients and servers. A
client is right if it has exactly the registered servers and all keys that the operator wrote. A server is right if it is registered.

A computed row is linear in the number of clients and servers. Exceptions: a figure with \"*\" grows with clients times servers, because the
servers change; a figure with \"+\" includes one request for every 500 keys of each list; a figure with \"~\" depends on the TTL, which grows
with the number of servers. A figure that is not linear and has no rule is
left out.";
