//! An in-memory peer that performs the HTTP/2 handshake and answers PINGs. It does both in `poll_write` and needs no task, so ten thousand
//! peers cost little.

use std::io;
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
    fn take_in(&mut self) {
        let mut rest = &self.unread[..];
        if !self.greeted {
            if rest.len() < PREFACE {
                return;
            }
            self.greeted = true;
            rest = &rest[PREFACE..];
            self.answers.extend(EMPTY_SETTINGS);
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
        self.take_in();
        if !self.answers.is_empty()
            && let Some(reader) = self.reader.take()
        {
            reader.wake();
        }
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
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
    let in_time = tokio::time::timeout(std::time::Duration::from_secs(60), seen).await;
    assert!(in_time.is_ok(), "{endpoints} endpoints do not become ready");
}

const PREFACE: usize = 24;
const FRAME_HEAD: usize = 9;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const ACK: u8 = 1;
const EMPTY_SETTINGS: [u8; FRAME_HEAD] = [0, 0, 0, SETTINGS, 0, 0, 0, 0, 0];
