//! A greeter on a bare `h2` server that can be killed and recovered without losing its port. While the server is down, its listener stays
//! open. Therefore [`Fleet::dial`], and not the kernel, refuses connections.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use h2::RecvStream;
use h2::server::SendResponse;
use http::{HeaderMap, Request, Response};
use prost::Message;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use tonic_etcd::Address;

use super::greeter::HelloReply;

/// A server that can be killed and recovered.
pub struct Backend {
    pub address: SocketAddr,
    up: Arc<AtomicBool>,
    connections: Arc<Mutex<JoinSet<()>>>,
    /// Number of connections since the last kill.
    opened: Arc<AtomicUsize>,
    pub served: Arc<AtomicUsize>,
    task: AbortHandle,
}

impl Backend {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections: Arc<Mutex<JoinSet<()>>> = Arc::default();
        let served = Arc::default();
        let opened = Arc::<AtomicUsize>::default();
        let up = Arc::new(AtomicBool::new(true));
        let (open, counter, is_up) = (
            Arc::clone(&connections),
            Arc::clone(&served),
            Arc::clone(&up),
        );
        let count = Arc::clone(&opened);
        let task = tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let mut open = open.lock().unwrap();
                // The connection may have entered the accept queue before the kill.
                if !is_up.load(Ordering::SeqCst) {
                    continue;
                }
                while open.try_join_next().is_some() {}
                count.fetch_add(1, Ordering::SeqCst);
                open.spawn(serve(socket, Arc::clone(&counter)));
            }
        });
        Self {
            address,
            up,
            connections,
            opened,
            served,
            task: task.abort_handle(),
        }
    }

    /// Closes every connection without a GOAWAY and accepts no new connections.
    pub fn kill(&self) {
        let mut connections = self.connections.lock().unwrap();
        self.up.store(false, Ordering::SeqCst);
        self.opened.store(0, Ordering::SeqCst);
        connections.abort_all();
    }

    /// Returns whether a connection was accepted since the last kill.
    pub fn is_connected(&self) -> bool {
        self.opened.load(Ordering::SeqCst) > 0
    }

    pub fn recover(&self) {
        self.up.store(true, Ordering::SeqCst);
    }

    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::SeqCst)
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.task.abort();
        self.connections.lock().unwrap().abort_all();
    }
}

/// A set of servers.
#[derive(Clone)]
pub struct Fleet(Arc<Vec<Backend>>);

impl Fleet {
    pub async fn start(servers: usize) -> Self {
        let mut backends = Vec::new();
        for _ in 0..servers {
            backends.push(Backend::start().await);
        }
        Self(Arc::new(backends))
    }

    pub fn get(&self, server: usize) -> &Backend {
        &self.0[server]
    }

    pub fn iter(&self) -> impl Iterator<Item = &Backend> {
        self.0.iter()
    }

    /// Connects to a server. Fails if the server is down.
    pub async fn dial(self, address: Address) -> io::Result<TcpStream> {
        let backend = self
            .iter()
            .find(|backend| backend.address.to_string() == address.to_string());
        let backend = backend.ok_or(io::ErrorKind::AddrNotAvailable)?;
        if !backend.is_up() {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let socket = TcpStream::connect(backend.address).await?;
        socket.set_nodelay(true)?;
        Ok(socket)
    }
}

async fn serve(socket: TcpStream, served: Arc<AtomicUsize>) {
    let _ = socket.set_nodelay(true);
    let mut builder = h2::server::Builder::new();
    builder
        .max_concurrent_reset_streams(100_000)
        .max_pending_accept_reset_streams(100_000);
    let Ok(mut connection) = builder.handshake(socket).await else {
        return;
    };
    // The calls end with the connection.
    let mut calls = JoinSet::new();
    loop {
        tokio::select! {
            call = connection.accept() => match call {
                Some(Ok((request, respond))) => {
                    calls.spawn(answer(request, respond, Arc::clone(&served)));
                }
                _ => return,
            },
            Some(_) = calls.join_next() => {}
        }
    }
}

/// Answers a call after a delay: the field `name` of the request contains the number of milliseconds. A unary call gets one reply. Any
/// other call gets an endless stream.
async fn answer(
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    served: Arc<AtomicUsize>,
) {
    let unary = request.uri().path().ends_with("/SayHello");
    let mut body = request.into_body();
    let mut message = Vec::new();
    while let Some(Ok(data)) = body.data().await {
        let _ = body.flow_control().release_capacity(data.len());
        message.extend_from_slice(&data);
    }
    let request = super::greeter::HelloRequest::decode(message.get(5..).unwrap_or_default());
    let name = request.map(|request| request.name).unwrap_or_default();
    tokio::time::sleep(Duration::from_millis(name.parse().unwrap_or(0))).await;
    served.fetch_add(1, Ordering::SeqCst);
    let head = Response::builder()
        .header("content-type", "application/grpc")
        .body(())
        .unwrap();
    let Ok(mut stream) = respond.send_response(head, false) else {
        return;
    };
    let reply = framed(&HelloReply { message: name });
    if unary {
        let _ = stream.send_data(reply, false);
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", "0".parse().unwrap());
        let _ = stream.send_trailers(trailers);
        return;
    }
    while stream.send_data(reply.clone(), false).is_ok() {
        tokio::select! {
            _ = std::future::poll_fn(|cx| stream.poll_reset(cx)) => return,
            () = tokio::time::sleep(Duration::from_millis(2)) => {}
        }
    }
}

/// Returns a message with its gRPC length prefix.
fn framed(message: &impl Message) -> Bytes {
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.encoded_len()).unwrap());
    message.encode(&mut frame).unwrap();
    frame.freeze()
}
