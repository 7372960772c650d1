//! Proxies between the members. They can isolate a member from the others while clients still reach
//! it.

use std::{
    collections::BTreeSet,
    io::{self, Read, Write},
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use super::port::Port;

/// One proxy for each member. The other members reach the member only through its proxy.
///
/// The proxies use threads instead of tasks, because an `Etcd` belongs to no tokio runtime.
#[derive(Debug)]
pub(super) struct Peers {
    ports: Vec<Port>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    closed: AtomicBool,
    links: Mutex<Links>,
}

#[derive(Debug, Default)]
struct Links {
    /// The isolated members: the index of each, and the id that it sends in its requests.
    isolated: BTreeSet<(usize, String)>,
    open: Vec<Link>,
}

/// A connection from one member to another.
#[derive(Debug)]
struct Link {
    /// The index of the member that accepted the connection.
    to: usize,
    /// The id of the member that opened the connection, if the first request contains this id.
    from: Option<String>,
    /// The two TCP connections of the proxy: from the sender, and to the target.
    ends: [TcpStream; 2],
}

impl Links {
    fn is_cut(&self, to: usize, from: Option<&str>) -> bool {
        let cut = |(index, id): &(usize, String)| *index == to || from == Some(id);
        self.isolated.iter().any(cut)
    }

    /// Closes the connections of isolated members, or all connections if `all` is true.
    fn close(&mut self, all: bool) {
        let open = std::mem::take(&mut self.open);
        for link in open {
            if !all && !self.is_cut(link.to, link.from.as_deref()) {
                self.open.push(link);
                continue;
            }
            for end in &link.ends {
                // An error means that the connection is already closed.
                end.shutdown(Shutdown::Both).ok();
            }
        }
    }
}

impl Peers {
    /// Starts one proxy in front of each target port.
    pub(super) fn start(targets: &[u16]) -> io::Result<Self> {
        let mut peers = Self {
            ports: Vec::new(),
            shared: Arc::default(),
        };
        for (to, target) in targets.iter().copied().enumerate() {
            let port = Port::draw()?;
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port.number()))?;
            peers.ports.push(port);
            let shared = Arc::clone(&peers.shared);
            thread::spawn(move || accept(&listener, to, target, &shared));
        }
        Ok(peers)
    }

    /// Returns the proxy port of each member.
    pub(super) fn ports(&self) -> Vec<u16> {
        self.ports.iter().map(Port::number).collect()
    }

    /// Isolates a member in both directions. `id` is the member id that it sends in its requests.
    pub(super) fn isolate(&self, member: usize, id: u64) {
        let mut links = self.shared.links();
        links.isolated.insert((member, format!("{id:x}")));
        links.close(false);
    }

    /// Reconnects a member to the others.
    pub(super) fn rejoin(&self, member: usize) {
        let mut links = self.shared.links();
        links.isolated.retain(|(index, _)| *index != member);
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::SeqCst);
        self.shared.links().close(true);
        for port in &self.ports {
            // This connection wakes the thread that waits in `accept`.
            TcpStream::connect((Ipv4Addr::LOCALHOST, port.number())).ok();
        }
    }
}

impl Shared {
    /// Locks the links. A poisoned lock is accepted, because a panic cannot leave the links half
    /// changed.
    fn links(&self) -> MutexGuard<'_, Links> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn accept(listener: &TcpListener, to: usize, target: u16, shared: &Arc<Shared>) {
    while let Ok((inbound, _)) = listener.accept() {
        if shared.closed.load(Ordering::SeqCst) {
            return;
        }
        let shared = Arc::clone(shared);
        // `forward` fails if a connection is refused, or is closed before the head of the first
        // request was forwarded. The error needs no report.
        thread::spawn(move || forward(inbound, to, target, &shared).ok());
    }
}

fn forward(mut inbound: TcpStream, to: usize, target: u16, shared: &Shared) -> io::Result<()> {
    let head = read_head(&mut inbound)?;
    let from = sender(&head);
    let mut outbound = TcpStream::connect((Ipv4Addr::LOCALHOST, target))?;
    let (mut inbound_reader, mut outbound_writer) = (inbound.try_clone()?, outbound.try_clone()?);
    {
        let mut links = shared.links();
        if links.is_cut(to, from.as_deref()) || shared.closed.load(Ordering::SeqCst) {
            return Ok(());
        }
        let ends = [inbound.try_clone()?, outbound.try_clone()?];
        links.open.push(Link { to, from, ends });
    }
    outbound.write_all(&head)?;
    let upstream = thread::spawn(move || copy(&mut inbound_reader, &mut outbound_writer));
    copy(&mut outbound, &mut inbound);
    upstream.join().ok();
    Ok(())
}

fn copy(from: &mut TcpStream, to: &mut TcpStream) {
    io::copy(from, to).ok();
    from.shutdown(Shutdown::Both).ok();
    to.shutdown(Shutdown::Both).ok();
}

/// Reads the head of the first request, with any bytes that follow it in the same read.
fn read_head(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    let mut buffer = [0; 4096];
    while !head.windows(4).any(|window| window == b"\r\n\r\n") {
        let read = stream.read(&mut buffer)?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        head.extend_from_slice(&buffer[..read]);
    }
    Ok(head)
}

/// Returns the id of the member that sent a request. Raft requests between members contain the id
/// in the header `X-Server-From`.
fn sender(head: &[u8]) -> Option<String> {
    let head = String::from_utf8_lossy(head);
    head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        let named = name.eq_ignore_ascii_case("x-server-from");
        named.then(|| value.trim().to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_identifies_its_sender() {
        let head = b"POST /raft HTTP/1.1\r\nHost: a\r\nX-Server-From: 8e9e05c52164694d\r\n\r\nbody";
        assert_eq!(sender(head).as_deref(), Some("8e9e05c52164694d"));
        assert_eq!(sender(b"GET /raft/probing HTTP/1.1\r\n\r\n"), None);
    }
}
