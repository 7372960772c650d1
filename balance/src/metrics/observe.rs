//! Gauges: values that are read from existing state when the metrics are exported.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::instrument::{Instrument, Label};

/// State that gauges are read from, for example a channel.
pub trait GaugeSource: Send + Sync + 'static {
    /// Passes each current value of the gauge, with its labels, to `observe`.
    fn observe(&self, instrument: &'static Instrument, observe: &mut dyn FnMut(&[Label<'_>], f64));
}

/// The current values of one gauge.
#[derive(Clone)]
pub struct Observations {
    instrument: &'static Instrument,
    sources: Arc<Mutex<Vec<Weak<dyn GaugeSource>>>>,
}

/// One value of a gauge.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Observation {
    /// The labels, in the order of the instrument's labels.
    pub labels: Vec<(&'static str, String)>,
    /// The value.
    pub value: f64,
}

impl Observations {
    pub(super) fn new(instrument: &'static Instrument) -> Self {
        Self {
            instrument,
            sources: Arc::default(),
        }
    }

    /// Reads the current values. Values of several sources with the same labels, such as two channels of one target, become one value:
    /// their sum, or for the units `{bool}`, `s` and `{revision}` their minimum.
    #[must_use]
    pub fn read(&self) -> Vec<Observation> {
        Self::read_all(std::slice::from_ref(self))
    }

    /// Reads the current values of one instrument from several observations, as [`read`](Self::read) does. A recorder that is passed to
    /// several channels receives an instrument once for each of them.
    #[must_use]
    pub fn read_all(all: &[Self]) -> Vec<Observation> {
        // The locks are released before the sources are read, because a source may be dropped here, and a source takes locks of its own.
        let mut sources = Vec::new();
        for part in all {
            let alive = part.lock();
            let alive = alive.iter().filter_map(Weak::upgrade);
            sources.extend(alive.map(|source| (part.instrument, source)));
        }
        let mut values = BTreeMap::<Vec<(&'static str, String)>, f64>::new();
        for (instrument, source) in sources {
            // A sum of these values has no meaning.
            let is_minimum = matches!(instrument.unit(), "{bool}" | "s" | "{revision}");
            source.observe(instrument, &mut |labels, value| {
                let labels = labels.iter().map(|(name, value)| (*name, (*value).into()));
                let merge = |known: &mut f64| {
                    *known = if is_minimum {
                        known.min(value)
                    } else {
                        *known + value
                    };
                };
                let entry = values.entry(labels.collect());
                entry.and_modify(merge).or_insert(value);
            });
        }
        let observation = |(labels, value)| Observation { labels, value };
        values.into_iter().map(observation).collect()
    }

    /// Returns whether there will be no further values, because all channels and registries that have passed this gauge to the recorder are
    /// dropped.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        Arc::strong_count(&self.sources) == 1
            && self.lock().iter().all(|source| source.strong_count() == 0)
    }

    pub(super) fn add(&self, source: Weak<dyn GaugeSource>) {
        let mut sources = self.lock();
        sources.retain(|source| source.strong_count() > 0);
        sources.push(source);
    }

    pub(super) fn instrument(&self) -> &'static Instrument {
        self.instrument
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Weak<dyn GaugeSource>>> {
        // No code panics while it holds this lock.
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Observations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Observations")
            .field("instrument", &self.instrument.name())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Kind;

    struct Fixed(f64);

    impl GaugeSource for Fixed {
        fn observe(&self, _: &'static Instrument, observe: &mut dyn FnMut(&[Label<'_>], f64)) {
            observe(&[("grpc.target", "a")], self.0);
        }
    }

    const fn gauge(unit: &'static str) -> Instrument {
        Instrument::new(Kind::Gauge, "test", unit, "A test.", &["grpc.target"])
    }

    #[test]
    fn numbers_of_two_sources_are_added_and_for_other_values_the_minimum_is_exported() {
        static CALLS: Instrument = gauge("{call}");
        static BOOL: Instrument = gauge("{bool}");
        static SECONDS: Instrument = gauge("s");
        static REVISION: Instrument = gauge("{revision}");
        let sources: [Arc<dyn GaugeSource>; 2] = [Arc::new(Fixed(40.0)), Arc::new(Fixed(2.0))];
        for (instrument, expected) in [
            (&CALLS, 42.0),
            (&BOOL, 2.0),
            (&SECONDS, 2.0),
            (&REVISION, 2.0),
        ] {
            let observations = Observations::new(instrument);
            for source in &sources {
                observations.add(Arc::downgrade(source));
            }
            let read = observations.read();
            let values: Vec<_> = read.iter().map(|observation| observation.value).collect();
            assert_eq!(values, [expected], "{}", instrument.unit());
        }
    }
}
