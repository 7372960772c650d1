//! The limit of the concurrency, derived from latencies. It is a gradient controller, as in Envoy's filter for adaptive concurrency: the
//! limit is multiplied by the ratio of the latency without a queue (the baseline) to the current latency.
//!
//! Envoy measures the baseline at a concurrency of three. For a server with many workers, this wastes its capacity, and with one worker, it
//! measures a queue. This controller instead halves the limit until the latency does not fall any more (a *probe*). If the baseline was
//! right, that is at half of the limit, at which a server that is somewhat above its capacity has no queue, and still does most of its work.

use std::time::Duration;

use tokio::time::Instant;

use super::window::{Accepted, Measurement, Window};

/// The limits between which the controller may choose.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) min: usize,
    pub(super) max: usize,
}

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Its response began.
    Success,
    /// It was dropped, or its deadline passed, before its response began. Without that, it would have taken longer.
    Overrun,
    /// Its latency is not comparable with that of other calls.
    Unsampled,
}

/// The controller.
#[derive(Debug)]
pub(super) struct Gradient {
    bounds: Bounds,
    limit: f64,
    window: Window,
    baseline: Option<Baseline>,
    /// The interval between probes. It grows from [`FIRST_PROBE`] to [`LAST_PROBE`] while the server is loaded, because a probe costs some
    /// goodput, and the mean of several probes is more accurate than each of them.
    probe_interval: Duration,
    /// The limit at the end of the last probe.
    probed_limit: f64,
    /// The current probe, if any.
    probe: Option<Probe>,
}

/// The latency without a queue.
#[derive(Clone, Copy, Debug)]
struct Baseline {
    latency: f64,
    measured: Instant,
}

/// A measurement of the baseline.
#[derive(Clone, Copy, Debug)]
struct Probe {
    limit: f64,
    /// The latency at twice this limit. It is infinite if it is unknown.
    before: f64,
    expires: Instant,
}

impl Gradient {
    pub(super) fn new(bounds: Bounds, now: Instant) -> Self {
        Self {
            bounds,
            limit: as_f64(INITIAL_LIMIT.clamp(bounds.min, bounds.max)),
            window: Window::new(0, now),
            baseline: None,
            probe_interval: FIRST_PROBE,
            probed_limit: 0.0,
            probe: None,
        }
    }

