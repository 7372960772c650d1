//! A recorder, with the instruments and labels that are enabled.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use super::instrument::{Instrument, Label, instruments};
use super::observe::{GaugeSource, Observations};
use super::recorder::{Counter, Histogram, Recorder, UpDownCounter};

/// A [`Recorder`] and the selection of instruments. By default, the stable instruments are enabled, and the experimental ones (gRFCs A91,
/// A94 and A96) are not. A recorder converts to this type, so `.metrics(recorder)` uses the default selection.
///
/// ```
/// use tonic_balance::metrics::{Metrics, Recorder};
///
/// fn selected(recorder: impl Recorder) -> Metrics {
///     Metrics::new(recorder)
///         .enable("grpc.client.call.retries")
///         .enable("grpc.subchannel.disconnections")
///         .with_label("grpc.lb.locality")
/// }
/// ```
#[derive(Clone)]
pub struct Metrics {
    recorder: Arc<dyn Recorder>,
    /// The instruments that differ from their defaults, with the last choice at the end.
    chosen: Vec<(String, bool)>,
    labels: Vec<String>,
    gauges: Arc<Mutex<Vec<Observations>>>,
}

impl Metrics {
    /// Creates the default selection.
    #[must_use]
    pub fn new(recorder: impl Recorder) -> Self {
        Self {
            recorder: Arc::new(recorder),
            chosen: Vec::new(),
            labels: Vec::new(),
            gauges: Arc::default(),
        }
    }

    /// Enables an instrument. A channel with an unknown name is [invalid](crate::error::ChannelError::InvalidOption).
    #[must_use]
    pub fn enable(mut self, name: impl Into<String>) -> Self {
        self.chosen.push((name.into(), true));
        self
    }

    /// Disables an instrument. A channel with an unknown name is [invalid](crate::error::ChannelError::InvalidOption).
    #[must_use]
    pub fn disable(mut self, name: impl Into<String>) -> Self {
        self.chosen.push((name.into(), false));
        self
    }

    /// Adds an optional label to the instruments that have it. A channel with an unknown name is
    /// [invalid](crate::error::ChannelError::InvalidOption).
    #[must_use]
    pub fn with_label(mut self, name: impl Into<String>) -> Self {
        self.labels.push(name.into());
        self
    }

    /// Returns whether the instrument is enabled.
    #[must_use]
    pub fn is_enabled(&self, instrument: &Instrument) -> bool {
        let mut chosen = self.chosen.iter().rev();
        let chosen = chosen.find(|(name, _)| name == instrument.name());
        chosen.map_or(instrument.is_default(), |(_, is_enabled)| *is_enabled)
    }

    pub(super) fn has_label(&self, label: &str) -> bool {
        self.labels.iter().any(|enabled| enabled == label)
    }

    /// Returns the error text for the first name that no instrument or label has. Other crates may define instruments whose names begin
    /// with `tonic_etcd.`, so these are not checked.
    pub(crate) fn unknown_name(&self) -> Option<String> {
        let is_known = |name: &str| {
            name.starts_with("tonic_etcd.")
                || instruments().iter().any(|known| known.name() == name)
        };
        let is_label = |label: &str| {
            let mut labels = instruments()
                .iter()
                .flat_map(|known| known.optional_labels());
            labels.any(|known| *known == label)
        };
        let unknown = self.chosen.iter().find(|(name, _)| !is_known(name));
        if let Some((name, _)) = unknown {
            return Some(format!("there is no instrument {name:?}"));
        }
        let unknown = self.labels.iter().find(|label| !is_label(label));
        unknown.map(|label| format!("no instrument has the optional label {label:?}"))
    }

    /// Returns the handle of a counter with these labels; `None` if the instrument is disabled. Values of optional labels that are disabled
    /// are dropped.
    #[must_use]
    pub fn counter(
        &self,
        instrument: &'static Instrument,
        labels: &[Label<'_>],
    ) -> Option<Box<dyn Counter>> {
        let labels = self.labels_of(instrument, labels)?;
        self.recorder.counter(instrument, &labels)
    }

    /// Returns the handle of an up-down counter, as [`counter`](Self::counter) does.
    #[must_use]
    pub fn up_down_counter(
        &self,
        instrument: &'static Instrument,
        labels: &[Label<'_>],
    ) -> Option<Box<dyn UpDownCounter>> {
        let labels = self.labels_of(instrument, labels)?;
        self.recorder.up_down_counter(instrument, &labels)
    }

    /// Returns the handle of a histogram, as [`counter`](Self::counter) does.
    #[must_use]
    pub fn histogram(
        &self,
        instrument: &'static Instrument,
        labels: &[Label<'_>],
    ) -> Option<Box<dyn Histogram>> {
        let labels = self.labels_of(instrument, labels)?;
        self.recorder.histogram(instrument, &labels)
    }

    /// Adds a source of a gauge. The source is read until it is dropped.
    pub fn observe<S: GaugeSource>(&self, instrument: &'static Instrument, source: &Arc<S>) {
        if !self.is_enabled(instrument) {
            return;
        }
        let mut gauges = self.gauges.lock().unwrap_or_else(PoisonError::into_inner);
        let known = gauges
            .iter()
            .find(|gauge| std::ptr::eq(gauge.instrument(), instrument));
        let observations = known.cloned().unwrap_or_else(|| {
            let observations = Observations::new(instrument);
            gauges.push(observations.clone());
            self.recorder.gauge(instrument, observations.clone());
            observations
        });
        drop(gauges);
        let source: Arc<dyn GaugeSource> = Arc::<S>::clone(source);
        observations.add(Arc::downgrade(&source));
    }

    /// Returns the labels that the instrument has; `None` if the instrument is disabled.
    fn labels_of<'a>(
        &self,
        instrument: &Instrument,
        labels: &[Label<'a>],
    ) -> Option<Vec<Label<'a>>> {
        let is_shown = |name: &str| {
            instrument.labels().contains(&name)
                || (instrument.optional_labels().contains(&name) && self.has_label(name))
        };
        let shown = labels.iter().filter(|(name, _)| is_shown(name));
        self.is_enabled(instrument)
            .then(|| shown.copied().collect())
    }
}

impl<R: Recorder> From<R> for Metrics {
    fn from(recorder: R) -> Self {
        Self::new(recorder)
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics")
            .field("chosen", &self.chosen)
            .field("labels", &self.labels)
            .finish_non_exhaustive()
    }
}
