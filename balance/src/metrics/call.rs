//! The measurement of one call, with its retries and hedges.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;
use tonic::Code;

use super::attempt::{AttemptRecord, OpenAttempt, SentSize};
use super::method::MethodMetrics;

/// A call that has not ended, with its first attempt. On the common path, the call and its only attempt end at the same time with the same
/// status, so they share the handles of the method and one allocation.
#[derive(Debug)]
pub(crate) struct CallRecord {
    method: Arc<MethodMetrics>,
    started: Instant,
    /// The first attempt. `None` before it is sent, and after the call has left the common path.
    first: Option<OpenAttempt>,
    /// Set if the call has left the common path, so that it may be sent more than once.
    sends: Option<Arc<Sends>>,
    has_ended: bool,
}

impl CallRecord {
    pub(crate) fn start(method: Arc<MethodMetrics>, now: Instant) -> Self {
        Self {
            method,
            started: now,
            first: None,
            sends: None,
            has_ended: false,
        }
    }

    pub(crate) fn method(&self) -> &Arc<MethodMetrics> {
        &self.method
    }

    /// Records the first attempt, which was sent at the start of the call.
    pub(crate) fn on_sent(&mut self, sent: SentSize) {
        self.first = Some(OpenAttempt::start(&self.method, sent));
    }

    /// Adds a data frame of the response to the first attempt.
    pub(crate) fn on_data(&mut self, frame: &[u8]) {
        if let Some(first) = &mut self.first {
            first.on_data(frame);
        }
    }

    /// Starts to count the sends of a call that leaves the common path. Also returns its first attempt, if it was sent.
    pub(crate) fn count_sends(&mut self, is_hedged: bool) -> (Arc<Sends>, Option<AttemptRecord>) {
        let first = self.first.take();
        let sends = Arc::new(Sends::new(is_hedged, first.is_some(), self.started));
        self.sends = Some(Arc::clone(&sends));
        let adopt = |first| AttemptRecord::adopt(Arc::clone(&self.method), first, self.started);
        (sends, first.map(adopt))
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// Records the end of the call, and of its first attempt unless the call has left the common path. Later ends have no effect. `zone` is
    /// that of the endpoint of the first attempt, or empty.
    pub(crate) fn end(&mut self, code: Code, zone: &str, now: Instant) {
        if std::mem::replace(&mut self.has_ended, true) {
            return;
        }
        let seconds = now.saturating_duration_since(self.started).as_secs_f64();
        if let Some(first) = &self.first {
            first.end(&self.method, code, zone, seconds);
        }
        if let Some(duration) = self.method.call_duration(code) {
            duration.record(seconds);
        }
        if let Some(sends) = &self.sends {
            sends.record(&self.method);
        }
    }
}

/// Counts the sends of a call that may be sent more than once. The task of the call counts, and its [`CallRecord`] reads the counts at the
/// end.
#[derive(Debug)]
pub(crate) struct Sends {
    is_hedged: bool,
    epoch: Instant,
    /// The largest number of earlier attempts of any send, plus one; 0 before the first send.
    attempts: AtomicU32,
    transparent: AtomicU32,
    /// Nanoseconds from `epoch` to the time at which the last active attempt ended, plus one; 0 while an attempt is active.
    idle_since: AtomicU64,
    delay: AtomicU64,
}

impl Sends {
    fn new(is_hedged: bool, sent: bool, epoch: Instant) -> Self {
        Self {
            is_hedged,
            epoch,
            attempts: AtomicU32::new(u32::from(sent)),
            transparent: AtomicU32::new(0),
            idle_since: AtomicU64::new(0),
            delay: AtomicU64::new(0),
        }
    }

    /// Records a send. `previous` is the number of earlier attempts, not counting those that the server certainly did not process. So a
    /// transparent retry has the same number as the send that it replaces, or a smaller one.
    pub(crate) fn on_sent(&self, previous: u32, now: Instant) {
        let attempts = self.attempts.load(Ordering::Relaxed);
        if previous < attempts {
            self.transparent.fetch_add(1, Ordering::Relaxed);
        } else {
            self.attempts.store(previous + 1, Ordering::Relaxed);
        }
        let idle_since = self.idle_since.swap(0, Ordering::Relaxed);
        if idle_since > 0 {
            let delay = self.nanos(now).saturating_sub(idle_since);
            self.delay.fetch_add(delay, Ordering::Relaxed);
        }
    }

    /// Records that no attempt is active any more.
    pub(crate) fn on_idle(&self, now: Instant) {
        self.idle_since.store(self.nanos(now), Ordering::Relaxed);
    }

    fn nanos(&self, now: Instant) -> u64 {
        let nanos = now.saturating_duration_since(self.epoch).as_nanos();
        u64::try_from(nanos).unwrap_or(u64::MAX).saturating_add(1)
    }

    fn record(&self, method: &MethodMetrics) {
        let further = self.attempts.load(Ordering::Relaxed).saturating_sub(1);
        let further_kind = if self.is_hedged {
            &method.hedges
        } else {
            &method.retries
        };
        let transparent = self.transparent.load(Ordering::Relaxed);
        let delay = Duration::from_nanos(self.delay.load(Ordering::Relaxed));
        for (histogram, value) in [
            (further_kind, f64::from(further)),
            (&method.transparent_retries, f64::from(transparent)),
            (&method.retry_delay, delay.as_secs_f64()),
        ] {
            if let Some(histogram) = histogram
                && value > 0.0
            {
                histogram.record(value);
            }
        }
    }
}
