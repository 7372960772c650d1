//! Relays the frames between a client and `h2`. It counts frames, rejects frames that `h2` itself would accept, and adds frames that `h2`
//! cannot be made to send.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use h2::Reason;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, timeout};

use super::{Beyond, BoxIo, Close, Counts, How, Limit, Police, Shared, When};

/// Relays one connection until one side has ended it.
pub(super) async fn run(io: BoxIo, far: DuplexStream, shared: Arc<Shared>, leave: &Notify) {
    let (from_client, to_client) = tokio::io::split(io);
    let (from_h2, to_h2) = tokio::io::split(far);
    let (orders, ordered) = mpsc::unbounded_channel();
    let manner = shared.manner();
    let close = manner.close;
    let wire = Mutex::new(Wire {
        close,
        limit: manner.limit,
        strikes: manner.police.map(Strikes::new),
        orders,
        leave,
        counts: &shared.counts,
        began: Instant::now(),
        open: HashSet::new(),
        requests: 0,
        last: 0,
        below: 0,
        block: 0,
        ceiling: None,
        closing: false,
        shutdown: Shutdown::Lenient,
        ended: false,
    });
    let inbound = inbound(from_client, to_h2, &wire);
    let outbound = outbound(from_h2, to_client, &wire, ordered);
    let age = async {
        if let Some(Close {
            when: When::Age(age),
            how,
        }) = close
        {
            tokio::time::sleep(age).await;
            wire.lock().unwrap().close(how);
        }
        std::future::pending::<()>().await;
    };
    tokio::pin!(inbound);
    tokio::select! {
        () = &mut inbound => return,
        () = outbound => {}
        () = age => {}
    }
    // The frames of the client are still read. Unread bytes would turn the close into a reset, which can discard the last frames.
    wire.lock().unwrap().ended = true;
    let _ = timeout(DRAIN, inbound).await;
}

async fn inbound(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    wire: &Mutex<Wire<'_>>,
) {
    let mut buffer = BytesMut::new();
    while buffer.len() < PREFACE {
        let Ok(1..) = from.read_buf(&mut buffer).await else {
            return;
        };
    }
    let mut passed = buffer.split_to(PREFACE);
    loop {
        while let Some(frame) = Frame::next(&mut buffer) {
            if wire.lock().unwrap().takes(&frame) {
                passed.extend_from_slice(&frame.bytes);
            }
        }
        if to.write_all(&passed.split()).await.is_err() && !wire.lock().unwrap().ended {
            return;
        }
        let Ok(1..) = from.read_buf(&mut buffer).await else {
            return;
        };
    }
}

async fn outbound(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    wire: &Mutex<Wire<'_>>,
    mut ordered: mpsc::UnboundedReceiver<Order>,
) {
    let (mut buffer, mut passed) = (BytesMut::new(), BytesMut::new());
    loop {
        tokio::select! {
            // The GOAWAY of a close must be sent before the last response, because the connection ends after this response.
            biased;
            Some(order) = ordered.recv() => match order {
                Order::Send(bytes) => passed.extend_from_slice(&bytes),
                Order::Look => {}
                Order::Cut => break,
            },
            read = from.read_buf(&mut buffer) => if !matches!(read, Ok(1..)) {
                break;
            }
        }
        while let Some(frame) = Frame::next(&mut buffer) {
            wire.lock().unwrap().gives(&frame);
            passed.extend_from_slice(&frame.bytes);
        }
        if to.write_all(&passed.split()).await.is_err() || to.flush().await.is_err() {
            break;
        }
        if wire.lock().unwrap().is_finished() && ordered.is_empty() {
            break;
        }
    }
    let _ = to.shutdown().await;
}

/// Instruction for the outbound direction, executed between two frames.
enum Order {
    Send(Bytes),
    /// Checks whether the connection has finished.
    Look,
    Cut,
}

/// State of a connection.
struct Wire<'a> {
    close: Option<Close>,
    limit: Option<Limit>,
    strikes: Option<Strikes>,
    orders: mpsc::UnboundedSender<Order>,
    leave: &'a Notify,
    counts: &'a Counts,
    began: Instant,
    /// Accepted streams that have not ended.
    open: HashSet<u32>,
    requests: u32,
    /// ID of the last stream that the client has opened and that was not dropped as [`When::Unserved`].
    last: u32,
    /// ID of the stream that was opened before `last`.
    below: u32,
    /// Number of bytes in the HEADERS and CONTINUATION frames since the last stream was opened, without the frame headers.
    block: usize,
    /// Streams above this ID are dropped.
    ceiling: Option<u32>,
    /// Whether the connection ends as soon as no stream is open.
    closing: bool,
    shutdown: Shutdown,
    ended: bool,
}

/// What happens if the client opens a further stream while the connection shuts down.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shutdown {
    /// The wire does not react to the stream.
    Lenient,
    /// As `Lenient`, until the response to the PING of the shutdown is received. Then the state becomes `Over`.
    Strict,
    /// The wire closes the connection.
    Over,
}

