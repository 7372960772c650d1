//! The load of a connection: its calls in flight and its latency.
//!
//! The latency is a time-weighted mean of the time from a request to the head of its response. The peak latency is not used: if the methods
//! differ widely in cost, the peak would punish the server that happened to get the last expensive call. The duration of a stream after the
//! head does not count.
//!
//! Each call adds a sample to this mean, the [`Estimate`]. For the latency, a pick reads only one number, which is computed from the mean.
//! Each call updates this number when its outcome is recorded, and the driver updates it at intervals, so a pick reads no clock.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// The load of one connection. It contains all data that a pick reads about the connection, in a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct Load {
    in_flight: AtomicU32,
    /// Maximum number of calls in flight.
    limit: AtomicU32,
    /// The latency that picks compare, in microseconds, as the bits of an `f32`. 0 while no latency is known.
    latency: AtomicU32,
    /// The median latency of all endpoints, in the same form. It is used as the latency if there are no samples. With fewer than [`WARM`]
    /// samples, the latency is at most the median.
    median: AtomicU32,
    /// The packed [`Estimate`]: the mean, the time of its last change, and the number of its samples.
    estimate: AtomicU64,
}

impl Load {
    /// Initializes the load of a new connection. The latency is that of an earlier connection to the same endpoint if there was one, and
    /// else the median of all endpoints.
    fn begin(&self, inherited: Option<Estimate>, median: f32) {
        let estimate = inherited.unwrap_or_default();
        let latency = estimate.effective(median);
        self.latency.store(latency.to_bits(), Ordering::Relaxed);
        self.median.store(median.to_bits(), Ordering::Relaxed);
        self.estimate.store(estimate.pack(), Ordering::Relaxed);
    }

    pub(crate) fn in_flight(&self) -> u32 {
        // Relaxed: a pick only compares the numbers of two connections, and both numbers are outdated a moment later.
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Returns the latency that picks compare, in microseconds.
    pub(crate) fn latency(&self) -> f32 {
        f32::from_bits(self.latency.load(Ordering::Relaxed))
    }

    /// Returns the maximum number of calls in flight.
    pub(crate) fn limit(&self) -> usize {
        // Relaxed: no other data depends on the limit, and the peer may have changed it in the meantime.
        self.limit.load(Ordering::Relaxed) as usize
    }

    pub(crate) fn set_limit(&self, limit: usize) {
        let limit = u32::try_from(limit).unwrap_or(u32::MAX);
        self.limit.store(limit, Ordering::Relaxed);
    }

    /// Reserves a stream for a call. Returns false if the limit is reached.
    pub(crate) fn acquire(&self) -> bool {
        // This function and `release` use SeqCst. A waiting call registers itself and then looks for a free stream; a finished call
        // releases its stream and then looks for waiting calls. At least one of the two must see what the other has written. Weaker
        // orderings do not guarantee this.
        //
        // The count is incremented only if it is below the limit. If it were always incremented, and decremented again when it is above the
        // limit, a call that was woken for a free stream could find the limit reached in between.
        let limit = self.limit.load(Ordering::Relaxed);
        let one_more = |before| (before < limit).then_some(before + 1);
        let taken = self
            .in_flight
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_more);
        taken.is_ok()
    }

    /// Releases the stream of a call.
    pub(crate) fn release(&self) {
        self.in_flight.fetch_sub(1, Ordering::SeqCst);
    }

    /// Records the head of a response, received after `elapsed`.
    pub(crate) fn on_head(&self, elapsed: Duration, now: Ticks) {
        self.sample(micros(elapsed), now);
    }

    /// Records a failed call. The sample has a minimum, because a fast failure must not count as a fast response. After a failure, the
    /// estimate counts as having [`WARM`] samples, so it is not capped at the median. The cap exists for slow responses of a cold server,
    /// not for failures.
    pub(crate) fn on_failure(&self, elapsed: Duration, now: Ticks) {
        let median = f32::from_bits(self.median.load(Ordering::Relaxed));
        let sample = micros(elapsed)
            .max(MIN_FAILURE_LATENCY)
            .max(median * FAILURE_FACTOR);
        self.update(|estimate| Estimate {
            samples: WARM,
            ..estimate.with(sample, now)
        });
    }

