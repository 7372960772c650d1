//! What a connection is loaded with: calls in flight, and how long it takes to answer.
//!
//! The estimate is a time-weighted mean of the time from a request to its response's head, and not a peak: over methods of very different
//! cost a peak punishes whichever server last got an expensive call. It has nothing of a stream's length. Callers write to it, picks only
//! read one number; what takes a clock is done by the caller at the end of a call, and by the driver every now and then.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// The load of one connection: all that a pick reads of it, in a line of the cache that it has for itself.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct Load {
    in_flight: AtomicU32,
    /// How many calls may be in flight.
    limit: AtomicU32,
    /// What picks compare: the latency in microseconds, as the bits of an `f32`. 0 while nothing at all is known.
    shown: AtomicU32,
    /// The pool's median, in the same form. It stands in for an estimate that too few samples have made.
    seed: AtomicU32,
    /// The mean, when it was last changed, and from how few samples: see [`Estimate`].
    estimate: AtomicU64,
}

impl Load {
    /// Gives a new connection the latency of an earlier one to the same endpoint, or else the pool's.
    fn begin(&self, inherited: Option<Estimate>, median: f32) {
        let estimate = inherited.unwrap_or_default();
        let shown = estimate.shown(median);
        self.shown.store(shown.to_bits(), Ordering::Relaxed);
        self.seed.store(median.to_bits(), Ordering::Relaxed);
        self.estimate.store(estimate.pack(), Ordering::Relaxed);
    }

    pub(crate) fn in_flight(&self) -> u32 {
        // Relaxed: a pick compares two numbers that are both out of date a moment later.
        self.in_flight.load(Ordering::Relaxed)
    }

    /// The latency that picks compare, in microseconds.
    pub(crate) fn latency(&self) -> f32 {
        f32::from_bits(self.shown.load(Ordering::Relaxed))
    }

    /// How many calls may be in flight.
    pub(crate) fn limit(&self) -> usize {
        // Relaxed: nothing else hangs on it, and the value is the peer's of a moment ago in any case.
        self.limit.load(Ordering::Relaxed) as usize
    }

    pub(crate) fn set_limit(&self, limit: usize) {
        let limit = u32::try_from(limit).unwrap_or(u32::MAX);
        self.limit.store(limit, Ordering::Relaxed);
    }

    /// Takes a place for a call, unless as many are in flight as may be.
    pub(crate) fn acquire(&self) -> bool {
        // SeqCst here and in `release`: a waiter announces itself and then looks for a place, a finished call gives its place up and then
        // looks for waiters. One of the two must see the other, which weaker orderings do not promise.
        //
        // In one step: an addition that is taken back would for a moment hide a place that has just become free from whoever was told of it.
        let limit = self.limit.load(Ordering::Relaxed);
        let one_more = |before| (before < limit).then_some(before + 1);
        let taken = self
            .in_flight
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_more);
        taken.is_ok()
    }

    /// Gives a call's place up.
    pub(crate) fn release(&self) {
        self.in_flight.fetch_sub(1, Ordering::SeqCst);
    }

    /// The response's head has come after `elapsed`.
    pub(crate) fn on_head(&self, elapsed: Duration, now: Ticks) {
        self.sample(micros(elapsed), now);
    }

    /// A call has failed: a fast failure must not look like a fast answer. It counts from the first on: the grace for few samples is for
    /// servers that are cold.
    pub(crate) fn on_failure(&self, elapsed: Duration, now: Ticks) {
        let seed = f32::from_bits(self.seed.load(Ordering::Relaxed));
        let sample = micros(elapsed).max(PENALTY).max(seed * PENALTY_FACTOR);
        self.update(|estimate| Estimate {
            samples: WARM,
            ..estimate.with(sample, now)
        });
    }

    /// Seconds since the last sample, as far as the clock of the estimate reaches.
    pub(crate) fn quiet(&self, now: Ticks) -> f32 {
        now.quiet_since(Estimate::unpack(self.estimate.load(Ordering::Relaxed)).updated)
    }

    /// A call was dropped before its head: it would have taken at least this long, which can only raise the estimate.
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
        // Relaxed: the word is the whole estimate, so no reader can see half of an update, and nothing else hangs on it.
        let updated =
            self.estimate
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |estimate| {
                    Some(change(Estimate::unpack(estimate)).pack())
                });
        if let Ok(before) = updated {
            let estimate = change(Estimate::unpack(before));
            let seed = f32::from_bits(self.seed.load(Ordering::Relaxed));
            self.shown
                .store(estimate.shown(seed).to_bits(), Ordering::Relaxed);
        }
    }

    /// Brings what picks see up to date with time: an estimate that nothing renews goes to the pool's median, so that an endpoint that was
    /// slow once is tried again.
    pub(crate) fn refresh(&self, median: f32, now: Ticks) {
        self.seed.store(median.to_bits(), Ordering::Relaxed);
        let estimate = Estimate::unpack(self.estimate.load(Ordering::Relaxed));
        let shown = estimate.faded(median, now);
        self.shown.store(shown.to_bits(), Ordering::Relaxed);
    }

    /// Forgets what was measured: the peer was away, and is taken for as fast as the pool.
    pub(crate) fn forget(&self, median: f32) {
        let nothing = Estimate::default();
        self.estimate.store(nothing.pack(), Ordering::Relaxed);
        self.seed.store(median.to_bits(), Ordering::Relaxed);
        self.shown.store(median.to_bits(), Ordering::Relaxed);
    }

    /// The estimate, if there are samples.
    pub(crate) fn estimate(&self) -> Option<Estimate> {
        let estimate = Estimate::unpack(self.estimate.load(Ordering::Relaxed));
        (estimate.samples > 0).then_some(estimate)
    }
}

