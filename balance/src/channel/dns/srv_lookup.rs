//! Looks up SRV records and the addresses of their targets.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use domain::base::iana::Rcode;
use domain::base::name::ToName;
use domain::base::{Message, Name, Rtype};
use domain::rdata::{A, Aaaa, Srv};
use domain::resolv::StubResolver;
use domain::resolv::stub::conf::{ResolvConf, ServerConf, Transport};
use tokio::sync::Semaphore;
use tokio::task::{JoinSet, spawn_blocking};

use super::srv_records::{SrvRecord, by_priority, endpoints};
use super::task::{Found, Lookup};
use crate::attributes::Attributes;

type DnsName = Name<Vec<u8>>;
type Record = SrvRecord<DnsName>;

/// Looks up the SRV records of a name.
pub(super) struct SrvLookup {
    name: DnsName,
    name_servers: Vec<SocketAddr>,
    /// The last known IPv4 and IPv6 addresses of each target, for a lookup that fails.
    known: HashMap<DnsName, [Vec<IpAddr>; 2]>,
}

/// The answer to a query for the addresses of one version of IP.
type AddressAnswer = Result<(Vec<IpAddr>, Option<Duration>), String>;

/// What is known about the targets of a lookup so far.
struct Progress {
    resolver: Arc<StubResolver>,
    /// The addresses in the additional section of the answer.
    additional: HashMap<DnsName, [Vec<IpAddr>; 2]>,
    ttl: Option<Duration>,
    /// The first failure of a lookup of a target.
    trouble: Option<String>,
}

impl SrvLookup {
    pub(super) fn new(name: DnsName, name_servers: Vec<SocketAddr>) -> Self {
        Self {
            name,
            name_servers,
            known: HashMap::new(),
        }
    }

    /// Returns the addresses of the targets of a group. A target whose lookup fails keeps its last known addresses.
    async fn resolve(
        &mut self,
        group: &[Record],
        progress: &mut Progress,
    ) -> HashMap<DnsName, Vec<IpAddr>> {
        let targets: HashSet<_> = group.iter().map(|record| &record.target).collect();
        let mut lookups = JoinSet::new();
        let permits = Arc::new(Semaphore::new(MAX_LOOKUPS));
        for target in targets {
            if let Some(found) = progress.additional.get(target) {
                self.known.insert(target.clone(), found.clone());
                continue;
            }
            let (target, permits) = (target.clone(), Arc::clone(&permits));
            let resolver = Arc::clone(&progress.resolver);
            lookups.spawn(async move {
                // The semaphore is never closed.
                let _permit = permits.acquire().await;
                let answers = tokio::join!(
                    addresses(&resolver, &target, Rtype::A),
                    addresses(&resolver, &target, Rtype::AAAA),
                );
                (target, answers)
            });
        }
        while let Some(done) = lookups.join_next().await {
            let Ok((target, (v4, v6))) = done else {
                progress.trouble.get_or_insert_with(|| PANICKED.to_owned());
                continue;
            };
            let known = self.known.entry(target.clone()).or_default();
            for (known, answer) in known.iter_mut().zip([v4, v6]) {
                match answer {
                    Ok((addresses, ttl)) => {
                        *known = addresses;
                        progress.ttl = shorter(progress.ttl, ttl);
                    }
                    Err(error) => {
                        let trouble = format!("the target {target} cannot be looked up: {error}");
                        progress.trouble.get_or_insert(trouble);
                    }
                }
            }
        }
        let known = |record: &Record| {
            let addresses = self.known.get(&record.target);
            addresses.map(|[v4, v6]| [&v4[..], &v6[..]].concat())
        };
        group
            .iter()
            .map(|record| (record.target.clone(), known(record).unwrap_or_default()))
            .collect()
    }
}

impl Lookup for SrvLookup {
    type Attributes = Attributes;

    async fn lookup(&mut self) -> Result<Found<Attributes>, String> {
        let stub = Arc::new(stub_resolver(self.name_servers.clone()).await);
        let response = isolated(Arc::clone(&stub), self.name.clone(), Rtype::SRV).await?;
        let records = srv_records(&response)?;
        match &records[..] {
            [] => return Err("the name has no SRV record".to_owned()),
            [only] if only.target.is_root() => {
                return Err("the record states that the service is not available".to_owned());
            }
            _ => {}
        }
        let named: HashSet<_> = records.iter().map(|record| &record.target).collect();
        self.known.retain(|target, _| named.contains(target));
        let mut progress = Progress {
            resolver: stub,
            additional: additional_addresses(&response, &named),
            ttl: shortest_ttl(&response),
            trouble: None,
        };
        for group in by_priority(records) {
            let by_target = self.resolve(&group, &mut progress).await;
            let resolved: Vec<_> = group
                .iter()
                .map(|record| {
                    let addresses = by_target.get(&record.target);
                    (record, addresses.cloned().unwrap_or_default())
                })
                .collect();
            let weights = endpoints(&resolved);
            if weights.is_empty() {
                continue;
            }
            let weights = weights.into_iter();
            return Ok(Found {
                endpoints: weights
                    .map(|(address, weight)| (address, Attributes::new().with_weight(weight)))
                    .collect(),
                ttl: progress.ttl,
                trouble: progress.trouble,
            });
        }
        let none = || "no target of the SRV records has an address".to_owned();
        Err(progress.trouble.unwrap_or_else(none))
    }
}

