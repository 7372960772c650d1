//! The recorders of the cases with metrics.

use std::time::Duration;

use opentelemetry::metrics::MeterProvider;
use opentelemetry_sdk::metrics::{InMemoryMetricExporter, PeriodicReader, SdkMeterProvider};
use tonic_etcd::metrics::{
    Counter, Histogram, Instrument, Label, Observations, Recorder, UpDownCounter,
};
use tonic_etcd_opentelemetry::OpenTelemetry;

/// Returns a provider that exports nothing during the run.
pub fn provider() -> SdkMeterProvider {
    let reader = PeriodicReader::builder(InMemoryMetricExporter::default());
    let reader = reader.with_interval(Duration::from_secs(3_600)).build();
    SdkMeterProvider::builder().with_reader(reader).build()
}

pub fn recorder(provider: &SdkMeterProvider) -> OpenTelemetry {
    OpenTelemetry::new(provider.meter("instructions"))
}

/// A recorder whose handles do nothing.
pub struct Discard;

impl Recorder for Discard {
    fn counter(&self, _: &'static Instrument, _: &[Label<'_>]) -> Option<Box<dyn Counter>> {
        Some(Box::new(Self))
    }

    fn up_down_counter(
        &self,
        _: &'static Instrument,
        _: &[Label<'_>],
    ) -> Option<Box<dyn UpDownCounter>> {
        Some(Box::new(Self))
    }

    fn histogram(&self, _: &'static Instrument, _: &[Label<'_>]) -> Option<Box<dyn Histogram>> {
        Some(Box::new(Self))
    }

    fn gauge(&self, _: &'static Instrument, _: Observations) {}
}

impl Counter for Discard {
    fn add(&self, _: u64) {}
}

impl UpDownCounter for Discard {
    fn add(&self, _: i64) {}
}

impl Histogram for Discard {
    fn record(&self, _: f64) {}
}
