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
    /// their sum, or for the units `{bool}` and `s` their minimum.
    #[must_use]
    pub fn read(&self) -> Vec<Observation> {
        // The lock is released before the sources are read, because a source may be dropped here, and a source takes locks of its own.
        let sources: Vec<_> = self.lock().iter().filter_map(Weak::upgrade).collect();
        let is_minimum = matches!(self.instrument.unit(), "{bool}" | "s");
        let mut values = BTreeMap::<Vec<(&'static str, String)>, f64>::new();
        for source in sources {
            source.observe(self.instrument, &mut |labels, value| {
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
