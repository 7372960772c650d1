//! The builder of a resolver.

use std::path::PathBuf;
use std::time::Duration;

use super::cache::Cache;
use super::options::{Filter, Options};
use super::resolver::Resolver;
use super::running::RunningResolvers;
use crate::error::{EtcdError, EtcdErrorKind};
use crate::etcd::Etcd;
use crate::format::Format;
use crate::instance::Instance;
use crate::keyspace::{Key, Keyspace, Range, check_service, with_slash};
use tonic_balance::AddressPolicy;

/// Builder of a [`Resolver`], returned by [`Registry::resolver`](crate::Registry::resolver).
#[derive(Clone, Debug)]
#[must_use = "nothing is watched before `start`"]
pub struct ResolverBuilder {
    etcd: Etcd,
    service: String,
    source: Source,
    options: Options,
    running: RunningResolvers,
}

/// The keys to watch.
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
            running: RunningResolvers::default(),
        }
    }

    pub(crate) fn prefixes(etcd: Etcd, prefixes: &[String], policy: AddressPolicy) -> Self {
        Self {
            etcd,
            service: prefixes.join(", "),
            source: Source::Prefixes(prefixes.to_vec()),
            options: Options::new(policy),
            running: RunningResolvers::default(),
        }
    }

    /// Sets the resolvers with which this one can share its watch.
    pub(crate) fn sharing(mut self, running: &RunningResolvers) -> Self {
        self.running = running.clone();
        self
    }

    /// Sets the only format that the resolver reads. A resolver of a service then watches the prefix at which this format stores the
    /// service. By default, it watches the prefix of [`Format::EtcdNaming`], and recognises the format of each value; see [`Format`].
    pub fn format(mut self, format: Format) -> Self {
        self.options.decoder.format = Some(format);
        self
    }

    /// Sets the policy for the addresses of instances. The default is the policy of the registry.
    pub fn address_policy(mut self, policy: AddressPolicy) -> Self {
        self.options.decoder.policy = policy;
        self
    }

    /// Sets how long an instance is kept as a last resort when most instances vanish from the registry at once. `None` or zero disables
    /// this protection. The default is 30 s, twice the default TTL, because a running server that loses its entry registers again within
    /// that time.
    ///
    /// The protection starts when removals leave fewer than half of the largest set of the last 10 s, and at least two instances have been
    /// removed. The instance whose removal crosses this limit is kept, and so is each instance that is removed while fewer than half
    /// remain. A kept instance has [`is_last_resort`](crate::Instance::is_last_resort) set. It is removed after the configured duration, or
    /// earlier, as soon as half of the set is registered again.
    ///
    /// Such removals can be due to an operator's mistake, to a fault in etcd, or to a planned shutdown of the whole fleet, and the registry
    /// looks the same in each case. A [`BalancedChannel`](crate::BalancedChannel) therefore calls a kept instance only while no other
    /// instance is ready, and only over an existing connection. It never dials a kept instance. `Resolver::into_tonic_channel` drops the
    /// kept instances as soon as any instance is registered.
    ///
    /// An instance that deregisters or pauses is not kept if its format can mark a planned departure: [`Format::EtcdNaming`] can,
    /// [`Format::Plain`] cannot. The resolver logs the start and the end of each period in which it keeps instances.
    /// [`ResolverStatus::held`](crate::resolver::ResolverStatus::held) is the number of instances that are kept now, and
    /// [`mass_removals`](crate::resolver::ResolverStatus::mass_removals) is the number of such periods.
    pub fn mass_removal_protection(mut self, hold: Option<Duration>) -> Self {
        self.options.hold = hold;
        self
    }

    /// Uses only the instances that the function accepts, such as the instances of one version. By default, all instances are used.
    ///
    /// Prefer this method to a filter on the resolver's stream. With this method, the channel can detect that the list is complete, so
    /// calls fail at once if no instance is accepted. The function runs on every read of the set of instances, never for a call. It must be
    /// cheap, and must always return the same result for the same instance. It must not use the resolver or a handle of the resolver: this
    /// would deadlock. The function also applies to instances that [`mass_removal_protection`](Self::mass_removal_protection) keeps.
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

    /// Sets the limit on the number of keys that the resolver stores. The default is 100 000.
    ///
    /// A key beyond the limit is not used. It counts as a [rejected value](crate::resolver::ResolverStatus::rejected_values), and
    /// [`Resolver::rejected`] returns it. A writer that fills the prefix therefore cannot fill the memory of every client.
    pub fn max_keys(mut self, keys: usize) -> Self {
        self.options.limit.keys = keys;
        self
    }

    /// Sets the limit on the total size of the keys and values that the resolver stores. The default is 64 MiB. A key beyond the limit is
    /// not used, as with [`max_keys`](Self::max_keys).
    pub fn max_bytes(mut self, bytes: usize) -> Self {
        self.options.limit.bytes = bytes;
        self
    }

    /// Sets the maximum time between two reconciliations. A reconciliation compares the keys that the resolver has with those in etcd.
    /// `None` disables reconciliation. The default is 5 minutes. Each wait is random between half of the interval and the whole
    /// interval, so that clients that start together do not list together. An interval below 100 ms counts as 100 ms.
    ///
    /// Reconciliation detects faults in etcd: several faults are known in which a watch loses events without an error. A reconciliation
    /// begins with a request for the number of keys, and for the names of the keys that were written since the last reconciliation. If
    /// these differ from what the resolver has, and in every sixteenth reconciliation, the resolver lists all names, revisions and leases.
    /// Such a list is about a megabyte for 10 000 instances. If a key in this list differs, the watch gets 5 s to deliver the change. If
    /// the difference remains, the key is read individually. If it remains for more than 100 keys, the whole set is listed again instead.
    /// [`ResolverStatus::repaired`](crate::resolver::ResolverStatus::repaired) counts the keys that were corrected.
    pub fn reconcile_interval(mut self, interval: Option<Duration>) -> Self {
        self.options.reconcile = interval;
        self
    }

    /// Stores the registered instances in a file in this directory, and the service config in another one, if it is
    /// [watched](Self::watch_service_config). After the next start, the resolver uses them until etcd answers. Disabled by default.
    ///
    /// The file is used if etcd has not answered within 50 ms. The [status](Resolver::status) is then
    /// [`Stale`](crate::resolver::ResolverState::Stale), a warning is logged, and the first complete list replaces the set. The file is
    /// written about a second after a change, and never for an empty set. A missing directory is created; on Unix, only its owner can read
    /// it. Cached instances that the first list does not contain count as removed together, so some of them may be kept as after any
    /// [mass removal](Self::mass_removal_protection). A file that is corrupt, has another version, or was written for other prefixes is
    /// ignored, and a warning is logged.
    ///
    /// The same rules apply to the file of the service config: its [status](crate::resolver::ServiceConfigStatus::stale) is then stale, and
    /// the first answer of etcd replaces it, also if the key does not exist any more. An unusable value in etcd leaves the cached service
    /// config in force. If the key does not exist, the file is removed. A write that fails is logged, and repeated after 60 s.
    ///
    /// ```no_run
    /// # fn run(registry: tonic_etcd::Registry) {
    /// let channel = registry
    ///     .channel("helloworld.Greeter")
    ///     .map_source(|resolver| resolver.cache_dir("/var/cache/greeter"))
    ///     .connect_lazy();
    /// # }
    /// ```
    pub fn cache_dir(mut self, directory: impl Into<PathBuf>) -> Self {
        self.options.cache_dir = Some(directory.into());
        self
    }

    /// Sets the instances to use after the start until etcd answers, if there is no usable [cache](Self::cache_dir). The default is no
    /// seeds.
    pub fn seeds(mut self, instances: impl IntoIterator<Item = Instance>) -> Self {
        self.options.seeds = instances.into_iter().collect();
        self
    }

    /// Watches the service config of the service, in the key `<control prefix><service>/config`. The usual prefix is `/gRPC.control/`.
    /// Disabled by default.
    ///
    /// The value of the key is a service config in gRPC's JSON format: timeouts, `waitForReady`, retries or hedging for each method, limits
    /// on messages, the load-balancing policy and the health check. A put changes all running channels of the resolver, and the deletion of
    /// the key restores the options of the program. Connections stay open. The channel's option
    /// [`service_config_mode`](crate::channel::ChannelBuilder::service_config_mode) sets whether the service config or the options of the
    /// program take precedence; by default, the options do.
    ///
    /// A value that cannot be used is logged, counted and shown in the [status](crate::resolver::ServiceConfigStatus), and the last good
    /// value stays in force. It also stays in force while etcd is unavailable, and while the user may not read the key.
    ///
    /// The option costs etcd one watcher per resolver, on a stream that the resolver already has, two requests at the start, and one read in
    /// each [`reconcile_interval`](Self::reconcile_interval). With authentication, the user needs the permission to read the key. The option
    /// has no effect on a resolver of prefixes.
    ///
    /// ```no_run
    /// # fn run(registry: tonic_etcd::Registry) {
    /// let channel = registry
    ///     .channel("helloworld.Greeter")
    ///     .map_source(|resolver| resolver.watch_service_config("/gRPC.control/"))
    ///     .connect_lazy();
    /// # }
    /// ```
    pub fn watch_service_config(mut self, control_prefix: impl Into<String>) -> Self {
        if let Source::Service(_) = self.source {
            let (prefix, service) = (with_slash(&control_prefix.into()), &self.service);
            let key = format!("{prefix}{service}/config");
            self.options.service_config = Some(Key::from(key.as_str()));
        }
        self
    }

    /// Starts watching.
    ///
    /// This method does not return an error for an invalid service name or an empty prefix. Instead, the set counts as known and empty, and
    /// the [status](Resolver::status) contains the reason. Calls then fail at once with that reason.
    ///
    /// # Panics
    ///
    /// Panics if called outside a tokio runtime.
    #[must_use]
    pub fn start(self) -> Resolver {
        let prefixes = self.watched();
        let Self {
            etcd,
            service,
            mut options,
            running,
            ..
        } = self;
        let (prefixes, trouble) = match prefixes {
            Ok(prefixes) => (prefixes, None),
            Err(reason) => {
                tracing::error!(reason, "nothing can be resolved");
                (
                    Vec::new(),
                    Some(EtcdError::without_endpoint(
                        EtcdErrorKind::InvalidRequest,
                        "list",
                        reason,
                    )),
                )
            }
        };
        let ranges: Vec<_> = prefixes
            .iter()
            .map(|prefix| Range::prefix(prefix))
            .collect();
        if let Some(key) = &options.service_config
            && (ranges.is_empty() || ranges.iter().any(|range| range.contains(key)))
        {
            // With an invalid service name, nothing is watched. A key below the prefix of the instances would be taken for an instance.
            tracing::error!(
                key = key.escaped(),
                "the key of the service config is below the prefix of the instances; use another control prefix"
            );
            options.service_config = None;
        }
        let target = target(&prefixes, &service);
        let file = options
            .cache_dir
            .as_ref()
            .map(|directory| Cache::new(directory, &service, prefixes));
        running.join_or_start(&service, &ranges, &options, || {
            Resolver::start(
                &etcd,
                service.clone(),
                &target,
                ranges.clone(),
                options.clone(),
                file,
                trouble,
            )
        })
    }

    /// Returns the prefixes to watch, or the reason why the service name or the prefixes are invalid.
    fn watched(&self) -> Result<Vec<String>, String> {
        match &self.source {
            Source::Service(keyspace) => {
                let service = &self.service;
                check_service(service)
                    .map_err(|reason| format!("the service name {service:?} {reason}"))?;
                let format = self.options.decoder.format.clone().unwrap_or_default();
                Ok(vec![format.service_prefix(keyspace.given(), service)])
            }
            Source::Prefixes(prefixes)
                if prefixes.is_empty() || prefixes.iter().any(String::is_empty) =>
            {
                Err("a prefix is empty, or no prefix is given".to_owned())
            }
            Source::Prefixes(prefixes) => {
                let prefixes = prefixes.iter().map(|prefix| with_slash(prefix));
                Ok(disjoint(prefixes.collect()))
            }
        }
    }
}

