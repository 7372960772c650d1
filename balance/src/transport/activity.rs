//! Records what a connection has read, and when. The record shows whether the peer is alive, and which limits the peer has announced.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::frames::{Frame, FrameReader};

/// The record of one connection. The connection's task updates the record at each read. Calls use the record only if the connection was
/// silent for a while, or if a call takes too long.
pub(super) struct Activity {
    started: Instant,
    bytes: AtomicU64,
    /// The time of the last read, in microseconds since `started`; 0 if nothing was read.
    last_read: AtomicU64,
    /// The number of HEADERS and DATA frames that the peer has sent.
    responses: AtomicU64,
    /// The peer's limit on a header list, in bytes; `u32::MAX` if the peer has announced no limit.
    max_header_list: AtomicU32,
    too_many_pings: AtomicBool,
    /// The error code of the peer's last GOAWAY plus one; 0 if the peer has sent no GOAWAY.
    goaway: AtomicU64,
    /// Whether the end of the connection was reported, or the peer has left a PING unanswered.
    unresponsive: AtomicBool,
    /// The number of times that [`end_waits`](Self::end_waits) has ended all waits.
    ended_waits: AtomicU64,
    /// The number of PINGs that the peer has answered.
    pongs: AtomicU64,
    /// Whether a task waits in [`wait_since`](Self::wait_since).
    awaited: AtomicBool,
    changed: Notify,
    /// The first bytes that the peer sent, for the error message if they are not HTTP/2.
    first_bytes: Mutex<Vec<u8>>,
    /// A function that returns whether calls are open on the connection.
    is_busy: OnceLock<Box<dyn Fn() -> bool + Send + Sync>>,
}

impl Activity {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            started: Instant::now(),
            bytes: AtomicU64::new(0),
            last_read: AtomicU64::new(0),
            responses: AtomicU64::new(0),
            max_header_list: AtomicU32::new(u32::MAX),
            too_many_pings: AtomicBool::new(false),
            goaway: AtomicU64::new(0),
            unresponsive: AtomicBool::new(false),
            ended_waits: AtomicU64::new(0),
            pongs: AtomicU64::new(0),
            awaited: AtomicBool::new(false),
            changed: Notify::new(),
            first_bytes: Mutex::new(Vec::new()),
            is_busy: OnceLock::new(),
        })
    }

    /// Returns the numbers of bytes and responses that were read up to now, and the time of the last read.
    pub(super) fn progress(&self) -> ReadProgress {
        ReadProgress {
            bytes: self.bytes.load(Ordering::Relaxed),
            responses: self.responses.load(Ordering::Relaxed),
            at: self.last_read(),
        }
    }

    /// Returns the time of the last read. If nothing was read, returns the time when the record was created.
    pub(super) fn last_read(&self) -> Instant {
        self.started + Duration::from_micros(self.last_read.load(Ordering::Relaxed))
    }

    /// Returns whether anything was read since `then`.
    pub(super) fn has_read_since(&self, then: Instant) -> bool {
        self.last_read.load(Ordering::Relaxed) >= self.micros(then)
    }

    pub(super) fn max_header_list(&self) -> u32 {
        self.max_header_list.load(Ordering::Relaxed)
    }

    /// Returns whether the peer has closed the connection because of our PINGs.
    pub(super) fn has_too_many_pings(&self) -> bool {
        self.too_many_pings.load(Ordering::Relaxed)
    }

    /// Returns the error code of the peer's last GOAWAY, if any.
    pub(super) fn goaway(&self) -> Option<u32> {
        let code = self.goaway.load(Ordering::Relaxed).checked_sub(1)?;
        u32::try_from(code).ok()
    }

    pub(super) fn first_bytes(&self) -> Vec<u8> {
        self.first_bytes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Sets the function that returns whether calls are open on the connection.
    pub(super) fn set_busy(&self, is_busy: impl Fn() -> bool + Send + Sync + 'static) {
        let _ = self.is_busy.set(Box::new(is_busy));
    }

    pub(super) fn is_busy(&self) -> bool {
        self.is_busy.get().is_some_and(|is_busy| is_busy())
    }

    /// Returns the mark for [`wait_since`](Self::wait_since). Call this function before the PING is requested. Otherwise the wait could
    /// miss the answer.
    pub(super) fn mark(&self) -> Mark {
        Mark {
            bytes: self.bytes.load(Ordering::SeqCst),
            pongs: self.pongs.load(Ordering::SeqCst),
            ended_waits: self.ended_waits.load(Ordering::SeqCst),
        }
    }

    /// Waits until the peer has sent a byte or answered a PING after `mark`, and then returns true. Returns false if the connection ends
    /// first, if the peer leaves a PING unanswered, or if [`end_waits`](Self::end_waits) is called.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future changes nothing.
    pub(super) async fn wait_since(&self, mark: Mark) -> bool {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            // SeqCst here and in `on_read`: a wait sets the flag and then compares the bytes; a read adds the bytes and then loads the
            // flag. So at least one of the two sees the write of the other.
            self.awaited.store(true, Ordering::SeqCst);
            // The bytes of a PONG can be read before the mark is taken, while h2 processes the PONG only afterwards. So a processed PONG
            // also ends the wait, even if no byte was read since the mark.
            if self.bytes.load(Ordering::SeqCst) > mark.bytes
                || self.pongs.load(Ordering::SeqCst) != mark.pongs
            {
                return true;
            }
            let is_ended = self.ended_waits.load(Ordering::SeqCst) != mark.ended_waits;
            if is_ended || self.unresponsive.load(Ordering::SeqCst) {
                return false;
            }
            changed.await;
        }
    }

    /// Sets whether the connection counts as unresponsive, because it has ended or the peer has left a PING unanswered. While it counts as
    /// unresponsive, waits for the peer return false at once.
    pub(super) fn set_unresponsive(&self, unresponsive: bool) {
        self.unresponsive.store(unresponsive, Ordering::SeqCst);
        if unresponsive {
            self.changed.notify_waiters();
        }
    }

    /// Ends the waits in progress. Called when nothing was read in time, and the [PING budget](super::stall_detection) allows no PING.
    pub(super) fn end_waits(&self) {
        self.ended_waits.fetch_add(1, Ordering::SeqCst);
        self.changed.notify_waiters();
    }

    /// Records that the peer has answered a PING.
    pub(super) fn on_pong(&self) {
        self.pongs.fetch_add(1, Ordering::SeqCst);
        self.changed.notify_waiters();
    }

    fn on_read(&self, bytes: usize) {
        let bytes = u64::try_from(bytes).unwrap_or_default();
        // Relaxed: there is one writer, and readers only compare the value with a time of their own.
        self.last_read
            .store(self.micros(Instant::now()), Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::SeqCst);
        if self.awaited.load(Ordering::SeqCst) {
            self.awaited.store(false, Ordering::SeqCst);
            self.changed.notify_waiters();
        }
    }

    pub(super) fn on_response(&self) {
        self.responses.fetch_add(1, Ordering::Relaxed);
    }

    fn on_frame(&self, frame: Frame) {
        match frame {
            Frame::Response => self.on_response(),
            Frame::MaxHeaderList(limit) => self.max_header_list.store(limit, Ordering::Relaxed),
            Frame::GoAway {
                code,
                too_many_pings,
            } => {
                self.goaway.store(u64::from(code) + 1, Ordering::Relaxed);
                self.too_many_pings
                    .fetch_or(too_many_pings, Ordering::Relaxed);
            }
        }
    }

    fn keep_first_bytes(&self, bytes: &[u8]) {
        let mut first_bytes = self
            .first_bytes
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let room = MAX_FIRST_BYTES.saturating_sub(first_bytes.len());
        first_bytes.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }

    fn micros(&self, at: Instant) -> u64 {
        let since = at.saturating_duration_since(self.started);
        u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
    }
}

