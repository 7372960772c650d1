//! Derives findings from facts.

use std::collections::BTreeMap;

use super::facts::{Access, AlarmKind, Facts, Key, LeaseState, Service};
use crate::escape::escaped;
use crate::probe::{Answer, Health};

/// The questions of `doctor`, in the order in which they are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Question {
    Connection,
    Members,
    Alarms,
    Clock,
    Permissions,
    Registered,
    Values,
    Leases,
    Addresses,
    Servers,
}

impl Question {
    pub(super) const ALL: [Self; 10] = [
        Self::Connection,
        Self::Members,
        Self::Alarms,
        Self::Clock,
        Self::Permissions,
        Self::Registered,
        Self::Values,
        Self::Leases,
        Self::Addresses,
        Self::Servers,
    ];

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Connection => "connection",
            Self::Members => "members",
            Self::Alarms => "alarms",
            Self::Clock => "clock",
            Self::Permissions => "permissions",
            Self::Registered => "registered",
            Self::Values => "values",
            Self::Leases => "leases",
            Self::Addresses => "addresses",
            Self::Servers => "servers",
        }
    }
}

/// A fault, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Finding {
    pub(super) question: Question,
    /// A stable name for scripts, such as `member-down`.
    pub(super) name: &'static str,
    /// The member, the key or the service.
    pub(super) subject: String,
    pub(super) problem: String,
    pub(super) advice: String,
}

/// Returns the findings, in the order of the questions.
pub(super) fn findings(facts: &Facts) -> Vec<Finding> {
    let mut findings = Findings(Vec::new());
    if let Err(reason) = &facts.connection {
        findings.add(
            Question::Connection,
            "etcd-unreachable",
            &facts.endpoints.join(","),
            reason.clone(),
            "fix the connection first; all other checks need it",
        );
        return findings.0;
    }
    findings.members(facts);
    findings.alarms(facts);
    findings.clocks(facts);
    findings.permissions(facts);
    findings.registered(facts);
    for service in &facts.services {
        findings.values(service);
        findings.leases(service);
        findings.addresses(service, facts.remote_clients);
        findings.servers(service, facts.client_tls);
    }
    findings.0.sort_by_key(|finding| finding.question);
    findings.0
}

struct Findings(Vec<Finding>);

impl Findings {
    fn add(
        &mut self,
        question: Question,
        name: &'static str,
        subject: &str,
        problem: impl Into<String>,
        advice: impl Into<String>,
    ) {
        self.0.push(Finding {
            question,
            name,
            subject: escaped(subject),
            problem: escaped(&problem.into()),
            advice: escaped(&advice.into()),
        });
    }

    fn members(&mut self, facts: &Facts) {
        for member in facts.members.iter().flatten() {
            let subject = format!("{} ({})", member.name, member.addresses.join(","));
            match &member.answer {
                Err(reason) => self.add(
                    Question::Members,
                    "member-down",
                    &subject,
                    format!("the member does not respond: {reason}"),
                    "start the member, or remove it with `etcdctl member remove`; the cluster tolerates fewer failures until then",
                ),
                Ok(status) if !status.has_leader => self.add(
                    Question::Members,
                    "no-leader",
                    &subject,
                    "the member has no leader",
                    "check the network between the members, and whether a majority of them runs",
                ),
                Ok(status) if status.latency.as_secs() >= SLOW_SECONDS => self.add(
                    Question::Members,
                    "member-slow",
                    &subject,
                    format!("the member needs {} ms to respond", status.latency.as_millis()),
                    "check the disk and the load of the member",
                ),
                Ok(_) => {}
            }
        }
        for (endpoint, reason) in &facts.dead_endpoints {
            self.add(
                Question::Members,
                "endpoint-down",
                endpoint,
                format!("the endpoint does not respond: {reason}"),
                "correct --endpoints, or start the member; clients with this list try the endpoint as well",
            );
        }
    }

    fn alarms(&mut self, facts: &Facts) {
        for alarm in facts.alarms.iter().flatten() {
            let (name, problem, advice) = match alarm.kind {
                AlarmKind::NoSpace => (
                    "alarm-nospace",
                    "the alarm NOSPACE is active: etcd rejects registrations",
                    "compact (`etcdctl compact`), defragment each member (`etcdctl defrag`), then `etcdctl alarm disarm`; raise --quota-backend-bytes if the database is full again",
                ),
                AlarmKind::Corrupt => (
                    "alarm-corrupt",
                    "the alarm CORRUPT is active: the data of the members differ",
                    "replace the corrupt member, as the page \"Data corruption\" of etcd's documentation describes",
                ),
                AlarmKind::Other => (
                    "alarm",
                    "an unknown alarm is active",
                    "run `etcdctl alarm list` of the same version as etcd",
                ),
            };
            self.add(Question::Alarms, name, &alarm.member, problem, advice);
        }
    }

