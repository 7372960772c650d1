//! Parses the headers of the frames that a peer sends, without I/O.
//!
//! h2 does not expose three facts that a channel needs: the peer's limit on header lists, whether a HEADERS or DATA frame has followed a
//! PING, and the reason in a GOAWAY. All of them are in the bytes that pass through the connection's I/O.

/// A frame of the peer that matters to the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// A HEADERS or DATA frame, which is part of a response.
    Response,
    /// The peer's `SETTINGS_MAX_HEADER_LIST_SIZE`, in bytes.
    MaxHeaderList(u32),
    /// A GOAWAY with this error code.
    GoAway {
        code: u32,
        /// Whether the debug data begins with `too_many_pings` (gRFC A8).
        too_many_pings: bool,
    },
}

/// Finds the frames in a stream of bytes. The result does not depend on how reads split the stream.
#[derive(Debug)]
pub(super) struct FrameReader {
    /// The bytes of a frame header, or the beginning of a payload that must be parsed.
    buffer: [u8; KEPT],
    filled: usize,
    state: State,
    is_first: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Header,
    /// The payload of a frame of type `kind`. Its last `left` bytes are not read yet.
    Payload {
        kind: u8,
        left: usize,
    },
    /// The first frame of the peer is not SETTINGS, so the peer does not use HTTP/2.
    NotHttp2,
}

impl FrameReader {
    pub(super) fn new() -> Self {
        Self {
            buffer: [0; KEPT],
            filled: 0,
            state: State::Header,
            is_first: true,
        }
    }

    /// Parses the next bytes and reports the frames in them. Returns the number of bytes parsed: all of them, or those up to the end of a
    /// GOAWAY.
    pub(super) fn read(&mut self, all: &[u8], mut on_frame: impl FnMut(Frame)) -> usize {
        let mut bytes = self.skip_whole_frames(all, &mut on_frame);
        while !bytes.is_empty() {
            match self.state {
                State::NotHttp2 => return all.len(),
                State::Header => bytes = self.header(bytes, &mut on_frame),
                State::Payload { kind, left } => {
                    let part = left.min(bytes.len());
                    if matches!(kind, SETTINGS | GOAWAY) {
                        self.keep(&bytes[..part]);
                    }
                    bytes = &bytes[part..];
                    self.state = State::Payload {
                        kind,
                        left: left - part,
                    };
                }
            }
            if let State::Payload { kind, left: 0 } = self.state {
                self.complete(kind, &mut on_frame);
                self.filled = 0;
                self.state = State::Header;
                if kind == GOAWAY {
                    break;
                }
            }
        }
        all.len() - bytes.len()
    }

    /// Skips the frames at the start of `bytes` that are whole and have no payload that must be parsed, and returns the rest. Most frames are
    /// such frames. Without this function, a call needs 220 instructions more.
    fn skip_whole_frames<'a>(
        &self,
        mut bytes: &'a [u8],
        on_frame: &mut impl FnMut(Frame),
    ) -> &'a [u8] {
        if self.state != State::Header || self.filled > 0 || self.is_first {
            return bytes;
        }
        while let Some((&[a, b, c, kind, ..], rest)) = bytes.split_first_chunk::<HEADER>() {
            let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
            let Some(after) = rest.get(length..) else {
                break;
            };
            match kind {
                SETTINGS | GOAWAY => break,
                DATA | HEADERS => on_frame(Frame::Response),
                _ => {}
            }
            bytes = after;
        }
        bytes
    }

    /// Reads the missing bytes of a frame header, and returns the rest of `bytes`.
    fn header<'a>(&mut self, bytes: &'a [u8], on_frame: &mut impl FnMut(Frame)) -> &'a [u8] {
        let part = (HEADER - self.filled).min(bytes.len());
        self.keep(&bytes[..part]);
        if self.filled == HEADER {
            let [a, b, c, kind, ..] = self.buffer;
            let left = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
            self.filled = 0;
            self.state = if std::mem::take(&mut self.is_first) && kind != SETTINGS {
                State::NotHttp2
            } else {
                State::Payload { kind, left }
            };
            // The frame is reported when its header is complete, because the payload of a large DATA frame can arrive much later.
            if self.state != State::NotHttp2 && matches!(kind, DATA | HEADERS) {
                on_frame(Frame::Response);
            }
        }
        &bytes[part..]
    }

    fn keep(&mut self, bytes: &[u8]) {
        let room = KEPT - self.filled;
        let part = bytes.len().min(room);
        self.buffer[self.filled..self.filled + part].copy_from_slice(&bytes[..part]);
        self.filled += part;
    }

    fn complete(&self, kind: u8, on_frame: &mut impl FnMut(Frame)) {
        let payload = &self.buffer[..self.filled];
        match kind {
            SETTINGS => {
                for entry in payload.chunks_exact(6) {
                    if let [0, MAX_HEADER_LIST_SIZE, a, b, c, d] = *entry {
                        on_frame(Frame::MaxHeaderList(u32::from_be_bytes([a, b, c, d])));
                    }
                }
            }
            GOAWAY => {
                // The payload has the id of the last stream, the error code, and the debug data.
                if let [_, _, _, _, a, b, c, d, ref data @ ..] = *payload {
                    on_frame(Frame::GoAway {
                        code: u32::from_be_bytes([a, b, c, d]),
                        too_many_pings: data.starts_with(TOO_MANY_PINGS),
                    });
                }
            }
            _ => {}
        }
    }
}

