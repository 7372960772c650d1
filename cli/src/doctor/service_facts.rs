//! Gathers facts about services: their keys and their servers.

use etcd_client::{Client, GetOptions, GetResponse};
use tonic_etcd::{Address, Format};

use super::facts::{Key, LeaseState, Service};
use crate::error::Failure;
use crate::keys::{self, RegisteredKey, Value};
use crate::ls::probe_all;
use crate::options::Options;
use crate::probe::{Dial, Probe};

/// Reads the keys of a service, and dials its servers if `dial` is set.
pub(super) async fn service(
    options: &Options,
    client: &Client,
    name: &str,
    dial: Option<&Dial>,
) -> Result<Service, Failure> {
    let registered = keys::read(options, client, name).await?;
    let probes = match dial {
        Some(dial) => probe_all(dial, &registered).await,
        None => vec![None; registered.len()],
    };
    Ok(Service {
        name: name.to_owned(),
        keys: std::iter::zip(&registered, probes)
            .map(|(key, probe)| fact(key, probe))
            .collect(),
    })
}

fn fact(key: &RegisteredKey, probe: Option<Probe>) -> Key {
    let instance = key.instance();
    Key {
        name: key.key.clone(),
        address: instance.map(|instance| instance.address().to_string()),
        is_loopback: instance.is_some_and(|instance| is_loopback(instance.address())),
        tls_hint: instance.is_some_and(tonic_etcd::Instance::is_tls),
        rejected: match &key.value {
            Value::Rejected(reason) => Some(reason.clone()),
            _ => None,
        },
        lease: match key.lease {
            None => LeaseState::None,
            Some(lease) => match lease.ttl {
                // etcd returns -1 for a lease that has expired since the list was read.
                Some((left, granted)) if left >= 0 => LeaseState::Ttl { left, granted },
                _ => LeaseState::Unknown,
            },
        },
        answer: probe.map(|probe| probe.answer),
    }
}

fn is_loopback(address: &Address) -> bool {
    match address.ip() {
        Some(ip) => ip.to_canonical().is_loopback(),
        None => address
            .host()
            .is_some_and(|host| host == "localhost" || host.ends_with(".localhost")),
    }
}

/// Searches for the keys of a service below other prefixes: the default prefixes of all formats, and then the names of all keys, which needs
/// the permission to read all keys.
pub(super) async fn elsewhere(options: &Options, client: &Client, service: &str) -> Vec<String> {
    let own = options.service_prefix(service);
    let mut found = Vec::new();
    for name in FORMATS {
        let Ok(format) = name.parse::<Format>() else {
            continue;
        };
        let prefix = format.service_prefix(None, service);
        if prefix != own {
            found.extend(names(client, &prefix, GetOptions::new().with_prefix()).await);
        }
    }
    let all = names(client, "", GetOptions::new().with_all_keys()).await;
    let control = &options.control_prefix;
    found.extend(all.into_iter().filter(|key| {
        belongs(key, service) && !key.starts_with(&own) && !key.starts_with(control.as_str())
    }));
    found.sort();
    found.dedup();
    found
}

/// Returns whether the service is a part of the key, and not its last part.
fn belongs(key: &str, service: &str) -> bool {
    let mut parts: Vec<_> = key.split('/').collect();
    parts.pop();
    parts.contains(&service)
}

/// Returns the names of keys. A failed request counts as no keys, because the search is only an addition to a finding.
async fn names(client: &Client, key: &str, get: GetOptions) -> Vec<String> {
    let get = get.with_keys_only().with_limit(MAX_SEARCHED);
    let listed = client.kv_client().get(key, Some(get)).await;
    let listed = listed.iter().flat_map(GetResponse::kvs);
    listed
        .map(|kv| String::from_utf8_lossy(kv.key()).into_owned())
        .collect()
}

/// Limit on the number of names that one search reads. A store with more keys is searched in part only.
const MAX_SEARCHED: i64 = 20_000;
/// The formats whose default prefix differs from that of etcd naming.
const FORMATS: [&str; 8] = [
    "etcd-naming",
    "kratos",
    "kitex",
    "go-micro",
    "rpcx",
    "dubbo-interface",
    "dubbo-application",
    "go-frame",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_a_whole_part_of_a_key() {
        assert!(belongs("/prod/greeter/10.0.0.5:80", "greeter"));
        assert!(belongs("greeter/1", "greeter"));
        assert!(!belongs("/prod/greeter2/10.0.0.5:80", "greeter"));
        assert!(!belongs("/prod/greeter", "greeter"));
    }

    #[test]
    fn loopback_addresses_are_recognised_in_each_form() {
        for (address, loopback) in [
            ("127.0.0.1:80", true),
            ("[::1]:80", true),
            ("[::ffff:127.0.0.1]:80", true),
            ("localhost:80", true),
            ("10.0.0.5:80", false),
            ("host:80", false),
        ] {
            let parsed: Address = address.parse().expect("the address is valid");
            assert_eq!(is_loopback(&parsed), loopback, "{address}");
        }
    }
}
