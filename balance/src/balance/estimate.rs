//! The latency estimate of one connection.
//!
//! The estimate is a mean of the samples that is weighted by time, so that it does not depend on the number of calls. It forgets at a rate
//! that the driver sets for the whole channel, in proportion to the interval between two samples of an endpoint. A channel with many calls
//! forgets within seconds. A channel with few calls avoids a slow endpoint for about twenty calls per endpoint, and for a few minutes at
//! most.

use std::time::Duration;

use tokio::time::Instant;

/// What the driver computes from all connections of a channel, and publishes to each of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Reference {
    /// The median latency of all endpoints, in microseconds. 0 while no latency is known.
    pub(crate) median: f32,
    /// The time constant of the means and of their decay, in seconds.
    pub(crate) time_constant: f32,
}

impl Default for Reference {
    fn default() -> Self {
        Self {
            median: 0.0,
            time_constant: MIN_TIME_CONSTANT,
        }
    }
}

impl Reference {
    /// Returns whether a sample is far above the median. False while the median is unknown.
    fn is_far_below(self, sample: f32) -> bool {
        self.median > 0.0 && sample > self.median * FAR
    }
}

/// A time-weighted mean of the latency.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Estimate {
    /// The mean in microseconds.
    mean: f32,
    updated: Ticks,
    /// Number of samples, up to [`WARM`].
    samples: u8,
    /// Number of consecutive samples, up to [`EVIDENCE`], that were far above the median.
    far: u8,
}

impl Estimate {
    pub(crate) fn mean(&self) -> f32 {
        self.mean
    }

    pub(crate) fn latency(&self) -> Duration {
        Duration::from_secs_f32(self.mean.max(0.0) / 1e6)
    }

    pub(crate) fn updated(&self) -> Ticks {
        self.updated
    }

    pub(crate) fn has_samples(&self) -> bool {
        self.samples > 0
    }

    /// Returns the estimate with one more sample.
    ///
    /// If the samples are so few that this one would dominate the mean, a sample far above the median is clipped unless the previous one
    /// was far above the median too. One call of an expensive method is therefore no evidence that the endpoint is slow.
    pub(crate) fn with(self, sample: f32, now: Ticks, reference: Reference) -> Self {
        let weight = self.weight(now, reference);
        let far = if reference.is_far_below(sample) {
            (self.far + 1).min(EVIDENCE)
        } else {
            // While the median is unknown, a sample may later turn out to be far above it.
            u8::from(reference.median <= 0.0)
        };
        let is_doubtful = reference.median > 0.0 && far == 1 && weight > DOMINANT;
        let sample = if is_doubtful {
            // A clipped sample must not lower the mean: the call was slower than the mean.
            sample.min((reference.median * DOUBT).max(self.mean))
        } else {
            sample
        };
        Self {
            far,
            ..self.averaged(sample, weight, now)
        }
    }

    /// Returns the estimate with the sample of a failed call. The estimate then counts as having [`WARM`] samples. The limits on the
    /// latency exist for slow responses of a cold server and for expensive methods, not for failures.
    pub(crate) fn with_failure(self, sample: f32, now: Ticks, reference: Reference) -> Self {
        Self {
            samples: WARM,
            far: EVIDENCE,
            ..self.averaged(sample, self.weight(now, reference), now)
        }
    }

    fn averaged(self, sample: f32, weight: f32, now: Ticks) -> Self {
        Self {
            mean: self.mean + (sample - self.mean) * weight,
            updated: now,
            samples: (self.samples + 1).min(WARM),
            far: self.far,
        }
    }

    /// Returns the weight of a new sample. The weight of the old mean is exp(-dt / time constant), where dt is the time since the last
    /// sample. Up to [`WARM`] samples, the new sample weighs at least as much as in a plain mean. Otherwise one unusual first sample would
    /// dominate for seconds.
    fn weight(self, now: Ticks, reference: Reference) -> f32 {
        let aged = 1.0 - self.remaining(now, reference);
        let few = 1.0 / (f32::from(self.samples) + 1.0);
        if self.samples < WARM {
            aged.max(few)
        } else {
            aged
        }
    }

