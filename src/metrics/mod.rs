//! Metrics of channels, resolvers, registrations and requests to etcd.
//!
//! [`RegistryBuilder::metrics`](crate::registry::RegistryBuilder::metrics) enables them. A [`Recorder`] passes the values to a metrics
//! library; the crate `tonic-etcd-opentelemetry` has one for OpenTelemetry. [`Metrics`] selects the instruments, and
//! [`instruments`] returns all of them. [`guide::metrics`](crate::guide::metrics) describes each instrument.

mod instrument;

pub use instrument::instruments;
pub(crate) use instrument::{
    CONNECTED, ERROR, INSTANCES, LEASE_REMAINING, LISTS, LOSSES, MASS_REMOVALS, OPERATION, REASON,
    REGISTERED, REJECTED, REPAIRED, REQUEST_DURATION, SERVICE, SERVICE_CONFIG_REJECTED,
    SERVICE_CONFIG_REVISION, STATE, TARGET, WATCHES,
};
pub use tonic_balance::metrics::{
    Counter, GaugeSource, Histogram, Instrument, Kind, Label, Metrics, Observation, Observations,
    Recorder, UpDownCounter,
};
