//! A TCP relay that behaves like a middlebox between two machines. Its behaviour can be changed at run time.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, sleep_until};

/// Behaviour of a link on existing and on new flows. A flow is one relayed TCP connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behaviour {
    /// Forwards every byte.
    Pass,
    /// Like a NAT gateway, forgets a flow if the client sends no byte for this long. Bytes that either side sends later are acknowledged by
    /// TCP and then discarded. New flows work.
    Forget(Duration),
    /// Forwards this many bytes per second, in each direction of each flow.
    Rate(u64),
    /// Discards the bytes of all flows, old and new, in both directions. A flow that has lost bytes never works again, even after a change
    /// of the behaviour.
    BlackHole,
    /// Accepts new connections and never answers them. Existing flows continue.
    HalfOpen,
    /// Delays the bytes of existing flows by this time in each direction. Accepts new connections and never answers them.
    Established(Duration),
    /// Closes a flow gracefully after this time without a byte in either direction.
    CloseIdle(Duration),
    /// Ends all flows and resets new connections at once.
    Refuse,
}

/// A relay to one target. Dropping it ends the relay and all its flows.
pub struct Link {
    pub address: SocketAddr,
    behaviour: watch::Sender<Behaviour>,
    accepted: Arc<AtomicUsize>,
    open: Arc<AtomicUsize>,
    task: AbortHandle,
}

impl Link {
    pub async fn start(target: impl ToString) -> Self {
        Self::at("127.0.0.1:0", target, Behaviour::Pass).await
    }

    pub async fn behaving(target: impl ToString, behaviour: Behaviour) -> Self {
        Self::at("127.0.0.1:0", target, behaviour).await
    }

    pub async fn at(listen: &str, target: impl ToString, behaviour: Behaviour) -> Self {
        let listener = TcpListener::bind(listen).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (behaviour, behaves) = watch::channel(behaviour);
        let (accepted, open) = (Arc::default(), Arc::default());
        let counters = (Arc::clone(&accepted), Arc::clone(&open));
        let task = tokio::spawn(relay(listener, target.to_string(), behaves, counters));
        Self {
            address,
            behaviour,
            accepted,
            open,
            task: task.abort_handle(),
        }
    }

    /// Changes the behaviour, for existing flows too.
    pub fn set(&self, behaviour: Behaviour) {
        self.behaviour.send_replace(behaviour);
    }

    /// Returns the number of connections accepted so far.
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }

    /// Returns the number of open connections.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::SeqCst)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

type Counters = (Arc<AtomicUsize>, Arc<AtomicUsize>);

async fn relay(
    listener: TcpListener,
    target: String,
    behaves: watch::Receiver<Behaviour>,
    (accepted, open): Counters,
) {
    let mut flows = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        while flows.try_join_next().is_some() {}
        accepted.fetch_add(1, Ordering::SeqCst);
        let counted = Counted::new(&open);
        let (target, behaves) = (target.clone(), behaves.clone());
        flows.spawn(async move {
            carry(client, &target, behaves).await;
            drop(counted);
        });
    }
}

/// Counts one open flow until it is dropped.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(open: &Arc<AtomicUsize>) -> Self {
        open.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(open))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

async fn carry(client: TcpStream, target: &str, mut behaves: watch::Receiver<Behaviour>) {
    let _ = client.set_nodelay(true);
    let first = *behaves.borrow_and_update();
    match first {
        Behaviour::Refuse => return reset(&client),
        Behaviour::HalfOpen | Behaviour::Established(_) | Behaviour::BlackHole => {
            return hold(client).await;
        }
        _ => {}
    }
    let Ok(server) = TcpStream::connect(target).await else {
        return reset(&client);
    };
    let _ = server.set_nodelay(true);
    let flow = Flow::new();
    let ((from_client, to_client), (from_server, to_server)) =
        (client.into_split(), server.into_split());
    let up = pump(from_client, to_server, Way::Up, &flow, behaves.clone());
    let down = pump(from_server, to_client, Way::Down, &flow, behaves.clone());
    let refused = async {
        while behaves.changed().await.is_ok() {
            if *behaves.borrow_and_update() == Behaviour::Refuse {
                return;
            }
        }
    };
    let both = async {
        tokio::pin!(down);
        tokio::select! {
            () = up => {}
            () = &mut down => return,
        }
        // After the client has closed its side, the remaining bytes of the server are forwarded. A forgotten flow ends as soon as the
        // client has closed its side.
        if !flow.is_forgotten() {
            let _ = tokio::time::timeout(LINGER, down).await;
        }
    };
    tokio::select! {
        () = both => {}
        () = refused => {}
    }
}

