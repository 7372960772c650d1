//! The keys of a service: reads them from etcd, and decodes them.

use std::collections::BTreeMap;

use etcd_client::{Client, GetOptions};
use tonic_etcd::{AddressPolicy, Format, Instance};

use crate::bounded::run_all;
use crate::error::Failure;
use crate::escape::{escaped, escaped_bytes};
use crate::options::Options;

/// Limit on the size of a list. A service with 10 000 instances has about 2 MB.
const MAX_LIST: usize = 256 * 1024 * 1024;

/// One key of a service.
#[derive(Clone, Debug)]
pub(crate) struct RegisteredKey {
    /// The key as in etcd. Bytes that are not UTF-8 are replaced.
    pub(crate) key: String,
    /// The part of the key after the prefix of the service.
    pub(crate) id: String,
    pub(crate) lease: Option<Lease>,
    pub(crate) mod_revision: i64,
    pub(crate) value: Value,
}

/// The lease of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lease {
    pub(crate) id: i64,
    /// The remaining and the granted TTL, in seconds. `None` if etcd did not return them.
    pub(crate) ttl: Option<(i64, i64)>,
}

/// The decoded value of a key.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    Instance {
        instance: Box<Instance>,
        format: String,
    },
    /// The value is valid, but it marks its instance as out of service, or the key is not an instance.
    Ignored,
    /// The reason completes "the value".
    Rejected(String),
}

impl RegisteredKey {
    pub(crate) fn instance(&self) -> Option<&Instance> {
        match &self.value {
            Value::Instance { instance, .. } => Some(instance),
            _ => None,
        }
    }
}

/// Decodes a value as a resolver does: by the given format, or by the format that the contents show.
fn decode(format: Option<&Format>, key: &str, value: &[u8]) -> Value {
    let recognised = match format {
        Some(format) => Ok(format.clone()),
        None => Format::recognise(value),
    };
    let decoded = recognised.and_then(|format| {
        let instance = format.decode(key, value, &AddressPolicy::default())?;
        Ok((instance, format))
    });
    match decoded {
        Ok((Some(instance), format)) => Value::Instance {
            instance: Box::new(instance),
            format: format.to_string(),
        },
        Ok((None, _)) => Value::Ignored,
        Err(error) => Value::Rejected(escaped(&error.to_string())),
    }
}

/// Reads the keys of a service, with their leases. The keys are sorted.
pub(crate) async fn read(
    options: &Options,
    client: &Client,
    service: &str,
) -> Result<Vec<RegisteredKey>, Failure> {
    let prefix = options.service_prefix(service);
    let mut kv = client.kv_client().max_decoding_message_size(MAX_LIST);
    let listed = kv
        .get(prefix.as_str(), Some(GetOptions::new().with_prefix()))
        .await
        .map_err(|error| {
            Failure::of_etcd(
                &format!("read the keys below {:?}", escaped(&prefix)),
                &error,
            )
        })?;
    let mut keys: Vec<_> = listed
        .kvs()
        .iter()
        .map(|kv| {
            let key = String::from_utf8_lossy(kv.key()).into_owned();
            RegisteredKey {
                id: key.strip_prefix(&prefix).unwrap_or(&key).to_owned(),
                lease: (kv.lease() != 0).then_some(Lease {
                    id: kv.lease(),
                    ttl: None,
                }),
                mod_revision: kv.mod_revision(),
                value: decode(options.format.as_ref(), &key, kv.value()),
                key,
            }
        })
        .collect();
    read_ttls(client, &mut keys).await;
    Ok(keys)
}

/// Reads the TTL of each lease once. A lease whose TTL cannot be read is shown without one: a list without TTLs is better than none.
async fn read_ttls(client: &Client, keys: &mut [RegisteredKey]) {
    let mut ids: Vec<_> = keys
        .iter()
        .filter_map(|key| key.lease.map(|lease| lease.id))
        .collect();
    ids.sort_unstable();
    ids.dedup();
    let requests = ids.into_iter().map(|id| {
        let mut leases = client.lease_client();
        async move {
            let answer = leases.time_to_live(id, None).await.ok()?;
            Some((id, (answer.ttl(), answer.granted_ttl())))
        }
    });
    let ttls: BTreeMap<_, _> = run_all(requests).await.into_iter().flatten().collect();
    for lease in keys.iter_mut().filter_map(|key| key.lease.as_mut()) {
        lease.ttl = ttls.get(&lease.id).copied();
    }
}