    fn clocks(&mut self, facts: &Facts) {
        for clock in &facts.clocks {
            if clock.seconds_ahead.abs() < SKEW_SECONDS {
                continue;
            }
            let direction = if clock.seconds_ahead > 0 {
                "ahead of"
            } else {
                "behind"
            };
            self.add(
                Question::Clock,
                "clock-skew",
                &clock.endpoint,
                format!(
                    "the clock of the member is {} s {direction} the clock of this host",
                    clock.seconds_ahead.abs()
                ),
                "synchronise the clocks; leases do not depend on them, but signed tokens and certificates do",
            );
        }
    }

    fn permissions(&mut self, facts: &Facts) {
        if facts.read != Access::Denied {
            return;
        }
        let user = facts.user.as_deref().unwrap_or("(none)");
        let prefix = &facts.prefix;
        let mut advice = format!(
            "grant a role of the user the permission: `etcdctl role grant-permission ROLE --prefix=true read {prefix}`"
        );
        if facts.wanted.is_none() {
            advice += "; if the user may read single services only, pass a service";
        }
        self.add(
            Question::Permissions,
            "permission-denied",
            prefix,
            format!("user {user} may not read the keys"),
            advice,
        );
    }

    fn registered(&mut self, facts: &Facts) {
        if facts.read != Access::Granted || facts.services.iter().any(|it| !it.keys.is_empty()) {
            return;
        }
        let Some(wanted) = &facts.wanted else {
            return self.add(
                Question::Registered,
                "not-registered",
                &facts.prefix,
                "no service has a key below the prefix",
                "check --prefix and --format; if they are correct, no server has registered itself: read the logs of the servers",
            );
        };
        let Some(first) = facts.elsewhere.first() else {
            return self.add(
                Question::Registered,
                "not-registered",
                wanted,
                format!("the service has no key below {}", facts.prefix),
                "check the name of the service; if it is correct, no server has registered itself: read the logs of the servers",
            );
        };
        let end = first.find(&format!("{wanted}/")).unwrap_or(first.len());
        self.add(
            Question::Registered,
            "wrong-prefix",
            wanted,
            format!(
                "the service has no key below {}, but {} below other prefixes, for example {first}",
                facts.prefix,
                facts.elsewhere.len()
            ),
            format!(
                "servers and clients must use the same prefix: try --prefix {:?}, and correct the prefix of one side",
                &first[..end]
            ),
        );
    }

    fn values(&mut self, service: &Service) {
        for key in &service.keys {
            if let Some(reason) = &key.rejected {
                self.add(
                    Question::Values,
                    "unreadable-value",
                    &key.name,
                    format!("the value {reason}; clients do not use the key"),
                    "correct the server that writes the key, or set --format; delete the key if no server owns it",
                );
            }
        }
    }

    fn leases(&mut self, service: &Service) {
        for key in &service.keys {
            match key.lease {
                LeaseState::None => self.add(
                    Question::Leases,
                    "no-lease",
                    &key.name,
                    "the key has no lease: it remains when its server ends",
                    "delete the key; a server that registers itself writes it again under a lease",
                ),
                // A server renews its lease when a third of the TTL has passed. If less than half is left, a renewal is missing.
                LeaseState::Ttl { left, granted } if left * 2 < granted => self.add(
                    Question::Leases,
                    "lease-expiring",
                    &key.name,
                    format!("the lease expires in {left} s of {granted} s: the server does not renew it"),
                    "check whether the server runs and reaches etcd; the key is removed when the lease expires",
                ),
                LeaseState::Ttl { .. } | LeaseState::Unknown => {}
            }
        }
    }

    fn addresses(&mut self, service: &Service, remote_clients: bool) {
        let mut by_address: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for key in &service.keys {
            if let Some(address) = &key.address {
                by_address.entry(address).or_default().push(&key.name);
            }
        }
        for (address, keys) in by_address.iter().filter(|(_, keys)| keys.len() > 1) {
            self.add(
                Question::Addresses,
                "duplicate-address",
                address,
                format!("{} keys have this address: {}", keys.len(), keys.join(", ")),
                "clients use the address once; give each server its own address, or delete the keys of old servers",
            );
        }
        let instances = || service.keys.iter().filter(|key| key.address.is_some());
        let others = instances().any(|key| !key.is_loopback);
        for key in instances().filter(|key| key.is_loopback) {
            if others || remote_clients {
                self.add(
                    Question::Addresses,
                    "loopback-address",
                    &key.name,
                    format!(
                        "{} is a loopback address: clients on other hosts reach themselves",
                        key.address.as_deref().unwrap_or_default()
                    ),
                    "set the advertised host of the server (`RegistrationBuilder::host`, or ADDRESS of `tonic-etcd register`)",
                );
            }
        }
    }