/// Guesses the protocol of a peer that does not use HTTP/2, from the first bytes that the peer has sent. Returns `None` if there are no
/// bytes, or if they begin an HTTP/2 connection.
pub(crate) fn recognise_protocol(opening: &[u8]) -> Option<&'static str> {
    // The first frame of an HTTP/2 server is SETTINGS: type 4 on stream 0.
    if opening.is_empty() || matches!(opening, [_, _, _, SETTINGS, _, 0, 0, 0, 0, ..]) {
        return None;
    }
    Some(match opening {
        [0x15 | 0x16, 0x03, ..] => "TLS, and the client does not; configure TLS on the channel",
        _ if opening.starts_with(b"HTTP/1.") => "HTTP/1, not HTTP/2",
        _ if opening.starts_with(b"SSH-") => "SSH",
        _ if opening.starts_with(b"-ERR") => "Redis",
        _ => "a protocol that is not HTTP/2",
    })
}

/// Size of the buffer in bytes. It is enough for every SETTINGS frame in use, and for the beginning of a GOAWAY's debug data.
const KEPT: usize = 120;
const HEADER: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const MAX_HEADER_LIST_SIZE: u8 = 6;
const TOO_MANY_PINGS: &[u8] = b"too_many_pings";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
        let mut frame = vec![length[1], length[2], length[3], kind, 0, 0, 0, 0, 0];
        frame.extend_from_slice(payload);
        frame
    }

    fn connection() -> (Vec<u8>, Vec<Frame>) {
        let settings = [0, 3, 0, 0, 0, 100, 0, 6, 0, 0, 32, 0];
        let mut going = vec![0, 0, 0, 0, 0, 0, 0, 11];
        going.extend_from_slice(TOO_MANY_PINGS);
        let bytes = [
            frame(SETTINGS, &settings),
            frame(SETTINGS, &[]),
            frame(6, &[0; 8]),
            frame(HEADERS, &[7; 40]),
            frame(DATA, &[4; 1_000]),
            frame(DATA, &[]),
            frame(GOAWAY, &going),
        ];
        let frames = vec![
            Frame::MaxHeaderList(8_192),
            Frame::Response,
            Frame::Response,
            Frame::Response,
            Frame::GoAway {
                code: 11,
                too_many_pings: true,
            },
        ];
        (bytes.concat(), frames)
    }

    proptest! {
        #[test]
        fn frames_are_parsed_for_every_split_of_the_bytes(cuts in proptest::collection::vec(1..300_usize, 0..200)) {
            let (bytes, expected) = connection();
            let (mut reader, mut found) = (FrameReader::new(), Vec::new());
            let (mut rest, mut cuts) = (&bytes[..], cuts.into_iter());
            while !rest.is_empty() {
                let cut = cuts.next().unwrap_or(rest.len()).min(rest.len());
                let taken = reader.read(&rest[..cut], |frame| found.push(frame));
                rest = &rest[taken..];
            }
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn arbitrary_bytes_never_panic(chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..50), 0..50)) {
            let mut reader = FrameReader::new();
            for chunk in chunks {
                reader.read(&chunk, |_| {});
            }
        }
    }

    /// Most reads begin at a frame boundary, and their frames are whole.
    #[test]
    fn whole_frames_are_reported_as_the_parts_of_frames_are() {
        let (bytes, mut expected) = connection();
        let first = frame(SETTINGS, &[0, 3, 0, 0, 0, 100, 0, 6, 0, 0, 32, 0]).len();
        // A change of the limit in the same read as responses.
        let change = frame(SETTINGS, &[0, 6, 0, 0, 64, 0]);
        let end = bytes.len() - frame(GOAWAY, &[0; 8 + TOO_MANY_PINGS.len()]).len();
        let bytes = [&bytes[..end], &change, &frame(DATA, &[1; 5]), &bytes[end..]].concat();
        expected.splice(4..4, [Frame::MaxHeaderList(16_384), Frame::Response]);
        for cut in first..=bytes.len() {
            let (mut reader, mut found) = (FrameReader::new(), Vec::new());
            for part in [&bytes[..first], &bytes[first..cut], &bytes[cut..]] {
                assert_eq!(reader.read(part, |frame| found.push(frame)), part.len());
            }
            assert_eq!(found, expected, "cut at {cut}");
        }
    }

    #[test]
    fn a_goaway_with_another_reason_is_not_too_many_pings() {
        let (mut reader, mut found) = (FrameReader::new(), Vec::new());
        let mut bytes = frame(SETTINGS, &[]);
        bytes.extend(frame(GOAWAY, b"\0\0\0\0\0\0\0\x0bheaders"));
        bytes.extend(frame(GOAWAY, &[0; 8]));
        bytes.extend(frame(GOAWAY, &[0; 7]));
        bytes.extend(frame(6, &[0; 8]));
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let taken = reader.read(rest, |frame| found.push(frame));
            rest = &rest[taken..];
        }
        let expected = [11, 0].map(|code| Frame::GoAway {
            code,
            too_many_pings: false,
        });
        assert_eq!(found, expected);
    }

    #[test]
    fn the_first_bytes_identify_the_protocol() {
        for (opening, expected) in [
            (&b"HTTP/1.1 400 Bad Request"[..], Some("HTTP/1")),
            (b"\x15\x03\x01\0\x02\x02\x16", Some("TLS")),
            (b"SSH-2.0-OpenSSH_9.2", Some("SSH")),
            (b"-ERR unknown command", Some("Redis")),
            (b"220 smtp.example", Some("a protocol")),
            (b"\0\0\x06\x04\0\0\0\0\0\0\x03", None),
            (b"", None),
        ] {
            let found = recognise_protocol(opening);
            assert_eq!(found.is_some(), expected.is_some(), "{opening:?}");
            assert!(
                found
                    .unwrap_or_default()
                    .starts_with(expected.unwrap_or_default())
            );
        }
    }
}
