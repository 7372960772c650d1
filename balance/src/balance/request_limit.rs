//! The limit on the requests of a channel (gRFC A32), and the queue of the calls that wait for a place below it.
//!
//! Each attempt that is sent, or that waits for a stream of an endpoint, holds one place. A place that becomes free is passed to the first
//! call in the queue, so that no other call can take it first.

use std::collections::VecDeque;
use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use tokio::sync::oneshot;

/// The places of a channel.
pub(crate) struct RequestLimit {
    max: usize,
    taken: AtomicUsize,
    /// The length of the queue, so that the end of a request takes the lock only while calls wait.
    queued: AtomicUsize,
    /// The number of calls that wait, so that a call is refused without the lock, which the end of each request needs.
    waiting: AtomicUsize,
    /// Also contains calls that no longer wait.
    queue: Mutex<VecDeque<oneshot::Sender<Place>>>,
}

/// The place of one request. Dropping it makes it free.
pub(crate) struct Place(Option<Arc<RequestLimit>>);

/// A call that waits for a place. Dropping it ends the wait.
pub(crate) struct PlaceWait {
    given: oneshot::Receiver<Place>,
    limit: Arc<RequestLimit>,
}

impl RequestLimit {
    pub(super) fn new(max: usize) -> Self {
        Self {
            max,
            taken: AtomicUsize::new(0),
            queued: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            queue: Mutex::default(),
        }
    }

    pub(crate) fn max(&self) -> usize {
        self.max
    }

    /// Takes a place for a request. Returns false if none is free.
    fn take(&self) -> bool {
        // SeqCst, as in `Load::acquire`: a call joins the queue and then looks for a free place, and the end of a request makes its place
        // free and then looks for calls in the queue. At least one of the two must see what the other has written.
        let one_more = |taken| (taken < self.max).then_some(taken + 1);
        let taken = self
            .taken
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_more);
        taken.is_ok()
    }

    /// Makes a place free, or passes it to the first call in the queue.
    pub(super) fn release(self: &Arc<Self>) {
        if self.is_awaited() && self.pass_on() {
            return;
        }
        self.taken.fetch_sub(1, Ordering::SeqCst);
        self.serve();
    }

    /// Returns a free place, if there is one.
    pub(crate) fn place(self: &Arc<Self>) -> Option<Place> {
        self.take().then(|| Place(Some(Arc::clone(self))))
    }

    /// Adds a call to the queue. Returns `None` if `max_waiting` calls wait already.
    pub(crate) fn join(self: &Arc<Self>, max_waiting: usize) -> Option<PlaceWait> {
        // Relaxed, here and below: no other data depends on the number.
        let one_more = |waiting| (waiting < max_waiting).then_some(waiting + 1);
        let waiting = self
            .waiting
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more)
            .ok()?;
        let (give, given) = oneshot::channel();
        let wait = PlaceWait {
            given,
            limit: Arc::clone(self),
        };
        let mut queue = self.lock();
        if queue.len() > 2 * waiting + MAX_STALE {
            queue.retain(|call| !call.is_closed());
        }
        queue.push_back(give);
        self.queued.store(queue.len(), Ordering::SeqCst);
        drop(queue);
        // A place may have become free before the call was in the queue.
        self.serve();
        Some(wait)
    }

    /// Returns the number of calls that wait for a place. A call counts until its [`PlaceWait`] is dropped, even if it was given a place.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    fn is_awaited(&self) -> bool {
        self.queued.load(Ordering::SeqCst) > 0
    }

    /// Passes free places to the calls in the queue.
    fn serve(self: &Arc<Self>) {
        while self.is_awaited() && self.take() {
            if !self.pass_on() {
                // A call that has joined the queue in the meantime may have found no free place. The loop looks for it.
                self.taken.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }

    /// Passes a place that is taken to the first call in the queue. Returns false if no call waits.
    fn pass_on(self: &Arc<Self>) -> bool {
        let mut place = Place(Some(Arc::clone(self)));
        // The place is sent outside the lock, because a call that has ended drops it, and the drop may take the lock.
        while let Some(call) = self.pop() {
            match call.send(place) {
                Ok(()) => return true,
                Err(returned) => place = returned,
            }
        }
        place.keep();
        false
    }

    fn pop(&self) -> Option<oneshot::Sender<Place>> {
        let mut queue = self.lock();
        let first = queue.pop_front();
        self.queued.store(queue.len(), Ordering::SeqCst);
        first
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<oneshot::Sender<Place>>> {
        // No code panics while it holds this lock.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(crate) fn taken(&self) -> usize {
        self.taken.load(Ordering::SeqCst)
    }
}

impl Place {
    /// Returns the place of a request on a channel without a limit.
    pub(crate) fn unlimited() -> Self {
        Self(None)
    }

    /// Keeps the place taken. The permit of the request makes it free.
    pub(crate) fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(limit) = self.0.take() {
            limit.release();
        }
    }
}

impl Future for PlaceWait {
    /// `None` is never returned: the queue keeps each call that waits.
    type Output = Option<Place>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Place>> {
        Pin::new(&mut self.given).poll(cx).map(Result::ok)
    }
}

impl Drop for PlaceWait {
    fn drop(&mut self) {
        self.limit.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Place").field(&self.0.is_some()).finish()
    }
}

impl fmt::Debug for RequestLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestLimit")
            .field("max", &self.max)
            .field("taken", &self.taken)
            .field("queued", &self.queued)
            .finish_non_exhaustive()
    }
}