    /// Returns the seconds since the last sample. The result wraps around with [`Ticks`], after about three days.
    pub(crate) fn since_last_sample(&self, now: Ticks) -> f32 {
        now.since(Estimate::unpack(self.estimate.load(Ordering::Relaxed)).updated)
    }

    /// Records a call that was dropped, or overran its deadline, before the head of its response was received. The call would have taken at
    /// least `elapsed`, so `elapsed` is used as a sample only if it raises the estimate.
    pub(crate) fn on_abandoned(&self, elapsed: Duration, now: Ticks) {
        let elapsed = micros(elapsed);
        if elapsed > Estimate::unpack(self.estimate.load(Ordering::Relaxed)).mean {
            self.sample(elapsed, now);
        }
    }

    fn sample(&self, sample: f32, now: Ticks) {
        self.update(|estimate| estimate.with(sample, now));
    }

    fn update(&self, change: impl Fn(Estimate) -> Estimate) {
        // Relaxed: this word is the whole estimate, so no reader can see a partial update, and no other data depends on it.
        let updated =
            self.estimate
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |estimate| {
                    Some(change(Estimate::unpack(estimate)).pack())
                });
        if let Ok(before) = updated {
            let estimate = change(Estimate::unpack(before));
            let median = f32::from_bits(self.median.load(Ordering::Relaxed));
            self.latency
                .store(estimate.effective(median).to_bits(), Ordering::Relaxed);
        }
    }

    /// Updates the latency that picks compare. Without new samples, this latency approaches the median of all endpoints, so that an
    /// endpoint that was slow once is tried again.
    pub(crate) fn refresh(&self, median: f32, now: Ticks) {
        self.median.store(median.to_bits(), Ordering::Relaxed);
        let estimate = Estimate::unpack(self.estimate.load(Ordering::Relaxed));
        let latency = estimate.decayed(median, now);
        self.latency.store(latency.to_bits(), Ordering::Relaxed);
    }

    /// Discards all samples, because the peer did not answer for a while. The latency is then the median.
    pub(crate) fn forget(&self, median: f32) {
        let nothing = Estimate::default();
        self.estimate.store(nothing.pack(), Ordering::Relaxed);
        self.median.store(median.to_bits(), Ordering::Relaxed);
        self.latency.store(median.to_bits(), Ordering::Relaxed);
    }

    /// Returns the estimate, if it has samples.
    pub(crate) fn estimate(&self) -> Option<Estimate> {
        let estimate = Estimate::unpack(self.estimate.load(Ordering::Relaxed));
        (estimate.samples > 0).then_some(estimate)
    }
}

/// A handle to the load of one connection. The loads of many connections are adjacent in memory.
///
/// If each load were stored in its connection, a pick among ten thousand connections would take twice as long: the two loads that it
/// compares would be in neither the CPU cache nor the TLB (translation lookaside buffer).
#[derive(Clone, Debug)]
pub(crate) struct LoadHandle {
    slab: Arc<Slab>,
    index: usize,
}

type Slab = [Load; SLAB];

impl Deref for LoadHandle {
    type Target = Load;

    fn deref(&self) -> &Load {
        &self.slab[self.index % SLAB]
    }
}

/// Allocates the loads of new connections in slabs of [`SLAB`] loads. A slab is freed when the last of its connections is dropped. No entry
/// of a slab is reused.
#[derive(Debug)]
pub(crate) struct Loads {
    slab: Arc<Slab>,
    used: usize,
}

impl Loads {
    pub(crate) fn new() -> Self {
        Self {
            slab: slab(),
            used: 0,
        }
    }

