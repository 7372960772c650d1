//! A recorder that keeps all values in memory. The integration tests of both packages also use this file.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::metrics::{
    Counter, Histogram, Instrument, Kind, Label, Observations, Recorder, UpDownCounter,
};

/// The values of each instrument, keyed by its name and its labels in the form `name{label=value,label=value}`.
#[derive(Clone, Debug, Default)]
pub(crate) struct Memory(Arc<Mutex<Values>>);

#[derive(Debug, Default)]
struct Values {
    /// The sums of counters and up-down counters.
    sums: BTreeMap<String, i64>,
    histograms: BTreeMap<String, Vec<f64>>,
    gauges: Vec<(&'static Instrument, Observations)>,
    /// How many handles were created.
    handles: usize,
}

impl Memory {
    /// Returns the sum of a counter or an up-down counter; 0 if it was never used.
    pub(crate) fn sum(&self, key: &str) -> i64 {
        self.lock().sums.get(key).copied().unwrap_or(0)
    }

    /// Returns all values of a histogram.
    pub(crate) fn values(&self, key: &str) -> Vec<f64> {
        let values = self.lock().histograms.get(key).cloned();
        values.unwrap_or_default()
    }

    /// Returns the current value of a gauge.
    pub(crate) fn gauge(&self, key: &str) -> Option<f64> {
        let gauges = self.lock().gauges.clone();
        gauges.iter().find_map(|(instrument, observations)| {
            let observed = observations.read();
            let observed = observed.into_iter().find(|observation| {
                let labels: Vec<_> = observation
                    .labels
                    .iter()
                    .map(|(name, value)| (*name, value.as_str()))
                    .collect();
                key_of(instrument, &labels) == key
            });
            observed.map(|observation| observation.value)
        })
    }

    /// Returns the keys of all instruments with a value, without those of gauges.
    pub(crate) fn keys(&self) -> Vec<String> {
        let values = self.lock();
        let histograms = values.histograms.iter().filter(|(_, all)| !all.is_empty());
        let histograms = histograms.map(|(key, _)| key.clone());
        let sums = values.sums.iter().filter(|(_, sum)| **sum != 0);
        histograms.chain(sums.map(|(key, _)| key.clone())).collect()
    }

    /// Returns how many handles were created.
    pub(crate) fn handles(&self) -> usize {
        self.lock().handles
    }

    fn lock(&self) -> MutexGuard<'_, Values> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handle(&self, instrument: &Instrument, kind: Kind, labels: &[Label<'_>]) -> Handle {
        assert_eq!(instrument.kind(), kind, "{}", instrument.name());
        self.lock().handles += 1;
        let key = key_of(instrument, labels);
        Handle(self.clone(), key)
    }
}

fn key_of(instrument: &Instrument, labels: &[Label<'_>]) -> String {
    let names = labels.iter().map(|(name, _)| *name);
    let mut expected: Vec<_> = instrument.labels().to_vec();
    expected.extend(instrument.optional_labels());
    for name in names {
        assert!(expected.contains(&name), "{} {name}", instrument.name());
    }
    for label in instrument.labels() {
        let mut names = labels.iter().map(|(name, _)| name);
        assert!(
            names.any(|name| name == label),
            "{} {label}",
            instrument.name()
        );
    }
    let mut sorted = labels.to_vec();
    sorted.sort_unstable();
    let labels: Vec<_> = sorted
        .iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    format!("{}{{{}}}", instrument.name(), labels.join(","))
}

struct Handle(Memory, String);

impl Handle {
    fn add_signed(&self, count: i64) {
        let mut values = self.0.lock();
        *values.sums.entry(self.1.clone()).or_default() += count;
    }
}

impl Counter for Handle {
    fn add(&self, count: u64) {
        self.add_signed(i64::try_from(count).unwrap_or(i64::MAX));
    }
}

impl UpDownCounter for Handle {
    fn add(&self, count: i64) {
        self.add_signed(count);
    }
}

impl Histogram for Handle {
    fn record(&self, value: f64) {
        let mut values = self.0.lock();
        values
            .histograms
            .entry(self.1.clone())
            .or_default()
            .push(value);
    }
}

impl Recorder for Memory {
    fn counter(
        &self,
        instrument: &'static Instrument,
        labels: &[Label<'_>],
    ) -> Option<Box<dyn Counter>> {
        Some(Box::new(self.handle(instrument, Kind::Counter, labels)))
    }

    fn up_down_counter(
        &self,
        instrument: &'static Instrument,
        labels: &[Label<'_>],
    ) -> Option<Box<dyn UpDownCounter>> {
        Some(Box::new(self.handle(
            instrument,
            Kind::UpDownCounter,
            labels,
        )))
    }

    fn histogram(
        &self,
        instrument: &'static Instrument,
        labels: &[Label<'_>],
    ) -> Option<Box<dyn Histogram>> {
        Some(Box::new(self.handle(instrument, Kind::Histogram, labels)))
    }

    fn gauge(&self, instrument: &'static Instrument, observations: Observations) {
        assert_eq!(instrument.kind(), Kind::Gauge, "{}", instrument.name());
        self.lock().gauges.push((instrument, observations));
    }
}
