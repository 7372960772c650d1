//! One call under the limit.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::gradient::{Bounds, End, Gradient};
use super::window::Accepted;

/// The state that all clones of a layer share.
pub(super) struct Shared {
    pub(super) limit: AtomicUsize,
    pub(super) in_flight: AtomicUsize,
    pub(super) refused: AtomicUsize,
    accepted: AtomicUsize,
    gradient: Mutex<Gradient>,
}

impl Shared {
    pub(super) fn new(bounds: Bounds) -> Self {
        let gradient = Gradient::new(bounds, Instant::now());
        Self {
            limit: AtomicUsize::new(gradient.limit()),
            in_flight: AtomicUsize::new(0),
            refused: AtomicUsize::new(0),
            accepted: AtomicUsize::new(0),
            gradient: Mutex::new(gradient),
        }
    }

    #[cfg(test)]
    pub(super) fn baseline(&self) -> Option<Duration> {
        lock(&self.gradient).baseline()
    }

    /// Counts one more call in flight, unless the limit is reached. Then returns the time after which the call may be sent again.
    fn accept(&self) -> Result<Accepted, Duration> {
        let in_flight = self.in_flight.fetch_add(1, Ordering::Relaxed) + 1;
        if in_flight <= self.limit.load(Ordering::Relaxed) {
            return Ok(self.number(in_flight));
        }
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        self.refused.fetch_add(1, Ordering::Relaxed);
        // A refusal should be cheap, so it does not wait for the lock.
        let baseline = self.gradient.try_lock().ok().and_then(|mut gradient| {
            gradient.on_refusal(Instant::now(), self.accepted.load(Ordering::Relaxed));
            self.limit.store(gradient.limit(), Ordering::Relaxed);
            gradient.baseline()
        });
        let pushback = baseline.unwrap_or_default() * PUSHBACK;
        Err(pushback.clamp(MIN_PUSHBACK, MAX_PUSHBACK))
    }

    /// Counts one more call in flight, even if the limit is reached. The latency of the call begins with the time for which the call was
    /// in flight before.
    fn readmit(&self, spent: Duration) -> Accepted {
        let in_flight = self.in_flight.fetch_add(1, Ordering::Relaxed) + 1;
        let accepted = self.number(in_flight);
        Accepted {
            at: accepted.at.checked_sub(spent).unwrap_or(accepted.at),
            ..accepted
        }
    }

    fn number(&self, in_flight: usize) -> Accepted {
        Accepted {
            number: self.accepted.fetch_add(1, Ordering::Relaxed),
            at: Instant::now(),
            in_flight,
        }
    }

    /// Counts one call in flight less, and adjusts the limit. Returns the time for which the call was in flight.
    fn release(&self, call: &Accepted, end: End) -> Duration {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        // A lock is cheap enough: with the counters and the window, 45 ns for each call. Each of the two readings of the clock costs more.
        // With two threads that do nothing else, a call takes 0.3 µs. At the end of a window, the lock is held for some microseconds.
        let mut gradient = lock(&self.gradient);
        // The clock is read under the lock, so that the controller sees no time before that of the previous call.
        let accepted = self.accepted.load(Ordering::Relaxed);
        let now = Instant::now();
        gradient.on_end(call, end, now, accepted);
        self.limit.store(gradient.limit(), Ordering::Relaxed);
        now.saturating_duration_since(call.at)
    }
}

/// A call that was accepted. Its future and the body of its request share it.
///
/// The call is in flight while its handler works, and not while its handler waits for the client.
pub(super) struct Call {
    shared: Arc<Shared>,
    state: Mutex<State>,
}

struct State {
    /// The call in flight. `None` while the handler waits for the client, and after the end.
    in_flight: Option<Accepted>,
    has_ended: bool,
    /// The time for which the call was in flight before the last wait for the client. `None` if the latency of the call has no meaning.
    spent: Option<Duration>,
}

impl Call {
    pub(super) fn accept(shared: &Arc<Shared>) -> Result<Arc<Self>, Duration> {
        let accepted = shared.accept()?;
        Ok(Arc::new(Self {
            shared: Arc::clone(shared),
            state: Mutex::new(State {
                in_flight: Some(accepted),
                has_ended: false,
                spent: Some(Duration::ZERO),
            }),
        }))
    }

    /// Records that the handler waits for the client.
    pub(super) fn pause(&self) {
        let mut state = lock(&self.state);
        if let Some(call) = state.in_flight.take() {
            let spent = self.shared.release(&call, End::Unsampled);
            state.spent = state.spent.map(|_| spent);
        }
    }

    /// Records that a frame has arrived for which the handler waited, or the end of the request.
    pub(super) fn resume(&self) {
        lock(&self.state).resume(&self.shared);
    }

    /// Records that the handler does not wait for the client any more, although no frame has arrived.
    pub(super) fn abandon(&self) {
        let mut state = lock(&self.state);
        // Either the call is dropped, which is the end of the wait and not of the work, or its handler does less than that of other calls.
        state.spent = None;
        state.resume(&self.shared);
    }

    /// Records the end of the call. Later ends have no effect.
    pub(super) fn end(&self, end: End) {
        let mut state = lock(&self.state);
        state.has_ended = true;
        if let Some(call) = state.in_flight.take() {
            let end = state.spent.map_or(End::Unsampled, |_| end);
            self.shared.release(&call, end);
        }
    }
}

impl State {
    fn resume(&mut self, shared: &Shared) {
        if !self.has_ended && self.in_flight.is_none() {
            self.in_flight = Some(shared.readmit(self.spent.unwrap_or_default()));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic of another thread leaves numbers behind that the controller corrects by itself.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A refused call may be sent again after this many latencies without a queue.
const PUSHBACK: u32 = 2;
const MIN_PUSHBACK: Duration = Duration::from_millis(10);
const MAX_PUSHBACK: Duration = Duration::from_secs(1);
