//! A link between a client and a server, for plaintext HTTP/2. It records how connections end. With `PEERS_TRACE=1` in the environment, it
//! prints every frame.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, timeout};

use crate::{ms, since};

const PREFACE: usize = 24;
const HEAD: usize = 9;
const GOAWAY: u8 = 7;
const DRAIN: Duration = ms(1_000);

pub struct Tap {
    pub address: SocketAddr,
    seen: Arc<Mutex<Seen>>,
    task: AbortHandle,
}

/// What the link has recorded so far.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub connections: usize,
    /// Connections that the server closed before the client.
    pub ended_by_server: usize,
    pub ended_by_client: usize,
    /// GOAWAYs of the server that report an error.
    pub errors: Vec<String>,
}

impl Seen {
    /// Returns the number of connections that the server ended, with or without an error.
    pub fn lost(&self) -> usize {
        self.ended_by_server.max(self.errors.len())
    }
}

impl Tap {
    pub async fn start(target: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::<Mutex<Seen>>::default();
        let all = Arc::clone(&seen);
        let task = tokio::spawn(async move {
            let mut open = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                while open.try_join_next().is_some() {}
                let number = {
                    let mut seen = lock(&all);
                    seen.connections += 1;
                    seen.connections
                };
                open.spawn(carry(client, target.clone(), number, Arc::clone(&all)));
            }
        });
        Self {
            address,
            seen,
            task: task.abort_handle(),
        }
    }

    pub fn seen(&self) -> Seen {
        lock(&self.seen).clone()
    }

    pub fn connections(&self) -> usize {
        lock(&self.seen).connections
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap()
}

async fn carry(client: TcpStream, target: String, number: usize, seen: Arc<Mutex<Seen>>) {
    let Ok(server) = TcpStream::connect(target).await else {
        return;
    };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let trace = std::env::var_os("PEERS_TRACE").is_some_and(|trace| trace == "1");
    let frames = |name, skip| Frames {
        name,
        number,
        skip,
        trace,
        start: Instant::now(),
        buffer: BytesMut::new(),
    };
    let mut up = frames(">", PREFACE);
    let mut down = frames("<", 0);
    let up = pipe(from_client, to_server, |bytes| {
        up.take(bytes);
    });
    let down = pipe(from_server, to_client, |bytes| {
        for error in down.take(bytes) {
            lock(&seen).errors.push(error);
        }
    });
    tokio::pin!(up, down);
    let by_client = tokio::select! {
        () = &mut up => true,
        () = &mut down => false,
    };
    if trace {
        println!(
            "{number} ended by the {}",
            if by_client { "client" } else { "server" }
        );
    }
    {
        let mut seen = lock(&seen);
        if by_client {
            seen.ended_by_client += 1;
        } else {
            seen.ended_by_server += 1;
        }
    }
    // The other direction is still read. Unread bytes would turn the close into a reset, which discards data in flight.
    let rest = async {
        if by_client {
            down.await;
        } else {
            up.await;
        }
    };
    let _ = timeout(DRAIN, rest).await;
}

/// Copies until one end is closed.
async fn pipe(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut look: impl FnMut(&[u8]),
) {
    let mut buffer = BytesMut::with_capacity(1 << 16);
    while let Ok(1..) = from.read_buf(&mut buffer).await {
        look(&buffer);
        // Data that the other side no longer reads are dropped.
        let _ = to.write_all_buf(&mut buffer).await;
        buffer.clear();
        buffer.reserve(1 << 16);
    }
    let _ = to.shutdown().await;
}

/// Frames of one direction.
struct Frames {
    name: &'static str,
    number: usize,
    skip: usize,
    trace: bool,
    start: Instant,
    buffer: BytesMut,
}

impl Frames {
    /// Parses the bytes that pass, and returns the GOAWAYs with an error.
    fn take(&mut self, bytes: &[u8]) -> Vec<String> {
        self.buffer.extend_from_slice(bytes);
        let skipped = self.skip.min(self.buffer.len());
        self.buffer.advance(skipped);
        self.skip -= skipped;
        let mut errors = Vec::new();
        while self.buffer.len() >= HEAD {
            let mut head = &self.buffer[..HEAD];
            let length = usize::try_from(head.get_uint(3)).unwrap();
            let (kind, flags, stream) = (head.get_u8(), head.get_u8(), head.get_u32());
            if self.buffer.len() < HEAD + length {
                break;
            }
            let frame = self.buffer.split_to(HEAD + length);
            let mut payload = &frame[HEAD..];
            let mut shown = String::new();
            if kind == GOAWAY && length >= 8 {
                let (last, code) = (payload.get_u32(), payload.get_u32());
                let why = String::from_utf8_lossy(payload);
                shown = format!("GOAWAY, last stream {last}, code {code}, {why:?}");
                if code != 0 {
                    errors.push(format!("connection {}: {shown}", self.number));
                }
            }
            if self.trace {
                let at = since(self.start);
                let (number, name) = (self.number, self.name);
                println!(
                    "{number} {at:?} {name} kind {kind} flags {flags} stream {stream} length {length} {shown}"
                );
            }
        }
        errors
    }
}
