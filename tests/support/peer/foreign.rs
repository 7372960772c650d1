//! Servers of other protocols on the port of a gRPC server.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;

/// Protocol of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaks {
    Http1,
    Ssh,
    /// A TLS server, which answers the preface with an alert.
    Tls,
    Redis,
}

impl Speaks {
    /// Returns the name of the protocol, as errors of the channel contain it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Http1 => "HTTP/1",
            Self::Ssh => "SSH",
            Self::Tls => "TLS",
            Self::Redis => "Redis",
        }
    }

    /// Returns whether the server sends the first bytes.
    fn greets(self) -> bool {
        self == Self::Ssh
    }

    fn words(self) -> &'static [u8] {
        match self {
            Self::Http1 => {
                b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/html\r\nContent-Length: 19\r\nConnection: close\r\n\r\n<h1>Bad Request</h1"
            }
            Self::Ssh => b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n",
            // A fatal alert, `unexpected_message`.
            Self::Tls => &[0x15, 0x03, 0x03, 0x00, 0x02, 0x02, 0x0a],
            Self::Redis => b"-ERR unknown command 'PRI', with args beginning with: '*' 'HTTP/2.0' \r\n",
        }
    }
}

pub struct Foreign {
    pub address: SocketAddr,
    connections: Arc<AtomicUsize>,
    task: AbortHandle,
}

impl Foreign {
    pub async fn start(speaks: Speaks) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::<AtomicUsize>::default();
        let counter = Arc::clone(&connections);
        let task = tokio::spawn(async move {
            let mut open = JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                counter.fetch_add(1, Ordering::SeqCst);
                open.spawn(answer(socket, speaks));
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

impl Drop for Foreign {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn answer(mut socket: TcpStream, speaks: Speaks) {
    let mut buffer = [0; 4096];
    if !speaks.greets() {
        let _ = socket.read(&mut buffer).await;
    }
    let _ = socket.write_all(speaks.words()).await;
    let _ = socket.shutdown().await;
    // The remaining bytes are read. Unread bytes would turn the graceful close into a reset, which discards the response.
    let drained = async { while matches!(socket.read(&mut buffer).await, Ok(1..)) {} };
    let _ = timeout(Duration::from_secs(1), drained).await;
}
