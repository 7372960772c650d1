//! The options of a resolver.

use super::Resolver;
use crate::address::AddressPolicy;
use crate::error::{EtcdError, EtcdErrorKind};
use crate::etcd::Etcd;
use crate::format::{Decoder, Format};
use crate::keyspace::{Keyspace, Range, check_service, with_slash};

/// A [`Resolver`] with options; made by [`Registry::resolver_builder`](crate::Registry::resolver_builder).
#[derive(Clone, Debug)]
#[must_use = "nothing is watched before `start`"]
pub struct ResolverBuilder {
    etcd: Etcd,
    service: String,
    source: Source,
    decoder: Decoder,
}

/// Where the instances are looked for.
#[derive(Clone, Debug)]
enum Source {
    Service(Keyspace),
    Prefixes(Vec<String>),
}

impl ResolverBuilder {
    pub(crate) fn service(
        etcd: Etcd,
        keyspace: &Keyspace,
        service: &str,
        policy: AddressPolicy,
    ) -> Self {
        Self {
            etcd,
            service: service.to_owned(),
            source: Source::Service(keyspace.clone()),
            decoder: Decoder {
                format: None,
                policy,
            },
        }
    }

    pub(crate) fn prefixes(etcd: Etcd, prefixes: &[String], policy: AddressPolicy) -> Self {
        Self {
            etcd,
            service: prefixes.join(", "),
            source: Source::Prefixes(prefixes.to_vec()),
            decoder: Decoder {
                format: None,
                policy,
            },
        }
    }

    /// Reads keys and values of this format only, a service's where the format has them. By default every known format is recognised by
    /// the looks of its values, where this library keeps its own; see [`Format`].
    pub fn format(mut self, format: Format) -> Self {
        self.decoder.format = Some(format);
        self
    }

    /// Which addresses are accepted. By default the registry's policy.
    pub fn address_policy(mut self, policy: AddressPolicy) -> Self {
        self.decoder.policy = policy;
        self
    }

    /// Starts watching.
    ///
    /// A service name or prefix that cannot be right (empty, or a service name with a slash) is not an error here: the set is then
    /// known and empty, and the [status](Resolver::status) says why, so that calls fail at once and with the reason.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    #[must_use]
    pub fn start(self) -> Resolver {
        let prefixes = self.watched();
        let Self {
            etcd,
            service,
            decoder,
            ..
        } = self;
        let (prefixes, trouble) = match prefixes {
            Ok(prefixes) => (prefixes, None),
            Err(reason) => {
                tracing::error!(reason, "nothing can be resolved");
                (
                    Vec::new(),
                    Some(EtcdError::new(
                        EtcdErrorKind::Unavailable,
                        "list",
                        "(not asked)",
                        reason,
                    )),
                )
            }
        };
        let ranges = prefixes
            .iter()
            .map(|prefix| Range::prefix(prefix))
            .collect();
        Resolver::start(&etcd, service, ranges, decoder, trouble)
    }

    /// The prefixes to watch, or why there are none.
    fn watched(&self) -> Result<Vec<String>, String> {
        match &self.source {
            Source::Service(keyspace) => {
                let service = &self.service;
                check_service(service)
                    .map_err(|reason| format!("the service name {service:?} {reason}"))?;
                let format = self.decoder.format.unwrap_or_default();
                Ok(vec![format.service_prefix(keyspace.given(), service)])
            }
            Source::Prefixes(prefixes)
                if prefixes.is_empty() || prefixes.iter().any(String::is_empty) =>
            {
                Err("an empty prefix is the whole store".to_owned())
            }
            Source::Prefixes(prefixes) => {
                let prefixes = prefixes.iter().map(|prefix| with_slash(prefix));
                Ok(disjoint(prefixes.collect()))
            }
        }
    }
}

/// The prefixes without those that lie inside another: a key must have one watch, or a delete on one would be undone by the other.
fn disjoint(mut prefixes: Vec<String>) -> Vec<String> {
    prefixes.sort();
    prefixes.dedup();
    let mut kept: Vec<String> = Vec::new();
    for prefix in prefixes {
        // Sorted, a prefix comes before all it contains.
        if kept
            .last()
            .is_none_or(|last| !prefix.starts_with(last.as_str()))
        {
            kept.push(prefix);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_inside_others_are_left_out() {
        let prefixes = ["/web/a/", "/gRPC/", "/web/", "/web/", "/webb/"];
        assert_eq!(
            disjoint(prefixes.map(String::from).to_vec()),
            ["/gRPC/", "/web/", "/webb/"]
        );
    }
}