    fn servers(&mut self, service: &Service, client_tls: bool) {
        let mut dialled: Vec<&str> = Vec::new();
        for key in &service.keys {
            let (Some(address), Some(answer)) = (&key.address, &key.answer) else {
                continue;
            };
            // Two keys with one address are one finding.
            if dialled.contains(&address.as_str()) {
                continue;
            }
            dialled.push(address);
            self.server(key, address, answer, client_tls);
        }
    }

    fn server(&mut self, key: &Key, address: &str, answer: &Answer, client_tls: bool) {
        let (name, problem, advice) = match answer {
            Answer::RequiresTls if key.tls_hint => return,
            Answer::RequiresTls => (
                "tls-mismatch",
                "the server uses TLS, but neither its registration nor these clients do".to_owned(),
                "configure TLS in the clients (`ChannelBuilder::tls_config`); here, set --server-cacert or --server-tls",
            ),
            Answer::Plaintext => (
                "tls-mismatch",
                "the server does not use TLS, but the clients do".to_owned(),
                "configure TLS in the server, or plaintext in the clients",
            ),
            Answer::Grpc(Health::Serving | Health::NoService) if key.tls_hint && !client_tls => (
                "tls-mismatch",
                "the registration advertises TLS, but the server does not use it".to_owned(),
                "configure TLS in the server, or remove the TLS hint from its registration",
            ),
            answer if answer.is_ready() => return,
            Answer::Grpc(_) => (
                "not-serving",
                format!(
                    "the server responds, but it is not ready: {}",
                    answer.text()
                ),
                "read the log of the server; it reports NOT_SERVING itself",
            ),
            Answer::NotGrpc(_) | Answer::Http1 | Answer::OtherProtocol => (
                "not-grpc",
                format!("the server is not a gRPC server: {}", answer.text()),
                "correct the port of the registration; perhaps it is the port of another protocol or of a proxy",
            ),
            _ => (
                "server-dead",
                format!(
                    "the server is registered, but does not respond: {}",
                    answer.text()
                ),
                "check whether the server runs, and whether a firewall blocks its port; its key expires only with its lease",
            ),
        };
        let subject = format!("{address} ({})", key.name);
        self.add(Question::Servers, name, &subject, problem, advice);
    }
}

