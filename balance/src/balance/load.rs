//! The load of a connection: its calls in flight and its latency.
//!
//! The latency is a time-weighted mean of the time from a request to the head of its response. The peak latency is not used: if the methods
//! differ widely in cost, the peak would punish the server that happened to get the last expensive call. The duration of a stream after the
//! head does not count.
//!
//! Each call adds a sample to this mean, the [`Estimate`]. For the latency, a pick reads only one number, which is computed from the mean.
//! Each call updates this number when its outcome is recorded, and the driver updates it at intervals, so a pick reads no clock.
//!
//! With load reports, the load also contains the calls of other clients ([`ServerLoad`]), which is updated in the same way.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use super::estimate::{Estimate, Reference, Ticks};
use super::server_load::ServerLoad;

/// The load of one connection. It contains all data that a pick reads about the connection, in a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct Load {
    in_flight: AtomicU32,
    /// Maximum number of calls in flight.
    limit: AtomicU32,
    /// The latency that picks compare, in microseconds, as the bits of an `f32`. 0 while no latency is known.
    latency: AtomicU32,
    /// The [`Reference`] as of the last refresh: the median latency of all endpoints, in the same form, and the time constant of the
    /// estimate, in seconds, as the bits of an `f32`.
    median: AtomicU32,
    time_constant: AtomicU32,
    /// The packed [`Estimate`].
    estimate: AtomicU64,
    /// The calls of other clients that are in flight at the server, as picks count them. 0 without load reports.
    others: AtomicU32,
    /// The packed [`ServerLoad`] of the last load report; 0 if there is none.
    reported: AtomicU64,
}

impl Load {
    /// Initializes the load of a new connection. The latency is that of an earlier connection to the same endpoint if there was one, and
    /// else a fraction of the median of all endpoints.
    fn begin(&self, inherited: Option<Estimate>, reference: Reference) {
        let estimate = inherited.unwrap_or_default();
        let latency = estimate.effective(reference);
        self.set_reference(reference);
        self.estimate.store(estimate.pack(), Ordering::Relaxed);
        self.latency.store(latency.to_bits(), Ordering::Relaxed);
    }