/// Returns the target as grpc-go writes it: `etcd:///` and the keys without the last slash.
fn target(prefixes: &[String], service: &str) -> String {
    if prefixes.is_empty() {
        return format!("etcd:///{service}");
    }
    let prefixes: Vec<_> = prefixes
        .iter()
        .map(|prefix| prefix.trim_end_matches('/'))
        .collect();
    format!("etcd:///{}", prefixes.join(","))
}

/// Removes duplicates, and prefixes that are nested in another prefix. Each key must have exactly one watch. With two watches, a late put
/// from one watch could undo a delete from the other.
fn disjoint(mut prefixes: Vec<String>) -> Vec<String> {
    prefixes.sort();
    prefixes.dedup();
    let mut kept: Vec<String> = Vec::new();
    for prefix in prefixes {
        // In sorted order, a prefix precedes every prefix nested in it.
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
    fn the_target_has_the_form_of_grpc_go() {
        let prefixes = ["/gRPC/helloworld.Greeter/".to_owned()];
        let expected = "etcd:////gRPC/helloworld.Greeter";
        assert_eq!(target(&prefixes, "helloworld.Greeter"), expected);
        let prefixes = ["a/".to_owned(), "b/".to_owned()];
        assert_eq!(target(&prefixes, "a/, b/"), "etcd:///a,b");
    }

    #[test]
    fn nested_prefixes_are_omitted() {
        let prefixes = ["/web/a/", "/gRPC/", "/web/", "/web/", "/webb/"];
        assert_eq!(
            disjoint(prefixes.map(String::from).to_vec()),
            ["/gRPC/", "/web/", "/webb/"]
        );
    }
}