impl fmt::Debug for Activity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Activity")
            .field("bytes", &self.bytes)
            .field("responses", &self.responses)
            .field("unresponsive", &self.unresponsive)
            .finish_non_exhaustive()
    }
}

/// The progress of a connection's reads at one time.
#[derive(Clone, Copy, Debug)]
pub(super) struct ReadProgress {
    pub(super) bytes: u64,
    pub(super) responses: u64,
    pub(super) at: Instant,
}

/// The state of a connection when a wait for its peer starts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mark {
    bytes: u64,
    pongs: u64,
    ended_waits: u64,
}

/// A byte stream that records its reads in an [`Activity`].
#[derive(Debug)]
pub(super) struct Watched<T> {
    io: T,
    activity: Arc<Activity>,
    frames: FrameReader,
    read: usize,
    /// Bytes that were read after a GOAWAY and that are held back from h2.
    held: Bytes,
    /// Whether the next read returns `Pending` once, so that h2 writes its queue first.
    pause: bool,
}

impl<T> Watched<T> {
    pub(super) fn new(io: T, activity: Arc<Activity>) -> Self {
        Self {
            io,
            activity,
            frames: FrameReader::new(),
            read: 0,
            held: Bytes::new(),
            pause: false,
        }
    }

    /// Parses the bytes of `buf` from the index `before` on, and leaves them in `buf` for h2, but only up to the end of a GOAWAY. The rest
    /// is held back.
    ///
    /// In a graceful shutdown the server sends a GOAWAY and then a PING, and expects no new streams after the PONG. If a request arrives
    /// after the PONG, grpc-java closes the whole connection. But h2 writes the PONG before the requests that are already in its queue. So
    /// the PING is held back until h2 has processed the GOAWAY and has written its queue. After the GOAWAY, h2 opens no more streams.
    fn pass_on(&mut self, buf: &mut ReadBuf<'_>, before: usize) {
        let activity = &self.activity;
        let read = &buf.filled()[before..];
        let mut paused = false;
        let taken = self.frames.read(read, |frame| {
            paused |= matches!(frame, Frame::GoAway { .. });
            activity.on_frame(frame);
        });
        if taken < read.len() {
            self.held = Bytes::copy_from_slice(&read[taken..]);
            buf.set_filled(before + taken);
        }
        self.pause = paused;
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Watched<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if std::mem::take(&mut this.pause) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buf.filled().len();
        if !this.held.is_empty() {
            let part = this.held.len().min(buf.remaining());
            buf.put_slice(&this.held.split_to(part));
            let rest = std::mem::take(&mut this.held);
            this.pass_on(buf, before);
            if !rest.is_empty() {
                // The bytes that `pass_on` has held back precede the bytes that were not parsed yet.
                this.held = [&this.held[..], &rest[..]].concat().into();
            }
            return Poll::Ready(Ok(()));
        }
        let polled = Pin::new(&mut this.io).poll_read(cx, buf);
        let read = &buf.filled()[before..];
        if !read.is_empty() {
            if this.read < MAX_FIRST_BYTES {
                this.activity.keep_first_bytes(read);
            }
            this.read = this.read.saturating_add(read.len());
            this.activity.on_read(read.len());
            this.pass_on(buf, before);
        }
        polled
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Watched<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

/// Maximum number of first bytes that are kept. This is more than the 9 bytes of a frame header, and enough to recognise another protocol.
const MAX_FIRST_BYTES: usize = 24;
