//! A TCP proxy that can close its connections, and can refuse new ones. It simulates the network between two processes of one machine.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Forwards connections to a target. After [`cut`](Proxy::cut), closes new connections at once, until [`heal`](Proxy::heal) is called.
pub struct Proxy {
    pub address: SocketAddr,
    open: watch::Sender<bool>,
    accepted: Arc<AtomicUsize>,
}

impl Proxy {
    pub async fn start(listen: &str, target: String) -> Self {
        let listener = TcpListener::bind(listen).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (open, mut is_open) = watch::channel(true);
        let accepted = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&accepted);
        tokio::spawn(async move {
            // Ends when the proxy is dropped.
            while is_open.has_changed().is_ok() {
                let inbound = tokio::select! {
                    inbound = listener.accept() => inbound,
                    changed = is_open.changed() => match changed {
                        Ok(()) => continue,
                        Err(_) => return,
                    },
                };
                let Ok((mut inbound, _)) = inbound else {
                    continue;
                };
                if !*is_open.borrow_and_update() {
                    continue;
                }
                counter.fetch_add(1, Ordering::SeqCst);
                let target = target.clone();
                let mut cut = is_open.clone();
                tokio::spawn(async move {
                    let Ok(mut outbound) = TcpStream::connect(target).await else {
                        return;
                    };
                    tokio::select! {
                        _ = copy_bidirectional(&mut inbound, &mut outbound) => {}
                        _ = cut.changed() => {}
                    }
                });
            }
        });
        Self {
            address,
            open,
            accepted,
        }
    }

    /// Closes every connection. Also closes each new connection at once, until [`heal`](Self::heal) is called.
    pub fn cut(&self) {
        self.open.send_replace(false);
    }

    /// Closes every connection once. Does not change whether new connections are forwarded.
    pub fn reset(&self) {
        self.open.send_modify(|_| {});
    }

    /// Ends the effect of [`cut`](Self::cut): new connections are forwarded again.
    pub fn heal(&self) {
        self.open.send_replace(true);
    }

    /// Returns the number of connections accepted so far, without those that were closed at once because of [`cut`](Self::cut).
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }
}