    pub(crate) fn in_flight(&self) -> u32 {
        // Relaxed: a pick only compares the numbers of two connections, and both numbers are outdated a moment later.
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Returns the number of calls in flight at the server: those on this connection, and those of other clients as far as they are known.
    pub(crate) fn server_in_flight(&self) -> u32 {
        self.in_flight()
            .saturating_add(self.others.load(Ordering::Relaxed))
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

    /// Records a failed call. The sample has a minimum, because a fast failure must not count as a fast response.
    pub(crate) fn on_failure(&self, elapsed: Duration, now: Ticks) {
        let reference = self.reference();
        let sample = micros(elapsed)
            .max(MIN_FAILURE_LATENCY)
            .max(reference.median * FAILURE_FACTOR);
        self.update(reference, |estimate| {
            estimate.with_failure(sample, now, reference)
        });
    }

    /// Returns the seconds since the last sample. The result wraps around with [`Ticks`], after about three days.
    pub(crate) fn since_last_sample(&self, now: Ticks) -> f32 {
        now.since(self.unpacked().updated())
    }

    /// Records a call that was dropped, or overran its deadline, before the head of its response was received. The call would have taken at
    /// least `elapsed`, so `elapsed` is used as a sample only if it raises the estimate.
    pub(crate) fn on_abandoned(&self, elapsed: Duration, now: Ticks) {
        let elapsed = micros(elapsed);
        if elapsed > self.unpacked().mean() {
            self.sample(elapsed, now);
        }
    }

    fn sample(&self, sample: f32, now: Ticks) {
        let reference = self.reference();
        self.update(reference, |estimate| estimate.with(sample, now, reference));
    }

    fn update(&self, reference: Reference, change: impl Fn(Estimate) -> Estimate) {
        // Relaxed: this word is the whole estimate, so no reader can see a partial update, and no other data depends on it.
        let updated =
            self.estimate
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |estimate| {
                    Some(change(Estimate::unpack(estimate)).pack())
                });
        if let Ok(before) = updated {
            let latency = change(Estimate::unpack(before)).effective(reference);
            self.latency.store(latency.to_bits(), Ordering::Relaxed);
        }
    }

    /// Updates the latency that picks compare. Without new samples, this latency approaches the median of all endpoints, so that an
    /// endpoint that was slow once is tried again.
    pub(crate) fn refresh(&self, reference: Reference, now: Ticks) {
        self.set_reference(reference);
        let latency = self.unpacked().decayed(now, reference);
        self.latency.store(latency.to_bits(), Ordering::Relaxed);
    }

    /// Discards all samples, because the peer did not answer for a while. The latency is then the median.
    pub(crate) fn forget(&self, reference: Reference) {
        self.begin(Some(Estimate::of_median(reference)), reference);
    }

    /// Records the number of calls in flight that the server has reported.
    pub(crate) fn on_server_load(&self, reported: u32, now: Ticks) {
        // Relaxed: other calls may start or end between the two loads. The number is an approximation in any case.
        let load = ServerLoad::new(reported, self.in_flight(), now);
        self.reported.store(load.pack(), Ordering::Relaxed);
        self.set_others(load.others());
    }

    /// Returns the load of the last load report, if there is one.
    pub(crate) fn server_load(&self) -> Option<ServerLoad> {
        ServerLoad::unpack(self.reported.load(Ordering::Relaxed))
    }

    /// Updates the calls of other clients that picks count. `median`: the median of all servers. It counts for a server without a report,
    /// which would otherwise look idle.
    pub(crate) fn refresh_others(&self, median: u32, now: Ticks) {
        let load = self.server_load();
        self.set_others(load.map_or(median, |load| load.decayed(median, now)));
    }

    /// Sets the calls of other clients that picks count.
    pub(crate) fn set_others(&self, others: u32) {
        self.others.store(others, Ordering::Relaxed);
    }

    /// Returns the estimate, if it has samples.
    pub(crate) fn estimate(&self) -> Option<Estimate> {
        Some(self.unpacked()).filter(Estimate::has_samples)
    }

    fn unpacked(&self) -> Estimate {
        Estimate::unpack(self.estimate.load(Ordering::Relaxed))
    }

    fn reference(&self) -> Reference {
        // Relaxed: a sample may be recorded with the median of one refresh and the time constant of another. Both are approximations.
        let float = |word: &AtomicU32| f32::from_bits(word.load(Ordering::Relaxed));
        Reference {
            median: float(&self.median),
            time_constant: float(&self.time_constant),
        }
    }

    fn set_reference(&self, reference: Reference) {
        let Reference {
            median,
            time_constant,
        } = reference;
        self.median.store(median.to_bits(), Ordering::Relaxed);
        self.time_constant
            .store(time_constant.to_bits(), Ordering::Relaxed);
    }
}

/// A handle to the load of one connection. The loads of many connections are adjacent in memory.
///
/// If each load were stored in its connection, a pick among ten thousand connections would take twice as long: the two loads that it
/// compares would be in neither the CPU cache nor the TLB (translation lookaside buffer).
#[derive(Clone, Debug)]
pub(crate) struct LoadHandle {
    slab: Arc<Slab>,
    index: u32,
    /// Whether the number of requests of the endpoint is limited. The flag is here because it fits into the padding: a pick reads the handles
    /// of a set, which has one for each connection.
    has_request_limit: bool,
}

impl LoadHandle {
    /// Sets whether the number of requests of the endpoint is limited.
    pub(crate) fn with_request_limit(mut self, has_request_limit: bool) -> Self {
        self.has_request_limit = has_request_limit;
        self
    }

    pub(crate) fn has_request_limit(&self) -> bool {
        self.has_request_limit
    }
}

type Slab = [Load; SLAB];

impl Deref for LoadHandle {
    type Target = Load;

    fn deref(&self) -> &Load {
        &self.slab[self.index as usize % SLAB]
    }
}

/// Allocates the loads of new connections in slabs of [`SLAB`] loads. A slab is freed when the last of its connections is dropped. No entry
/// of a slab is reused.
#[derive(Debug)]
pub(crate) struct Loads {
    slab: Arc<Slab>,
    used: u32,
}

impl Loads {
    pub(crate) fn new() -> Self {
        Self {
            slab: slab(),
            used: 0,
        }
    }

    /// Returns the load of a new connection. No call is in flight. The latency is that of an earlier connection to the same endpoint if
    /// there was one, and else a fraction of the median of all endpoints.
    pub(crate) fn begin(
        &mut self,
        inherited: Option<Estimate>,
        reference: Reference,
    ) -> LoadHandle {
        if self.used as usize == SLAB {
            *self = Self::new();
        }
        let load = LoadHandle {
            slab: Arc::clone(&self.slab),
            index: self.used,
            has_request_limit: false,
        };
        self.used += 1;
        load.begin(inherited, reference);
        load
    }
}

fn slab() -> Arc<Slab> {
    Arc::new(std::array::from_fn(|_| Load::default()))
}

fn micros(duration: Duration) -> f32 {
    duration.as_secs_f32() * 1e6
}

/// Number of loads in a slab. 64 loads of 64 bytes fill a page of 4 KiB.
const SLAB: usize = 64;
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

