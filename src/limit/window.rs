//! The calls from which the controller derives one change of the limit.

use tokio::time::Instant;

/// A call that was accepted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Accepted {
    /// The number of calls that were accepted before this one. It may wrap around.
    pub(super) number: usize,
    pub(super) at: Instant,
    /// The number of calls in flight when this one was accepted, including it.
    pub(super) in_flight: usize,
}

/// Consecutive accepted calls, and the latencies of those that have ended.
///
/// The window is a set of calls that were accepted in a period, and not of those that ended in a period. The calls that end first after a
/// change of the limit are either old ones, which have waited in a longer queue, or fast ones. Both would bias the latency.
#[derive(Debug)]
pub(super) struct Window {
    /// The number of the first call.
    first: usize,
    /// The number of calls. It is unknown while the window is open.
    size: Option<usize>,
    pub(super) since: Instant,
    /// The times at which the first and the last of the calls that have ended were accepted.
    accepted: Option<(Instant, Instant)>,
    latencies: Vec<f64>,
    /// The latencies that would have been longer if the calls had not been dropped.
    overruns: Vec<f64>,
    /// The calls of the window that ended without a latency.
    unsampled: usize,
    in_flight: usize,
}

/// The result of a window.
#[derive(Clone, Copy, Debug)]
pub(super) struct Measurement {
    /// The latency that a quarter of the calls exceeds.
    pub(super) latency: f64,
    /// Whether at least half of the calls have not ended by themselves. Then the latency is at least `latency`, and may be much longer.
    ///
    /// With fewer such calls, `latency` may also be the time at which calls were dropped. Then it is treated as any other latency: if it has
    /// another cause than a queue, it is the same at a lower limit. A smaller share would not be reliable, because with few calls, the share
    /// differs by chance.
    pub(super) is_late: bool,
    /// The part of the calls that have not ended by themselves.
    pub(super) late_share: f64,
    /// The calls that succeed, for each second in which calls were accepted.
    pub(super) goodput: f64,
    pub(super) calls: usize,
    /// The largest number of calls in flight.
    pub(super) in_flight: usize,
}

impl Window {
    /// Creates an open window, which begins with the call of the number `first`.
    pub(super) fn new(first: usize, since: Instant) -> Self {
        Self {
            first,
            size: None,
            since,
            accepted: None,
            latencies: Vec::new(),
            overruns: Vec::new(),
            unsampled: 0,
            in_flight: 0,
        }
    }

    /// Begins again with the next call. The memory is kept.
    pub(super) fn restart(&mut self, accepted: usize, now: Instant) {
        let mut latencies = std::mem::take(&mut self.latencies);
        latencies.clear();
        let mut overruns = std::mem::take(&mut self.overruns);
        overruns.clear();
        *self = Self::new(accepted, now);
        self.latencies = latencies;
        self.overruns = overruns;
    }

    /// Returns whether a call belongs to the window. `accepted` is the number of calls accepted so far.
    pub(super) fn contains(&self, call: &Accepted, accepted: usize) -> bool {
        // The number of a call before the window wraps around to a very large offset.
        let offset = call.number.wrapping_sub(self.first);
        offset < self.size.unwrap_or_else(|| self.accepted(accepted))
    }

    /// Records the latency of a call that belongs to the window.
    pub(super) fn record(&mut self, call: &Accepted, latency: f64, is_overrun: bool) {
        if is_overrun {
            self.overruns.push(latency);
        } else {
            self.latencies.push(latency);
        }
        self.in_flight = self.in_flight.max(call.in_flight);
        let (first, last) = self.accepted.unwrap_or((call.at, call.at));
        self.accepted = Some((first.min(call.at), last.max(call.at)));
    }

    /// Records that a call of the window ended without a latency.
    pub(super) fn skip(&mut self) {
        self.unsampled += 1;
    }

    /// Returns the number of calls that have, or may get, a latency, if the window is open.
    pub(super) fn open_calls(&self, accepted: usize) -> Option<usize> {
        match self.size {
            Some(_) => None,
            None => Some(self.accepted(accepted).saturating_sub(self.unsampled)),
        }
    }

    /// Closes the window: calls that are accepted from now on do not belong to it.
    pub(super) fn close(&mut self, accepted: usize) {
        self.size = Some(self.accepted(accepted));
    }

    /// Returns whether the window is closed and enough of its calls have ended. At most `limit` calls are in flight.
    pub(super) fn is_complete(&self, accepted: usize, limit: usize) -> bool {
        let Some(size) = self.size else {
            return false;
        };
        let calls = size.saturating_sub(self.unsampled);
        // The percentile is known without the slowest calls.
        let is_nearly_ended = (self.latencies.len() + self.overruns.len()) * 10 >= calls * 9;
        // So many calls have been accepted later that the missing calls are much slower than others, or never end.
        let is_overtaken = self.accepted(accepted) >= 2 * size + limit;
        is_nearly_ended || is_overtaken
    }

    /// Removes the calls that were dropped earlier than three quarters of the others succeeded. Such calls are not late.
    pub(super) fn skip_early_overruns(&mut self) {
        let rank = self.latencies.len() * 3 / 4;
        if rank < self.latencies.len() {
            let (_, latency, _) = self.latencies.select_nth_unstable_by(rank, f64::total_cmp);
            let (latency, overruns) = (*latency, self.overruns.len());
            self.overruns.retain(|overrun| *overrun >= latency);
            self.unsampled += overruns - self.overruns.len();
        }
    }

    /// Returns the result of a closed window, if any call has a latency. Calls that have not ended count as slower than all others.
    pub(super) fn measure(&mut self, now: Instant) -> Option<Measurement> {
        let calls = self.size?.saturating_sub(self.unsampled);
        if calls == 0 {
            return None;
        }
        let rank = calls * 3 / 4;
        let overruns = self.overruns.len();
        let successes = self.latencies.len();
        self.latencies.append(&mut self.overruns);
        let missing = calls.saturating_sub(self.latencies.len());
        let latency = if rank < self.latencies.len() {
            let (_, latency, _) = self.latencies.select_nth_unstable_by(rank, f64::total_cmp);
            *latency
        } else {
            now.saturating_duration_since(self.since).as_secs_f64()
        };
        let late = overruns + missing;
        let accepting = self
            .accepted
            .map(|(first, last)| last.saturating_duration_since(first));
        let accepting = accepting.unwrap_or_default().as_secs_f64();
        Some(Measurement {
            latency,
            is_late: late * 2 >= calls,
            late_share: as_f64(late) / as_f64(calls),
            goodput: as_f64(successes) / accepting.max(MIN_TIME),
            calls,
            in_flight: self.in_flight,
        })
    }

    /// Returns the number of calls accepted since the beginning of the window.
    fn accepted(&self, accepted: usize) -> usize {
        accepted.wrapping_sub(self.first)
    }
}

/// One microsecond.
const MIN_TIME: f64 = 1e-6;

#[expect(
    clippy::cast_precision_loss,
    reason = "numbers of calls are far below 2^52"
)]
pub(super) fn as_f64(number: usize) -> f64 {
    number as f64
}
