//! Gathers facts about etcd: members, alarms, clocks and permissions.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use etcd_client::{
    AlarmAction, AlarmType, Client, Compare, CompareOp, GetOptions, MemberListResponse, Txn, TxnOp,
};
use tokio::time::{Instant, timeout};

use super::clock;
use super::facts::{Access, Alarm, AlarmKind, Clock, Member, MemberStatus};
use crate::bounded::run_all;
use crate::connection::{self, host_port};
use crate::error::{etcd_error, is_permission_denied};
use crate::options::Options;

/// The members, and what their endpoints answer.
pub(super) struct Cluster {
    pub(super) members: Result<Vec<Member>, String>,
    pub(super) dead_endpoints: Vec<(String, String)>,
    pub(super) alarms: Result<Vec<Alarm>, String>,
    pub(super) clocks: Vec<Clock>,
}

/// The answer of one endpoint: the id of its member and the status.
type Answer = Result<(u64, MemberStatus), String>;

pub(super) async fn cluster(options: &Options, client: &Client) -> Cluster {
    let listed = client.cluster_client().member_list().await;
    let configured: BTreeSet<_> = options.endpoints.iter().map(|it| host_port(it)).collect();
    let mut addresses = configured.clone();
    for member in listed.iter().flat_map(MemberListResponse::members) {
        addresses.extend(member.client_urls().iter().map(|url| host_port(url)));
    }
    let answers = ask_all(options, addresses).await;
    let mut names = BTreeMap::new();
    let members = match &listed {
        Err(error) => Err(etcd_error(error)),
        Ok(listed) => Ok(listed
            .members()
            .iter()
            .map(|member| {
                let name = if member.name().is_empty() {
                    format!("{:x}", member.id())
                } else {
                    member.name().to_owned()
                };
                names.insert(member.id(), name.clone());
                let addresses: Vec<_> = member
                    .client_urls()
                    .iter()
                    .map(|it| host_port(it))
                    .collect();
                let answer = member_answer(member.id(), &addresses, &answers);
                Member {
                    name,
                    addresses,
                    answer,
                }
            })
            .collect()),
    };
    let of_members: BTreeSet<_> = members
        .iter()
        .flatten()
        .flat_map(|member: &Member| member.addresses.iter().cloned())
        .collect();
    let dead_endpoints = configured
        .difference(&of_members)
        .filter_map(|endpoint| {
            let reason = answers.get(endpoint)?.as_ref().err()?;
            Some((endpoint.clone(), reason.clone()))
        })
        .collect();
    Cluster {
        dead_endpoints,
        alarms: alarms(client, &names).await,
        clocks: clocks(options, &answers).await,
        members,
    }
}

/// Requests the status from each address. All requests run at once, so that dead members do not add up.
async fn ask_all(options: &Options, addresses: BTreeSet<String>) -> BTreeMap<String, Answer> {
    let requests = addresses.into_iter().map(async |address| {
        let answer = match timeout(options.timeout, ask(options, &address)).await {
            Ok(answer) => answer,
            Err(_) => Err(format!("no response within {:?}", options.timeout)),
        };
        (address, answer)
    });
    run_all(requests).await.into_iter().collect()
}

async fn ask(options: &Options, address: &str) -> Answer {
    let client = connection::member(options, address).await;
    let mut maintenance = client
        .map_err(|failure| failure.to_string())?
        .maintenance_client();
    let mut latency = None;
    // The first request also opens the connection, so the second one is measured.
    loop {
        let start = Instant::now();
        let status = maintenance.status().await;
        let status = status.map_err(|error| etcd_error(&error))?;
        let elapsed = Instant::now().saturating_duration_since(start);
        if latency.replace(elapsed).is_some() {
            let id = status
                .header()
                .map_or(0, etcd_client::ResponseHeader::member_id);
            let status = MemberStatus {
                latency: elapsed,
                version: status.version().to_owned(),
                has_leader: status.leader() != 0,
            };
            return Ok((id, status));
        }
    }
}

/// Returns the best answer of a member: that of any endpoint that leads to it, or else the failure of its first address.
fn member_answer(
    id: u64,
    addresses: &[String],
    answers: &BTreeMap<String, Answer>,
) -> Result<MemberStatus, String> {
    let answered = answers.values().flatten().find(|(member, _)| *member == id);
    if let Some((_, status)) = answered {
        return Ok(status.clone());
    }
    let mut failed = addresses.iter().filter_map(|address| answers.get(address));
    let reason = failed.find_map(|answer| answer.as_ref().err());
    Err(reason.map_or_else(
        || "it has no client URL: it was added, but never started".to_owned(),
        Clone::clone,
    ))
}

async fn alarms(client: &Client, names: &BTreeMap<u64, String>) -> Result<Vec<Alarm>, String> {
    let listed = client
        .maintenance_client()
        .alarm(AlarmAction::Get, AlarmType::None, None)
        .await
        .map_err(|error| etcd_error(&error))?;
    let alarm = |alarm: &etcd_client::AlarmMember| Alarm {
        member: names
            .get(&alarm.member_id())
            .cloned()
            .unwrap_or_else(|| format!("{:x}", alarm.member_id())),
        kind: match alarm.alarm() {
            AlarmType::Nospace => AlarmKind::NoSpace,
            AlarmType::Corrupt => AlarmKind::Corrupt,
            AlarmType::None => AlarmKind::Other,
        },
    };
    Ok(listed.alarms().iter().map(alarm).collect())
}

/// Reads the clocks of the members that respond. With TLS, the clocks are not read: a wrong clock is then visible in the handshake.
async fn clocks(options: &Options, answers: &BTreeMap<String, Answer>) -> Vec<Clock> {
    if connection::is_tls(options) {
        return Vec::new();
    }
    let mut clocks = Vec::new();
    for endpoint in answers
        .iter()
        .filter(|(_, answer)| answer.is_ok())
        .map(|(it, _)| it)
    {
        let limit = options.timeout.min(Duration::from_secs(2));
        if let Some(seconds_ahead) = clock::seconds_ahead(endpoint, limit).await {
            clocks.push(Clock {
                endpoint: endpoint.clone(),
                seconds_ahead,
            });
        }
    }
    clocks
}

/// Returns whether the user may read all keys with the prefix.
pub(super) async fn may_read(client: &Client, prefix: &str) -> Access {
    let get = match prefix {
        "" => GetOptions::new().with_all_keys(),
        _ => GetOptions::new().with_prefix(),
    };
    let read = client
        .kv_client()
        .get(prefix, Some(get.with_limit(1).with_keys_only()))
        .await;
    access(read.map(drop))
}

/// Returns whether the user may write keys with the prefix. etcd checks the permissions of all operations of a transaction, also of those
/// that the condition excludes. No revision is below 0, so nothing is written.
pub(super) async fn may_write(client: &Client, prefix: &str) -> Access {
    let key = format!("{prefix}doctor");
    let never = Compare::mod_revision(key.as_str(), CompareOp::Less, 0);
    let transaction = Txn::new()
        .when([never])
        .and_then([TxnOp::put(key.as_str(), "", None)]);
    access(client.kv_client().txn(transaction).await.map(drop))
}

fn access(outcome: Result<(), etcd_client::Error>) -> Access {
    match outcome {
        Ok(()) => Access::Granted,
        Err(error) if is_permission_denied(&error) => Access::Denied,
        Err(error) => Access::Unknown(etcd_error(&error)),
    }
}
