//! Shows the cluster: as a live picture if standard output is a terminal, and otherwise as plain lines.

use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{Instant, interval};
use tonic_etcd::BalancedChannel;
use tonic_etcd::channel::{BalancedChannelExt, EndpointReport};

use super::tally::{Pace, Tally};
use super::terminal::Screen;
use super::view::{Event, Picture, Server, changes, frame};

/// Where the demonstration reports what happens. Plain lines are printed at once. A live picture is drawn until
/// [`close`](Self::close), which then prints the same lines.
pub struct Display(Option<Live>);

/// Reports lines from other tasks.
#[derive(Clone)]
pub struct Reporter(Option<Arc<Mutex<State>>>);

impl Reporter {
    /// Reports a line.
    pub fn line(&self, line: String) {
        match &self.0 {
            Some(state) => lock(state).lines.push(line),
            None => println!("{line}"),
        }
    }
}

/// A live picture, which a task draws.
struct Live {
    state: Arc<Mutex<State>>,
    screen: Arc<Screen>,
    drawing: JoinHandle<()>,
}

pub struct State {
    start: Instant,
    /// What was reported, for the end.
    lines: Vec<String>,
    channel: Option<BalancedChannel>,
    picture: Picture,
}

impl Display {
    /// Opens the picture if standard output is a terminal.
    pub fn open(tally: &Arc<Mutex<Tally>>) -> Self {
        let Some(screen) = Screen::open() else {
            return Self(None);
        };
        let screen = Arc::new(screen);
        let state = Arc::new(Mutex::new(State {
            start: Instant::now(),
            lines: Vec::new(),
            channel: None,
            picture: Picture::default(),
        }));
        let drawing = draw(Arc::clone(&screen), Arc::clone(&state), Arc::clone(tally));
        Self(Some(Live {
            drawing: tokio::spawn(drawing),
            state,
            screen,
        }))
    }

    /// Returns whether a picture is shown.
    pub fn is_live(&self) -> bool {
        self.0.is_some()
    }

    /// Reports a line.
    pub fn line(&self, line: String) {
        self.reporter().line(line);
    }

    pub fn reporter(&self) -> Reporter {
        Reporter(self.0.as_ref().map(|live| Arc::clone(&live.state)))
    }

    /// Sets the etcd in the heading of the picture.
    pub fn etcd(&self, etcd: &str) {
        self.line(format!("etcd {etcd}"));
        if let Some(live) = &self.0 {
            etcd.clone_into(&mut lock(&live.state).picture.etcd);
        }
    }

    /// Sets what the demonstration does at the moment.
    pub fn title(&self, title: &str) {
        if let Some(live) = &self.0 {
            let mut state = lock(&live.state);
            title.clone_into(&mut state.picture.title);
            state.event(title.to_owned());
        }
    }

    /// Sets the channel whose servers are shown.
    pub fn channel(&self, channel: &BalancedChannel) {
        if let Some(live) = &self.0 {
            lock(&live.state).channel = Some(channel.clone());
        }
    }

    /// Removes the picture, and stops the process until it is continued.
    pub fn suspend(&self) {
        if let Some(live) = &self.0 {
            live.screen.suspend();
        }
    }

    /// Removes the picture, and prints the lines.
    pub fn close(self) {
        let Some(live) = self.0 else {
            return;
        };
        live.drawing.abort();
        live.screen.restore();
        let mut stdout = std::io::stdout().lock();
        for line in std::mem::take(&mut lock(&live.state).lines) {
            // After a hangup, the terminal does not exist. `println` would panic.
            let _ = writeln!(stdout, "{line}");
        }
    }
}

async fn draw(screen: Arc<Screen>, state: Arc<Mutex<State>>, tally: Arc<Mutex<Tally>>) {
    let mut ticks = interval(PERIOD);
    loop {
        ticks.tick().await;
        let now = Instant::now();
        let mut state = lock(&state);
        {
            let mut tally = lock(&tally);
            let pace = tally.pace(now);
            state.update(&tally, &pace, now);
        }
        screen.draw(&frame(&state.picture, screen.canvas()));
    }
}

impl State {
    fn event(&mut self, text: String) {
        let at = Instant::now().saturating_duration_since(self.start);
        self.picture.events.push(Event { at, text });
        let excess = self.picture.events.len().saturating_sub(EVENTS);
        self.picture.events.drain(..excess);
    }

    fn update(&mut self, tally: &Tally, pace: &Pace, now: Instant) {
        let status = self.channel.as_ref().and_then(BalancedChannelExt::status);
        let endpoints = status.map(|status| status.endpoints).unwrap_or_default();
        let servers: Vec<_> = endpoints
            .iter()
            .map(|report| server(report, tally, pace))
            .collect();
        for change in changes(&self.picture.servers, &servers) {
            self.event(change);
        }
        self.picture = Picture {
            elapsed: now.saturating_duration_since(self.start),
            rate: pace.rate,
            p50: pace.p50,
            p99: pace.p99,
            calls: tally.calls(),
            failed: tally.failed,
            caught: tally.caught,
            servers,
            ..std::mem::take(&mut self.picture)
        };
    }
}

fn server(report: &EndpointReport, tally: &Tally, pace: &Pace) -> Server {
    let endpoint = &report.endpoint;
    let address = endpoint.address.as_str();
    Server {
        name: tally.names.get(address).cloned().unwrap_or_default(),
        address: address.to_owned(),
        state: endpoint.state.to_string(),
        registered: report.instance.is_some(),
        rate: pace.servers.get(address).copied().unwrap_or_default(),
        calls: endpoint.calls,
        last_error: endpoint.last_error.clone(),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The time between two pictures.
const PERIOD: Duration = Duration::from_millis(200);
/// Number of events that are kept. A terminal shows fewer.
const EVENTS: usize = 100;