/// Creates a resolver with these name servers, or else with those of the system. It is created for each lookup, because the system's
/// configuration can change.
async fn stub_resolver(name_servers: Vec<SocketAddr>) -> StubResolver {
    let mut conf = ResolvConf::new();
    if name_servers.is_empty() {
        // This reads a file.
        if let Ok(read) = spawn_blocking(ResolvConf::default).await {
            conf = read;
        }
    }
    let given = name_servers.into_iter();
    conf.servers
        .extend(given.map(|server| ServerConf::new(server, Transport::UdpTcp)));
    conf.options.timeout = conf.options.timeout.min(QUERY_TIMEOUT);
    conf.finalize();
    StubResolver::from_conf(conf)
}

/// Sends a query in a task of its own, so that a panic in the resolver does not end the lookups.
async fn isolated(
    resolver: Arc<StubResolver>,
    name: DnsName,
    rtype: Rtype,
) -> Result<Message<Bytes>, String> {
    let mut task = JoinSet::new();
    task.spawn(async move { query(&resolver, &name, rtype).await });
    match task.join_next().await {
        Some(Ok(answer)) => answer,
        _ => Err(PANICKED.to_owned()),
    }
}

/// Sends a query, and sends it again after a failure. The answer may have no record.
async fn query(
    resolver: &StubResolver,
    name: &DnsName,
    rtype: Rtype,
) -> Result<Message<Bytes>, String> {
    let mut failure = String::new();
    for _ in 0..ATTEMPTS {
        match resolver.query::<&DnsName, _>((name, rtype)).await {
            Ok(answer) if answer.is_final() => return Ok(answer.into_message()),
            Ok(answer) if answer.is_truncated() => {
                "the answer is truncated".clone_into(&mut failure);
            }
            Ok(answer) => failure = format!("the name server returned {}", answer.header().rcode()),
            Err(error) => failure = error.to_string(),
        }
    }
    Err(failure)
}

/// Looks up the addresses of a target.
async fn addresses(resolver: &StubResolver, target: &DnsName, rtype: Rtype) -> AddressAnswer {
    let answer = query(resolver, target, rtype).await?;
    if answer.header().rcode() == Rcode::NXDOMAIN {
        return Ok((Vec::new(), None));
    }
    let owner = answer.canonical_name().ok_or(MALFORMED)?;
    let records = answer.answer().map_err(|_| MALFORMED)?;
    let mut addresses = Vec::new();
    if rtype == Rtype::A {
        for record in records.limit_to_in::<A>() {
            let record = record.map_err(|_| MALFORMED)?;
            if record.owner() == &owner {
                addresses.push(IpAddr::V4(record.data().addr()));
            }
        }
    } else {
        for record in records.limit_to_in::<Aaaa>() {
            let record = record.map_err(|_| MALFORMED)?;
            if record.owner() == &owner {
                addresses.push(IpAddr::V6(record.data().addr()));
            }
        }
    }
    Ok((addresses, shortest_ttl(&answer)))
}

fn srv_records(answer: &Message<Bytes>) -> Result<Vec<Record>, String> {
    let owner = answer.canonical_name().ok_or(MALFORMED)?;
    let found = answer.answer().map_err(|_| MALFORMED)?;
    let mut records = Vec::new();
    for record in found.limit_to_in::<Srv<_>>() {
        let record = record.map_err(|_| MALFORMED)?;
        if record.owner() == &owner {
            let data = record.data();
            records.push(SrvRecord {
                priority: data.priority(),
                weight: data.weight(),
                port: data.port(),
                target: data.target().to_vec(),
            });
        }
    }
    Ok(records)
}

/// Returns the addresses in the additional section, by target. RFC 2782 permits their use, which saves a query for each target.
fn additional_addresses(
    answer: &Message<Bytes>,
    targets: &HashSet<&DnsName>,
) -> HashMap<DnsName, [Vec<IpAddr>; 2]> {
    let mut found: HashMap<DnsName, [Vec<IpAddr>; 2]> = HashMap::new();
    let Ok(additional) = answer.additional() else {
        return found;
    };
    for record in additional.limit_to_in::<A>().flatten() {
        let owner = record.owner().to_vec();
        if targets.contains(&owner) {
            let [v4, _] = found.entry(owner).or_default();
            v4.push(IpAddr::V4(record.data().addr()));
        }
    }
    for record in additional.limit_to_in::<Aaaa>().flatten() {
        let owner = record.owner().to_vec();
        if targets.contains(&owner) {
            let [_, v6] = found.entry(owner).or_default();
            v6.push(IpAddr::V6(record.data().addr()));
        }
    }
    found
}

/// Returns the shortest time to live of the records in the answer section.
fn shortest_ttl(answer: &Message<Bytes>) -> Option<Duration> {
    let records = answer.answer().ok()?.flatten();
    records.map(|record| record.ttl().into_duration()).min()
}

fn shorter(one: Option<Duration>, other: Option<Duration>) -> Option<Duration> {
    one.into_iter().chain(other).min()
}

/// The failure if a task of the resolver has panicked.
const PANICKED: &str = "the resolver has panicked";
const MALFORMED: &str = "the answer is malformed";
/// Limit on the targets that are looked up at the same time.
const MAX_LOOKUPS: usize = 16;
/// Number of attempts of a query, because the network can lose a datagram.
const ATTEMPTS: usize = 2;
/// Timeout of one attempt.
const QUERY_TIMEOUT: Duration = Duration::from_secs(2);
