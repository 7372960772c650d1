//! Detects whether the client of a connection has started HTTP. A connection whose client sends no complete HTTP/2 preface would block a
//! graceful shutdown forever, because hyper waits for the end of the preface.

use std::sync::atomic::{AtomicBool, Ordering};

/// The progress of a connection towards its first call.
///
/// tonic handles TLS above this layer, so the bytes of the client cannot be decoded here. Only the order of reads and writes, and the
/// numbers of bytes, are visible. An HTTP/2 server sends its SETTINGS at once, flushes them, and sends nothing more until it has received
/// the preface and the SETTINGS of the client. It then acknowledges the SETTINGS of the client. A write after the flush therefore shows
/// that the client has sent its preface.
#[derive(Debug, Default)]
pub(super) struct Opening {
    /// Whether the server has started HTTP on the connection: at once in plaintext, and after the handshake with TLS. The client may not have
    /// sent anything yet. The flag is atomic, because it is set through a shared reference.
    http: AtomicBool,
    /// Whether bytes were received before HTTP began: these are the bytes of a TLS handshake.
    tls: bool,
    /// Number of bytes received since HTTP began.
    received: usize,
    greeting: Greeting,
}

/// The progress of the greeting: the SETTINGS that the server sends at once.
#[derive(Debug, Default, PartialEq, Eq)]
enum Greeting {
    #[default]
    Unsent,
    Sent,
    Flushed,
    /// The server has sent more than its greeting: it has acknowledged the SETTINGS of the client.
    Answered,
}

impl Opening {
    /// Returns whether the client has sent its preface, or the beginning of an HTTP/1 request.
    pub(super) fn is_over(&self) -> bool {
        let preface = PREFACE + if self.tls { TLS_RECORD } else { 0 };
        // An HTTP/1 server sends no greeting, so only the number of received bytes can show that a request has begun.
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

/// Length of the HTTP/2 client preface (RFC 9113, section 3.4).
const PREFACE: usize = 24;
/// Overhead of a TLS 1.3 record (RFC 8446, section 5.2): a header of 5 bytes, the content type of 1 byte, and a tag of 16 bytes.
const TLS_RECORD: usize = 22;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_plaintext_the_complete_preface_ends_the_opening() {
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
    fn under_tls_the_acknowledged_settings_end_the_opening() {
        let mut opening = Opening::default();
        for _ in 0..3 {
            opening.on_read(500);
            opening.on_write();
            opening.on_flush();
        }
        assert!(!opening.is_over(), "the handshake must not count");
        opening.on_http();
        opening.on_flush();
        opening.on_write();
        opening.on_write();
        opening.on_flush();
        assert!(!opening.is_over(), "the greeting must not count");
        // A part of the preface.
        opening.on_read(TLS_RECORD + 10);
        assert!(!opening.is_over());
        opening.on_write();
        assert!(
            opening.is_over(),
            "the acknowledgement of the client's SETTINGS must end the opening"
        );
    }

    #[test]
    fn under_tls_an_http_1_request_ends_the_opening() {
        let mut opening = Opening::default();
        opening.on_read(500);
        opening.on_http();
        opening.on_read(TLS_RECORD + "GET / HTTP/1.1\r\nHost: a\r\n\r\n".len());
        assert!(opening.is_over());
    }
}
