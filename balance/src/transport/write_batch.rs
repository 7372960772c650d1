//! Collects what h2 writes within one poll of the connection's task, and writes it to the socket at the end of the poll.
//!
//! h2 writes to the socket once for each DATA frame of 256 bytes or more. A poll that sends the requests of ten callers would make ten
//! system calls, or ten TLS records. With the batch, the poll makes one. A frame is never delayed beyond the poll in which h2 wrote it.

use std::fmt;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::sent_streams::{LastSent, SentStreams};

/// The socket of a connection, as h2 sees it. Clones share the socket.
///
/// The lock is never contended: h2 and [`Batched::poll_end`] are called by one task, in turn.
pub(super) struct Batched<T>(Arc<Mutex<Socket<T>>>);

struct Socket<T> {
    io: T,
    /// Whether writes are collected. It is false before the connection's task runs, because nothing would then write the collected bytes to
    /// the socket.
    is_batching: bool,
    /// Bytes that h2 has written. Those before `written` are already in the socket.
    buffer: Vec<u8>,
    written: usize,
    /// The number of bytes that were collected since a poll last ended with an empty buffer.
    collected: usize,
    /// Whether the socket must be flushed.
    needs_flush: bool,
    sent: SentStreams,
    /// Whether a read or a write has shown that the connection has ended. No further byte is then written, although h2 still flushes what it
    /// has: a call whose request was not written is sent to another server, and must not reach this one as well.
    has_ended: bool,
    /// The error of a write at the end of a poll, which h2 receives with its next call.
    error: Option<io::Error>,
}

