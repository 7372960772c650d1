//! The name servers of a lookup, and the queries that are sent to them.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use domain::base::iana::Rcode;
use domain::base::{Message, MessageBuilder, Name, Rtype};
use domain::resolv::StubResolver;
use domain::resolv::stub::conf::{self, ResolvConf, ServerConf, Transport};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::timeout;

pub(super) type DnsName = Name<Vec<u8>>;

/// The name servers of a lookup.
pub(super) struct NameServers {
    /// One resolver for each server: a resolver with several servers returns the error of the first one.
    resolvers: Vec<StubResolver>,
    /// The servers that the program has set.
    given: Vec<SocketAddr>,
    /// The index of the server that has answered last, which gets the next query first.
    first: AtomicUsize,
}

impl NameServers {
    /// Uses these servers, or else those of the system. They are read for each lookup, because the system's configuration can change.
    ///
    /// # Errors
    ///
    /// Fails if the system's configuration has no server because it cannot be read.
    pub(super) async fn new(given: &[SocketAddr]) -> Result<Self, String> {
        let mut conf = if given.is_empty() {
            // This reads a file.
            let read = spawn_blocking(|| system(Path::new(RESOLV_CONF))).await;
            read.unwrap_or_else(|_| Err(PANICKED.to_owned()))?
        } else {
            let mut conf = ResolvConf::new();
            let servers = given.iter();
            conf.servers
                .extend(servers.map(|server| ServerConf::new(*server, Transport::UdpTcp)));
            conf
        };
        // This adds `127.0.0.1` if there is no server.
        conf.finalize();
        let timeout = conf.options.timeout;
        conf.options.timeout = timeout.clamp(MIN_QUERY_TIMEOUT, QUERY_TIMEOUT);
        let resolver = |server| {
            let mut only = ResolvConf::new();
            only.options = conf.options.clone();
            only.servers.push(server);
            only.finalize();
            StubResolver::from_conf(only)
        };
        Ok(Self {
            resolvers: conf.servers.into_iter().map(resolver).collect(),
            given: given.to_vec(),
            first: AtomicUsize::new(0),
        })
    }

    /// Sends a query to one server after the other, until one answers. The answer may have no record.
    pub(super) async fn query(
        &self,
        name: &DnsName,
        rtype: Rtype,
    ) -> Result<Message<Bytes>, String> {
        let mut failure = String::new();
        let first = self.first.load(Ordering::Relaxed);
        let attempts = self.resolvers.len().max(ATTEMPTS);
        let resolvers = self.resolvers.iter().enumerate().cycle();
        for (index, resolver) in resolvers.skip(first).take(attempts) {
            let answer = resolver.query::<&DnsName, _>((name, rtype)).await;
            let answer = answer.map_err(|error| error.to_string());
            match answer.and_then(|answer| checked(answer.into_message())) {
                Ok(answer) => {
                    self.first.store(index, Ordering::Relaxed);
                    return Ok(answer);
                }
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    /// Sends the query for SRV records. Their number is not known, and Consul removes records from an answer over UDP without a sign, so the
    /// servers that the program has set get the query over TCP first.
    pub(super) async fn query_srv(
        self: &Arc<Self>,
        name: &DnsName,
    ) -> Result<Message<Bytes>, String> {
        for (index, server) in self.given.iter().enumerate() {
            let answer = timeout(QUERY_TIMEOUT, query_over_tcp(*server, name, Rtype::SRV)).await;
            if let Ok(Some(answer)) = answer
                && let Ok(answer) = checked(answer)
            {
                self.first.store(index, Ordering::Relaxed);
                return Ok(answer);
            }
        }
        // A panic in the resolver must not end the lookups.
        let (this, name) = (Arc::clone(self), name.clone());
        let mut task = JoinSet::new();
        task.spawn(async move { this.query(&name, Rtype::SRV).await });
        match task.join_next().await {
            Some(Ok(answer)) => answer,
            _ => Err(PANICKED.to_owned()),
        }
    }
}

/// Reads the system's configuration. glibc also uses `127.0.0.1` if the file is missing, or has no server.
fn system(path: &Path) -> Result<ResolvConf, String> {
    let mut conf = ResolvConf::new();
    match conf.parse_file(path) {
        Err(conf::Error::Io(error)) if error.kind() == ErrorKind::NotFound => Ok(conf),
        Err(error) if conf.servers.is_empty() => {
            Err(format!("{} cannot be used: {error}", path.display()))
        }
        _ => Ok(conf),
    }
}

/// Returns the answer if it is complete, and no error of the server.
fn checked(answer: Message<Bytes>) -> Result<Message<Bytes>, String> {
    let header = answer.header();
    let rcode = header.rcode();
    if rcode != Rcode::NOERROR && rcode != Rcode::NXDOMAIN {
        Err(format!("the name server returned {rcode}"))
    } else if header.tc() {
        Err("the answer is truncated".to_owned())
    } else {
        Ok(answer)
    }
}

/// Sends a query on a TCP connection of its own. Returns `None` after any error, because the query is then sent over UDP.
async fn query_over_tcp(
    server: SocketAddr,
    name: &DnsName,
    rtype: Rtype,
) -> Option<Message<Bytes>> {
    let mut builder = MessageBuilder::new_vec();
    builder.header_mut().set_id(fastrand::u16(..));
    builder.header_mut().set_rd(true);
    let mut builder = builder.question();
    builder.push((name, rtype)).ok()?;
    let query = builder.into_message();
    let length = u16::try_from(query.as_slice().len()).ok()?;
    // Some servers expect the length and the message in one segment.
    let request = [&length.to_be_bytes()[..], query.as_slice()].concat();
    let mut stream = TcpStream::connect(server).await.ok()?;
    stream.write_all(&request).await.ok()?;
    let length = stream.read_u16().await.ok()?;
    let mut answer = vec![0; length.into()];
    stream.read_exact(&mut answer).await.ok()?;
    let answer = Message::from_octets(Bytes::from(answer)).ok()?;
    answer.is_answer(&query).then_some(answer)
}

/// The failure if a task of the resolver has panicked.
pub(super) const PANICKED: &str = "the resolver has panicked";
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Smallest number of attempts of a query, because the network can lose a datagram.
const ATTEMPTS: usize = 2;
/// Timeout of one attempt.
const QUERY_TIMEOUT: Duration = Duration::from_secs(2);
/// The file can have a timeout of 0.
const MIN_QUERY_TIMEOUT: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_configuration_without_a_server_is_an_error_if_it_cannot_be_read() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("resolv.conf");
        let servers = |path: &Path| system(path).map(|conf| conf.servers.len());
        assert_eq!(servers(&path), Ok(0));
        for (content, expected) in [
            ("search test\n", Some(0)),
            ("nameserver 10.0.0.1\nnameserver 10.0.0.2\n", Some(2)),
            ("nameserver 10.0.0.1\nunheard of\n", Some(1)),
            ("unheard of\nnameserver 10.0.0.1\n", None),
        ] {
            fs::write(&path, content).expect("the file is written");
            assert_eq!(servers(&path).ok(), expected, "{content}");
        }
        let error = servers(directory.path()).expect_err("a directory is no file");
        assert!(error.contains("cannot be used: "), "{error}");
    }
}
