//! Finds the streams whose HEADERS the socket has taken. If a connection ends, its other calls have certainly not reached the peer.
//!
//! h2 does not expose this: after the end of a connection, all open streams have the same error. But h2 writes the HEADERS of streams in
//! the order of their ids, so one number is sufficient: the last id in the bytes that the socket has taken.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use h2::StreamId;

/// The last stream whose HEADERS the socket has taken. Clones share the value.
#[derive(Clone, Debug, Default)]
pub(super) struct LastSent(Arc<AtomicU32>);

impl LastSent {
    /// Returns whether the socket has taken the HEADERS of a stream, or their first bytes. If not, the peer has certainly not processed the
    /// stream.
    pub(super) fn includes(&self, stream: StreamId) -> bool {
        // Relaxed: a call reads the value after the end of its socket. The connection's task has passed that end on through h2's lock, and
        // no byte is written after it.
        stream.as_u32() <= self.0.load(Ordering::Relaxed)
    }
}

/// Parses the headers of the frames that the socket takes. The result does not depend on how writes split the frames.
#[derive(Debug)]
pub(super) struct SentStreams {
    last: LastSent,
    /// The beginning of a frame header whose rest was not taken yet.
    header: [u8; HEADER],
    filled: usize,
    /// The bytes up to the next frame header.
    skip: usize,
}

impl SentStreams {
    pub(super) fn new() -> Self {
        Self {
            last: LastSent::default(),
            header: [0; HEADER],
            filled: 0,
            skip: PREFACE,
        }
    }

    pub(super) fn last(&self) -> &LastSent {
        &self.last
    }

    /// Parses the next bytes that the socket has taken.
    pub(super) fn on_taken(&mut self, mut bytes: &[u8]) {
        loop {
            let part = self.skip.min(bytes.len());
            self.skip -= part;
            bytes = &bytes[part..];
            if bytes.is_empty() {
                return;
            }
            let part = (HEADER - self.filled).min(bytes.len());
            self.header[self.filled..self.filled + part].copy_from_slice(&bytes[..part]);
            self.filled += part;
            bytes = &bytes[part..];
            if self.filled == HEADER {
                self.filled = 0;
                self.on_header();
            }
        }
    }

    fn on_header(&mut self) {
        let [a, b, c, kind, _, id @ ..] = self.header;
        self.skip = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        if kind == HEADERS {
            let id = u32::from_be_bytes(id);
            // Trailers of an earlier stream are HEADERS as well.
            if id > self.last.0.load(Ordering::Relaxed) {
                self.last.0.store(id, Ordering::Relaxed);
            }
        }
    }
}

/// Size of the client's connection preface, which precedes the first frame.
const PREFACE: usize = 24;
/// Size of a frame header.
const HEADER: usize = 9;
const HEADERS: u8 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, stream: u32, length: u8) -> Vec<u8> {
        let mut frame = vec![0, 0, length, kind, 0];
        frame.extend(stream.to_be_bytes());
        frame.extend(std::iter::repeat_n(HEADERS, length.into()));
        frame
    }

    #[test]
    fn the_last_headers_are_found_however_writes_are_split() {
        let frames = [
            (4, 0, 12),
            (HEADERS, 1, 40),
            (0, 1, 0),
            (HEADERS, 3, 1),
            (HEADERS, 1, 5),
            (0, 3, 200),
        ];
        let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        let mut lasts = vec![(0, 0)];
        for (kind, stream, length) in frames {
            if kind == HEADERS && stream >= lasts[lasts.len() - 1].1 {
                lasts.push((bytes.len() + HEADER, stream));
            }
            bytes.extend(frame(kind, stream, length));
        }
        for size in 1..bytes.len() {
            let mut sent = SentStreams::new();
            let mut taken = 0;
            for part in bytes.chunks(size) {
                sent.on_taken(part);
                taken += part.len();
                let mut complete = lasts.iter().rev();
                let last = complete.find(|(end, _)| *end <= taken).map(|last| last.1);
                assert_eq!(
                    Some(sent.last.0.load(Ordering::Relaxed)),
                    last,
                    "after {taken} bytes in parts of {size}"
                );
            }
        }
    }
}
