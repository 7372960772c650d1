//! Programs under a pseudo-terminal, and what a user sees there.

use std::fs::File;
use std::io::Read;
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::pty::{Winsize, openpty};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};

/// A pseudo-terminal with one program.
pub struct Terminal(Arc<Mutex<Screen>>);

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
        let screen = Arc::new(Mutex::new(Screen::new(columns.into(), rows.into())));
        let shared = Arc::clone(&screen);
        let mut master = File::from(pty.master);
        // The thread ends when the program has closed the terminal. The read then fails.
        std::thread::spawn(move || {
            let mut buffer = [0; 4_096];
            while let Ok(read @ 1..) = master.read(&mut buffer) {
                lock(&shared).feed(&buffer[..read]);
            }
        });
        (child, Self(screen))
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
            let screen = lock(&self.0).clone();
            if condition(&screen) {
                return screen;
            }
            let waited = Instant::now().saturating_duration_since(start);
            assert!(waited < limit, "{what}:\n{}", screen.text());
            sleep(Duration::from_millis(20)).await;
        }
    }
}

fn lock(screen: &Mutex<Screen>) -> MutexGuard<'_, Screen> {
    screen.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a terminal shows. It understands the control sequences that the programs of this repository send, and panics at others.
#[derive(Clone)]
pub struct Screen {
    columns: usize,
    rows: usize,
    main: Vec<Vec<char>>,
    alternate: Option<Vec<Vec<char>>>,
    /// The position of the cursor: row and column, from zero.
    cursor: (usize, usize),
    pub cursor_is_visible: bool,
    /// Whether a colour was ever selected.
    pub was_coloured: bool,
    /// Whether a line of the alternate screen was ever longer than the terminal is wide.
    pub has_wrapped: bool,
    /// The bytes of an incomplete character or control sequence.
    pending: Vec<u8>,
}

impl Screen {
    fn new(columns: usize, rows: usize) -> Self {
        Self {
            columns,
            rows,
            main: vec![vec![' '; columns]; rows],
            alternate: None,
            cursor: (0, 0),
            cursor_is_visible: true,
            was_coloured: false,
            has_wrapped: false,
            pending: Vec::new(),
        }
    }

    /// Returns whether the alternate screen is shown, which hides earlier output.
    pub fn is_alternate(&self) -> bool {
        self.alternate.is_some()
    }

    /// Returns the visible text.
    pub fn text(&self) -> String {
        let lines = self.alternate.as_ref().unwrap_or(&self.main).iter();
        let line = |line: &Vec<char>| line.iter().collect::<String>().trim_end().to_owned();
        lines.map(line).collect::<Vec<_>>().join("\n")
    }

    fn feed(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.pending.push(*byte);
            if self.pending[0] == 0x1b {
                // ESC [ parameters, and a letter at the end.
                if self.pending.len() > 2 && byte.is_ascii_alphabetic() {
                    let sequence = String::from_utf8(std::mem::take(&mut self.pending)).unwrap();
                    self.control(&sequence[1..]);
                }
            } else if let Ok(text) = std::str::from_utf8(&self.pending) {
                let letter = text.chars().next().unwrap();
                self.pending.clear();
                self.print(letter);
            }
        }
    }

    fn lines(&mut self) -> &mut Vec<Vec<char>> {
        self.alternate.as_mut().unwrap_or(&mut self.main)
    }

    fn print(&mut self, letter: char) {
        let columns = self.columns;
        match letter {
            '\r' => self.cursor.1 = 0,
            '\n' => self.line_feed(),
            letter => {
                assert!(!letter.is_control(), "{letter:?}");
                if self.cursor.1 == columns {
                    self.has_wrapped |= self.is_alternate();
                    self.cursor.1 = 0;
                    self.line_feed();
                }
                let (row, column) = self.cursor;
                self.lines()[row][column] = letter;
                self.cursor.1 += 1;
            }
        }
    }

    fn line_feed(&mut self) {
        let columns = self.columns;
        if self.cursor.0 + 1 < self.rows {
            self.cursor.0 += 1;
        } else {
            let lines = self.lines();
            lines.remove(0);
            lines.push(vec![' '; columns]);
        }
    }

    fn control(&mut self, sequence: &str) {
        let (row, column) = self.cursor;
        match sequence {
            "[?1049h" => self.alternate = Some(vec![vec![' '; self.columns]; self.rows]),
            "[?1049l" => self.alternate = None,
            "[?25h" => self.cursor_is_visible = true,
            "[?25l" => self.cursor_is_visible = false,
            "[2J" => self.lines().iter_mut().for_each(|line| line.fill(' ')),
            "[J" => {
                self.lines()[row][column..].fill(' ');
                let below = self.lines()[row + 1..].iter_mut();
                below.for_each(|line| line.fill(' '));
            }
            "[2K" => self.lines()[row].fill(' '),
            "[0m" => {}
            _ if sequence.ends_with('m') => self.was_coloured = true,
            _ if sequence.ends_with('H') => {
                let position = sequence[1..sequence.len() - 1].split_once(';').unwrap();
                let number = |text: &str| text.parse::<usize>().unwrap() - 1;
                self.cursor = (number(position.0), number(position.1));
            }
            _ => panic!("unknown control sequence {sequence:?}"),
        }
    }
}