impl<T> Batched<T> {
    pub(super) fn new(io: T) -> Self {
        Self(Arc::new(Mutex::new(Socket {
            io,
            is_batching: false,
            buffer: Vec::new(),
            written: 0,
            collected: 0,
            needs_flush: false,
            sent: SentStreams::new(),
            has_ended: false,
            error: None,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Socket<T>> {
        // No code panics while the lock is held, except possibly the socket of a custom connector. Such a panic ends the connection's task,
        // and with it the connection.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the last stream whose HEADERS the socket has taken. The value changes with each write.
    pub(super) fn last_sent(&self) -> LastSent {
        self.lock().sent.last().clone()
    }

    /// Starts to collect writes. From now on, every poll of h2 must be followed by [`poll_end`](Self::poll_end).
    pub(super) fn start(&self) {
        self.lock().is_batching = true;
    }
}

impl<T: AsyncWrite + Unpin> Batched<T> {
    /// Writes what h2 has written in this poll. If the socket takes only a part, the task is woken when the socket takes more.
    pub(super) fn poll_end(&self, cx: &mut Context<'_>) {
        let mut socket = self.lock();
        if let Poll::Ready(Err(error)) = socket.poll_flush(cx) {
            socket.end();
            socket.error = Some(error);
            cx.waker().wake_by_ref();
        }
    }
}

impl<T> Socket<T> {
    fn pending(&self) -> &[u8] {
        &self.buffer[self.written..]
    }

    /// Discards what is not written yet, and all later writes.
    fn end(&mut self) {
        self.has_ended = true;
        self.buffer = Vec::new();
        self.written = 0;
    }

    /// Records that the socket has taken bytes of the buffer.
    fn advance(&mut self, bytes: usize) {
        let start = self.written;
        self.written += bytes;
        self.sent.on_taken(&self.buffer[start..self.written]);
        if self.written == self.buffer.len() {
            self.buffer.clear();
            self.written = 0;
        } else if self.written >= LIMIT {
            // A socket that takes only a part at each poll would otherwise never empty the buffer, which would grow without bound.
            self.buffer.drain(..self.written);
            self.written = 0;
        }
    }
}

impl<T: AsyncWrite + Unpin> Socket<T> {
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.needs_flush || self.has_ended {
            return Poll::Ready(Ok(()));
        }
        while !self.pending().is_empty() {
            let bytes =
                ready!(Pin::new(&mut self.io).poll_write(cx, &self.buffer[self.written..]))?;
            if bytes == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.advance(bytes);
        }
        // A connection that has once sent a burst must not keep the memory for it.
        if self.buffer.capacity() > KEPT && self.collected < KEPT {
            self.buffer.shrink_to(KEPT);
        }
        self.collected = 0;
        ready!(Pin::new(&mut self.io).poll_flush(cx))?;
        self.needs_flush = false;
        Poll::Ready(Ok(()))
    }

    fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let Some(error) = self.error.take() {
            return Poll::Ready(Err(error));
        }
        let total: usize = parts.iter().map(|part| part.len()).sum();
        if self.has_ended {
            return Poll::Ready(Ok(total));
        }
        let outcome = self.poll_collect_or_write(cx, parts, total);
        if let Poll::Ready(Err(_)) = outcome {
            self.end();
        }
        outcome
    }

    fn poll_collect_or_write(
        &mut self,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
        total: usize,
    ) -> Poll<io::Result<usize>> {
        self.needs_flush = true;
        let is_small = self.is_batching && total <= LARGE;
        loop {
            if is_small && self.pending().len() + total <= LIMIT {
                for part in parts {
                    self.buffer.extend_from_slice(part);
                }
                self.collected += total;
                return Poll::Ready(Ok(total));
            }
            // A large write is not copied: the socket gets it together with the collected bytes.
            let collected = self.pending().len();
            let bytes = if collected == 0 {
                let bytes = ready!(write_parts(&mut self.io, cx, parts))?;
                self.on_parts_taken(parts, bytes);
                return Poll::Ready(Ok(bytes));
            } else {
                let io = Pin::new(&mut self.io);
                let pending = &self.buffer[self.written..];
                if io.is_write_vectored() && !is_small {
                    let mut all = [IoSlice::new(&[]); PARTS];
                    all[0] = IoSlice::new(pending);
                    let parts = &parts[..parts.len().min(PARTS - 1)];
                    all[1..=parts.len()].copy_from_slice(parts);
                    ready!(io.poll_write_vectored(cx, &all[..=parts.len()]))?
                } else {
                    ready!(io.poll_write(cx, pending))?
                }
            };
            if bytes == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.advance(bytes.min(collected));
            if bytes > collected {
                self.on_parts_taken(parts, bytes - collected);
                return Poll::Ready(Ok(bytes - collected));
            }
        }
    }
}

impl<T> Socket<T> {
    /// Records that the socket has taken the first `bytes` of a write.
    fn on_parts_taken(&mut self, parts: &[IoSlice<'_>], mut bytes: usize) {
        for part in parts {
            let taken = bytes.min(part.len());
            self.sent.on_taken(&part[..taken]);
            bytes -= taken;
        }
    }
}

fn write_parts<T: AsyncWrite + Unpin>(
    io: &mut T,
    cx: &mut Context<'_>,
    parts: &[IoSlice<'_>],
) -> Poll<io::Result<usize>> {
    let io = Pin::new(io);
    if io.is_write_vectored() {
        return io.poll_write_vectored(cx, parts);
    }
    let first = parts.iter().find(|part| !part.is_empty());
    io.poll_write(cx, first.map_or(&[][..], |part| part))
}

impl<T> Clone for Batched<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> fmt::Debug for Batched<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batched").finish_non_exhaustive()
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Batched<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut socket = self.lock();
        if let Some(error) = socket.error.take() {
            return Poll::Ready(Err(error));
        }
        let (filled, has_room) = (buf.filled().len(), buf.remaining() > 0);
        let outcome = Pin::new(&mut socket.io).poll_read(cx, buf);
        let is_end = match &outcome {
            Poll::Ready(Ok(())) => has_room && buf.filled().len() == filled,
            Poll::Ready(Err(_)) => true,
            Poll::Pending => false,
        };
        if is_end {
            socket.end();
        }
        outcome
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Batched<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.lock().poll_write(cx, &[IoSlice::new(buf)])
    }

    /// Does nothing while writes are collected: [`Batched::poll_end`] flushes the socket.
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut socket = self.lock();
        if socket.is_batching {
            return Poll::Ready(socket.error.take().map_or(Ok(()), Err));
        }
        socket.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut socket = self.lock();
        ready!(socket.poll_flush(cx))?;
        Pin::new(&mut socket.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.lock().poll_write(cx, bufs)
    }

    /// True, so that h2 passes the header and the payload of a frame in one call.
    fn is_write_vectored(&self) -> bool {
        true
    }
}

/// Limit on the collected bytes. When it is reached, they are written before the end of the poll.
const LIMIT: usize = 32 << 10;
/// Memory that an idle connection keeps for the next batch.
const KEPT: usize = 4 << 10;
/// A write of more bytes than this is not copied to the buffer.
const LARGE: usize = 8 << 10;
/// Maximum number of parts of one write: the collected bytes, and the header and the payload of a frame, with room to spare.
const PARTS: usize = 8;

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, proptest};
    use std::task::Waker;

    use super::*;

    /// The call whose request is in the buffer is then sent to another server.
    #[tokio::test]
    async fn after_the_end_of_the_socket_no_collected_byte_is_written() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};

        let (near, mut far) = tokio::io::duplex(1 << 16);
        let mut socket = Batched::new(near);
        socket.start();
        socket.write_all(&[1; 300]).await.expect("is collected");
        far.shutdown().await.expect("the peer half-closes");
        assert_eq!(socket.read(&mut [0; 10]).await.expect("the end"), 0);
        socket.write_all(&[2; 300]).await.expect("is discarded");
        std::future::poll_fn(|cx| {
            socket.poll_end(cx);
            Poll::Ready(())
        })
        .await;
        drop(socket);
        let mut received = Vec::new();
        far.read_to_end(&mut received).await.expect("the end");
        assert_eq!(received, [0; 0]);
    }

