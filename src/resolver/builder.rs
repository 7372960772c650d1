//! The options of a resolver.

use std::time::Duration;

use super::Resolver;
use super::options::{Filter, Options};
use crate::error::{EtcdError, EtcdErrorKind};
use crate::etcd::Etcd;
use crate::format::Format;
use crate::instance::Instance;
use crate::keyspace::{Keyspace, Range, check_service, with_slash};
use tonic_balance::AddressPolicy;

/// A [`Resolver`] with options; made by [`Registry::resolver`](crate::Registry::resolver).
#[derive(Clone, Debug)]
#[must_use = "nothing is watched before `start`"]
pub struct ResolverBuilder {
    etcd: Etcd,
    service: String,
    source: Source,
    options: Options,
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
            options: Options::new(policy),
        }
    }

    pub(crate) fn prefixes(etcd: Etcd, prefixes: &[String], policy: AddressPolicy) -> Self {
        Self {
            etcd,
            service: prefixes.join(", "),
            source: Source::Prefixes(prefixes.to_vec()),
            options: Options::new(policy),
        }
    }

    /// Reads keys and values of this format only, a service's where the format has them. By default every known format is recognised by
    /// the looks of its values, where this library keeps its own; see [`Format`].
    pub fn format(mut self, format: Format) -> Self {
        self.options.decoder.format = Some(format);
        self
    }

    pub(crate) fn policy(&self) -> &AddressPolicy {
        &self.options.decoder.policy
    }

    /// Which addresses are accepted. By default the registry's policy.
    pub fn address_policy(mut self, policy: AddressPolicy) -> Self {
        self.options.decoder.policy = policy;
        self
    }

    /// How long an instance is kept as a last resort when most instances vanish from the registry at once; `None`, or zero, for not at
    /// all. Default 30 s: twice the default TTL, in which every server that lives has registered again.
    ///
    /// When removals within 10 s leave fewer than half of the largest set of those 10 s, and at least two instances have gone, each one
    /// that would vanish from then on stays for this long, or until half of the set is back, with
    /// [`is_last_resort`](crate::Instance::is_last_resort) set. An operator's slip or a fault in etcd looks like this, and a fleet that
    /// really ends at once does as well: a [`BalancedChannel`](crate::BalancedChannel) therefore calls such an instance only while no
    /// other is ready, over the connection that is there, and never dials it. `Resolver::into_tonic_channel` keeps them only while
    /// its set would otherwise be empty.
    ///
    /// An instance that deregisters or pauses is never held, where its format can say that it leaves: [`Format::EtcdNaming`] can,
    /// [`Format::Plain`] cannot. Each hold's begin and end is logged; [`ResolverStatus::held`](crate::ResolverStatus::held) and
    /// [`mass_removals`](crate::ResolverStatus::mass_removals) count them.
    pub fn mass_removal_protection(mut self, hold: Option<Duration>) -> Self {
        self.options.hold = hold;
        self
    }

    /// Uses only the instances that the function accepts, such as those of one version. All by default.
    ///
    /// Use this rather than a filter on the resolver's stream: the channel then knows when the list is complete, and calls fail at once if no
    /// instance is accepted. The function runs on every read of the set of instances, never for a call; it must be cheap, and always return the
    /// same for the same instance. It also applies to instances that [`mass_removal_protection`](Self::mass_removal_protection) keeps.
    ///
    /// ```no_run
    /// # fn run(registry: tonic_etcd::Registry) {
    /// let channel = registry
    ///     .channel("helloworld.Greeter")
    ///     .map_source(|resolver| resolver.filter(|instance| instance.version() == Some("1.2.0")))
    ///     .connect_lazy();
    /// # }
    /// ```
    pub fn filter<F>(mut self, accepts: F) -> Self
    where
        F: Fn(&Instance) -> bool + Send + Sync + 'static,
    {
        self.options.filter = Some(Filter::new(accepts));
        self
    }

    /// How often, at most, the keys are compared with a list of their names; `None` for never. Default 5 minutes. Each wait is random
    /// between half of it and the whole, so that clients that start together do not ask together. Under 100 ms it counts as that.
    ///
    /// It is for faults in etcd, of which several have lost events of a watch without an error. A list has no values in it: names,
    /// revisions and leases of 10 000 instances are about a megabyte. Keys that it has otherwise are given 5 s, in which the watch may
    /// bring what is on its way, and are then read one by one. [`ResolverStatus::repaired`](crate::ResolverStatus::repaired) counts those
    /// that were put right.
    pub fn reconcile_interval(mut self, interval: Option<Duration>) -> Self {
        self.options.reconcile = interval;
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
            options,
            ..
        } = self;
        let (prefixes, trouble) = match prefixes {
            Ok(prefixes) => (prefixes, None),
            Err(reason) => {
                tracing::error!(reason, "nothing can be resolved");
                (
                    Vec::new(),
                    Some(EtcdError::new(
                        EtcdErrorKind::InvalidRequest,
                        "list",
                        "(none)",
                        reason,
                    )),
                )
            }
        };
        let ranges = prefixes
            .iter()
            .map(|prefix| Range::prefix(prefix))
            .collect();
        Resolver::start(&etcd, service, ranges, options, trouble)
    }

    /// The prefixes to watch, or why there are none.
    fn watched(&self) -> Result<Vec<String>, String> {
        match &self.source {
            Source::Service(keyspace) => {
                let service = &self.service;
                check_service(service)
                    .map_err(|reason| format!("the service name {service:?} {reason}"))?;
                let format = self.options.decoder.format.unwrap_or_default();
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