    fn reference(median: f32) -> Reference {
        Reference {
            median,
            ..Reference::default()
        }
    }

    fn fresh(median: f32) -> Load {
        let load = Load::default();
        load.begin(None, reference(median));
        load
    }

    fn warmed(latency: Duration) -> Load {
        let load = fresh(0.0);
        for _ in 0..20 {
            load.on_head(latency, Ticks::default());
        }
        load
    }

    fn near(left: f32, right: f32) -> bool {
        (left - right).abs() <= right.abs() * 0.02
    }

    fn at(millis: u64) -> Ticks {
        let start = tokio::time::Instant::now();
        Ticks::at(start + ms(millis), start)
    }

    #[test]
    fn an_endpoint_that_answers_again_after_a_stall_counts_as_the_median() {
        let load = warmed(ms(50));
        let reference = Reference {
            median: 1_500.0,
            ..Reference::default()
        };
        load.forget(reference);
        load.refresh(reference, at(1));
        assert!(near(load.latency(), 1_500.0), "{} us", load.latency());
        load.on_head(ms(1), at(60_000));
        assert!(near(load.latency(), 1_000.0), "{} us", load.latency());
    }

    #[test]
    fn a_new_endpoint_counts_as_faster_than_the_median_until_its_first_response() {
        let load = fresh(1_500.0);
        assert!(near(load.latency(), 1_125.0), "{} us", load.latency());
        load.on_head(ms(5), at(0));
        assert!(
            near(load.latency(), 1_500.0),
            "one slow call must not raise the latency above the median"
        );
        for _ in 0..20 {
            load.on_head(ms(5), at(0));
        }
        assert!(
            near(load.latency(), 5_000.0),
            "with enough samples, the latency must be their mean"
        );
    }

    #[test]
    fn a_failure_counts_as_slow_however_fast_it_was() {
        let load = warmed(ms(1));
        load.on_failure(ms(0), at(1_000));
        assert!(load.latency() > 20_000.0, "{} us", load.latency());
    }

    #[test]
    fn an_abandoned_call_can_only_raise_the_latency() {
        let load = warmed(ms(10));
        load.on_abandoned(ms(1), at(1_000));
        assert!(near(load.latency(), 10_000.0));
        load.on_abandoned(ms(500), at(1_000));
        assert!(load.latency() > 100_000.0);
    }

    #[test]
    fn the_latency_decays_to_the_median_without_new_samples() {
        let load = warmed(ms(50));
        load.refresh(reference(1_000.0), at(0));
        assert!(near(load.latency(), 50_000.0));
        load.refresh(reference(1_000.0), at(3_000));
        let left = 49_000.0 / std::f32::consts::E;
        assert!(near(load.latency(), 1_000.0 + left));
        load.refresh(reference(1_000.0), at(60_000));
        assert!(near(load.latency(), 1_000.0));
        assert!(
            near(load.estimate().expect("has samples").mean(), 50_000.0),
            "the stored estimate must not change"
        );
    }

    #[test]
    fn the_latency_decays_with_the_time_constant_of_the_last_refresh() {
        let load = warmed(ms(50));
        let slowly = Reference {
            median: 1_000.0,
            time_constant: 20.0,
        };
        load.refresh(slowly, at(20_000));
        let left = 49_000.0 / std::f32::consts::E;
        assert!(near(load.latency(), 1_000.0 + left));
        // A sample after 20 s has the weight 1 - 1/e.
        load.on_head(ms(1), at(20_000));
        assert!(near(load.latency(), 1_000.0 + left));
    }

    #[test]
    fn acquire_fails_at_the_limit_and_succeeds_after_a_release() {
        let load = fresh(0.0);
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
    fn the_calls_of_other_clients_are_those_that_the_server_reports_beyond_the_own() {
        let load = fresh(0.0);
        load.set_limit(10);
        assert!(load.acquire() && load.acquire());
        assert_eq!(load.server_in_flight(), 2);
        load.on_server_load(30, at(0));
        assert_eq!(load.server_in_flight(), 30);
        assert!(load.acquire());
        assert_eq!(load.server_in_flight(), 31, "the next call counts at once");
        load.refresh_others(4, at(0));
        assert_eq!(load.server_in_flight(), 31);
        load.refresh_others(4, at(60_000));
        assert_eq!(load.server_in_flight(), 7, "the report is forgotten");
    }

    #[test]
    fn a_server_without_a_report_counts_as_the_median() {
        let load = fresh(0.0);
        load.refresh_others(12, at(0));
        assert_eq!(load.server_in_flight(), 12);
        assert_eq!(load.in_flight(), 0);
    }

    #[test]
    fn a_load_is_one_cache_line() {
        assert_eq!(size_of::<Load>(), 64);
    }
}