    /// A socket that takes a random number of bytes, or none.
    #[derive(Debug)]
    struct Slow {
        rng: fastrand::Rng,
        taken: Vec<u8>,
        writes: usize,
        is_vectored: bool,
        /// Whether the socket takes everything at once.
        is_fast: bool,
    }

    impl Slow {
        fn room(&mut self) -> Option<usize> {
            if self.is_fast {
                return Some(usize::MAX);
            }
            (self.rng.u8(..3) > 0).then(|| self.rng.usize(1..20_000))
        }
    }

    impl AsyncRead for Slow {
        fn poll_read(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            _: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    impl AsyncWrite for Slow {
        fn poll_write(
            self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &[u8],
        ) -> Poll<io::Result<usize>> {
            self.poll_write_vectored(cx, &[IoSlice::new(buf)])
        }

        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bufs: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            let Some(mut room) = self.room() else {
                return Poll::Pending;
            };
            self.writes += 1;
            let mut written = 0;
            for buf in bufs {
                let part = buf.len().min(room);
                self.taken.extend_from_slice(&buf[..part]);
                room -= part;
                written += part;
            }
            Poll::Ready(Ok(written))
        }

        fn is_write_vectored(&self) -> bool {
            self.is_vectored
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    fn unstarted(seed: u64, is_fast: bool) -> Batched<Slow> {
        Batched::new(Slow {
            rng: fastrand::Rng::with_seed(seed),
            taken: Vec::new(),
            writes: 0,
            is_vectored: seed.is_multiple_of(2),
            is_fast,
        })
    }

    fn batched(seed: u64, is_fast: bool) -> Batched<Slow> {
        let batched = unstarted(seed, is_fast);
        batched.start();
        batched
    }

    proptest! {
        /// For all sizes of writes, and for all sizes that the socket takes: the bytes stay in order, the batch stays within its limit, and
        /// after the end of a poll, nothing is left that the socket would have taken.
        #[test]
        fn bytes_stay_in_order_within_the_limit(seed in any::<u64>(), is_fast in any::<bool>()) {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut batched = batched(seed, is_fast);
            let mut cx = Context::from_waker(Waker::noop());
            let mut sent = Vec::new();
            for _ in 0..60 {
                for _ in 0..rng.usize(..6) {
                    let largest = [100, 1_000, 40_000][rng.usize(..3)];
                    let size = rng.usize(0..largest) + 9;
                    let frame: Vec<u8> = std::iter::repeat_with(|| rng.u8(..)).take(size).collect();
                    let (head, payload) = frame.split_at(9);
                    let parts = [IoSlice::new(head), IoSlice::new(payload)];
                    let taken = Pin::new(&mut batched).poll_write_vectored(&mut cx, &parts);
                    if let Poll::Ready(taken) = taken {
                        sent.extend_from_slice(&frame[..taken.expect("no error")]);
                    }
                    let socket = batched.lock();
                    assert!(socket.pending().len() <= LIMIT);
                    assert!(socket.buffer.len() <= 2 * LIMIT, "{}", socket.buffer.len());
                }
                batched.poll_end(&mut cx);
                assert!(!is_fast || batched.lock().pending().is_empty());
            }
            let socket = batched.lock();
            let all = [&socket.io.taken[..], socket.pending()].concat();
            assert!(all == sent, "the bytes differ: {} and {}", all.len(), sent.len());
        }
    }

    #[test]
    fn the_frames_of_one_poll_are_sent_in_one_write() {
        let mut batched = batched(2, true);
        let mut cx = Context::from_waker(Waker::noop());
        for size in [16, 300, 900, 5_000] {
            for _ in 0..5 {
                let frame = vec![7; size];
                let taken = Pin::new(&mut batched).poll_write(&mut cx, &frame);
                assert!(matches!(taken, Poll::Ready(Ok(taken)) if taken == size));
            }
            assert_eq!(
                batched.lock().io.writes,
                0,
                "nothing must be written before poll_end"
            );
            batched.poll_end(&mut cx);
            assert_eq!(std::mem::take(&mut batched.lock().io.writes), 1);
        }
        // A large payload is written at once, with what was collected before.
        let _ = Pin::new(&mut batched).poll_write(&mut cx, &[7; 300]);
        let taken = Pin::new(&mut batched).poll_write(&mut cx, &vec![7; 20_000]);
        assert!(matches!(taken, Poll::Ready(Ok(20_000))));
        assert_eq!(batched.lock().io.writes, 1);
    }

    #[test]
    fn a_socket_that_never_takes_everything_does_not_fill_the_memory() {
        let mut batched = batched(2, false);
        let mut cx = Context::from_waker(Waker::noop());
        for _ in 0..2_000 {
            let _ = Pin::new(&mut batched).poll_write(&mut cx, &[7; 5_000]);
            batched.poll_end(&mut cx);
            assert!(batched.lock().buffer.len() <= 2 * LIMIT);
        }
    }

    #[test]
    fn the_memory_of_a_burst_is_released() {
        let mut batched = batched(2, true);
        let mut cx = Context::from_waker(Waker::noop());
        for size in [30_000, 100] {
            for _ in 0..size / 100 {
                let _ = Pin::new(&mut batched).poll_write(&mut cx, &[7; 100]);
            }
            batched.poll_end(&mut cx);
        }
        assert!(batched.lock().buffer.capacity() <= KEPT);
    }

    #[test]
    fn writes_before_the_task_starts_are_not_collected() {
        let mut batched = unstarted(2, true);
        let mut cx = Context::from_waker(Waker::noop());
        let _ = Pin::new(&mut batched).poll_write(&mut cx, &[7; 16]);
        assert_eq!(batched.lock().io.taken.len(), 16);
    }
}
