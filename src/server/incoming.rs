//! The listening socket. [`Incoming`] is used in place of tonic's own type, so that the server controls when the socket closes, and does
//! not lose connections that the kernel has already accepted.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::time::Sleep;
use tokio_stream::Stream;
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::transport::server::Connected;

use super::connection::{Connection, Connections};

/// A stream of accepted connections. It ends after the drain has begun.
#[derive(Debug)]
pub(super) struct Incoming {
    listener: TcpListener,
    connections: Connections,
    closing: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Number of connections that may still be accepted after the drain has begun.
    remainder: u32,
    /// The wait after an accept error. Without this wait, most accept errors, such as a lack of file descriptors, would recur at once, in a
    /// tight loop.
    pause: Option<Pin<Box<Sleep>>>,
}

impl Incoming {
    /// Binds a listener to an address.
    pub(super) fn bind(address: SocketAddr) -> io::Result<TcpListener> {
        let socket = socket2::Socket::new(
            socket2::Domain::for_address(address),
            socket2::Type::STREAM,
            Some(socket2::Protocol::TCP),
        )?;
        // With this option, a restarted server can bind its port again although connections of the old process are still in TIME_WAIT.
        #[cfg(unix)]
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        TcpListener::from_std(socket.into())
    }

    pub(super) fn new(listener: TcpListener, connections: Connections) -> Self {
        Self {
            listener,
            closing: Box::pin(connections.draining()),
            connections,
            remainder: BACKLOG.unsigned_abs(),
            pause: None,
        }
    }

    /// Returns a connection that the kernel has already accepted, if there is one. The socket is polled directly, because the runtime may
    /// not have received the readiness event yet.
    fn remaining(&mut self) -> Option<Connection> {
        loop {
            // The number of these connections is limited, so that a flood of new connections cannot keep the socket open.
            self.remainder = self.remainder.checked_sub(1)?;
            let accepted = socket2::SockRef::from(&self.listener).accept();
            let opened = accepted.and_then(|(socket, _)| {
                socket.set_nonblocking(true)?;
                TcpStream::from_std(socket.into())
            });
            match opened {
                Ok(stream) => return Some(Connection::tcp(stream, &self.connections)),
                // This connection is lost, because its client has given up, but the others are not.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::ConnectionAborted
                            | io::ErrorKind::ConnectionReset
                            | io::ErrorKind::Interrupted
                    ) => {}
                Err(_) => return None,
            }
        }
    }
}

impl Stream for Incoming {
    type Item = io::Result<Connection>;

    /// Returns the next connection. After the drain has begun, the stream first returns the connections that the kernel has already
    /// accepted: closing the socket would reset them, although their clients may have sent a call. After these connections, the stream
    /// ends. tonic then drops it, which closes the socket.
    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.closing.as_mut().poll(cx).is_ready() {
            return Poll::Ready(self.remaining().map(Ok));
        }
        if let Some(pause) = &mut self.pause {
            ready!(pause.as_mut().poll(cx));
            self.pause = None;
        }
        match ready!(self.listener.poll_accept(cx)) {
            Ok((stream, _)) => Poll::Ready(Some(Ok(Connection::tcp(stream, &self.connections)))),
            Err(error) => {
                tracing::warn!(%error, "could not accept a connection");
                self.pause = Some(Box::pin(tokio::time::sleep(ACCEPT_PAUSE)));
                Poll::Ready(Some(Err(error)))
            }
        }
    }
}

/// A stream of connections that the caller of this library accepts. It ends when the drain begins.
#[derive(Debug)]
pub(super) struct Accepted<I> {
    stream: Pin<Box<I>>,
    connections: Connections,
    closing: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl<I> Accepted<I> {
    pub(super) fn new(accepted: I, connections: Connections) -> Self {
        Self {
            stream: Box::pin(accepted),
            closing: Box::pin(connections.draining()),
            connections,
        }
    }
}

impl<I, T, E> Stream for Accepted<I>
where
    I: Stream<Item = Result<T, E>>,
    T: Connected,
{
    type Item = Result<Connection<T>, E>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.closing.as_mut().poll(cx).is_ready() {
            return Poll::Ready(None);
        }
        let accepted = ready!(self.stream.as_mut().poll_next(cx));
        let connection =
            accepted.map(|accepted| accepted.map(|io| Connection::new(io, &self.connections)));
        Poll::Ready(connection)
    }
}

/// Limit on the accept queue. It is the default limit of Linux (`net.core.somaxconn`, since 5.4). With a shorter queue, simultaneous
/// reconnects of a fleet would overflow the queue.
const BACKLOG: i32 = 4096;
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use tokio_stream::StreamExt;

    use super::*;

    #[tokio::test]
    async fn connections_accepted_before_the_drain_are_returned() {
        let connections = Connections::default();
        let address = "127.0.0.1:0".parse().expect("an address");
        let mut incoming = Incoming::new(
            Incoming::bind(address).expect("a socket"),
            connections.clone(),
        );
        let bound = incoming.listener.local_addr().expect("an address");
        let clients: Vec<_> = (0..3)
            .map(|_| std::net::TcpStream::connect(bound).expect("a connection"))
            .collect();
        connections.drain();
        for _ in &clients {
            assert!(matches!(incoming.next().await, Some(Ok(_))));
        }
        assert!(incoming.next().await.is_none());
        drop(incoming);
        assert!(
            std::net::TcpStream::connect(bound).is_err(),
            "the listener must be closed"
        );
    }
}
