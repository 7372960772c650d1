//! Percentiles and a histogram of latencies.

use std::time::Duration;

/// The latencies of calls, sorted.
#[derive(Debug)]
pub(super) struct Latencies(Vec<Duration>);

impl Latencies {
    pub(super) fn new(mut latencies: Vec<Duration>) -> Self {
        latencies.sort_unstable();
        Self(latencies)
    }

    /// Returns the smallest latency that at least this share of the calls did not exceed; `None` without calls.
    pub(super) fn percentile(&self, percent: f64) -> Option<Duration> {
        #[allow(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "the rank is between 0 and the number of calls"
        )]
        let rank = (self.0.len() as f64 * percent / 100.0).ceil() as usize;
        self.0.get(rank.saturating_sub(1)).copied()
    }

    /// Returns the counts of buckets whose limits double, from the bucket of the fastest call to that of the slowest.
    pub(super) fn histogram(&self) -> Vec<(Duration, usize)> {
        let mut buckets: Vec<(Duration, usize)> = Vec::new();
        let mut limit = SMALLEST;
        for latency in &self.0 {
            while *latency > limit {
                limit *= 2;
                if let Some(last) = buckets.last().map(|(last, _)| *last)
                    && last < limit
                {
                    buckets.push((limit, 0));
                }
            }
            match buckets.last_mut() {
                Some((last, count)) if *last == limit => *count += 1,
                _ => buckets.push((limit, 1)),
            }
        }
        buckets
    }
}

const SMALLEST: Duration = Duration::from_micros(125);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_latencies_of_calls() {
        let millis = |count: u64| Duration::from_millis(count);
        let latencies = Latencies::new((1..=100).rev().map(millis).collect());
        assert_eq!(latencies.percentile(50.0), Some(millis(50)));
        assert_eq!(latencies.percentile(99.0), Some(millis(99)));
        assert_eq!(latencies.percentile(100.0), Some(millis(100)));
        assert_eq!(
            Latencies::new(vec![millis(3)]).percentile(50.0),
            Some(millis(3))
        );
        assert_eq!(Latencies::new(Vec::new()).percentile(50.0), None);
    }

    #[test]
    fn a_histogram_has_every_bucket_between_the_first_and_the_last() {
        let micros = |count: u64| Duration::from_micros(count);
        let latencies = Latencies::new([200, 240, 900].map(micros).to_vec());
        assert_eq!(
            latencies.histogram(),
            [(micros(250), 2), (micros(500), 0), (micros(1_000), 1)]
        );
    }
}
