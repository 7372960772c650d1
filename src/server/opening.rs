//! Whether the client of a connection has begun to speak HTTP. One that has not holds a graceful shutdown up for ever: hyper waits for
//! the end of its preface.

use std::sync::atomic::{AtomicBool, Ordering};

/// How far a connection has come towards its first call.
///
/// Below TLS, which is tonic's, what the client says cannot be read; but who speaks when can be seen. An HTTP/2 server sends its
/// SETTINGS at once, flushes them, and has nothing further to say before the client's preface is in. Then it acknowledges the client's.
#[derive(Debug, Default)]
pub(super) struct Opening {
    /// Whether TLS, if there is any, is set up, and HTTP has begun. Set through a shared reference, by the connection's own task.
    http: AtomicBool,
    /// Whether anything was received before that.
    tls: bool,
    /// How many bytes have been received since.
    received: usize,
    greeting: Greeting,
}

/// The server's side of it.
#[derive(Debug, Default, PartialEq, Eq)]
enum Greeting {
    #[default]
    Unsent,
    Sent,
    Flushed,
    /// The server has said more than its greeting.
    Answered,
}

impl Opening {
    /// Whether the client has sent its preface, or what else begins its first call.
    pub(super) fn is_over(&self) -> bool {
        let preface = PREFACE + if self.tls { TLS_RECORD } else { 0 };
        // An HTTP/1 server greets nobody; there the bytes that came decide.
        self.greeting == Greeting::Answered || self.received >= preface
    }

    pub(super) fn on_http(&self) {
        self.http.store(true, Ordering::Relaxed);
    }

    pub(super) fn on_read(&mut self, bytes: usize) {
        if *self.http.get_mut() {
            self.received = self.received.saturating_add(bytes);
        } else {
            self.tls = true;
        }
    }

    pub(super) fn on_write(&mut self) {
        if *self.http.get_mut() {
            self.greeting = match self.greeting {
                Greeting::Unsent | Greeting::Sent => Greeting::Sent,
                Greeting::Flushed | Greeting::Answered => Greeting::Answered,
            };
        }
    }

    pub(super) fn on_flush(&mut self) {
        if self.greeting == Greeting::Sent {
            self.greeting = Greeting::Flushed;
        }
    }
}

/// The length of the HTTP/2 client preface (RFC 9113, section 3.4).
const PREFACE: usize = 24;
/// What a record of TLS 1.3 adds (RFC 8446, section 5.2): a header of 5 bytes, the content type, a tag of 16.
const TLS_RECORD: usize = 22;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_plaintext_the_bytes_decide() {
        let mut opening = Opening::default();
        opening.on_http();
        opening.on_write();
        opening.on_flush();
        opening.on_read(PREFACE - 1);
        assert!(!opening.is_over());
        opening.on_read(1);
        assert!(opening.is_over());
    }

    #[test]
    fn under_tls_the_handshake_is_no_opening_and_an_answer_is() {
        let mut opening = Opening::default();
        for _ in 0..3 {
            opening.on_read(500);
            opening.on_write();
            opening.on_flush();
        }
        assert!(!opening.is_over(), "the handshake");
        opening.on_http();
        opening.on_flush();
        opening.on_write();
        opening.on_write();
        opening.on_flush();
        assert!(!opening.is_over(), "the greeting");
        // A part of the preface.
        opening.on_read(TLS_RECORD + 10);
        assert!(!opening.is_over());
        opening.on_write();
        assert!(opening.is_over(), "the client's settings are acknowledged");
    }

    #[test]
    fn under_tls_a_request_of_http_1_is_an_opening() {
        let mut opening = Opening::default();
        opening.on_read(500);
        opening.on_http();
        opening.on_read(TLS_RECORD + "GET / HTTP/1.1\r\nHost: a\r\n\r\n".len());
        assert!(opening.is_over());
    }
}
