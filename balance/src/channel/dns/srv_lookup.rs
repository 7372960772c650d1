//! Looks up SRV records and the addresses of their targets.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use domain::base::iana::Rcode;
use domain::base::name::ToName;
use domain::base::{Message, Rtype};
use domain::rdata::{A, Aaaa, Srv};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::name_servers::{DnsName, NameServers, PANICKED};
use super::srv_records::{SrvRecord, by_priority, endpoints};
use super::task::{Found, Lookup};
use crate::attributes::Attributes;

type Record = SrvRecord<DnsName>;

/// Looks up the SRV records of a name.
pub(super) struct SrvLookup {
    name: DnsName,
    name_servers: Vec<SocketAddr>,
    /// The last known IPv4 and IPv6 addresses of each target, for a lookup that fails. `None` if no lookup has succeeded.
    known: HashMap<DnsName, [Option<Vec<IpAddr>>; 2]>,
}

/// The addresses of one version of IP, and the time for which they are valid.
type AddressAnswer = Result<(Vec<IpAddr>, Option<Duration>), String>;

/// What is known about the targets of a lookup so far.
struct Progress {
    servers: Arc<NameServers>,
    /// The addresses in the additional section of the answer.
    additional: HashMap<DnsName, [Vec<IpAddr>; 2]>,
    /// The targets that were looked up. A target can have records of several priorities.
    done: HashSet<DnsName>,
    /// Number of the addresses in the answers for the targets.
    addresses: usize,
    ttl: Option<Duration>,
    /// The failure of a lookup of a target.
    trouble: Option<String>,
}

impl Progress {
    /// Records a failure. That of the smallest name is reported, so that a failure that repeats has the same text.
    fn on_failure(&mut self, failure: String) {
        let smallest = self.trouble.take().into_iter().chain([failure]).min();
        self.trouble = smallest;
    }
}

impl SrvLookup {
    pub(super) fn new(name: DnsName, name_servers: Vec<SocketAddr>) -> Self {
        Self {
            name,
            name_servers,
            known: HashMap::new(),
        }
    }

    /// Returns the records of a group with the addresses of their targets. A target whose lookup fails keeps its last known addresses.
    async fn resolve<'a>(
        &mut self,
        group: &'a [Record],
        progress: &mut Progress,
    ) -> Result<Vec<(&'a Record, Vec<IpAddr>)>, String> {
        let mut lookups = JoinSet::new();
        let permits = Arc::new(Semaphore::new(MAX_QUERIES));
        for (target, rtype) in self.unknown(group, progress) {
            let (permits, servers) = (Arc::clone(&permits), Arc::clone(&progress.servers));
            lookups.spawn(async move {
                // The semaphore is never closed.
                let _permit = permits.acquire().await;
                let answer = addresses(&servers, &target, rtype).await;
                (target, rtype, answer)
            });
        }
        while let Some(done) = lookups.join_next().await {
            let Ok((target, rtype, answer)) = done else {
                progress.on_failure(PANICKED.to_owned());
                continue;
            };
            match answer {
                Ok((addresses, ttl)) => {
                    progress.addresses += addresses.len();
                    if progress.addresses > MAX_ADDRESSES {
                        return Err(too_many_addresses());
                    }
                    progress.ttl = shorter(progress.ttl, ttl);
                    let [v4, v6] = self.known.entry(target).or_default();
                    *(if rtype == Rtype::A { v4 } else { v6 }) = Some(addresses);
                }
                Err(error) => {
                    let failure = format!("the target {target} cannot be looked up: {error}");
                    progress.on_failure(failure);
                }
            }
        }
        let mut resolved = Vec::new();
        let mut count = 0;
        for record in group {
            let known = self.known.get(&record.target).into_iter().flatten();
            let addresses: Vec<_> = known.flatten().flatten().copied().collect();
            // Several records can have the same target.
            count += addresses.len();
            if count > MAX_ADDRESSES {
                return Err(too_many_addresses());
            }
            resolved.push((record, addresses));
        }
        Ok(resolved)
    }

    /// Returns the queries for the targets of a group: those for addresses that the additional section does not contain. A version of IP
    /// that it does not contain is not queried if there was no address of this version before.
    fn unknown(&mut self, group: &[Record], progress: &mut Progress) -> Vec<(DnsName, Rtype)> {
        let mut queries = Vec::new();
        for Record { target, .. } in group {
            if !progress.done.insert(target.clone()) {
                continue;
            }
            let found = progress.additional.remove(target).unwrap_or_default();
            let has_some = found.iter().any(|addresses| !addresses.is_empty());
            let known = self.known.entry(target.clone()).or_default();
            let versions = [Rtype::A, Rtype::AAAA].into_iter().zip(known);
            for ((rtype, known), found) in versions.zip(found) {
                if !found.is_empty() {
                    *known = Some(found);
                } else if !has_some || known.as_ref().is_none_or(|known| !known.is_empty()) {
                    queries.push((target.clone(), rtype));
                }
            }
        }
        queries
    }
}

impl Lookup for SrvLookup {
    type Attributes = Attributes;

    async fn lookup(&mut self) -> Result<Found<Attributes>, String> {
        let servers = Arc::new(NameServers::new(&self.name_servers).await?);
        let response = servers.query_srv(&self.name).await?;
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
            servers,
            additional: additional_addresses(&response, &named),
            done: HashSet::new(),
            addresses: 0,
            ttl: shortest_ttl(&response),
            trouble: None,
        };
        for group in by_priority(records) {
            let resolved = self.resolve(&group, &mut progress).await?;
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

/// Looks up the addresses of a target.
async fn addresses(servers: &NameServers, target: &DnsName, rtype: Rtype) -> AddressAnswer {
    let answer = servers.query(target, rtype).await?;
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
            if records.len() == MAX_RECORDS {
                return Err(format!("the name has more than {MAX_RECORDS} SRV records"));
            }
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

fn too_many_addresses() -> String {
    format!("the targets of the SRV records have more than {MAX_ADDRESSES} addresses")
}

const MALFORMED: &str = "the answer is malformed";
/// Limit on the queries for addresses that are sent at the same time.
const MAX_QUERIES: usize = 32;
/// Limit on the SRV records of a name.
const MAX_RECORDS: usize = 1_000;
/// Limit on the addresses of a group of records. An answer over TCP can have 4 000 of them.
const MAX_ADDRESSES: usize = 10_000;
