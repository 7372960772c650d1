//! Values that wait for the SDK, in a place of their own for each thread.
//!
//! The SDK protects each histogram with a mutex. If several threads make calls, the mutex and the buckets move between the caches of the
//! cores with each value. A thread therefore keeps its values, and passes many of them at once.

use std::cell::Cell;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tonic_balance::metrics::{Counter, Histogram};

/// All handles whose values wait. They are passed on before each collection of the SDK.
#[derive(Default)]
pub(crate) struct Batches {
    /// Whether the SDK has called [`flush`](Self::flush). Until then, nothing waits: a view of the SDK may have removed the callback.
    is_flushed: AtomicBool,
    handles: Mutex<Vec<Weak<dyn Flush>>>,
}

trait Flush: Send + Sync {
    /// Passes all waiting values on.
    fn flush(&self);
}

impl Batches {
    /// Passes all waiting values on. The SDK calls this function before it collects the values.
    pub(crate) fn flush(&self) {
        let handles: Vec<_> = {
            let mut handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
            handles.retain(|handle| handle.strong_count() > 0);
            handles.iter().filter_map(Weak::upgrade).collect()
        };
        for handle in handles {
            handle.flush();
        }
        self.is_flushed.store(true, Ordering::Relaxed);
    }

    /// Returns a counter whose values wait.
    pub(crate) fn counter(self: &Arc<Self>, sdk: impl Counter + 'static) -> Box<dyn Counter> {
        let counter = Arc::new(BatchedCounter {
            sdk,
            batches: Arc::clone(self),
            waiting: PerThread::new(),
        });
        self.add(Arc::downgrade(&counter) as Weak<dyn Flush>);
        Box::new(Shared(counter))
    }

    /// Returns a histogram whose values wait.
    pub(crate) fn histogram(self: &Arc<Self>, sdk: impl Histogram + 'static) -> Box<dyn Histogram> {
        let histogram = Arc::new(BatchedHistogram {
            sdk,
            batches: Arc::clone(self),
            waiting: PerThread::new(),
        });
        self.add(Arc::downgrade(&histogram) as Weak<dyn Flush>);
        Box::new(Shared(histogram))
    }

    fn add(&self, handle: Weak<dyn Flush>) {
        let mut handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
        // Handles of dropped channels do not accumulate if nothing is ever collected.
        if handles.len() == handles.capacity() {
            handles.retain(|handle| handle.strong_count() > 0);
        }
        handles.push(handle);
    }
}

/// A handle that [`Batches`] also refers to.
struct Shared<T>(Arc<T>);

impl<C: Counter> Counter for Shared<BatchedCounter<C>> {
    fn add(&self, count: u64) {
        self.0.add(count);
    }
}

impl<H: Histogram> Histogram for Shared<BatchedHistogram<H>> {
    fn record(&self, value: f64) {
        self.0.record(value);
    }
}

struct BatchedCounter<C: Counter> {
    sdk: C,
    batches: Arc<Batches>,
    waiting: PerThread<AtomicU64>,
}

impl<C: Counter> BatchedCounter<C> {
    fn add(&self, count: u64) {
        if self.batches.is_flushed.load(Ordering::Relaxed) {
            self.waiting.mine().fetch_add(count, Ordering::Relaxed);
        } else {
            self.sdk.add(count);
        }
    }
}

impl<C: Counter> Flush for BatchedCounter<C> {
    fn flush(&self) {
        let waiting = self.waiting.all();
        let sum = waiting.map(|count| count.swap(0, Ordering::Relaxed)).sum();
        if sum > 0 {
            self.sdk.add(sum);
        }
    }
}

/// The values of a dropped channel are exported, too.
impl<C: Counter> Drop for BatchedCounter<C> {
    fn drop(&mut self) {
        self.flush();
    }
}

struct BatchedHistogram<H: Histogram> {
    sdk: H,
    batches: Arc<Batches>,
    waiting: PerThread<Mutex<Vec<f64>>>,
}

impl<H: Histogram> BatchedHistogram<H> {
    fn record(&self, value: f64) {
        if !self.batches.is_flushed.load(Ordering::Relaxed) {
            self.sdk.record(value);
            return;
        }
        // Only a flush, or another thread that shares the place, waits for this mutex.
        let mut values = self
            .waiting
            .mine()
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if values.capacity() == 0 {
            values.reserve_exact(BATCH);
        }
        values.push(value);
        if values.len() >= BATCH {
            self.pass_on(&mut values);
        }
    }

    fn pass_on(&self, values: &mut Vec<f64>) {
        for value in values.drain(..) {
            self.sdk.record(value);
        }
    }
}

impl<H: Histogram> Flush for BatchedHistogram<H> {
    fn flush(&self) {
        for values in self.waiting.all() {
            self.pass_on(&mut values.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }
}

/// The values of a dropped channel are exported, too.
impl<H: Histogram> Drop for BatchedHistogram<H> {
    fn drop(&mut self) {
        self.flush();
    }
}

/// One place for each thread, up to the number of cores. Further threads share the places.
struct PerThread<T>(Box<[Padded<T>]>);

/// Two lines of the cache: processors also fetch the line beside the one that is read.
#[derive(Default)]
#[repr(align(128))]
struct Padded<T>(T);

impl<T: Default> PerThread<T> {
    fn new() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let places = cores.clamp(1, MAX_PLACES);
        Self((0..places).map(|_| Padded::default()).collect())
    }
}

impl<T> PerThread<T> {
    /// Returns the place of the current thread.
    fn mine(&self) -> &T {
        thread_local! {
            static THREAD: Cell<usize> = const { Cell::new(usize::MAX) };
        }
        static THREADS: AtomicUsize = AtomicUsize::new(0);
        let thread = THREAD.with(|thread| {
            if thread.get() == usize::MAX {
                thread.set(THREADS.fetch_add(1, Ordering::Relaxed));
            }
            thread.get()
        });
        &self.0[thread % self.0.len()].0
    }

    fn all(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|place| &place.0)
    }
}

impl fmt::Debug for Batches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batches").finish_non_exhaustive()
    }
}

/// Values of one thread that are passed on at once. With 64, the cost of the moved cache lines is divided by 64, and a handle needs 512
/// bytes for each thread that records.
const BATCH: usize = 64;
/// Bounds the memory of a handle. More threads than this share places.
const MAX_PLACES: usize = 16;