/// A connection's load, where the loads of others are its neighbours.
///
/// Among ten thousand connections a pick that finds each load with the connection it belongs to takes twice as long: the two that it
/// compares are in memory that neither the cache nor the translation of addresses has at hand.
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

/// Where new connections get their loads. A slab goes when the last of its connections does; no place in it is used twice.
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

    /// The load of a new connection: nothing in flight, and the latency of an earlier connection to the same endpoint, or else the pool's.
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

/// A time-weighted mean.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Estimate {
    /// In microseconds.
    mean: f32,
    updated: Ticks,
    /// How many samples, up to [`WARM`].
    samples: u8,
}

impl Estimate {
    pub(crate) fn mean(&self) -> f32 {
        self.mean
    }

    pub(crate) fn latency(&self) -> Duration {
        Duration::from_secs_f32(self.mean.max(0.0) / 1e6)
    }

    /// The mean with one sample more. The old value weighs exp(-dt / 3 s); while the samples are few, it is their plain mean, or an unlucky
    /// first one would stand for seconds.
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

    /// What picks see right after a sample. Until there are enough, an endpoint counts as no slower than the pool.
    fn shown(self, median: f32) -> f32 {
        match self.samples {
            0 => median,
            1..WARM => self.mean.min(median),
            _ => self.mean,
        }
    }

    /// What picks see of it at a later time.
    fn faded(self, median: f32, now: Ticks) -> f32 {
        if self.samples < WARM {
            return self.shown(median);
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
            reason = "these are the fields' widths"
        )]
        let (high, low) = ((word >> 32) as u32, word as u32);
        Self {
            mean: f32::from_bits(high),
            updated: Ticks(low >> SAMPLE_BITS),
            samples: (low & u32::from(WARM)).try_into().unwrap_or(WARM),
        }
    }
}

/// A time in milliseconds since the channel's start. It wraps after three days, which then takes one sample for older than it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ticks(u32);

impl Ticks {
    pub(crate) fn at(now: Instant, start: Instant) -> Self {
        let millis = now.saturating_duration_since(start).as_millis();
        #[expect(clippy::cast_possible_truncation, reason = "the mask is narrower")]
        Self(millis as u32 & TICK_MASK)
    }

    /// As [`since`](Self::since), but a difference of more than a day is one: only a step of moments is taken for a clock read twice.
    fn quiet_since(self, earlier: Self) -> f32 {
        let millis = self.0.wrapping_sub(earlier.0) & TICK_MASK;
        if TICK_MASK - millis < 1_000 {
            return 0.0;
        }
        #[expect(
            clippy::cast_precision_loss,
            reason = "seconds more or less do not count"
        )]
        let seconds = millis as f32 / 1e3;
        seconds
    }

    /// Seconds since an earlier time.
    fn since(self, earlier: Self) -> f32 {
        #[expect(
            clippy::cast_precision_loss,
            reason = "milliseconds more or less after hours do not count"
        )]
        let millis = (self.0.wrapping_sub(earlier.0) & TICK_MASK) as f32;
        // Two callers may read the clock in one order and get here in the other: that is no time, not three days.
        if millis > BACKWARDS {
            0.0
        } else {
            millis / 1e3
        }
    }
}

fn micros(duration: Duration) -> f32 {
    duration.as_secs_f32() * 1e6
}

/// The pool's median of those that know their latency; 0 if none does.
pub(crate) fn median(latencies: &mut [f32]) -> f32 {
    let Some(last) = latencies.len().checked_sub(1) else {
        return 0.0;
    };
    // The lower of two: the slower one of a pair must have something better to fade to than itself.
    let middle = last / 2;
    *latencies.select_nth_unstable_by(middle, f32::total_cmp).1
}