    /// Returns the load of a new connection. No call is in flight. The latency is that of an earlier connection to the same endpoint if
    /// there was one, and else the median of all endpoints.
    pub(crate) fn begin(&mut self, inherited: Option<Estimate>, median: f32) -> LoadHandle {
        if self.used == SLAB {
            *self = Self::new();
        }
        let load = LoadHandle {
            slab: Arc::clone(&self.slab),
            index: self.used,
        };
        self.used += 1;
        load.begin(inherited, median);
        load
    }
}

fn slab() -> Arc<Slab> {
    Arc::new(std::array::from_fn(|_| Load::default()))
}

/// A time-weighted mean of the latency.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Estimate {
    /// The mean in microseconds.
    mean: f32,
    updated: Ticks,
    /// Number of samples, up to [`WARM`].
    samples: u8,
}

impl Estimate {
    pub(crate) fn mean(&self) -> f32 {
        self.mean
    }

    pub(crate) fn latency(&self) -> Duration {
        Duration::from_secs_f32(self.mean.max(0.0) / 1e6)
    }

    /// Returns the mean with one more sample. The weight of the old mean is exp(-dt / 3 s), where dt is the time since the last sample. Up
    /// to [`WARM`] samples, the new sample weighs at least as much as in a plain mean. Otherwise one unusual first sample would dominate
    /// for seconds.
    fn with(self, sample: f32, now: Ticks) -> Self {
        let aged = 1.0 - (-now.since(self.updated) / TIME_CONSTANT).exp();
        let few = 1.0 / (f32::from(self.samples) + 1.0);
        let weight = if self.samples < WARM {
            aged.max(few)
        } else {
            aged
        };
        Self {
            mean: self.mean + (sample - self.mean) * weight,
            updated: now,
            samples: (self.samples + 1).min(WARM),
        }
    }

    /// Returns the latency that picks compare right after a sample, before it decays. With fewer than [`WARM`] samples, an endpoint counts
    /// as no slower than the median.
    fn effective(self, median: f32) -> f32 {
        match self.samples {
            0 => median,
            1..WARM => self.mean.min(median),
            _ => self.mean,
        }
    }

    /// Returns the latency that picks compare at the later time `now`. A mean of [`WARM`] samples decays to the median.
    fn decayed(self, median: f32, now: Ticks) -> f32 {
        if self.samples < WARM {
            return self.effective(median);
        }
        let left = (-now.since(self.updated) / TIME_CONSTANT).exp();
        median + (self.mean - median) * left
    }

    fn pack(self) -> u64 {
        u64::from(self.mean.to_bits()) << 32
            | u64::from(self.updated.0) << SAMPLE_BITS
            | u64::from(self.samples)
    }

    fn unpack(word: u64) -> Self {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "each half of the word has 32 bits"
        )]
        let (high, low) = ((word >> 32) as u32, word as u32);
        Self {
            mean: f32::from_bits(high),
            updated: Ticks(low >> SAMPLE_BITS),
            samples: (low & u32::from(WARM)).try_into().unwrap_or(WARM),
        }
    }
}

/// Time in milliseconds since the start of the channel. It wraps around after about three days (2^28 ms), so after a longer pause, the last
/// sample counts as more recent than it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ticks(u32);

impl Ticks {
    pub(crate) fn at(now: Instant, start: Instant) -> Self {
        let millis = now.saturating_duration_since(start).as_millis();
        #[expect(clippy::cast_possible_truncation, reason = "only 28 bits are kept")]
        Self(millis as u32 & TICK_MASK)
    }

    /// Returns the seconds since an earlier time, which may be days ago.
    ///
    /// Two callers may read the clock in one order and update the estimate in the opposite order. A difference of less than a second in the
    /// wrong direction therefore counts as zero, and not as three days.
    fn since(self, earlier: Self) -> f32 {
        let millis = self.0.wrapping_sub(earlier.0) & TICK_MASK;
        if TICK_MASK - millis < 1_000 {
            return 0.0;
        }
        #[expect(
            clippy::cast_precision_loss,
            reason = "an error of a few milliseconds does not matter"
        )]
        let seconds = millis as f32 / 1e3;
        seconds
    }
}