/// Returns the names of the services below the prefix, with their numbers of keys. `None` counts the keys that have no service.
pub(crate) async fn services(
    options: &Options,
    client: &Client,
) -> Result<BTreeMap<String, usize>, Failure> {
    let prefix = root(options);
    let get = match prefix.as_str() {
        "" => GetOptions::new().with_all_keys(),
        _ => GetOptions::new().with_prefix(),
    };
    let mut kv = client.kv_client().max_decoding_message_size(MAX_LIST);
    let listed = kv
        .get(prefix.as_str(), Some(get.with_keys_only()))
        .await
        .map_err(|error| {
            Failure::of_etcd(
                &format!("read the keys below {:?}", escaped(&prefix)),
                &error,
            )
        })?;
    let format = options.key_format();
    let mut services = BTreeMap::new();
    for kv in listed.kvs() {
        let key = String::from_utf8_lossy(kv.key());
        let service = service_of(&format, options.prefix.as_deref(), &prefix, &key)
            .unwrap_or_else(|| escaped_bytes(kv.key()));
        *services.entry(service).or_default() += 1;
    }
    Ok(services)
}

/// Returns what all keys of the format start with: the prefix of a service, up to the service.
pub(crate) fn root(options: &Options) -> String {
    let format = options.key_format();
    let prefix = format.service_prefix(options.prefix.as_deref(), MARKER);
    let end = prefix.find(MARKER).unwrap_or(prefix.len());
    prefix[..end].to_owned()
}

/// A service name that occurs in no prefix.
const MARKER: &str = "\u{1}";

/// Returns the service of a key: the first part of the key after the root whose service prefix covers the key. A service name contains no
/// slash in this library. Keys of other libraries may have more parts, which then belong to the id.
fn service_of(format: &Format, prefix: Option<&str>, root: &str, key: &str) -> Option<String> {
    let (service, _) = key.strip_prefix(root)?.split_once('/')?;
    let covers = key.starts_with(&format.service_prefix(prefix, service));
    (covers && !service.is_empty()).then(|| service.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_service_is_found_in_the_keys_of_each_format() {
        for (format, prefix, key, service) in [
            ("etcd-naming", None, "/gRPC/greeter/10.0.0.5:80", "greeter"),
            ("etcd-naming", Some("/x"), "/x/greeter/a/b", "greeter"),
            (
                "kitex",
                None,
                "kitex/registry-etcd/echo/10.0.0.5:80",
                "echo",
            ),
            (
                "dubbo-interface",
                None,
                "/dubbo/com.Echo/providers/tri%3A%2F%2F10.0.0.5",
                "com.Echo",
            ),
            (
                "go-frame",
                None,
                "/service/default/default/echo/latest/10.0.0.5:80",
                "echo",
            ),
        ] {
            let format: Format = format.parse().expect("the format exists");
            let marked = format.service_prefix(prefix, MARKER);
            let root = &marked[..marked
                .find(MARKER)
                .expect("the prefix contains the service")];
            assert_eq!(
                service_of(&format, prefix, root, key).as_deref(),
                Some(service),
                "{format}"
            );
        }
    }

    #[test]
    fn a_value_is_decoded_as_a_resolver_decodes_it() {
        let is = |value: &str| decode(None, "/gRPC/greeter/x", value.as_bytes());
        assert!(
            matches!(is(r#"{"Op":0,"Addr":"10.0.0.5:80"}"#), Value::Instance { format, .. } if format == "EtcdNaming")
        );
        assert!(matches!(is("10.0.0.5:80"), Value::Instance { format, .. } if format == "Plain"));
        assert!(matches!(is(r#"{"a":1}"#), Value::Rejected(_)));
        assert!(matches!(is("169.254.169.254:80"), Value::Rejected(_)));
    }
}
