//! Programs under a pseudo-terminal, and what a user sees there.

use std::fs::File;
use std::io::Read;
use std::num::NonZeroU16;
use std::os::fd::AsFd;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{Winsize, openpty};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};
use vt100::{Callbacks, Color, Parser};

/// A pseudo-terminal with one program. The terminal is closed when the value is dropped.
pub struct Terminal {
    screen: Arc<Mutex<Screen>>,
    is_open: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
}

impl Terminal {
    /// Starts a program whose standard streams are a new terminal.
    pub fn spawn(mut command: Command, columns: u16, rows: u16) -> (Child, Self) {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pty = openpty(&size, None).unwrap();
        let stream = || Stdio::from(pty.slave.try_clone().unwrap());
        let child = command
            .env("TERM", "xterm-256color")
            .stdin(stream())
            .stdout(stream())
            .stderr(stream())
            .spawn()
            .unwrap();
        let size = |number| NonZeroU16::new(number).unwrap();
        let mut parser = Parser::new_with_callbacks(size(rows), size(columns), 0, OnlyKnown);
        let screen = Arc::new(Mutex::new(Screen::default()));
        let shared = Arc::clone(&screen);
        let mut master = File::from(pty.master);
        let is_open = Arc::new(AtomicBool::new(true));
        let opened = Arc::clone(&is_open);
        // The thread also ends when the program has closed the terminal. The read then fails.
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 4_096];
            while opened.load(Ordering::SeqCst) {
                let mut readable = [PollFd::new(master.as_fd(), PollFlags::POLLIN)];
                // A signal can interrupt the wait.
                if !matches!(poll(&mut readable, PollTimeout::from(20_u8)), Ok(1..)) {
                    continue;
                }
                let Ok(read @ 1..) = master.read(&mut buffer) else {
                    break;
                };
                parser.process(&buffer[..read]);
                lock(&shared).update(parser.screen());
            }
        });
        let terminal = Self {
            screen,
            is_open,
            reader: Some(reader),
        };
        (child, terminal)
    }

    /// Closes the terminal, as a lost connection does: the writes of the program fail. Only the leader of a session gets SIGHUP from the
    /// system, and a shell passes it on.
    pub fn close(mut self) {
        self.is_open.store(false, Ordering::SeqCst);
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
    }

    /// Waits until the screen satisfies a condition, and returns it. Panics with the screen after `limit`.
    pub async fn until(
        &self,
        what: &str,
        limit: Duration,
        condition: impl Fn(&Screen) -> bool,
    ) -> Screen {
        let start = Instant::now();
        loop {
            let screen = lock(&self.screen).clone();
            if condition(&screen) {
                return screen;
            }
            let waited = Instant::now().saturating_duration_since(start);
            assert!(waited < limit, "{what}:\n{}", screen.text());
            sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.is_open.store(false, Ordering::SeqCst);
    }
}

/// Waits until a program is stopped, and panics after `limit`.
pub async fn until_stopped(child: &Child, limit: Duration) {
    let id = Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap());
    let start = Instant::now();
    let flags = WaitPidFlag::WUNTRACED | WaitPidFlag::WNOHANG;
    loop {
        match waitpid(id, Some(flags)).unwrap() {
            WaitStatus::Stopped(..) => return,
            WaitStatus::StillAlive => {}
            status => panic!("{status:?}"),
        }
        let waited = Instant::now().saturating_duration_since(start);
        assert!(waited < limit, "the program is not stopped");
        sleep(Duration::from_millis(20)).await;
    }
}

fn lock(screen: &Mutex<Screen>) -> MutexGuard<'_, Screen> {
    screen.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a terminal shows, as the emulator of the crate `vt100` understands the output of the program.
#[derive(Clone, Default)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "independent facts, which tests read one by one"
)]
pub struct Screen {
    text: String,
    /// Whether the alternate screen is shown, which hides earlier output.
    is_alternate: bool,
    cursor_is_hidden: bool,
    /// Whether a coloured cell was ever on the screen.
    pub was_coloured: bool,
    /// Whether a line of the alternate screen was ever longer than the terminal is wide.
    pub has_wrapped: bool,
}

impl Screen {
    /// Returns whether the alternate screen is shown, which hides earlier output.
    pub fn is_alternate(&self) -> bool {
        self.is_alternate
    }

    pub fn cursor_is_visible(&self) -> bool {
        !self.cursor_is_hidden
    }

    /// Returns the visible text. A line that is longer than the terminal is wide is one line here.
    pub fn text(&self) -> &str {
        &self.text
    }

    fn update(&mut self, screen: &vt100::Screen) {
        let (rows, columns) = screen.size();
        let cells = (0..rows.get()).flat_map(|row| (0..columns.get()).map(move |c| (row, c)));
        self.was_coloured |= cells
            .filter_map(|(row, column)| screen.cell(row, column))
            .any(|cell| cell.fgcolor() != Color::Default || cell.bgcolor() != Color::Default);
        self.is_alternate = screen.alternate_screen();
        self.has_wrapped |= self.is_alternate && (0..rows.get()).any(|row| screen.row_wrapped(row));
        self.cursor_is_hidden = screen.hide_cursor();
        let lines = screen.contents();
        let lines: Vec<_> = lines.lines().map(str::trim_end).collect();
        self.text = lines.join("\n");
    }
}

/// Panics at a control character or sequence that the emulator does not know: other terminals may not know it either.
struct OnlyKnown;

impl Callbacks for OnlyKnown {
    fn unhandled_control(&mut self, _: &mut vt100::Screen, byte: u8) {
        panic!("unknown control character {byte:#04x}");
    }

    fn unhandled_escape(&mut self, _: &mut vt100::Screen, _: Option<u8>, _: Option<u8>, byte: u8) {
        panic!("unknown escape sequence {:?}", char::from(byte));
    }

    fn unhandled_csi(
        &mut self,
        _: &mut vt100::Screen,
        _: Option<u8>,
        _: Option<u8>,
        parameters: &[&[u16]],
        letter: char,
    ) {
        panic!("unknown control sequence {parameters:?} {letter:?}");
    }

    fn unhandled_osc(&mut self, _: &mut vt100::Screen, parameters: &[&[u8]]) {
        panic!("unknown operating system command {parameters:?}");
    }
}