    /// Returns the estimate of a connection whose samples no longer count. The median counts as a sample. Without a sample, the connection
    /// would be preferred like a new one.
    pub(crate) fn of_median(reference: Reference) -> Self {
        Self {
            mean: reference.median,
            samples: 1,
            ..Self::default()
        }
    }

    /// Returns the latency that picks compare right after a sample, before it decays.
    ///
    /// Without samples, an endpoint counts as faster than the median, so that a new endpoint gets its first call sooner.
    /// With fewer than [`WARM`] samples, an endpoint counts as no slower than the median, because the first calls to a cold server are
    /// slow. Samples far above the median are an exception: after one of them the endpoint is avoided for a short time, and
    /// [`EVIDENCE`] consecutive ones count in full.
    pub(crate) fn effective(self, reference: Reference) -> f32 {
        let limit = match (self.samples, self.far) {
            (0, _) => return reference.median * UNTRIED,
            (WARM.., _) | (_, EVIDENCE..) => return self.mean,
            (_, 0) => reference.median,
            (_, 1..) => reference.median * DOUBT,
        };
        self.mean.min(limit)
    }

    /// Returns the latency that picks compare at the later time `now`. It decays to the median, so that an endpoint that was slow is tried
    /// again.
    pub(crate) fn decayed(self, now: Ticks, reference: Reference) -> f32 {
        let (latency, median) = (self.effective(reference), reference.median);
        if self.samples < WARM && latency <= median {
            return latency;
        }
        median + (latency - median) * self.remaining(now, reference)
    }

    /// Returns the share of the estimate that is not yet forgotten.
    fn remaining(self, now: Ticks, reference: Reference) -> f32 {
        (-now.since(self.updated) / reference.time_constant).exp()
    }

    pub(crate) fn pack(self) -> u64 {
        // The sign of the mean is always 0. Its bit and the lowest bit of the fraction contain the number of samples far above the median.
        u64::from(self.mean.to_bits() >> 1) << (32 + FAR_BITS)
            | u64::from(self.far) << 32
            | u64::from(self.updated.0) << SAMPLE_BITS
            | u64::from(self.samples)
    }

