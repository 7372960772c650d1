//! A name server on a loopback socket, with the records and the faults that the tests set.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard};

use domain::base::iana::Rcode;
use domain::base::message_builder::AnswerBuilder;
use domain::base::{Message, MessageBuilder, Name, Rtype};
use domain::rdata::{A, Aaaa, Cname, Srv};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;

/// The data of a record.
#[derive(Clone, Debug)]
pub(super) enum Data {
    /// Priority, weight, port and target.
    Srv(u16, u16, u16, &'static str),
    Ip(&'static str),
    Cname(&'static str),
}

/// The records, and what the server does with them.
#[derive(Default)]
pub(super) struct Zone {
    pub(super) records: Vec<(&'static str, u32, Data)>,
    /// The names for which queries fail with `SERVFAIL`.
    pub(super) failing: BTreeSet<&'static str>,
    /// The types of the addresses of targets in the additional section.
    pub(super) additional: Vec<Rtype>,
    /// Whether each answer over UDP is truncated.
    pub(super) truncates: bool,
    /// Whether connections are closed before an answer.
    pub(super) closes_connections: bool,
    /// Number of further queries over UDP without an answer.
    pub(super) lost: usize,
    /// The queries so far: the transport, the type and the name.
    pub(super) queries: Vec<String>,
}

pub(super) struct NameServer {
    pub(super) address: SocketAddr,
    zone: Arc<Mutex<Zone>>,
    _tasks: JoinSet<()>,
}

impl NameServer {
    pub(super) async fn start(records: &[(&'static str, Data)]) -> Self {
        let records = records.iter().map(|(name, data)| (*name, 60, data.clone()));
        let zone = Arc::new(Mutex::new(Zone {
            records: records.collect(),
            ..Zone::default()
        }));
        let (listener, socket) = sockets().await;
        let address = listener.local_addr().expect("an address");
        let mut tasks = JoinSet::new();
        tasks.spawn(serve_udp(socket, Arc::clone(&zone)));
        tasks.spawn(serve_tcp(listener, Arc::clone(&zone)));
        Self {
            address,
            zone,
            _tasks: tasks,
        }
    }

    pub(super) fn zone(&self) -> MutexGuard<'_, Zone> {
        self.zone.lock().expect("the zone")
    }
}

/// Returns sockets with the same port.
async fn sockets() -> (TcpListener, UdpSocket) {
    loop {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
        let address = listener.local_addr().expect("an address");
        if let Ok(socket) = UdpSocket::bind(address).await {
            return (listener, socket);
        }
    }
}

async fn serve_udp(socket: UdpSocket, zone: Arc<Mutex<Zone>>) {
    let mut buffer = [0; 2_000];
    while let Ok((length, peer)) = socket.recv_from(&mut buffer).await {
        let answer = answer(&buffer[..length], &zone, false);
        if let Some(answer) = answer {
            // The peer may have closed its socket.
            let _ = socket.send_to(&answer, peer).await;
        }
    }
}

async fn serve_tcp(listener: TcpListener, zone: Arc<Mutex<Zone>>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        connections.spawn(serve_connection(stream, Arc::clone(&zone)));
    }
}

async fn serve_connection(mut stream: TcpStream, zone: Arc<Mutex<Zone>>) {
    while let Ok(length) = stream.read_u16().await {
        let mut query = vec![0; length.into()];
        if stream.read_exact(&mut query).await.is_err() {
            return;
        }
        let Some(answer) = answer(&query, &zone, true) else {
            return;
        };
        let length = u16::try_from(answer.len()).expect("a short answer");
        let sent = async {
            stream.write_u16(length).await?;
            stream.write_all(&answer).await
        };
        if sent.await.is_err() {
            return;
        }
    }
}

fn name(text: &str) -> Name<Vec<u8>> {
    Name::from_str(text).expect("a name")
}

/// Returns the answer to a query, or `None` if the query is lost.
fn answer(query: &[u8], zone: &Mutex<Zone>, is_tcp: bool) -> Option<Vec<u8>> {
    let query = Message::from_octets(query.to_vec()).expect("a message");
    let question = query.first_question().expect("a question");
    let asked = question.qname().to_string();
    let mut zone = zone.lock().expect("the zone");
    let transport = if is_tcp { "tcp" } else { "udp" };
    let rtype = question.qtype();
    zone.queries.push(format!("{transport} {rtype} {asked}"));
    if is_tcp && zone.closes_connections {
        return None;
    }
    if !is_tcp && zone.lost > 0 {
        zone.lost -= 1;
        return None;
    }
    let is_known = zone.records.iter().any(|(owner, ..)| *owner == asked);
    let rcode = if zone.failing.contains(&*asked) {
        Rcode::SERVFAIL
    } else if is_known {
        Rcode::NOERROR
    } else {
        Rcode::NXDOMAIN
    };
    let builder = MessageBuilder::new_vec().start_answer(&query, rcode);
    let mut builder = builder.expect("an answer");
    if zone.truncates && !is_tcp {
        builder.header_mut().set_tc(true);
        return Some(builder.finish());
    }
    if rcode != Rcode::NOERROR {
        return Some(builder.finish());
    }
    let mut owner = asked;
    let mut targets = Vec::new();
    for (of, ttl, data) in &zone.records {
        if *of == owner && push(&mut builder, of, *ttl, data, rtype) {
            match data {
                Data::Cname(canonical) => (*canonical).clone_into(&mut owner),
                Data::Srv(.., target) => targets.push(*target),
                Data::Ip(_) => {}
            }
        }
    }
    let mut builder = builder.additional();
    for (of, ttl, data) in &zone.records {
        if targets.contains(of)
            && let Data::Ip(ip) = data
        {
            let has = |rtype| zone.additional.contains(&rtype);
            let pushed = match ip.parse().expect("an address") {
                IpAddr::V4(ip) if has(Rtype::A) => builder.push((name(of), *ttl, A::new(ip))),
                IpAddr::V6(ip) if has(Rtype::AAAA) => builder.push((name(of), *ttl, Aaaa::new(ip))),
                _ => continue,
            };
            pushed.expect("room in the answer");
        }
    }
    Some(builder.finish())
}

/// Adds a record to the answer if the query has its type. Returns whether it was added.
fn push(
    builder: &mut AnswerBuilder<Vec<u8>>,
    owner: &str,
    ttl: u32,
    data: &Data,
    asked: Rtype,
) -> bool {
    let owner = name(owner);
    let pushed = match data {
        Data::Cname(canonical) => builder.push((owner, ttl, Cname::new(name(canonical)))),
        Data::Srv(priority, weight, port, target) if asked == Rtype::SRV => {
            let data = Srv::new(*priority, *weight, *port, name(target));
            builder.push((owner, ttl, data))
        }
        Data::Ip(ip) => match ip.parse().expect("an address") {
            IpAddr::V4(ip) if asked == Rtype::A => builder.push((owner, ttl, A::new(ip))),
            IpAddr::V6(ip) if asked == Rtype::AAAA => builder.push((owner, ttl, Aaaa::new(ip))),
            _ => return false,
        },
        Data::Srv(..) => return false,
    };
    pushed.expect("room in the answer");
    true
}