/// Configures the connection so that its close sends a reset, as a closed port does.
fn reset(client: &TcpStream) {
    let _ = socket2::SockRef::from(client).set_linger(Some(Duration::ZERO));
}

/// Reads and discards bytes until the client closes the connection.
async fn hold(mut client: TcpStream) {
    let mut buffer = vec![0; CHUNK];
    while matches!(client.read(&mut buffer).await, Ok(1..)) {}
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Up,
    Down,
}

/// State shared by the two directions of a flow.
struct Flow {
    forgotten: AtomicBool,
    /// Times of the last byte from the client and of the last byte in either direction.
    last: Mutex<(Instant, Instant)>,
}

impl Flow {
    fn new() -> Self {
        let now = Instant::now();
        Self {
            forgotten: AtomicBool::new(false),
            last: Mutex::new((now, now)),
        }
    }

    fn is_forgotten(&self) -> bool {
        self.forgotten.load(Ordering::SeqCst)
    }

    /// Records that bytes were received. Returns whether they are discarded.
    fn swallows(&self, way: Way, behaviour: Behaviour) -> bool {
        let now = Instant::now();
        let mut last = self.last.lock().unwrap();
        let silent = now.saturating_duration_since(last.0);
        let forgets = match behaviour {
            Behaviour::Forget(after) => silent > after,
            Behaviour::BlackHole => true,
            _ => false,
        };
        if forgets {
            self.forgotten.store(true, Ordering::SeqCst);
        }
        if way == Way::Up {
            last.0 = now;
        }
        last.1 = now;
        self.is_forgotten()
    }

    /// Completes when the flow has been idle for as long as its behaviour allows.
    async fn idle(&self, behaviour: Behaviour) {
        let Behaviour::CloseIdle(after) = behaviour else {
            return std::future::pending().await;
        };
        loop {
            let until = self.last.lock().unwrap().1 + after;
            if Instant::now() >= until {
                return;
            }
            sleep_until(until).await;
        }
    }
}

async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    way: Way,
    flow: &Flow,
    mut behaves: watch::Receiver<Behaviour>,
) {
    let mut buffer = vec![0; CHUNK];
    loop {
        let behaviour = *behaves.borrow_and_update();
        // On a slow link, small reads keep the rate even.
        let room = match behaviour {
            Behaviour::Rate(rate) => (rate / 100).clamp(64, CHUNK as u64),
            _ => CHUNK as u64,
        };
        let room = usize::try_from(room).unwrap();
        let read = tokio::select! {
            read = from.read(&mut buffer[..room]) => read,
            Ok(()) = behaves.changed() => continue,
            () = flow.idle(behaviour) => Ok(0),
        };
        let Ok(read @ 1..) = read else {
            break;
        };
        let behaviour = *behaves.borrow();
        if flow.swallows(way, behaviour) {
            continue;
        }
        if let Behaviour::Established(late) = behaviour {
            sleep(late).await;
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            break;
        }
        if let Behaviour::Rate(rate) = behaviour {
            sleep(Duration::from_secs(read as u64) / u32::try_from(rate).unwrap()).await;
        }
    }
    // If the middlebox has forgotten the flow, the FIN of the server is lost too.
    if way == Way::Down && flow.is_forgotten() {
        std::future::pending::<()>().await;
    }
    let _ = to.shutdown().await;
    if way == Way::Down {
        // The client receives this FIN first, and answers with its own FIN.
        sleep(LINGER).await;
    }
}

const CHUNK: usize = 16 * 1024;
/// Time for which one direction of a flow stays open after the other direction has ended.
const LINGER: Duration = Duration::from_millis(500);
