//! Shows a picture on the whole terminal, replaces it, and restores the terminal.

use std::io::{self, IsTerminal, StdoutLock, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{Signal, raise};
use nix::unistd::{getpid, getsid};
use terminal_size::{Height, Width, terminal_size};

use super::line::Canvas;

/// A terminal that shows a picture. At the drop and at a panic, the terminal is restored.
#[derive(Debug)]
pub(crate) struct Screen {
    colour: bool,
    /// Whether the picture is on the screen.
    shown: &'static AtomicBool,
}

/// Whether the picture is on the screen. A panic hook and a drop may both restore the terminal.
static SHOWN: AtomicBool = AtomicBool::new(false);

impl Screen {
    /// Opens the alternate screen, so that the picture does not overwrite earlier output. Returns `None` if standard output is not a
    /// terminal, or a terminal without control sequences.
    pub(crate) fn open() -> Option<Self> {
        let is_dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        if is_dumb || !io::stdout().is_terminal() {
            return None;
        }
        // https://no-color.org: any value that is not empty.
        let colour = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            // Before the message: it would vanish together with the alternate screen.
            restore(&SHOWN);
            before(panic);
        }));
        SHOWN.store(true, Ordering::SeqCst);
        write(&mut io::stdout().lock(), ENTER);
        Some(Self {
            colour,
            shown: &SHOWN,
        })
    }

    /// Returns the current size of the terminal.
    pub(crate) fn canvas(&self) -> Canvas {
        let size = terminal_size();
        let (Width(width), Height(height)) = size.unwrap_or((Width(80), Height(24)));
        Canvas {
            width: width.into(),
            height: height.into(),
            colour: self.colour,
        }
    }

    /// Replaces the picture. Nothing is drawn once the terminal is restored.
    pub(crate) fn draw(&self, lines: &[String]) {
        let mut text = String::new();
        for (row, line) in lines.iter().enumerate() {
            // Each row is addressed and erased before it is written, so that nothing scrolls, and a full row is not erased in part.
            let row = row + 1;
            text += "\x1b[";
            text += &row.to_string();
            text += ";1H\x1b[2K";
            text += line;
        }
        if lines.len() < self.canvas().height {
            let row = lines.len() + 1;
            text += "\x1b[";
            text += &row.to_string();
            text += ";1H\x1b[J";
        }
        // The lock prevents that another thread restores the terminal between the check and the write.
        let mut stdout = io::stdout().lock();
        if self.shown.load(Ordering::SeqCst) {
            write(&mut stdout, &text);
        }
    }

    /// Stops the process until SIGCONT, for example after Ctrl-Z. Meanwhile, the terminal is restored for the shell. Does nothing in a process
    /// that a shell cannot continue, because it leads its session.
    pub(crate) fn suspend(&self) {
        if getsid(None) == Ok(getpid()) {
            return;
        }
        let was_shown = restore(self.shown);
        // The process has a handler for SIGTSTP, so that signal does not stop it any more.
        let _ = raise(Signal::SIGSTOP);
        let mut stdout = io::stdout().lock();
        if was_shown && !self.shown.swap(true, Ordering::SeqCst) {
            write(&mut stdout, ENTER);
        }
    }

    /// Closes the alternate screen. The earlier output and the cursor are visible again.
    pub(crate) fn restore(&self) {
        restore(self.shown);
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.restore();
    }
}

/// Returns whether the picture was on the screen.
fn restore(shown: &AtomicBool) -> bool {
    let mut stdout = io::stdout().lock();
    let was_shown = shown.swap(false, Ordering::SeqCst);
    if was_shown {
        write(&mut stdout, LEAVE);
    }
    was_shown
}

/// Writes at once, so that no half of a picture is visible. A failed write to the terminal does not fail the program.
fn write(stdout: &mut StdoutLock<'_>, text: &str) {
    let _ = stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush());
}

/// The alternate screen, and an invisible cursor.
const ENTER: &str = "\x1b[?1049h\x1b[?25l\x1b[2J";
/// No colour, a visible cursor, and the screen as it was.
const LEAVE: &str = "\x1b[0m\x1b[?25h\x1b[?1049l";
