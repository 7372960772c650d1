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

    /// Counts one more call in flight, even if the limit is reached.
    fn readmit(&self) -> Accepted {
        let in_flight = self.in_flight.fetch_add(1, Ordering::Relaxed) + 1;
        self.number(in_flight)
    }

    fn number(&self, in_flight: usize) -> Accepted {
        Accepted {
            number: self.accepted.fetch_add(1, Ordering::Relaxed),
            at: Instant::now(),
            in_flight,
        }
    }

    /// Counts one call in flight less, and adjusts the limit.
    fn release(&self, call: &Accepted, end: End) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        // A lock is cheap enough: with the counters and the window, 45 ns for each call. Each of the two readings of the clock costs more.
        // With two threads that do nothing else, a call takes 0.3 µs. At the end of a window, the lock is held for some microseconds.
        let mut gradient = lock(&self.gradient);
        // The clock is read under the lock, so that the controller sees no time before that of the previous call.
        let accepted = self.accepted.load(Ordering::Relaxed);
        gradient.on_end(call, end, Instant::now(), accepted);
        self.limit.store(gradient.limit(), Ordering::Relaxed);
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
    waits: u32,
}

impl Call {
    pub(super) fn accept(shared: &Arc<Shared>) -> Result<Arc<Self>, Duration> {
        let accepted = shared.accept()?;
        Ok(Arc::new(Self {
            shared: Arc::clone(shared),
            state: Mutex::new(State {
                in_flight: Some(accepted),
                has_ended: false,
                waits: 0,
            }),
        }))
    }

    /// Records that the handler waits for the client.
    pub(super) fn pause(&self) {
        let mut state = lock(&self.state);
        if let Some(call) = state.in_flight.take() {
            state.waits = state.waits.saturating_add(1);
            self.shared.release(&call, End::Unsampled);
        }
    }

    /// Records that the handler does not wait for the client any more.
    pub(super) fn resume(&self) {
        let mut state = lock(&self.state);
        if !state.has_ended && state.in_flight.is_none() {
            state.in_flight = Some(self.shared.readmit());
        }
    }

    /// Records the end of the call. Later ends have no effect.
    pub(super) fn end(&self, end: End) {
        let mut state = lock(&self.state);
        state.has_ended = true;
        if let Some(call) = state.in_flight.take() {
            let end = if state.waits > UNARY_WAITS {
                End::Unsampled
            } else {
                end
            };
            self.shared.release(&call, end);
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
/// The handler of a unary call may wait for the message and for the end of the request.
const UNARY_WAITS: u32 = 2;