fn micros(duration: Duration) -> f32 {
    duration.as_secs_f32() * 1e6
}

/// Returns the median of the latencies, or 0 if there are none. Reorders the slice.
pub(crate) fn median(latencies: &mut [f32]) -> f32 {
    let Some(last) = latencies.len().checked_sub(1) else {
        return 0.0;
    };
    // Of two middle values, the lower one is used. With two endpoints, the upper value would be the slower endpoint's own latency, and the
    // estimate of that endpoint would never improve.
    let middle = last / 2;
    *latencies.select_nth_unstable_by(middle, f32::total_cmp).1
}

/// Number of loads in a slab. 64 loads of 64 bytes fill a page of 4 KiB.
const SLAB: usize = 64;
/// Time constant of the mean, in seconds. The weight of a sample depends on time and not on the number of samples, because there can be
/// many samples per second.
const TIME_CONSTANT: f32 = 3.0;
/// An estimate with at least this many samples is used as it is. With fewer samples, the estimate is capped at the median. The value is the
/// largest number that fits into `SAMPLE_BITS` bits.
const WARM: u8 = 15;
const SAMPLE_BITS: u32 = 4;
const TICK_MASK: u32 = u32::MAX >> SAMPLE_BITS;
/// Minimum latency that a failed call counts as, in microseconds.
const MIN_FAILURE_LATENCY: f32 = 100_000.0;
/// A failed call counts as at least this many times the median of all endpoints.
const FAILURE_FACTOR: f32 = 8.0;

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    impl Load {
        fn fresh(inherited: Option<Estimate>, median: f32) -> Self {
            let load = Self::default();
            load.begin(inherited, median);
            load
        }
    }

    fn warmed(latency: Duration, now: Ticks) -> Load {
        let load = Load::fresh(None, 0.0);
        for _ in 0..WARM {
            load.on_head(latency, now);
        }
        load
    }

    fn near(left: f32, right: f32) -> bool {
        (left - right).abs() <= right.abs() * 0.02
    }

    #[test]
    fn a_new_endpoint_starts_with_the_median_latency() {
        let load = Load::fresh(None, 1_500.0);
        assert!(near(load.latency(), 1_500.0));
        load.on_head(ms(50), Ticks(0));
        assert!(
            near(load.latency(), 1_500.0),
            "one slow call must not raise the latency above the median"
        );
        for _ in 0..WARM {
            load.on_head(ms(50), Ticks(0));
        }
        assert!(
            near(load.latency(), 50_000.0),
            "with enough samples, the latency must be their mean"
        );
    }

    #[test]
    fn the_first_sample_sets_the_estimate_and_a_few_samples_are_averaged() {
        let load = Load::fresh(None, 0.0);
        load.on_head(ms(4), Ticks(0));
        assert!(near(load.estimate().expect("has samples").mean(), 4_000.0));
        load.on_head(ms(2), Ticks(0));
        assert!(near(load.estimate().expect("has samples").mean(), 3_000.0));
    }

    #[test]
    fn the_mean_is_weighted_by_time_and_not_by_sample_count() {
        let load = warmed(ms(1), Ticks(0));
        // Among a thousand calls within one second, a call that takes a second counts as one sample of the mean, not as a peak.
        for millis in 1..1_000 {
            load.on_head(ms(1), Ticks(millis));
        }
        load.on_head(ms(1_000), Ticks(1_000));
        let mean = load.estimate().expect("has samples").mean();
        assert!(mean < 1_500.0, "mean {mean}");
        // After three seconds without calls, a call that takes a second has the weight 1 - 1/e.
        load.on_head(ms(1_000), Ticks(4_000));
        let mean = load.estimate().expect("has samples").mean();
        assert!((600_000.0..660_000.0).contains(&mean), "mean {mean}");
    }

    #[test]
    fn a_failure_counts_as_slow_however_fast_it_was() {
        let load = warmed(ms(1), Ticks(0));
        load.on_failure(ms(0), Ticks(1_000));
        assert!(load.latency() > 20_000.0, "{} us", load.latency());
    }

    #[test]
    fn days_without_calls_count_as_silence_and_a_clock_step_back_does_not() {
        let load = warmed(ms(1), Ticks(5_000));
        for hours in [1, 28, 62, 74] {
            let now = Ticks((5_000 + hours * 3_600_000) & TICK_MASK);
            assert!(
                load.since_last_sample(now) > 1.0,
                "after {hours} h, more than 1 s must have passed"
            );
        }
        assert!(
            load.since_last_sample(Ticks(4_990)) < 1.0,
            "a step back of ten milliseconds must not count as silence"
        );
    }

    #[test]
    fn an_abandoned_call_can_only_raise_the_latency() {
        let load = warmed(ms(10), Ticks(0));
        load.on_abandoned(ms(1), Ticks(1_000));
        assert!(near(load.latency(), 10_000.0));
        load.on_abandoned(ms(500), Ticks(1_000));
        assert!(load.latency() > 100_000.0);
    }

    #[test]
    fn the_latency_decays_to_the_median_without_new_samples() {
        let load = warmed(ms(50), Ticks(0));
        load.refresh(1_000.0, Ticks(0));
        assert!(near(load.latency(), 50_000.0));
        load.refresh(1_000.0, Ticks(3_000));
        assert!(near(
            load.latency(),
            1_000.0 + 49_000.0 / std::f32::consts::E
        ));
        load.refresh(1_000.0, Ticks(60_000));
        assert!(near(load.latency(), 1_000.0));
        assert!(
            near(load.estimate().expect("has samples").mean(), 50_000.0),
            "the stored estimate must not change"
        );
    }

    #[test]
    fn acquire_fails_at_the_limit_and_succeeds_after_a_release() {
        let load = Load::fresh(None, 0.0);
        load.set_limit(2);
        assert!(load.acquire() && load.acquire());
        assert!(!load.acquire());
        assert_eq!(load.in_flight(), 2, "a failed acquire must not count");
        load.release();
        assert!(load.acquire());
        load.set_limit(0);
        assert!(!load.acquire());
    }

    #[test]
    fn a_step_back_of_ticks_counts_as_zero_and_a_wrap_causes_no_jump() {
        assert!(near(Ticks(5).since(Ticks(6)) + 1.0, 1.0));
        assert!(
            near(Ticks(2).since(Ticks(TICK_MASK)), 0.003),
            "the difference across the wrap should be 3 ms"
        );
    }

    #[test]
    fn an_estimate_stays_decayed_after_days_without_calls() {
        let load = warmed(ms(50), Ticks(0));
        for hours in [1, 20, 30, 50, 70] {
            let estimate = load.estimate().expect("has samples");
            let decayed = estimate.decayed(1_000.0, Ticks(hours * 3_600_000));
            assert!(near(decayed, 1_000.0), "{decayed} us after {hours} h");
            let next = estimate.with(2_000.0, Ticks(hours * 3_600_000));
            assert!(
                near(next.mean(), 2_000.0),
                "{} us after {hours} h",
                next.mean()
            );
        }
    }

    #[test]
    fn unpacking_returns_the_packed_values() {
        let estimate = Estimate {
            mean: 1234.5,
            updated: Ticks(0x0abc_def1),
            samples: 9,
        };
        assert_eq!(Estimate::unpack(estimate.pack()), estimate);
    }

    #[test]
    fn the_median_of_an_empty_set_is_zero() {
        assert!(median(&mut []).abs() < f32::EPSILON);
        assert!(near(median(&mut [3.0, 1.0, 2.0]), 2.0));
        assert!(near(median(&mut [3.0, 1.0]), 1.0));
    }
}
