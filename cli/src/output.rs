//! The standard output of the command.

use std::io::{self, Write};

use serde::Serialize;

use crate::escape::escaped_json;

/// Writes results to stdout, as text or as JSON.
#[derive(Debug)]
pub(crate) struct Output {
    json: bool,
    stdout: io::Stdout,
}

impl Output {
    pub(crate) fn stdout(json: bool) -> Self {
        Self {
            json,
            stdout: io::stdout(),
        }
    }

    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// Writes one line. The caller has escaped external text.
    pub(crate) fn line(&mut self, line: &str) -> io::Result<()> {
        self.write(format!("{line}\n").as_bytes())
    }

    /// Writes a value as JSON on one line, so that a reader can parse a stream of values line by line. External text is escaped as JSON does.
    pub(crate) fn json(&mut self, value: &impl Serialize) -> io::Result<()> {
        self.line(&escaped_json(&serde_json::to_string(value)?))
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut stdout = self.stdout.lock();
        match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
            // `tonic-etcd watch x | head` must end quietly, as other commands do.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
            outcome => outcome,
        }
    }
}