impl Wire<'_> {
    /// Processes a frame of the client. Returns false if `h2` must not receive it.
    fn takes(&mut self, frame: &Frame) -> bool {
        if frame.kind == PING && frame.flags & ACK == 0 {
            Counts::add(&self.counts.pings);
            self.police();
        }
        if frame.kind == PING && frame.flags & ACK != 0 && self.shutdown == Shutdown::Strict {
            self.shutdown = Shutdown::Over;
        }
        if frame.kind == HEADERS && frame.stream > self.last {
            if self.shutdown == Shutdown::Over {
                self.cut();
            }
            Counts::add(&self.counts.requests);
            (self.below, self.last) = (self.last, frame.stream);
            self.block = 0;
            if let Some(Close { how, .. }) =
                self.close.take_if(|close| close.when == When::Unserved)
            {
                // The stream of this request is above the new `last`, so `How::Goaway` and `How::Fin` drop it.
                self.last = self.below;
                self.close(how);
            }
            if !self.is_dropped(frame.stream) {
                self.open.insert(frame.stream);
                self.requests += 1;
                if let Some(Close { when, how }) = self.close
                    && when == When::Requests(self.requests)
                {
                    self.close(how);
                }
            }
        }
        if matches!(frame.kind, HEADERS | CONTINUATION) {
            self.block += frame.bytes.len() - HEAD;
            self.measure();
        }
        if frame.kind == RST_STREAM {
            self.open.remove(&frame.stream);
            let _ = self.orders.send(Order::Look);
        }
        !self.ended && !self.is_dropped(frame.stream)
    }

    fn is_dropped(&self, stream: u32) -> bool {
        self.ceiling.is_some_and(|ceiling| stream > ceiling)
    }

    /// Processes a frame of `h2`.
    fn gives(&mut self, frame: &Frame) {
        if matches!(frame.kind, DATA | HEADERS)
            && let Some(strikes) = &mut self.strikes
        {
            strikes.forgive();
        }
        if frame.kind == RST_STREAM
            || matches!(frame.kind, DATA | HEADERS) && frame.flags & END_STREAM != 0
        {
            self.open.remove(&frame.stream);
        }
        if frame.kind == PING
            && frame.flags & ACK != 0
            && let Some(Close {
                when: When::Pong,
                how,
            }) = self.close.take_if(|close| close.when == When::Pong)
        {
            self.close(how);
        }
    }

    fn is_finished(&self) -> bool {
        self.closing && self.open.is_empty()
    }

    /// Begins to close the connection. Open streams are still served until they end.
    fn close(&mut self, how: How) {
        match how {
            How::Graceful | How::Strict => {
                if how == How::Strict {
                    self.shutdown = Shutdown::Strict;
                }
                return self.leave.notify_one();
            }
            How::Goaway => self.go_away(self.last, Reason::NO_ERROR, b""),
            How::Fin => {}
        }
        self.ceiling = Some(self.last);
        self.closing = true;
        let _ = self.orders.send(Order::Look);
    }

    fn go_away(&self, last: u32, reason: Reason, why: &[u8]) {
        let mut frame = BytesMut::new();
        frame.put_uint(8 + why.len() as u64, 3);
        frame.put_slice(&[GOAWAY, 0, 0, 0, 0, 0]);
        frame.put_u32(last);
        frame.put_u32(reason.into());
        frame.put_slice(why);
        let _ = self.orders.send(Order::Send(frame.freeze()));
    }

    /// Closes the connection at once.
    fn cut(&mut self) {
        self.ended = true;
        let _ = self.orders.send(Order::Cut);
    }

    /// Checks the size of the header block after a part of it was received.
    fn measure(&mut self) {
        let Some(limit) = self.limit else {
            return;
        };
        if self.block <= limit.bytes as usize || self.ended {
            return;
        }
        Counts::add(&self.counts.oversized);
        if let Beyond::Goaway(reason) = limit.beyond {
            self.go_away(self.below, reason, b"header list too large");
        }
        self.cut();
    }

    /// Counts a received PING, and ends the connection at the third strike.
    fn police(&mut self) {
        if self.ended || !self.strikes.as_mut().is_some_and(Strikes::strike) {
            return;
        }
        let lived = Instant::now().saturating_duration_since(self.began);
        self.counts.scolded.lock().unwrap().push(lived);
        self.go_away(self.last, Reason::ENHANCE_YOUR_CALM, b"too_many_pings");
        self.cut();
    }
}

/// The strikes since the server last sent HEADERS or DATA. A strike is a PING that counts against the client. Real servers also permit one
/// PING every five minutes. This rule is left out, because no test lasts that long.
struct Strikes {
    police: Police,
    count: u32,
    free: bool,
}

impl Strikes {
    fn new(police: Police) -> Self {
        Self {
            police,
            count: 0,
            free: police == Police::Go,
        }
    }

    /// Counts a PING. Returns true at the third strike.
    fn strike(&mut self) -> bool {
        if !std::mem::take(&mut self.free) {
            self.count += 1;
        }
        self.count > 2
    }

    fn forgive(&mut self) {
        self.count = 0;
        self.free = self.police == Police::Go;
    }
}

/// A complete frame.
struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    /// The bytes of the frame, with its header.
    bytes: BytesMut,
}

impl Frame {
    fn next(buffer: &mut BytesMut) -> Option<Self> {
        let head = buffer.get(..HEAD)?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]) & (u32::MAX >> 1);
        let (kind, flags) = (head[3], head[4]);
        if buffer.len() < HEAD + length {
            return None;
        }
        Some(Self {
            kind,
            flags,
            stream,
            bytes: buffer.split_to(HEAD + length),
        })
    }
}

const PREFACE: usize = 24;
const HEAD: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
const ACK: u8 = 1;
const END_STREAM: u8 = 1;
/// Time for which bytes are read after the end of the connection.
const DRAIN: Duration = Duration::from_millis(500);
