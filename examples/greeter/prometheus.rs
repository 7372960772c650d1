//! A recorder for the crate `prometheus-client`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter as PrometheusCounter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram as PrometheusHistogram;
use prometheus_client::registry::Registry;
use tonic_balance::metrics::{
    Counter, Histogram, Instrument, Label, Observations, Recorder, UpDownCounter,
};

type Labels = Vec<(String, String)>;

/// A recorder over a registry of `prometheus-client`.
#[derive(Clone, Default)]
pub struct Prometheus(Arc<Mutex<State>>);

/// The registry, and the family of each instrument.
#[derive(Default)]
struct State {
    registry: Registry,
    counters: HashMap<&'static str, Family<Labels, PrometheusCounter>>,
    up_down_counters: HashMap<&'static str, Family<Labels, Gauge>>,
    histograms: HashMap<&'static str, Family<Labels, PrometheusHistogram, Buckets>>,
    gauges: HashMap<&'static str, Gauges>,
}

/// The observations of a gauge: one for each channel or registry that the recorder was passed to.
type Gauges = Arc<Mutex<Vec<Observations>>>;

impl Prometheus {
    /// Returns all metrics in the text format of Prometheus.
    pub fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.lock().registry)?;
        Ok(text)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the name that OpenTelemetry's exporter for Prometheus gives to an instrument: underscores in place of dots, and the unit at the
/// end. `prometheus-client` adds `_total` to the names of counters.
fn name_of(instrument: &Instrument) -> String {
    let name = underscores(instrument.name());
    match instrument.unit() {
        "s" => name + "_seconds",
        "By" => name + "_bytes",
        _ => name,
    }
}

fn underscores(name: &str) -> String {
    name.replace('.', "_")
}

fn labels_of(labels: &[Label<'_>]) -> Labels {
    let label = |(name, value): &Label<'_>| (underscores(name), (*value).to_owned());
    labels.iter().map(label).collect()
}

/// Creates histograms with the buckets of an instrument.
#[derive(Clone)]
struct Buckets(&'static Instrument);

impl MetricConstructor<PrometheusHistogram> for Buckets {
    fn new_metric(&self) -> PrometheusHistogram {
        PrometheusHistogram::new(self.0.boundaries().iter().copied())
    }
}

/// A metric with fixed labels.
struct Bound<M>(M);

impl Counter for Bound<PrometheusCounter> {
    fn add(&self, count: u64) {
        self.0.inc_by(count);
    }
}

impl UpDownCounter for Bound<Gauge> {
    fn add(&self, count: i64) {
        self.0.inc_by(count);
    }
}

impl Histogram for Bound<PrometheusHistogram> {
    fn record(&self, value: f64) {
        self.0.observe(value);
    }
}

impl Recorder for Prometheus {
    fn counter(
        &self,
        instrument: &'static Instrument,
        labels: &[Label<'_>],
    ) -> Option<Box<dyn Counter>> {
        let State {
            registry, counters, ..
        } = &mut *self.lock();
        let family = counters.entry(instrument.name()).or_insert_with(|| {
            let family = Family::default();
            let (name, help) = (name_of(instrument), instrument.description());
            registry.register(name, help, Family::clone(&family));
            family
        });
        let counter = family.get_or_create(&labels_of(labels)).clone();
        Some(Box::new(Bound(counter)))
    }

    fn up_down_counter(
        &self,
        instrument: &'static Instrument,
        labels: &[Label<'_>],
    ) -> Option<Box<dyn UpDownCounter>> {
        let State {
            registry,
            up_down_counters,
            ..
        } = &mut *self.lock();
        let family = up_down_counters
            .entry(instrument.name())
            .or_insert_with(|| {
                let family = Family::default();
                let (name, help) = (name_of(instrument), instrument.description());
                registry.register(name, help, Family::clone(&family));
                family
            });
        let gauge = family.get_or_create(&labels_of(labels)).clone();
        Some(Box::new(Bound(gauge)))
    }

    fn histogram(
        &self,
        instrument: &'static Instrument,
        labels: &[Label<'_>],
    ) -> Option<Box<dyn Histogram>> {
        let State {
            registry,
            histograms,
            ..
        } = &mut *self.lock();
        let family = histograms.entry(instrument.name()).or_insert_with(|| {
            let family = Family::new_with_constructor(Buckets(instrument));
            let (name, help) = (name_of(instrument), instrument.description());
            registry.register(name, help, Family::clone(&family));
            family
        });
        let histogram = family.get_or_create(&labels_of(labels)).clone();
        Some(Box::new(Bound(histogram)))
    }

    fn gauge(&self, instrument: &'static Instrument, observations: Observations) {
        let State {
            registry, gauges, ..
        } = &mut *self.lock();
        let gauges = gauges.entry(instrument.name()).or_insert_with(|| {
            let gauges = Gauges::default();
            let collector = Observed(instrument, Arc::clone(&gauges));
            registry.register_collector(Box::new(collector));
            gauges
        });
        let mut gauges = gauges.lock().unwrap_or_else(PoisonError::into_inner);
        gauges.retain(|gauge| !gauge.has_ended());
        gauges.push(observations);
    }
}

/// A gauge, which is read at each scrape.
#[derive(Debug)]
struct Observed(&'static Instrument, Gauges);

impl Collector for Observed {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let Self(instrument, gauges) = self;
        let gauges = gauges
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let (name, help) = (name_of(instrument), instrument.description());
        let mut family = encoder.encode_descriptor(&name, help, None, MetricType::Gauge)?;
        for observation in Observations::read_all(&gauges) {
            let labels = observation.labels.into_iter();
            let labels: Labels = labels
                .map(|(name, value)| (underscores(name), value))
                .collect();
            let gauge = ConstGauge::new(observation.value);
            gauge.encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