/// Loads side by side: four kilobytes, which are a page.
const SLAB: usize = 64;
/// In seconds. Of samples per second there are many, so it is time and not their number that must pass.
const TIME_CONSTANT: f32 = 3.0;
/// The number of samples from which on an estimate stands on its own: as many as four bits count.
const WARM: u8 = 15;
const SAMPLE_BITS: u32 = 4;
const TICK_MASK: u32 = u32::MAX >> SAMPLE_BITS;
/// Differences in milliseconds above this are taken for a step back.
const BACKWARDS: f32 = 1e8;
/// The least that a failed call counts for, in microseconds.
const PENALTY: f32 = 100_000.0;
/// A failed call counts for at least so many of the pool's.
const PENALTY_FACTOR: f32 = 8.0;

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
    fn a_new_endpoint_has_the_pools_latency_and_not_zero_or_a_second() {
        let load = Load::fresh(None, 1_500.0);
        assert!(near(load.latency(), 1_500.0));
        load.on_head(ms(50), Ticks(0));
        assert!(
            near(load.latency(), 1_500.0),
            "one cold call does not condemn it"
        );
        for _ in 0..WARM {
            load.on_head(ms(50), Ticks(0));
        }
        assert!(near(load.latency(), 50_000.0), "enough of them do");
    }

    #[test]
    fn the_first_sample_sets_the_estimate_and_few_are_their_plain_mean() {
        let load = Load::fresh(None, 0.0);
        load.on_head(ms(4), Ticks(0));
        assert!(near(load.estimate().expect("a sample").mean(), 4_000.0));
        load.on_head(ms(2), Ticks(0));
        assert!(near(load.estimate().expect("samples").mean(), 3_000.0));
    }

    #[test]
    fn the_mean_is_weighted_by_time_and_not_by_samples() {
        let load = warmed(ms(1), Ticks(0));
        // One call of a second among a thousand in a second is the mean it is, not a peak.
        for millis in 1..1_000 {
            load.on_head(ms(1), Ticks(millis));
        }
        load.on_head(ms(1_000), Ticks(1_000));
        let mean = load.estimate().expect("samples").mean();
        assert!(mean < 1_500.0, "{mean}");
        // The same call after three silent seconds weighs 1 - 1/e.
        load.on_head(ms(1_000), Ticks(4_000));
        let mean = load.estimate().expect("samples").mean();
        assert!((600_000.0..660_000.0).contains(&mean), "{mean}");
    }

    #[test]
    fn a_failure_counts_as_slow_however_fast_it_was() {
        let load = warmed(ms(1), Ticks(0));
        load.on_failure(ms(0), Ticks(1_000));
        assert!(load.latency() > 20_000.0, "{}", load.latency());
    }

    #[test]
    fn a_weekend_is_a_silence_and_a_step_back_is_none() {
        let load = warmed(ms(1), Ticks(5_000));
        for hours in [1, 28, 62, 74] {
            let now = Ticks((5_000 + hours * 3_600_000) & TICK_MASK);
            assert!(load.quiet(now) > 1.0, "{hours} h");
        }
        assert!(load.quiet(Ticks(4_990)) < 1.0, "ten milliseconds back");
    }

    #[test]
    fn an_abandoned_call_only_raises() {
        let load = warmed(ms(10), Ticks(0));
        load.on_abandoned(ms(1), Ticks(1_000));
        assert!(near(load.latency(), 10_000.0));
        load.on_abandoned(ms(500), Ticks(1_000));
        assert!(load.latency() > 100_000.0);
    }

    #[test]
    fn an_estimate_nothing_renews_goes_to_the_median() {
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
            near(load.estimate().expect("samples").mean(), 50_000.0),
            "the estimate itself stays what was measured"
        );
    }

    #[test]
    fn places_are_limited_and_come_back() {
        let load = Load::fresh(None, 0.0);
        load.set_limit(2);
        assert!(load.acquire() && load.acquire());
        assert!(!load.acquire());
        assert_eq!(load.in_flight(), 2, "a refusal leaves nothing behind");
        load.release();
        assert!(load.acquire());
        load.set_limit(0);
        assert!(!load.acquire());
    }

    #[test]
    fn a_clock_that_steps_back_is_no_time() {
        assert!(near(Ticks(5).since(Ticks(6)) + 1.0, 1.0));
        assert!(
            near(Ticks(2).since(Ticks(TICK_MASK)), 0.003),
            "it wraps without a jump"
        );
    }

    #[test]
    fn what_is_packed_is_unpacked() {
        let estimate = Estimate {
            mean: 1234.5,
            updated: Ticks(0x0abc_def1),
            samples: 9,
        };
        assert_eq!(Estimate::unpack(estimate.pack()), estimate);
    }

    #[test]
    fn the_median_of_none_is_nothing() {
        assert!(median(&mut []).abs() < f32::EPSILON);
        assert!(near(median(&mut [3.0, 1.0, 2.0]), 2.0));
        assert!(near(median(&mut [3.0, 1.0]), 1.0));
    }
}
