//! The limit of the concurrency, derived from latencies. It is a gradient controller, as in Envoy's filter for adaptive concurrency: the
//! limit is multiplied by the ratio of the latency without a queue (the baseline) to the current latency.
//!
//! Envoy measures the baseline every minute at a concurrency of three. This controller instead halves the limit for a few calls, because a
//! server that is somewhat above its capacity has no queue at half of its limit, and still does most of its work.

use std::time::Duration;

use tokio::time::Instant;

/// The limits between which the controller may choose.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) min: usize,
    pub(super) max: usize,
}

/// The controller.
#[derive(Debug)]
pub(super) struct Gradient {
    bounds: Bounds,
    limit: f64,
    window: Window,
    baseline: Option<Baseline>,
    /// The interval between measurements of the baseline. It grows from [`FIRST_PROBE`] to [`LAST_PROBE`], because a baseline that was
    /// measured at the start of an overload contains a part of the queue, which each measurement halves.
    probe_interval: Duration,
    /// The start of the current measurement of the baseline, if any. Calls that started before it do not count.
    probing_since: Option<Instant>,
}

/// The latency without a queue.
#[derive(Clone, Copy, Debug)]
struct Baseline {
    latency: f64,
    measured: Instant,
}

/// The calls that ended since the last change of the limit.
#[derive(Debug)]
struct Window {
    since: Instant,
    latencies: Vec<f64>,
    /// The largest number of calls in flight.
    in_flight: usize,
}

impl Window {
    fn new(since: Instant) -> Self {
        Self {
            since,
            latencies: Vec::new(),
            in_flight: 0,
        }
    }

    fn clear(&mut self, now: Instant) {
        self.since = now;
        self.latencies.clear();
        self.in_flight = 0;
    }

    fn median(&mut self) -> Option<f64> {
        let middle = self.latencies.len() / 2;
        if self.latencies.is_empty() {
            return None;
        }
        let (_, median, _) = self
            .latencies
            .select_nth_unstable_by(middle, f64::total_cmp);
        Some(*median)
    }
}

impl Gradient {
    pub(super) fn new(bounds: Bounds, now: Instant) -> Self {
        Self {
            bounds,
            limit: as_f64(INITIAL_LIMIT.clamp(bounds.min, bounds.max)),
            window: Window::new(now),
            baseline: None,
            probe_interval: FIRST_PROBE,
            probing_since: None,
        }
    }

    /// Returns the number of calls that may be in flight at once.
    pub(super) fn limit(&self) -> usize {
        let limit = if self.probing_since.is_some() {
            self.limit / 2.0
        } else {
            self.limit
        };
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "the limit is positive and at most `bounds.max`"
        )]
        let limit = limit as usize;
        limit.clamp(self.bounds.min, self.bounds.max)
    }

    /// Returns the latency without a queue, if it is known.
    pub(super) fn baseline(&self) -> Option<Duration> {
        let baseline = self.baseline?;
        Duration::try_from_secs_f64(baseline.latency).ok()
    }

    /// Records a call that was accepted at `start` and ended at `now`, when `in_flight` calls, including this one, were in flight.
    pub(super) fn on_end(&mut self, start: Instant, now: Instant, in_flight: usize) {
        if self.probing_since.is_some_and(|probe| start < probe) {
            return;
        }
        let latency = now.saturating_duration_since(start).as_secs_f64();
        // The clock may not have advanced during a very short call.
        self.window.latencies.push(latency.max(MIN_LATENCY));
        self.window.in_flight = self.window.in_flight.max(in_flight);
        let samples = self.window.latencies.len();
        if self.probing_since.is_some() {
            if samples >= PROBE_SAMPLES {
                self.end_probe(now);
            }
            return;
        }
        let is_over = now.saturating_duration_since(self.window.since) >= WINDOW;
        if samples >= MAX_SAMPLES || (is_over && samples >= MIN_SAMPLES) {
            self.end_window(now);
        }
    }

    fn end_window(&mut self, now: Instant) {
        let Some(latency) = self.window.median() else {
            return;
        };
        let in_flight = as_f64(self.window.in_flight);
        self.window.clear(now);
        let is_loaded = in_flight >= self.limit / 2.0;
        let baseline = match self.baseline {
            // At a low load there is no queue, so the baseline follows the latency in both directions.
            Some(baseline) if is_loaded && baseline.latency <= latency => baseline,
            _ => Baseline {
                latency,
                measured: now,
            },
        };
        self.baseline = Some(baseline);
        if !is_loaded {
            // Fewer calls are in flight than the limit allows, so the latency does not depend on the limit.
            return;
        }
        let gradient = (baseline.latency * TOLERANCE / latency).clamp(MIN_GRADIENT, 1.0);
        let limit = self.limit * gradient;
        // The headroom lets the limit grow. Without a queue, the limit grows until the latency does.
        let limit = limit + limit.sqrt();
        self.limit = limit.clamp(as_f64(self.bounds.min), as_f64(self.bounds.max));
        if now.saturating_duration_since(baseline.measured) >= self.probe_interval {
            self.probing_since = Some(now);
        }
    }

    fn end_probe(&mut self, now: Instant) {
        let median = self.window.median();
        self.window.clear(now);
        self.probing_since = None;
        self.probe_interval = (self.probe_interval * 2).min(LAST_PROBE);
        self.baseline = median.map(|latency| Baseline {
            latency,
            measured: now,
        });
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "numbers of calls are far below 2^52"
)]
fn as_f64(number: usize) -> f64 {
    number as f64
}

/// The limit of a server that has just started. A smaller value would refuse calls of a server that is not loaded.
const INITIAL_LIMIT: usize = 32;
/// The limit changes at most this often, as in Envoy.
const WINDOW: Duration = Duration::from_millis(100);
/// A window of fewer calls is too short for a median.
const MIN_SAMPLES: usize = 20;
/// A window of more calls ends early, which bounds the memory.
const MAX_SAMPLES: usize = 2_000;
/// The number of calls that measure the baseline.
const PROBE_SAMPLES: usize = 20;
const FIRST_PROBE: Duration = Duration::from_secs(1);
const LAST_PROBE: Duration = Duration::from_secs(30);
/// The latency may be a quarter above the baseline before the limit is reduced, as in Envoy (`min_rtt_calc_params.buffer`).
const TOLERANCE: f64 = 1.25;
/// The limit is at most halved at once, as in Envoy.
const MIN_GRADIENT: f64 = 0.5;
/// One microsecond.
const MIN_LATENCY: f64 = 1e-6;