    pub(crate) fn unpack(word: u64) -> Self {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "each half of the word has 32 bits"
        )]
        let (high, low) = ((word >> 32) as u32, word as u32);
        Self {
            mean: f32::from_bits(high >> FAR_BITS << 1),
            updated: Ticks(low >> SAMPLE_BITS),
            samples: (low & u32::from(WARM)).try_into().unwrap_or(WARM),
            far: (high & FAR_MASK).try_into().unwrap_or(EVIDENCE),
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

    /// Returns the time as a number of at most 28 bits.
    pub(crate) fn to_bits(self) -> u32 {
        self.0
    }

    /// Returns the time with this number.
    pub(crate) fn from_bits(bits: u32) -> Self {
        Self(bits & TICK_MASK)
    }

    /// Returns the seconds since an earlier time, which may be days ago.
    ///
    /// Two callers may read the clock in one order and update the estimate in the opposite order. A difference of less than a second in the
    /// wrong direction therefore counts as zero, and not as three days.
    pub(crate) fn since(self, earlier: Self) -> f32 {
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

/// The time constant of a channel with many calls, in seconds. The weight of a sample depends on time and not on the number of samples,
/// because there can be many samples per second.
pub(crate) const MIN_TIME_CONSTANT: f32 = 3.0;
/// An estimate with at least this many samples is used as it is. With fewer samples, the estimate is capped at the median. The value is the
/// largest number that fits into `SAMPLE_BITS` bits.
const WARM: u8 = 15;
/// A sample is far above the median if it is more than this many times the median. Smaller differences occur between the methods of most
/// services, and on a busy machine.
const FAR: f32 = 4.0;
/// Number of consecutive samples far above the median that count as evidence that an endpoint is slow. If every tenth call is expensive, two
/// in a row are expensive once in a hundred calls.
const EVIDENCE: u8 = 2;
/// Without samples, an endpoint counts as having this fraction of the median latency. The fraction is just low enough that picks do not
/// ignore the difference as noise: of two idle endpoints, the new one is picked. A lower fraction would send more calls to a cold server
/// until its first response. With this one, the calls in flight to it exceed those to another endpoint by at most a third.
const UNTRIED: f32 = 0.75;
/// A single sample far above the median counts as this many times the median.
const DOUBT: f32 = 2.0;
/// A sample with a larger weight dominates the mean: it is one of the last ten samples, or nearly so.
const DOMINANT: f32 = 0.1;
const SAMPLE_BITS: u32 = 4;
const FAR_BITS: u32 = 2;
const FAR_MASK: u32 = (1 << FAR_BITS) - 1;
const TICK_MASK: u32 = u32::MAX >> SAMPLE_BITS;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MEDIAN: f32 = 1_000.0;
    const SLOW: f32 = 50_000.0;
    /// A channel with many calls.
    const BUSY: Reference = Reference {
        median: MEDIAN,
        time_constant: MIN_TIME_CONSTANT,
    };
    /// A channel with one call per second to four endpoints.
    const SPARSE: Reference = Reference {
        median: MEDIAN,
        time_constant: 16.0,
    };
    const UNKNOWN: Reference = Reference {
        median: 0.0,
        time_constant: MIN_TIME_CONSTANT,
    };

    fn near(left: f32, right: f32) -> bool {
        (left - right).abs() <= right.abs() * 0.02
    }

    /// Returns the estimate of a connection with more than [`WARM`] samples of this latency, one every `interval_ms`, and the time of the
    /// last one.
    fn warm(latency: f32, interval_ms: u32, reference: Reference) -> (Estimate, Ticks) {
        let times = (0..40).map(|sample| Ticks(sample * interval_ms));
        let last = Ticks(39 * interval_ms);
        let add = |estimate: Estimate, now| estimate.with(latency, now, reference);
        (times.fold(Estimate::default(), add), last)
    }

    fn later(Ticks(now): Ticks, millis: u32) -> Ticks {
        Ticks(now + millis)
    }

    #[test]
    fn the_first_sample_sets_the_mean_and_a_few_samples_are_averaged() {
        let estimate = Estimate::default().with(4_000.0, Ticks(0), UNKNOWN);
        assert!(near(estimate.mean(), 4_000.0));
        let estimate = estimate.with(2_000.0, Ticks(0), UNKNOWN);
        assert!(near(estimate.mean(), 3_000.0));
    }

    #[test]
    fn the_mean_of_a_busy_channel_is_weighted_by_time_and_not_by_sample_count() {
        let (mut estimate, mut now) = warm(MEDIAN, 1, BUSY);
        // Among a thousand calls within one second, a call that takes a second counts as one sample of the mean, not as a peak.
        for _ in 0..1_000 {
            now = later(now, 1);
            estimate = estimate.with(MEDIAN, now, BUSY);
        }
        now = later(now, 1);
        let mean = estimate.with(1_000_000.0, now, BUSY).mean();
        assert!((1_300.0..1_400.0).contains(&mean), "mean {mean}");
    }

    #[test]
    fn expensive_calls_count_in_full_on_a_busy_channel() {
        // Every tenth call takes 50 ms. The mean is 5.9 ms, and not that of clipped samples.
        let (mut estimate, mut now) = warm(MEDIAN, 10, BUSY);
        for call in 0..3_000 {
            now = later(now, 10);
            let sample = if call % 10 == 0 { SLOW } else { MEDIAN };
            estimate = estimate.with(sample, now, BUSY);
        }
        let mean = estimate.effective(BUSY);
        assert!((5_000.0..7_000.0).contains(&mean), "mean {mean}");
    }

    #[test]
    fn the_first_calls_to_a_cold_server_do_not_raise_the_latency_above_the_median() {
        let mut estimate = Estimate::default();
        for call in 0..10 {
            estimate = estimate.with(3.0 * MEDIAN, Ticks(call * 10), SPARSE);
            assert!(near(estimate.effective(SPARSE), MEDIAN));
        }
    }

    #[test]
    fn a_clipped_sample_does_not_lower_the_mean() {
        let slow = Estimate {
            mean: 18.0 * MEDIAN,
            samples: WARM,
            ..Estimate::default()
        };
        let after = slow.with(5_000.0 * MEDIAN, Ticks(4_000), SPARSE);
        assert!(after.mean() >= slow.mean(), "{after:?}");
    }

    #[test]
    fn two_first_samples_far_above_the_median_show_that_an_endpoint_is_slow() {
        let one = Estimate::default().with(SLOW, Ticks(0), SPARSE);
        let two = one.with(SLOW, Ticks(4_000), SPARSE);
        assert!(
            near(one.effective(SPARSE), 2.0 * MEDIAN),
            "one sample is a reason for doubt only"
        );
        assert!(two.effective(SPARSE) > 20.0 * MEDIAN);
    }

    #[test]
    fn a_first_sample_counts_although_the_median_was_unknown() {
        let one = Estimate::default().with(SLOW, Ticks(0), UNKNOWN);
        assert!(near(one.effective(SPARSE), 2.0 * MEDIAN));
        let two = one.with(SLOW, Ticks(4_000), SPARSE);
        assert!(near(two.effective(SPARSE), SLOW));
        let other = Estimate::default().with(MEDIAN, Ticks(0), UNKNOWN);
        let two = other.with(MEDIAN, Ticks(4_000), SPARSE);
        assert!(near(two.effective(SPARSE), MEDIAN));
    }

    #[test]
    fn a_fast_sample_of_a_cold_server_ends_the_doubt() {
        let estimate = Estimate::default().with(SLOW, Ticks(0), SPARSE);
        let estimate = estimate.with(MEDIAN, Ticks(4_000), SPARSE);
        assert!(near(estimate.effective(SPARSE), MEDIAN));
    }

    #[test]
    fn one_expensive_call_of_a_sparse_caller_does_not_mark_the_endpoint_as_slow() {
        let (estimate, now) = warm(MEDIAN, 4_000, SPARSE);
        let unlucky = estimate.with(SLOW, later(now, 4_000), SPARSE);
        assert!(
            unlucky.effective(SPARSE) < 1.25 * MEDIAN,
            "{} us",
            unlucky.effective(SPARSE)
        );
        let slow = unlucky.with(SLOW, later(now, 8_000), SPARSE);
        assert!(
            slow.effective(SPARSE) > 10.0 * MEDIAN,
            "two expensive calls in a row count"
        );
    }

    #[test]
    fn a_failure_counts_in_full_and_at_once() {
        let estimate = Estimate::default().with_failure(SLOW, Ticks(0), SPARSE);
        assert!(near(estimate.effective(SPARSE), SLOW));
        let (estimate, now) = warm(MEDIAN, 4_000, SPARSE);
        let estimate = estimate.with_failure(100_000.0, later(now, 4_000), SPARSE);
        assert!(estimate.effective(SPARSE) > 20.0 * MEDIAN);
    }

    #[test]
    fn an_idle_slow_endpoint_counts_as_median_after_a_few_time_constants() {
        for reference in [BUSY, SPARSE] {
            let (estimate, now) = warm(SLOW, 4_000, reference);
            let after = |constants: f32| {
                let millis = Duration::from_secs_f32(constants * reference.time_constant);
                let millis = u32::try_from(millis.as_millis()).expect("a few minutes");
                estimate.decayed(later(now, millis), reference)
            };
            assert!(after(5.0) > 1.25 * MEDIAN, "avoided for five constants");
            assert!(after(5.4) < 1.25 * MEDIAN, "tried again after 5.4");
        }
    }

    #[test]
    fn a_recovered_endpoint_is_as_good_as_the_others_after_one_sample() {
        let (estimate, now) = warm(SLOW, 4_000, SPARSE);
        let now = later(now, 90_000);
        let latency = estimate.with(MEDIAN, now, SPARSE).effective(SPARSE);
        assert!(latency < 1.25 * MEDIAN, "{latency} us");
    }

    #[test]
    fn an_estimate_stays_decayed_after_days_without_calls() {
        let (estimate, _) = warm(SLOW, 0, BUSY);
        for hours in [1, 20, 30, 50, 70] {
            let now = Ticks(hours * 3_600_000);
            let decayed = estimate.decayed(now, BUSY);
            assert!(near(decayed, MEDIAN), "{decayed} us after {hours} h");
            let next = estimate.with(2_000.0, now, BUSY).mean();
            assert!(near(next, 2_000.0), "{next} us after {hours} h");
        }
    }

    #[test]
    fn days_without_calls_count_as_silence_and_a_clock_step_back_does_not() {
        let last = Ticks(5_000);
        for hours in [1, 28, 62, 74] {
            let now = Ticks((5_000 + hours * 3_600_000) & TICK_MASK);
            assert!(
                now.since(last) > 1.0,
                "after {hours} h, more than 1 s must have passed"
            );
        }
        assert!(
            Ticks(4_990).since(last) < 1.0,
            "a step back of ten milliseconds must not count as silence"
        );
    }

    #[test]
    fn a_step_back_of_ticks_counts_as_zero_and_a_wrap_causes_no_jump() {
        assert!(near(Ticks(5).since(Ticks(6)) + 1.0, 1.0));
        assert!(
            near(Ticks(2).since(Ticks(TICK_MASK)), 0.003),
            "the difference across the wrap should be 3 ms"
        );
    }

    proptest! {
        #[test]
        fn unpacking_returns_the_packed_values(
            mean in 0.0..1e12_f32,
            updated in 0..=TICK_MASK,
            samples in 0..=WARM,
            far in 0..=EVIDENCE,
        ) {
            let updated = Ticks(updated);
            let unpacked = Estimate::unpack(Estimate { mean, updated, samples, far }.pack());
            prop_assert_eq!((unpacked.updated, unpacked.samples, unpacked.far), (updated, samples, far));
            prop_assert!((unpacked.mean - mean).abs() <= mean * 1e-6);
        }

        #[test]
        fn the_compared_latency_is_between_the_median_and_the_samples(
            samples in proptest::collection::vec((1.0..1e6_f32, 0..20_000_u32), 1..60),
            idle in 0..200_000_u32,
            time_constant in MIN_TIME_CONSTANT..30.0,
        ) {
            let reference = Reference { median: MEDIAN, time_constant };
            let (mut estimate, mut now) = (Estimate::default(), Ticks(0));
            for (sample, pause) in &samples {
                now = later(now, *pause);
                estimate = Estimate::unpack(estimate.with(*sample, now, reference).pack());
            }
            let all = samples.iter().map(|(sample, _)| *sample);
            let lowest = all.clone().fold(MEDIAN, f32::min) * 0.999;
            let highest = all.fold(2.0 * MEDIAN, f32::max) * 1.001;
            for latency in [estimate.effective(reference), estimate.decayed(later(now, idle), reference)] {
                prop_assert!((lowest..=highest).contains(&latency), "{latency} us");
            }
        }
    }

    #[test]
    fn the_median_of_an_empty_set_is_zero() {
        assert!(median(&mut []).abs() < f32::EPSILON);
        assert!(near(median(&mut [3.0, 1.0, 2.0]), 2.0));
        assert!(near(median(&mut [3.0, 1.0]), 1.0));
    }
}
