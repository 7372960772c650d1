//! The interface that a metrics library implements.

use std::sync::Arc;

use super::instrument::{Instrument, Label};
use super::observe::Observations;

/// Creates the instruments in a metrics library.
///
/// The library calls [`counter`](Self::counter), [`up_down_counter`](Self::up_down_counter) and [`histogram`](Self::histogram) once for
/// each set of labels, for example at the first call of a method. It keeps the returned handle and uses it for each call, so a call neither
/// looks up labels nor allocates. A recorder that ignores an instrument returns `None`.
///
/// The functions of the recorder and of its handles must not block: handles are used in the tasks of callers.
pub trait Recorder: Send + Sync + 'static {
    /// Returns the handle of a counter with these labels.
    fn counter(
        &self,
        instrument: &'static Instrument,
        labels: &[Label<'_>],
    ) -> Option<Box<dyn Counter>>;

    /// Returns the handle of an up-down counter with these labels.
    fn up_down_counter(
        &self,
        instrument: &'static Instrument,
        labels: &[Label<'_>],
    ) -> Option<Box<dyn UpDownCounter>>;

    /// Returns the handle of a histogram with these labels.
    fn histogram(
        &self,
        instrument: &'static Instrument,
        labels: &[Label<'_>],
    ) -> Option<Box<dyn Histogram>>;

    /// Takes the observations of a gauge. The recorder reads them whenever the metrics are exported. Called once per gauge for each
    /// [`Metrics`](super::Metrics).
    fn gauge(&self, instrument: &'static Instrument, observations: Observations);
}

/// A counter with fixed labels.
pub trait Counter: Send + Sync {
    /// Increases the counter.
    fn add(&self, count: u64);
}

/// An up-down counter with fixed labels.
pub trait UpDownCounter: Send + Sync {
    /// Adds a number, which can be negative.
    fn add(&self, count: i64);
}

/// A histogram with fixed labels.
pub trait Histogram: Send + Sync {
    /// Records one value.
    fn record(&self, value: f64);
}

impl<R: Recorder + ?Sized> Recorder for Arc<R> {
    fn counter(
        &self,
        instrument: &'static Instrument,
        labels: &[Label<'_>],
    ) -> Option<Box<dyn Counter>> {
        (**self).counter(instrument, labels)
    }

    fn up_down_counter(
        &self,
        instrument: &'static Instrument,
        labels: &[Label<'_>],
    ) -> Option<Box<dyn UpDownCounter>> {
        (**self).up_down_counter(instrument, labels)
    }

    fn histogram(
        &self,
        instrument: &'static Instrument,
        labels: &[Label<'_>],
    ) -> Option<Box<dyn Histogram>> {
        (**self).histogram(instrument, labels)
    }

    fn gauge(&self, instrument: &'static Instrument, observations: Observations) {
        (**self).gauge(instrument, observations);
    }
}
