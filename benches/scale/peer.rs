//! An in-memory peer that performs the HTTP/2 handshake, and answers PINGs and unary calls. It does all this in `poll_write` and needs no
//! task, so ten thousand peers cost little, and a call takes the same steps each time.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic_etcd::{BalancedChannel, LbPolicy, channel::ChannelBuilder};

#[derive(Default)]
pub struct Peer {
    greeted: bool,
    unread: Vec<u8>,
    answers: Vec<u8>,
    reader: Option<Waker>,
}

impl Peer {
    /// Handles the bytes that were written, and wakes the reader if there are answers.
    // Never inlined, so that the instructions of the peer can be left out of the count.
    #[inline(never)]
    fn answer(&mut self) {
        self.take_in();
        if !self.answers.is_empty()
            && let Some(reader) = self.reader.take()
        {
            reader.wake();
        }
    }

    fn take_in(&mut self) {
        let mut rest = &self.unread[..];
        if !self.greeted {
            if rest.len() < PREFACE {
                return;
            }
            self.greeted = true;
            rest = &rest[PREFACE..];
            self.answers.extend(EMPTY_SETTINGS);
            self.answers.extend(LARGE_WINDOW);
        }
        while rest.len() >= FRAME_HEAD {
            let length = FRAME_HEAD + usize::from(rest[1]) * 256 + usize::from(rest[2]);
            if rest.len() < length {
                break;
            }
            let (frame, others) = rest.split_at(length);
            match (frame[3], frame[4]) {
                (SETTINGS, 0) => self.answers.extend([0, 0, 0, SETTINGS, ACK, 0, 0, 0, 0]),
                (PING, 0) => {
                    self.answers.extend([0, 0, 8, PING, ACK, 0, 0, 0, 0]);
                    self.answers.extend(&frame[FRAME_HEAD..]);
                }
                (HEADERS | DATA, flags) if flags & END_STREAM != 0 => {
                    respond(&mut self.answers, &frame[5..FRAME_HEAD]);
                }
                _ => {}
            }
            rest = others;
        }
        self.unread = rest.to_vec();
    }
}

impl AsyncRead for Peer {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.answers.is_empty() {
            self.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let length = self.answers.len().min(buf.remaining());
        buf.put_slice(&self.answers[..length]);
        self.answers.drain(..length);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Peer {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.unread.extend(bytes);
        self.answer();
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        for part in parts {
            self.unread.extend(&**part);
        }
        self.answer();
        Poll::Ready(Ok(parts.iter().map(|part| part.len()).sum()))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Appends the response to a call: the head, one message of 300 bytes, and the trailers.
fn respond(answers: &mut Vec<u8>, stream: &[u8]) {
    let mut frame = |kind: u8, flags: u8, payload: &[&[u8]]| {
        let length: usize = payload.iter().map(|part| part.len()).sum();
        answers.extend([0, (length >> 8) as u8, length as u8, kind, flags]);
        answers.extend(stream);
        for part in payload {
            answers.extend(*part);
        }
    };
    frame(HEADERS, END_HEADERS, &[HEAD]);
    frame(DATA, 0, &[MESSAGE_PREFIX, &[b'x'; 300]]);
    frame(HEADERS, END_HEADERS | END_STREAM, &[TRAILERS]);
}

/// Sets a connector with which every connection, to any address, leads to an in-memory peer.
pub fn in_memory<S>(builder: ChannelBuilder<S>, policy: LbPolicy) -> ChannelBuilder<S> {
    builder
        .policy(policy)
        .connector(|_| std::future::ready(Ok(Peer::default())))
}

/// Waits until the picker sees this many endpoints.
pub async fn ready(channel: &BalancedChannel, endpoints: usize) {
    let seen = async {
        while tonic_etcd::__bench::ready(channel) != endpoints {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    };
    // Under valgrind and beside other programs, the rings of a set of 1 000 take more than a minute.
    let in_time = tokio::time::timeout(std::time::Duration::from_secs(300), seen).await;
    assert!(in_time.is_ok(), "{endpoints} endpoints do not become ready");
}

const PREFACE: usize = 24;
const FRAME_HEAD: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const EMPTY_SETTINGS: [u8; FRAME_HEAD] = [0, 0, 0, SETTINGS, 0, 0, 0, 0, 0];
/// A WINDOW_UPDATE that raises the connection's window to its maximum, so that no call waits for the window.
const LARGE_WINDOW: [u8; FRAME_HEAD + 4] = [0, 0, 4, 8, 0, 0, 0, 0, 0, 0x7f, 0xff, 0, 0];
/// HPACK: `:status: 200`, `content-type: application/grpc`.
const HEAD: &[u8] = b"\x88\x0f\x10\x10application/grpc";
/// The prefix of a gRPC message of 303 bytes, and the key and length of a protobuf field of 300 bytes.
const MESSAGE_PREFIX: &[u8] = b"\0\0\0\x01\x2f\x0a\xac\x02";
/// HPACK: `grpc-status: 0`.
const TRAILERS: &[u8] = b"\0\x0bgrpc-status\x010";
