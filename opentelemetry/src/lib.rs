#![doc = include_str!("../README.md")]

#[cfg(feature = "tracing")]
mod inject;

// The dependency only enables a feature.
#[cfg(feature = "bound-instruments")]
use opentelemetry_sdk as _;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use opentelemetry::KeyValue;
use opentelemetry::metrics::{self, Meter};
use tonic_balance::metrics::{
    Counter, Histogram, Instrument, Label, Observations, Recorder, UpDownCounter,
};

#[cfg(feature = "tracing")]
#[cfg_attr(docsrs, doc(cfg(feature = "tracing")))]
pub use inject::inject;

/// A recorder that creates the instruments with a `Meter`.
///
/// The buckets of histograms are those of gRFC A66. A view of the SDK can replace them.
///
/// A clone shares the instruments. Create one recorder for each `Meter`, and clone it for each channel: otherwise the SDK warns about
/// duplicate instruments.
#[derive(Clone)]
pub struct OpenTelemetry(Arc<Instruments>);

struct Instruments {
    meter: Meter,
    /// The instruments that were already created. The SDK stores the values of one instrument in one place, so handles with different labels
    /// share it.
    counters: Mutex<HashMap<&'static str, metrics::Counter<u64>>>,
    up_down_counters: Mutex<HashMap<&'static str, metrics::UpDownCounter<i64>>>,
    histograms: Mutex<HashMap<&'static str, metrics::Histogram<f64>>>,
    /// The observations of each gauge: one for each channel or registry that the recorder was passed to. The SDK has one callback for each
    /// gauge, which it never removes.
    gauges: Mutex<HashMap<&'static str, Gauges>>,
}

type Gauges = Arc<Mutex<Vec<Observations>>>;

impl OpenTelemetry {
    /// Creates a recorder.
    #[must_use]
    pub fn new(meter: Meter) -> Self {
        Self(Arc::new(Instruments {
            meter,
            counters: Mutex::default(),
            up_down_counters: Mutex::default(),
            histograms: Mutex::default(),
            gauges: Mutex::default(),
        }))
    }
}

impl fmt::Debug for OpenTelemetry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenTelemetry").finish_non_exhaustive()
    }
}

/// Returns the instrument with this name, and creates it if there is none.
fn shared<T: Clone>(
    known: &Mutex<HashMap<&'static str, T>>,
    instrument: &'static Instrument,
    create: impl FnOnce() -> T,
) -> T {
    let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
    let entry = known.entry(instrument.name()).or_insert_with(create);
    entry.clone()
}

fn attributes(labels: &[Label<'_>]) -> Vec<KeyValue> {
    let attribute = |(name, value): &Label<'_>| KeyValue::new(*name, (*value).to_owned());
    labels.iter().map(attribute).collect()
}

/// An instrument with its attributes, which are created once.
struct WithAttributes<T> {
    instrument: T,
    attributes: Vec<KeyValue>,
}

/// An instrument that the SDK has bound to its attributes.
#[cfg(feature = "bound-instruments")]
struct Bound<T>(T);

#[cfg(not(feature = "bound-instruments"))]
impl Counter for WithAttributes<metrics::Counter<u64>> {
    fn add(&self, count: u64) {
        self.instrument.add(count, &self.attributes);
    }
}

#[cfg(feature = "bound-instruments")]
impl Counter for Bound<metrics::BoundCounter<u64>> {
    fn add(&self, count: u64) {
        self.0.add(count);
    }
}

#[cfg(feature = "bound-instruments")]
impl Histogram for Bound<metrics::BoundHistogram<f64>> {
    fn record(&self, value: f64) {
        self.0.record(value);
    }
}

impl UpDownCounter for WithAttributes<metrics::UpDownCounter<i64>> {
    fn add(&self, count: i64) {
        self.instrument.add(count, &self.attributes);
    }
}

#[cfg(not(feature = "bound-instruments"))]
impl Histogram for WithAttributes<metrics::Histogram<f64>> {
    fn record(&self, value: f64) {
        self.instrument.record(value, &self.attributes);
    }
}

impl Recorder for OpenTelemetry {
    fn counter(
        &self,
        instrument: &'static Instrument,
        labels: &[Label<'_>],
    ) -> Option<Box<dyn Counter>> {
        let counter = shared(&self.0.counters, instrument, || {
            let builder = self.0.meter.u64_counter(instrument.name());
            let builder = builder.with_unit(instrument.unit());
            builder.with_description(instrument.description()).build()
        });
        let attributes = attributes(labels);
        #[cfg(feature = "bound-instruments")]
        let counter = Bound(counter.bind(&attributes));
        #[cfg(not(feature = "bound-instruments"))]
        let counter = WithAttributes {
            instrument: counter,
            attributes,
        };
        Some(Box::new(counter))
    }

    fn up_down_counter(
        &self,
        instrument: &'static Instrument,
        labels: &[Label<'_>],
    ) -> Option<Box<dyn UpDownCounter>> {
        let counter = shared(&self.0.up_down_counters, instrument, || {
            let builder = self.0.meter.i64_up_down_counter(instrument.name());
            let builder = builder.with_unit(instrument.unit());
            builder.with_description(instrument.description()).build()
        });
        Some(Box::new(WithAttributes {
            instrument: counter,
            attributes: attributes(labels),
        }))
    }

    fn histogram(
        &self,
        instrument: &'static Instrument,
        labels: &[Label<'_>],
    ) -> Option<Box<dyn Histogram>> {
        let histogram = shared(&self.0.histograms, instrument, || {
            let builder = self.0.meter.f64_histogram(instrument.name());
            let builder = builder.with_unit(instrument.unit());
            let builder = builder.with_boundaries(instrument.boundaries().to_vec());
            builder.with_description(instrument.description()).build()
        });
        let attributes = attributes(labels);
        #[cfg(feature = "bound-instruments")]
        let histogram = Bound(histogram.bind(&attributes));
        #[cfg(not(feature = "bound-instruments"))]
        let histogram = WithAttributes {
            instrument: histogram,
            attributes,
        };
        Some(Box::new(histogram))
    }

    fn gauge(&self, instrument: &'static Instrument, observations: Observations) {
        let mut known = self.0.gauges.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gauges) = known.get(instrument.name()) {
            let mut gauges = gauges.lock().unwrap_or_else(PoisonError::into_inner);
            gauges.retain(|gauge| !gauge.has_ended());
            gauges.push(observations);
            return;
        }
        let gauges = Gauges::new(Mutex::new(vec![observations]));
        known.insert(instrument.name(), Arc::clone(&gauges));
        // The SDK may call the callback, which locks `gauges`, from here on.
        drop(known);
        let builder = self.0.meter.f64_observable_gauge(instrument.name());
        let builder = builder.with_unit(instrument.unit());
        let builder = builder.with_description(instrument.description());
        let observe = move |observer: &dyn metrics::AsyncInstrument<f64>| {
            let all = gauges
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone();
            for observation in Observations::read_all(&all) {
                let labels = observation.labels.into_iter();
                let attributes: Vec<_> = labels
                    .map(|(name, value)| KeyValue::new(name, value))
                    .collect();
                observer.observe(observation.value, &attributes);
            }
        };
        // The SDK keeps the callback until the meter provider is dropped, so the returned handle is not needed.
        let _ = builder.with_callback(observe).build();
    }
}
