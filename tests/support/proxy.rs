//! A TCP proxy that can close its connections and stop forwarding. It simulates the network between two processes of one machine.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Forwards connections to a target until [`cut`](Proxy::cut) is called.
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

    /// Closes every connection, and forwards no new connections until `heal`.
    pub fn cut(&self) {
        self.open.send_replace(false);
    }

    /// Closes every connection. New connections are still forwarded.
    pub fn reset(&self) {
        self.open.send_modify(|_| {});
    }

    /// Forwards new connections again.
    pub fn heal(&self) {
        self.open.send_replace(true);
    }

    /// Returns the number of connections that were forwarded.
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }
}