/// A member that needs this long delays each request.
const SLOW_SECONDS: u64 = 1;
/// The `Date` of HTTP has a resolution of one second, and the response takes time.
const SKEW_SECONDS: i64 = 5;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::facts::{Alarm, Clock, Member, MemberStatus};
    use super::*;

    fn key(id: &str) -> Key {
        Key {
            name: format!("/gRPC/greeter/{id}"),
            address: Some(id.to_owned()),
            is_loopback: false,
            tls_hint: false,
            rejected: None,
            lease: LeaseState::Ttl {
                left: 12,
                granted: 15,
            },
            answer: Some(Answer::Grpc(Health::Serving)),
        }
    }

    fn healthy() -> Facts {
        let status = MemberStatus {
            latency: Duration::from_millis(2),
            version: "3.6.0".to_owned(),
            has_leader: true,
        };
        let member = |name: &str| Member {
            name: name.to_owned(),
            addresses: vec!["10.0.0.1:2379".to_owned()],
            answer: Ok(status.clone()),
        };
        Facts {
            endpoints: vec!["10.0.0.1:2379".to_owned()],
            connection: Ok(()),
            members: Ok(vec![member("a"), member("b")]),
            dead_endpoints: Vec::new(),
            alarms: Ok(Vec::new()),
            clocks: vec![Clock {
                endpoint: "10.0.0.1:2379".to_owned(),
                seconds_ahead: 1,
            }],
            user: Some("reader".to_owned()),
            prefix: "/gRPC/greeter/".to_owned(),
            read: Access::Granted,
            write: Access::Denied,
            wanted: Some("greeter".to_owned()),
            services: vec![Service {
                name: "greeter".to_owned(),
                keys: vec![key("10.0.0.5:80"), key("10.0.0.6:80")],
            }],
            elsewhere: Vec::new(),
            remote_clients: false,
            client_tls: false,
        }
    }

    /// Returns the names of the findings after one change of healthy facts.
    fn names(change: impl FnOnce(&mut Facts)) -> Vec<&'static str> {
        let mut facts = healthy();
        change(&mut facts);
        findings(&facts).iter().map(|it| it.name).collect()
    }

    #[test]
    fn a_healthy_cluster_has_no_finding() {
        assert_eq!(findings(&healthy()), []);
        let loopback_only = |facts: &mut Facts| {
            for key in &mut facts.services[0].keys {
                key.is_loopback = true;
            }
        };
        assert_eq!(names(loopback_only), [""; 0], "one host is a valid cluster");
        let tls = |facts: &mut Facts| {
            facts.services[0].keys[0].tls_hint = true;
            facts.services[0].keys[0].answer = Some(Answer::RequiresTls);
        };
        assert_eq!(names(tls), [""; 0], "a server that advertises TLS uses it");
    }

    #[test]
    fn each_fault_of_etcd_has_its_finding() {
        assert_eq!(
            names(|facts| facts.connection = Err("refused".to_owned())),
            ["etcd-unreachable"]
        );
        let member_down = |facts: &mut Facts| {
            if let Ok(members) = &mut facts.members {
                members[1].answer = Err("connection refused".to_owned());
            }
        };
        assert_eq!(names(member_down), ["member-down"]);
        let alarm = Alarm {
            member: "a".to_owned(),
            kind: AlarmKind::NoSpace,
        };
        assert_eq!(
            names(|facts| facts.alarms = Ok(vec![alarm])),
            ["alarm-nospace"]
        );
        assert_eq!(
            names(|facts| facts.clocks[0].seconds_ahead = -9),
            ["clock-skew"]
        );
        assert_eq!(
            names(|facts| facts.read = Access::Denied),
            ["permission-denied"]
        );
    }

    #[test]
    fn each_fault_of_a_key_has_its_finding() {
        let with = |change: fn(&mut Key)| names(|facts| change(&mut facts.services[0].keys[0]));
        assert_eq!(with(|key| key.lease = LeaseState::None), ["no-lease"]);
        let expiring = LeaseState::Ttl {
            left: 7,
            granted: 15,
        };
        assert_eq!(
            names(|facts| facts.services[0].keys[0].lease = expiring),
            ["lease-expiring"]
        );
        let unreadable = |key: &mut Key| {
            key.rejected = Some("has no Addr".to_owned());
            key.address = None;
        };
        assert_eq!(with(unreadable), ["unreadable-value"]);
        assert_eq!(with(|key| key.is_loopback = true), ["loopback-address"]);
        let duplicate = |facts: &mut Facts| {
            let keys = &mut facts.services[0].keys;
            keys[1].address = keys[0].address.clone();
        };
        assert_eq!(names(duplicate), ["duplicate-address"]);
    }

    #[test]
    fn each_fault_of_a_server_has_its_finding() {
        let with = |answer| names(|facts| facts.services[0].keys[0].answer = Some(answer));
        for (answer, name) in [
            (Answer::NotConnected("refused".to_owned()), "server-dead"),
            (Answer::TimedOut, "server-dead"),
            (Answer::Closed, "server-dead"),
            (Answer::Http1, "not-grpc"),
            (Answer::NotGrpc("HTTP status 404".to_owned()), "not-grpc"),
            (Answer::OtherProtocol, "not-grpc"),
            (Answer::RequiresTls, "tls-mismatch"),
            (Answer::Plaintext, "tls-mismatch"),
            (Answer::Grpc(Health::NotServing), "not-serving"),
        ] {
            assert_eq!(with(answer.clone()), [name], "{answer:?}");
        }
        assert_eq!(
            names(|facts| facts.services[0].keys[0].tls_hint = true),
            ["tls-mismatch"],
            "a server that advertises TLS must use it"
        );
    }

    #[test]
    fn a_service_under_another_prefix_is_found() {
        let moved = |facts: &mut Facts| {
            facts.services.clear();
            facts.elsewhere = vec!["/prod/greeter/10.0.0.5:80".to_owned()];
        };
        let mut facts = healthy();
        moved(&mut facts);
        let found = findings(&facts);
        assert_eq!(found[0].name, "wrong-prefix");
        assert!(found[0].advice.contains("\"/prod/\""), "{found:?}");
        assert_eq!(names(|facts| facts.services.clear()), ["not-registered"]);
    }

    #[test]
    fn findings_are_in_the_order_of_the_questions() {
        let many = |facts: &mut Facts| {
            facts.services[0].keys[0].answer = Some(Answer::TimedOut);
            facts.services[0].keys[1].lease = LeaseState::None;
            facts.clocks[0].seconds_ahead = 60;
        };
        assert_eq!(names(many), ["clock-skew", "no-lease", "server-dead"]);
    }
}
