//! Keeps what the live view shows, and draws it.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;
use tonic_etcd::{Address, Instance};

use super::changes::{Event, Kind};
use super::view::{Picture, Row, Sync, frame};
use crate::terminal::Screen;

/// The live view of a service on the terminal.
#[derive(Debug)]
pub(super) struct Live {
    screen: Screen,
    start: Instant,
    service: String,
    sync: Sync,
    /// The instances, with the times of their last events.
    rows: BTreeMap<String, (Row, Instant)>,
    /// The latest lines. They are drawn, and printed at the end.
    lines: VecDeque<String>,
}

impl Live {
    pub(super) fn new(screen: Screen, service: &str) -> Self {
        Self {
            screen,
            start: Instant::now(),
            service: service.to_owned(),
            sync: Sync::default(),
            rows: BTreeMap::new(),
            lines: VecDeque::new(),
        }
    }

    /// Applies an event, with its line.
    pub(super) fn on_event(&mut self, event: &Event, line: String) {
        let address = event.instance.address().to_string();
        if event.kind == Kind::Leave {
            self.rows.remove(&address);
        } else {
            let before = self.rows.remove(&address);
            let check = before.and_then(|(row, _)| row.check);
            let row = Row {
                check,
                ..row(&event.instance)
            };
            self.rows.insert(address, (row, Instant::now()));
        }
        self.lines.push_back(line);
        if self.lines.len() > LINES {
            self.lines.pop_front();
        }
    }

    /// Applies the result of a check.
    pub(super) fn on_checked(&mut self, address: &Address, text: String, is_ready: bool) {
        if let Some((row, _)) = self.rows.get_mut(address.as_str()) {
            row.check = Some((text, is_ready));
        }
    }

    pub(super) fn set_sync(&mut self, sync: Sync) {
        self.sync = sync;
    }

    pub(super) fn draw(&self) {
        let canvas = self.screen.canvas();
        let now = Instant::now();
        let rows = self.rows.values().map(|(row, last)| Row {
            since: now.saturating_duration_since(*last),
            ..row.clone()
        });
        // No more lines than that are visible.
        let hidden = self.lines.len().saturating_sub(canvas.height);
        let picture = Picture {
            service: self.service.clone(),
            sync: self.sync.clone(),
            elapsed: now.saturating_duration_since(self.start),
            rows: rows.collect(),
            events: self.lines.iter().skip(hidden).cloned().collect(),
        };
        self.screen.draw(&frame(&picture, canvas));
    }

    /// Restores the terminal, and stops the process until it is continued.
    pub(super) fn suspend(&self) {
        self.screen.suspend();
    }

    /// Restores the terminal, and returns the latest lines.
    pub(super) fn close(self) -> impl Iterator<Item = String> {
        self.screen.restore();
        self.lines.into_iter()
    }
}

fn row(instance: &Instance) -> Row {
    Row {
        address: instance.address().to_string(),
        leaving: instance.is_leaving(),
        weight: instance.weight(),
        zone: instance.zone().unwrap_or_default().to_owned(),
        version: instance.version().unwrap_or_default().to_owned(),
        since: Duration::ZERO,
        check: None,
    }
}

/// Number of lines that are kept. They are as many as a terminal keeps by default.
const LINES: usize = 1_000;