    /// Returns the number of calls that may be in flight at once.
    pub(super) fn limit(&self) -> usize {
        let limit = self.probe.map_or(self.limit, |probe| probe.limit);
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

    #[cfg(test)]
    pub(super) fn is_probing(&self) -> bool {
        self.probe.is_some()
    }

    /// Records that a call ended at `now`. `accepted` is the number of calls accepted so far.
    pub(super) fn on_end(&mut self, call: &Accepted, end: End, now: Instant, accepted: usize) {
        self.expire_probe(now, accepted);
        if self.window.contains(call, accepted) {
            self.record(call, end, now);
        }
        if let Some(calls) = self.window.open_calls(accepted) {
            let is_over = now.saturating_duration_since(self.window.since) >= WINDOW;
            let is_full = match self.probe {
                Some(_) => calls >= PROBE_CALLS,
                None => calls >= MAX_CALLS || (is_over && calls >= MIN_CALLS),
            };
            if is_full {
                self.window.close(accepted);
            }
        }
        if self.window.is_complete(accepted, self.limit()) {
            let measured = self.window.measure(now);
            self.window.restart(accepted, now);
            match (measured, self.probe) {
                (None, _) => {}
                (Some(measured), None) => self.end_window(measured, now),
                (Some(measured), Some(probe)) => self.end_level(probe, measured, now),
            }
        }
    }

    /// Records that a call was refused at `now`. `accepted` is the number of calls accepted so far.
    pub(super) fn on_refusal(&mut self, now: Instant, accepted: usize) {
        self.expire_probe(now, accepted);
    }

    fn record(&mut self, call: &Accepted, end: End, now: Instant) {
        let latency = now.saturating_duration_since(call.at).as_secs_f64();
        // The clock may not have advanced during a very short call.
        let latency = latency.max(MIN_LATENCY);
        match end {
            End::Success => self.window.record(call, latency, false),
            // A caller may also drop a call that is not late. Its latency has no meaning then.
            End::Overrun if !self.is_late(latency) => self.window.skip(),
            End::Overrun => self.window.record(call, latency, true),
            End::Unsampled => self.window.skip(),
        }
    }

    fn is_late(&self, latency: f64) -> bool {
        self.baseline
            .is_none_or(|baseline| latency > baseline.latency)
    }

    fn end_window(&mut self, measured: Measurement, now: Instant) {
        // If the deadlines are short, they bound the number of calls in flight, and not the limit.
        let is_late = measured.is_lower_bound;
        let is_loaded = is_late || as_f64(measured.in_flight) >= self.limit / 2.0;
        let is_first = self.baseline.is_none();
        if !is_late {
            self.update_baseline(measured, is_loaded, now);
        }
        if !is_loaded {
            // Fewer calls are in flight than the limit allows, so the latency does not depend on the limit.
            self.probe_interval = FIRST_PROBE;
            return;
        }
        let Some(baseline) = self.baseline else {
            // The deadlines of the calls are shorter than the queue.
            self.set_limit(self.limit * MIN_GRADIENT);
            return;
        };
        if is_first && measured.in_flight >= self.limit() {
            // The server may have been overloaded since its start. Then the queue still grows, so its latency is not compared with the
            // latency at a lower limit.
            self.begin_probe(f64::INFINITY, measured.latency, now);
            return;
        }
        let gradient = TOLERANCE * baseline.latency / measured.latency;
        if is_late {
            self.set_limit(self.limit * gradient.clamp(MIN_GRADIENT, 1.0));
        } else {
            self.set_limit(self.limit * gradient.clamp(MIN_GRADIENT, TOLERANCE) + HEADROOM);
        }
        if self.limit < self.probed_limit / 2.0 {
            // Either there is a queue, or the calls are slower than before without one.
            self.probe_interval = FIRST_PROBE;
        }
        let age = now.saturating_duration_since(baseline.measured);
        // A latency that does not reduce the limit needs no explanation by a probe, which might refuse calls of a server without overload.
        if age >= self.probe_interval && (is_late || gradient < 1.0) {
            let before = if is_late {
                f64::INFINITY
            } else {
                measured.latency
            };
            self.begin_probe(before, measured.latency, now);
        }
    }

    fn update_baseline(&mut self, measured: Measurement, is_loaded: bool, now: Instant) {
        match &mut self.baseline {
            None => {
                self.baseline = Some(Baseline {
                    latency: measured.latency,
                    measured: now,
                });
            }
            // At a low load there is no queue, so the baseline follows the latency in both directions.
            Some(baseline) if !is_loaded => {
                baseline.latency += (measured.latency - baseline.latency) * FOLLOW;
                baseline.measured = now;
            }
            // The smallest of many inaccurate latencies would be too small. So the weight is that of an accurate one.
            Some(baseline) if measured.latency < baseline.latency => {
                let weight = (as_f64(measured.calls) / ACCURATE_CALLS).min(1.0);
                baseline.latency += (measured.latency - baseline.latency) * weight;
            }
            Some(_) => {}
        }
    }

    fn begin_probe(&mut self, before: f64, latency: f64, now: Instant) {
        let latencies = Duration::try_from_secs_f64(latency.min(MAX_LATENCY) * PROBE_LATENCIES);
        self.probe = Some(Probe {
            limit: self.half(self.limit),
            before,
            expires: now + PROBE_TIMEOUT + latencies.unwrap_or_default(),
        });
    }

    /// Ends the measurement at one limit of a probe.
    fn end_level(&mut self, probe: Probe, measured: Measurement, now: Instant) {
        let has_queue = measured.is_lower_bound || measured.latency < probe.before * QUEUED;
        let half = self.half(probe.limit);
        if has_queue && half < probe.limit {
            let before = if measured.is_lower_bound {
                f64::INFINITY
            } else {
                measured.latency
            };
            self.probe = Some(Probe {
                limit: half,
                before,
                ..probe
            });
            return;
        }
        // At twice the limit of the probe, there was no queue, or a short one.
        self.set_limit(self.limit.min(probe.limit * 2.0));
        self.end_probe(now);
        if measured.is_lower_bound {
            return;
        }
        let latency = measured.latency;
        let known = self.baseline.map(|baseline| baseline.latency);
        let latency = match known {
            Some(known) if SIMILAR.contains(&(latency / known)) => f64::midpoint(known, latency),
            _ => latency,
        };
        self.baseline = Some(Baseline {
            latency,
            measured: now,
        });
    }

    fn end_probe(&mut self, now: Instant) {
        self.probe = None;
        self.probe_interval = (self.probe_interval * PROBE_GROWTH).min(LAST_PROBE);
        self.probed_limit = self.limit;
        if let Some(baseline) = &mut self.baseline {
            baseline.measured = now;
        }
    }

    /// Ends a probe for which there are too few calls. Otherwise, a burst of calls after it could be refused although the server is idle.
    fn expire_probe(&mut self, now: Instant, accepted: usize) {
        if self.probe.is_some_and(|probe| probe.expires <= now) {
            self.end_probe(now);
            self.window.restart(accepted, now);
        }
    }

    fn set_limit(&mut self, limit: f64) {
        self.limit = limit.clamp(as_f64(self.bounds.min), as_f64(self.bounds.max));
    }

    fn half(&self, limit: f64) -> f64 {
        (limit / 2.0).max(as_f64(self.bounds.min))
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
/// A window of fewer calls is too short for a percentile.
const MIN_CALLS: usize = 20;
/// A window of more calls is closed early, which bounds the memory.
const MAX_CALLS: usize = 1_000;
/// The number of calls at each limit of a probe.
const PROBE_CALLS: usize = 30;
const FIRST_PROBE: Duration = Duration::from_secs(1);
const LAST_PROBE: Duration = Duration::from_secs(30);
const PROBE_GROWTH: u32 = 4;
/// A probe at a limit of one takes the time of [`PROBE_CALLS`] calls at each of its limits.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);
const PROBE_LATENCIES: f64 = 64.0;
/// One minute.
const MAX_LATENCY: f64 = 60.0;
/// With a queue at half of the limit too, half of the limit halves the latency. Without one, the latency is at least this part.
const QUEUED: f64 = 0.6;
/// The ratios of two baselines whose difference may be by chance. Their mean is more accurate.
const SIMILAR: std::ops::Range<f64> = 0.6..1.6;
/// The weight of a latency at a low load.
const FOLLOW: f64 = 0.25;
/// The latency of so many calls is accurate.
const ACCURATE_CALLS: f64 = 1_000.0;
/// The latency may be a quarter above the baseline before the limit is reduced, as in Envoy (`min_rtt_calc_params.buffer`).
const TOLERANCE: f64 = 1.25;
/// The limit is at most halved at once, as in Envoy.
const MIN_GRADIENT: f64 = 0.5;
/// A server with `n` workers gets a limit of about `TOLERANCE * n + HEADROOM`. With one worker, that is one call that is served and one that
/// waits: fewer would waste capacity, and more would make the latency more than twice the baseline. Envoy's headroom is `sqrt(limit)`, which
/// is too large for few workers.
const HEADROOM: f64 = 0.75;
/// One microsecond.
const MIN_LATENCY: f64 = 1e-6;
