//! An HTTP/2 server on raw frames, for frames that no library can be made to send.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};

const PREFACE: usize = 24;
const HEAD: usize = 9;
const MAX_FRAME: usize = 16_384;
pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
const ACK: u8 = 1;
pub const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const INITIAL_WINDOW_SIZE: u16 = 4;
pub const MAX_CONCURRENT_STREAMS: u16 = 3;

/// A server that runs until it is dropped.
pub struct Raw {
    pub address: SocketAddr,
    connections: Arc<AtomicUsize>,
    task: AbortHandle,
}

impl Raw {
    /// Starts a server that runs a script on each connection. A script returns an error if its connection is lost.
    pub async fn start<Fut>(
        settings: &'static [(u16, u32)],
        script: impl Fn(Connection) -> Fut + Clone + Send + 'static,
    ) -> Self
    where
        Fut: Future<Output = io::Result<()>> + Send,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::<AtomicUsize>::default();
        let counter = Arc::clone(&connections);
        let task = tokio::spawn(async move {
            let mut open = JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                counter.fetch_add(1, Ordering::SeqCst);
                let script = script.clone();
                open.spawn(async move {
                    let connection = Connection::open(socket, settings).await?;
                    let running = script(connection);
                    running.await
                });
            }
        });
        Self {
            address,
            connections,
            task: task.abort_handle(),
        }
    }

    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Bytes,
}

/// A connection that respects the client's flow-control windows, and returns its own windows at once.
pub struct Connection {
    socket: TcpStream,
    inbound: BytesMut,
    outbound: BytesMut,
    window: i64,
    initial: i64,
    windows: HashMap<u32, i64>,
    /// Streams whose response has not ended.
    open: HashSet<u32>,
    /// Maximum number of streams that were open at the same time.
    pub most: usize,
    /// Payloads of the PINGs that the client has answered.
    pub answered: Vec<Bytes>,
}

impl Connection {
    async fn open(mut socket: TcpStream, settings: &[(u16, u32)]) -> io::Result<Self> {
        socket.set_nodelay(true)?;
        let mut preface = [0; PREFACE];
        socket.read_exact(&mut preface).await?;
        let mut this = Self {
            socket,
            inbound: BytesMut::new(),
            outbound: BytesMut::new(),
            window: 65_535,
            initial: 65_535,
            windows: HashMap::new(),
            open: HashSet::new(),
            most: 0,
            answered: Vec::new(),
        };
        let mut payload = BytesMut::new();
        for (name, value) in settings {
            payload.put_u16(*name);
            payload.put_u32(*value);
        }
        this.put(SETTINGS, 0, 0, &payload);
        this.flush().await?;
        Ok(this)
    }

    /// Appends a frame to the output of the next flush.
    pub fn put(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        self.outbound.put_uint(payload.len() as u64, 3);
        self.outbound.put_slice(&[kind, flags]);
        self.outbound.put_u32(stream);
        self.outbound.put_slice(payload);
    }

    pub async fn flush(&mut self) -> io::Result<()> {
        self.socket.write_all_buf(&mut self.outbound).await
    }

    /// Flushes and reads a frame. Updates the windows and answers SETTINGS and PING frames, as every server does.
    pub async fn next(&mut self) -> io::Result<Frame> {
        self.flush().await?;
        while self.inbound.len() < HEAD || self.inbound.len() < HEAD + self.length() {
            if self.socket.read_buf(&mut self.inbound).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let length = self.length();
        let mut head = self.inbound.split_to(HEAD);
        head.advance(3);
        let frame = Frame {
            kind: head.get_u8(),
            flags: head.get_u8(),
            stream: head.get_u32(),
            payload: self.inbound.split_to(length).freeze(),
        };
        self.note(&frame);
        Ok(frame)
    }

    fn length(&self) -> usize {
        usize::try_from(self.inbound.as_ref().get_uint(3)).unwrap()
    }

    fn note(&mut self, frame: &Frame) {
        let mut payload = frame.payload.clone();
        match frame.kind {
            SETTINGS if frame.flags & ACK == 0 => {
                while payload.remaining() >= 6 {
                    let (name, value) = (payload.get_u16(), payload.get_u32());
                    if name == INITIAL_WINDOW_SIZE {
                        self.initial = value.into();
                    }
                }
                self.put(SETTINGS, ACK, 0, &[]);
            }
            PING if frame.flags & ACK == 0 => self.put(PING, ACK, 0, &payload),
            PING => self.answered.push(payload),
            WINDOW_UPDATE => {
                let more = i64::from(payload.get_u32());
                if frame.stream == 0 {
                    self.window += more;
                } else {
                    *self.windows.entry(frame.stream).or_insert(self.initial) += more;
                }
            }
            HEADERS => {
                self.open.insert(frame.stream);
                self.most = self.most.max(self.open.len());
            }
            DATA if !payload.is_empty() => {
                let read = u32::try_from(payload.len()).unwrap().to_be_bytes();
                self.put(WINDOW_UPDATE, 0, 0, &read);
                if frame.flags & END_STREAM == 0 {
                    self.put(WINDOW_UPDATE, 0, frame.stream, &read);
                }
            }
            RST_STREAM => {
                self.open.remove(&frame.stream);
            }
            _ => {}
        }
    }

    /// Waits for a complete request and returns its stream.
    pub async fn request(&mut self) -> io::Result<u32> {
        loop {
            let frame = self.next().await?;
            if matches!(frame.kind, HEADERS | DATA) && frame.flags & END_STREAM != 0 {
                return Ok(frame.stream);
            }
        }
    }

    /// Writes the headers of a gRPC response: the status 200 and the content-type. The block is constant, so no HPACK encoder is needed.
    pub fn headers(&mut self, stream: u32) {
        let mut block = vec![0x88, 0x0f, 0x10, 0x10];
        block.extend_from_slice(b"application/grpc");
        self.put(HEADERS, END_HEADERS, stream, &block);
    }

    /// Writes trailers with the status OK.
    pub fn trailers(&mut self, stream: u32) {
        let mut block = vec![0x00, 0x0b];
        block.extend_from_slice(b"grpc-status\x010");
        self.put(HEADERS, END_HEADERS | END_STREAM, stream, &block);
        self.open.remove(&stream);
    }

    /// Sends bytes as the windows permit.
    pub async fn data(&mut self, stream: u32, bytes: &[u8]) -> io::Result<()> {
        for part in bytes.chunks(MAX_FRAME) {
            self.room(stream, part.len()).await?;
            self.put(DATA, 0, stream, part);
        }
        self.flush().await
    }

    /// Sends each byte in a separate frame with this many bytes of padding.
    pub async fn padded(&mut self, stream: u32, bytes: &[u8], padding: u8) -> io::Result<()> {
        for byte in bytes {
            let mut payload = vec![padding, *byte];
            payload.resize(2 + usize::from(padding), 0);
            self.room(stream, payload.len()).await?;
            self.put(DATA, PADDED, stream, &payload);
            if self.outbound.len() > MAX_FRAME {
                self.flush().await?;
            }
        }
        self.flush().await
    }

    /// Waits until the windows permit this many bytes, and reduces the windows.
    async fn room(&mut self, stream: u32, bytes: usize) -> io::Result<()> {
        let bytes = i64::try_from(bytes).unwrap();
        loop {
            let window = self.windows.entry(stream).or_insert(self.initial);
            if self.window >= bytes && *window >= bytes {
                *window -= bytes;
                self.window -= bytes;
                return Ok(());
            }
            self.next().await?;
        }
    }
}
