//! The descriptors of the instruments of resolvers, registrations and requests to etcd.

use tonic_balance::metrics::{Instrument, Kind};

pub(crate) const TARGET: &str = "grpc.target";
pub(crate) const STATE: &str = "tonic_etcd.state";
pub(crate) const SERVICE: &str = "tonic_etcd.service";
pub(crate) const REASON: &str = "tonic_etcd.reason";
pub(crate) const OPERATION: &str = "tonic_etcd.operation";
pub(crate) const ERROR: &str = "tonic_etcd.error";

pub(crate) static CONNECTED: Instrument = Instrument::new(
    Kind::Gauge,
    "tonic_etcd.resolver.connected",
    "{bool}",
    "1 while the set of instances is in sync with etcd, otherwise 0.",
    &[TARGET],
);
pub(crate) static INSTANCES: Instrument = Instrument::new(
    Kind::Gauge,
    "tonic_etcd.resolver.instances",
    "{instance}",
    "Instances by state: announced to channels, held as a last resort, or rejected because their value cannot be used.",
    &[TARGET, STATE],
);
pub(crate) static LISTS: Instrument = Instrument::new(
    Kind::Counter,
    "tonic_etcd.resolver.lists",
    "{list}",
    "Complete lists of a prefix.",
    &[TARGET],
);
pub(crate) static WATCHES: Instrument = Instrument::new(
    Kind::Counter,
    "tonic_etcd.resolver.watches",
    "{watch}",
    "Watches that were opened.",
    &[TARGET],
);
pub(crate) static REJECTED: Instrument = Instrument::new(
    Kind::Counter,
    "tonic_etcd.resolver.values_rejected",
    "{value}",
    "Written values that cannot be used.",
    &[TARGET],
);
pub(crate) static MASS_REMOVALS: Instrument = Instrument::new(
    Kind::Counter,
    "tonic_etcd.resolver.mass_removals",
    "{removal}",
    "Periods in which instances were kept as a last resort.",
    &[TARGET],
);
pub(crate) static REPAIRED: Instrument = Instrument::new(
    Kind::Counter,
    "tonic_etcd.resolver.repaired",
    "{key}",
    "Keys whose state differed from what the list and the watch had delivered.",
    &[TARGET],
);
pub(crate) static SERVICE_CONFIG_REVISION: Instrument = Instrument::new(
    Kind::Gauge,
    "tonic_etcd.resolver.service_config_revision",
    "{revision}",
    "Revision of the service config in force, or 0 without a service config. Absent if the service config is not watched.",
    &[TARGET],
);
pub(crate) static SERVICE_CONFIG_REJECTED: Instrument = Instrument::new(
    Kind::Counter,
    "tonic_etcd.resolver.service_config_rejected",
    "{value}",
    "Written service configs that cannot be used.",
    &[TARGET],
);
pub(crate) static REGISTERED: Instrument = Instrument::new(
    Kind::Gauge,
    "tonic_etcd.registration.registered",
    "{bool}",
    "1 while the server is registered, otherwise 0.",
    &[SERVICE],
);
pub(crate) static LEASE_REMAINING: Instrument = Instrument::new(
    Kind::Gauge,
    "tonic_etcd.registration.lease_remaining",
    "s",
    "Time until the lease expires if no further renewal succeeds.",
    &[SERVICE],
);
pub(crate) static LOSSES: Instrument = Instrument::new(
    Kind::Counter,
    "tonic_etcd.registration.losses",
    "{loss}",
    "Losses of the registration that the server did not cause.",
    &[SERVICE, REASON],
);
pub(crate) static REQUEST_DURATION: Instrument = Instrument::new(
    Kind::Histogram,
    "tonic_etcd.etcd.request.duration",
    "s",
    "Time of a request to etcd. Each attempt of a request is recorded.",
    &[OPERATION, ERROR],
);

/// Returns all instruments, including those of `tonic-balance`.
pub fn instruments() -> impl Iterator<Item = &'static Instrument> {
    let of_channel = tonic_balance::metrics::instruments();
    of_channel.iter().copied().chain(OWN)
}

const OWN: [&Instrument; 13] = [
    &CONNECTED,
    &INSTANCES,
    &LISTS,
    &WATCHES,
    &REJECTED,
    &MASS_REMOVALS,
    &REPAIRED,
    &SERVICE_CONFIG_REVISION,
    &SERVICE_CONFIG_REJECTED,
    &REGISTERED,
    &LEASE_REMAINING,
    &LOSSES,
    &REQUEST_DURATION,
];