/// Calls that no longer wait are removed when the queue is longer than twice the number of waiting calls plus this number.
const MAX_STALE: usize = 64;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    fn limit(max: usize) -> Arc<RequestLimit> {
        Arc::new(RequestLimit::new(max))
    }

    #[tokio::test]
    async fn places_are_passed_on_in_the_order_of_arrival() {
        let limit = limit(1);
        let first = limit.place().expect("a free place");
        assert!(limit.place().is_none());
        let mut second = limit.join(10).expect("the queue is not full");
        let mut third = limit.join(10).expect("the queue is not full");
        assert_eq!(limit.waiting(), 2);
        drop(first);
        let place = second.given.try_recv().expect("the first in the queue");
        assert!(third.given.try_recv().is_err());
        assert!(limit.place().is_none(), "a place was given away twice");
        drop(place);
        drop(third.given.try_recv().expect("the next in the queue"));
        assert_eq!(limit.taken(), 0);
    }

    #[tokio::test]
    async fn the_place_of_a_call_that_has_ended_is_passed_on() {
        let limit = limit(1);
        let held = limit.place().expect("a free place");
        let ended = limit.join(10).expect("the queue is not full");
        let given = limit.join(10).expect("the queue is not full");
        let mut last = limit.join(10).expect("the queue is not full");
        drop(ended);
        drop(held);
        // The second call has received its place, and ends before it uses it.
        drop(given);
        assert!(last.given.try_recv().is_ok());
        assert_eq!(limit.taken(), 0);
        drop(last);
        assert_eq!(limit.waiting(), 0);
    }

    #[test]
    fn the_queue_is_bounded_and_calls_that_have_ended_do_not_count() {
        let limit = limit(1);
        let _held = limit.place();
        for _ in 0..1_000 {
            drop(limit.join(3).expect("the calls before have ended"));
        }
        let waiting: Vec<_> = (0..3).map(|_| limit.join(3)).collect();
        assert!(waiting.iter().all(Option::is_some));
        assert!(limit.join(3).is_none());
        drop(waiting);
        for _ in 0..10_000 {
            drop(limit.join(usize::MAX));
        }
        assert!(limit.lock().len() <= MAX_STALE + 1);
    }

    /// Each release needs the lock. A caller that is refused all the time must not hold it.
    #[test]
    fn a_full_queue_refuses_a_call_without_the_lock() {
        let limit = limit(1);
        let _held = limit.place();
        let _waiting = limit.join(1).expect("the queue is not full");
        let (send, receive) = std::sync::mpsc::channel();
        let locked = limit.lock();
        let refused = Arc::clone(&limit);
        std::thread::spawn(move || send.send(refused.join(1).is_none()));
        let is_refused = receive.recv_timeout(Duration::from_secs(10));
        drop(locked);
        assert_eq!(is_refused, Ok(true));
    }

    /// The end of a request races with a call that joins the queue. After both, the call has the place.
    #[test]
    fn a_place_that_becomes_free_while_a_call_joins_is_passed_to_the_call() {
        const ROUNDS: usize = 30_000;
        // With other programs on the machine, each exchange between the two threads can take a time slice.
        let end = tokio::time::Instant::now() + Duration::from_secs(3);
        let limit = limit(1);
        let (begun, released, checked) = <(AtomicUsize, AtomicUsize, AtomicUsize)>::default();
        let reached = |round: &AtomicUsize, number| {
            while round.load(Ordering::SeqCst) < number {
                std::thread::yield_now();
            }
        };
        let spin = |spins: usize| (0..spins).for_each(|_| std::hint::spin_loop());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 1..=ROUNDS {
                    let place = limit.place().expect("a free place");
                    begun.store(round, Ordering::SeqCst);
                    spin(fastrand::usize(..40));
                    drop(place);
                    released.store(round, Ordering::SeqCst);
                    reached(&checked, round);
                }
            });
            for round in 1..=ROUNDS {
                while begun.load(Ordering::SeqCst) < round {
                    std::hint::spin_loop();
                }
                if tokio::time::Instant::now() > end {
                    println!("the test ends after {round} of {ROUNDS} rounds");
                    checked.store(usize::MAX, Ordering::SeqCst);
                    break;
                }
                spin(fastrand::usize(..40));
                let mut wait = limit.join(1).expect("the queue is not full");
                reached(&released, round);
                let is_served = wait.given.try_recv().is_ok();
                if !is_served {
                    // Ends the other thread.
                    checked.store(usize::MAX, Ordering::SeqCst);
                }
                assert!(is_served, "the call of round {round} is lost");
                checked.store(round, Ordering::SeqCst);
            }
        });
    }

    /// Many tasks take places, wait for them, give up and are cancelled at random.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn the_limit_is_never_exceeded_and_no_waiting_call_is_lost() {
        let seed = std::env::var("SEED").map_or_else(
            |_| fastrand::u64(..),
            |seed| seed.parse().expect("a number"),
        );
        println!("SEED={seed}");
        let mut seeds = fastrand::Rng::with_seed(seed);
        for max in [1, 2, 7] {
            let limit = limit(max);
            let held = Arc::new(AtomicUsize::new(0));
            let tasks: Vec<_> = (0..16)
                .map(|_| {
                    let rng = seeds.fork();
                    tokio::spawn(contend(Arc::clone(&limit), Arc::clone(&held), rng))
                })
                .collect();
            for task in tasks {
                let ended = timeout(Duration::from_secs(60), task).await;
                ended.expect("a call is lost").expect("no panic");
            }
            assert_eq!(limit.taken(), 0);
            assert_eq!(limit.waiting(), 0);
        }
    }

    async fn contend(limit: Arc<RequestLimit>, held: Arc<AtomicUsize>, mut rng: fastrand::Rng) {
        for _ in 0..2_000 {
            let place = match limit.place() {
                Some(place) => place,
                None if rng.u8(..4) == 0 => continue,
                None => {
                    let wait = limit.join(usize::MAX).expect("no bound");
                    if rng.u8(..4) == 0 {
                        tokio::task::yield_now().await;
                        drop(wait);
                        continue;
                    }
                    wait.await.expect("a place")
                }
            };
            let now = held.fetch_add(1, Ordering::SeqCst) + 1;
            assert!(now <= limit.max(), "{now} of {}", limit.max());
            for _ in 0..rng.u8(..3) {
                tokio::task::yield_now().await;
            }
            held.fetch_sub(1, Ordering::SeqCst);
            drop(place);
        }
    }
}
