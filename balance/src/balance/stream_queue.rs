//! The wait queue: calls that wait for a free stream, in order of arrival.
//!
//! A stream that becomes free is handed directly to a waiter that can use it, so that no other call can take it first. A notification alone
//! is not enough: the call that is woken may be excluded from using that stream, or may not find the stream among thousands of connections.
//!
//! If the requests of an endpoint are limited, the call that gets the stream also takes over the ended request's place below that limit. If the
//! requests of the channel are limited, only calls with a place below that limit (`request_limit.rs`) get a stream.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use super::permit::Reserved;
use super::ready_connection::{Queue, ReadyConnection};
use super::request_limit::RequestLimit;
use super::select::Criterion;
use crate::address::Address;

/// The wait queue of a channel.
#[derive(Debug)]
pub(crate) struct Waiters {
    waiting: AtomicUsize,
    limit: usize,
    /// The limit on the requests of the channel, if there is one.
    requests: Option<Arc<RequestLimit>>,
    /// The number of calls that have ever joined the queue, or have begun to wait for other endpoints.
    joined: AtomicU64,
    queue: Mutex<Lanes>,
}

/// The endpoints for a stream of which a call waits: those that match one of these criteria, or all endpoints if it is `None`.
pub(crate) type Awaited = Option<Arc<[Criterion]>>;

/// Connections and endpoints that a call must not use.
#[derive(Clone, Debug, Default)]
pub(crate) struct Exclusions {
    pub(crate) connections: Vec<Arc<ReadyConnection>>,
    /// Connections that did not answer a check, with the number of bytes that were read from each before the check. A connection is usable
    /// again after more bytes were read from it.
    pub(crate) silent: Vec<(Arc<ReadyConnection>, u64)>,
    pub(crate) endpoints: Vec<Address>,
}

impl Exclusions {
    fn allow(&self, connection: &Arc<ReadyConnection>) -> bool {
        let is_same = |excluded: &Arc<ReadyConnection>| Arc::ptr_eq(excluded, connection);
        let silent = |(excluded, bytes): &(Arc<ReadyConnection>, u64)| {
            Arc::ptr_eq(excluded, connection) && excluded.bytes_read() == *bytes
        };
        !self.connections.iter().any(is_same)
            && !self.silent.iter().any(silent)
            && !self.endpoints.contains(connection.endpoint().address())
    }
}

/// The waiting calls, in one lane for each set of endpoints that calls wait for. A stream is compared with each lane and not with each call:
/// while thousands of calls wait for one part of a traffic split, each stream of another part passes over all of them.
#[derive(Debug, Default)]
struct Lanes {
    all: Vec<Lane>,
    /// The number of calls in all lanes, including calls that no longer wait.
    len: usize,
    /// The number of the next call. Numbers give the order of arrival across the lanes.
    next: u64,
}

/// The calls that wait for the same endpoints, in order of arrival.
#[derive(Debug)]
struct Lane {
    awaited: Awaited,
    waiters: VecDeque<(u64, Arc<Waiter>)>,
}

impl Lane {
    fn matches(&self, connection: &ReadyConnection) -> bool {
        let endpoint = connection.endpoint();
        let Some(criteria) = &self.awaited else {
            return connection.takes_all_calls();
        };
        let attributes = endpoint.attributes();
        let mut criteria = criteria.iter();
        criteria.any(|criterion| criterion.matches(endpoint.address(), &attributes))
    }
}

impl Lanes {
    fn push(&mut self, awaited: &Awaited, waiter: Arc<Waiter>) -> u64 {
        let number = self.next;
        self.next += 1;
        self.insert(awaited, number, waiter);
        number
    }

    /// Adds a call to the lane of these endpoints, at the place of its number.
    fn insert(&mut self, awaited: &Awaited, number: u64, waiter: Arc<Waiter>) {
        let mut lanes = self.all.iter();
        let index = lanes.position(|lane| lane.awaited == *awaited);
        let index = index.unwrap_or_else(|| {
            self.all.push(Lane {
                awaited: awaited.clone(),
                waiters: VecDeque::new(),
            });
            self.all.len() - 1
        });
        if let Some(lane) = self.all.get_mut(index) {
            let at = lane.waiters.partition_point(|(other, _)| *other < number);
            lane.waiters.insert(at, (number, waiter));
            self.len += 1;
        }
    }

    /// Removes a call from the lane of these endpoints.
    fn take(&mut self, awaited: &Awaited, number: u64) -> Option<Arc<Waiter>> {
        let mut lanes = self.all.iter();
        let index = lanes.position(|lane| lane.awaited == *awaited)?;
        let waiters = &self.all.get(index)?.waiters;
        let at = waiters.binary_search_by_key(&number, |(number, _)| *number);
        self.remove(index, at.ok()?)
    }

    fn remove(&mut self, lane: usize, index: usize) -> Option<Arc<Waiter>> {
        let waiters = &mut self.all.get_mut(lane)?.waiters;
        let (_, waiter) = waiters.remove(index)?;
        self.len -= 1;
        if waiters.is_empty() {
            self.all.swap_remove(lane);
        }
        Some(waiter)
    }

    /// Removes the calls that no longer wait, and empty lanes.
    fn retain_waiting(&mut self) {
        for lane in &mut self.all {
            lane.waiters.retain(|(_, waiter)| waiter.waits());
        }
        self.all.retain(|lane| !lane.waiters.is_empty());
        self.len = self.all.iter().map(|lane| lane.waiters.len()).sum();
    }

    /// Returns the place of the first call that can use a stream of this connection: the index of its lane, and its index in the lane.
    fn first(&mut self, connection: &Arc<ReadyConnection>) -> Option<(usize, usize)> {
        let mut first: Option<(u64, usize, usize)> = None;
        for (index, lane) in self.all.iter_mut().enumerate() {
            if !lane.matches(connection) {
                continue;
            }
            // Calls often end their wait in the order of arrival, at their deadlines.
            while lane.waiters.front().is_some_and(|(_, call)| !call.waits()) {
                lane.waiters.pop_front();
                self.len -= 1;
            }
            let mut calls = lane.waiters.iter().enumerate();
            let call = calls.find(|(_, (_, call))| call.allows(connection));
            if let Some((at, (number, _))) = call
                && first.is_none_or(|(earliest, ..)| *number < earliest)
            {
                first = Some((*number, index, at));
            }
        }
        first.map(|(_, lane, index)| (lane, index))
    }
}

#[derive(Debug)]
struct Waiter {
    handover: Mutex<Handover>,
}

#[derive(Debug)]
enum Handover {
    /// The call waits. Its exclusions are dropped when the wait ends, because they keep connections open.
    Waiting {
        waker: Option<Waker>,
        exclusions: Exclusions,
    },
    Given(Reserved),
    /// The call does not wait any more.
    Done,
}

impl Waiter {
    fn lock(&self) -> MutexGuard<'_, Handover> {
        // No code panics while it holds this lock.
        self.handover.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn waits(&self) -> bool {
        matches!(*self.lock(), Handover::Waiting { .. })
    }

    /// Returns whether the call waits and does not exclude this connection.
    fn allows(&self, connection: &Arc<ReadyConnection>) -> bool {
        match &*self.lock() {
            Handover::Waiting { exclusions, .. } => exclusions.allow(connection),
            Handover::Given(_) | Handover::Done => false,
        }
    }
}

impl Waiters {
    pub(super) fn new(limit: usize, requests: Option<Arc<RequestLimit>>) -> Self {
        Self {
            waiting: AtomicUsize::new(0),
            limit,
            requests,
            joined: AtomicU64::new(0),
            queue: Mutex::default(),
        }
    }

    /// Adds a call to the queue, which waits for a stream of these endpoints. Returns `None` if the queue is full. A call without a place
    /// below the limit of the channel gets no stream. It only counts as waiting.
    pub(crate) fn join(
        self: &Arc<Self>,
        exclusions: Exclusions,
        awaited: Awaited,
        has_place: bool,
    ) -> Option<Waiting> {
        // SeqCst: see `Load::acquire`. From here on, `release` looks for waiters. If it looks before this call is in the queue, it releases
        // the stream, and then offers the stream if `joined` has changed. If `joined` changes only later, this call finds the free stream,
        // because it searches the ready set after it has joined.
        let waiting = self.waiting.fetch_add(1, Ordering::SeqCst);
        if waiting >= self.limit {
            self.waiting.fetch_sub(1, Ordering::SeqCst);
            return None;
        }
        let waiter = Arc::new(Waiter {
            handover: Mutex::new(Handover::Waiting {
                waker: None,
                exclusions,
            }),
        });
        if !has_place {
            return Some(Waiting {
                waiters: Arc::clone(self),
                waiter,
                number: u64::MAX,
                awaited,
            });
        }
        let mut queue = self.lock();
        if queue.len > 2 * waiting + MAX_STALE || queue.all.len() > queue.len + MAX_STALE {
            queue.retain_waiting();
        }
        let number = queue.push(&awaited, Arc::clone(&waiter));
        drop(queue);
        self.joined.fetch_add(1, Ordering::SeqCst);
        Some(Waiting {
            waiters: Arc::clone(self),
            waiter,
            number,
            awaited,
        })
    }

    /// Returns the number of waiting calls. A call counts until its [`Waiting`] is dropped, even if a stream was already given to the call.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }

    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    /// Returns how many calls wait, including those that wait for a place below the limit of the channel.
    pub(crate) fn all_waiting(&self) -> usize {
        let for_place = self.requests.as_ref().map(|limit| limit.waiting());
        self.waiting() + for_place.unwrap_or_default()
    }

    /// Gives a stream that is already reserved to the first waiter that can use it. Returns false if there is no such waiter.
    fn hand_over(&self, connection: &Arc<ReadyConnection>) -> bool {
        let mut queue = self.lock();
        while let Some((lane, index)) = queue.first(connection) {
            let Some(waiter) = queue.remove(lane, index) else {
                return false;
            };
            let mut handover = waiter.lock();
            // The call may have ended its wait since `first` has looked at it. The next call is then tried.
            if let Handover::Waiting { waker, .. } = &mut *handover {
                let waker = waker.take();
                let given = Handover::Given(Reserved::new(connection));
                let before = std::mem::replace(&mut *handover, given);
                drop(handover);
                drop(queue);
                // Dropped outside the locks, because `before` may hold the last reference to a connection.
                drop(before);
                if let Some(waker) = waker {
                    waker.wake();
                }
                return true;
            }
        }
        false
    }

    /// Offers the free streams of the connections of an endpoint, until no call joins the queue in the meantime.
    fn offer_all(&self, connections: &[Arc<ReadyConnection>]) {
        loop {
            let joined = self.joined.load(Ordering::SeqCst);
            for connection in connections {
                self.offer_one(connection);
            }
            if self.waiting() == 0 || self.joined.load(Ordering::SeqCst) == joined {
                return;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Lanes> {
        // No code panics while it holds this lock.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue for Waiters {
    fn release(&self, connection: &Arc<ReadyConnection>) {
        self.free(connection);
        if let Some(requests) = &self.requests {
            requests.release();
        }
    }

    fn release_stream(&self, connection: &Arc<ReadyConnection>) {
        self.free(connection);
    }

    fn offer(&self, connection: &Arc<ReadyConnection>) {
        match connection.requests() {
            Some(requests) if self.waiting() > 0 => self.offer_all(&requests.connections()),
            Some(_) => {}
            None => self.offer_one(connection),
        }
    }
}

impl Waiters {
    // Inlined, because each call ends here. What follows if calls wait is a function of its own.
    #[inline]
    fn free(&self, connection: &Arc<ReadyConnection>) {
        let joined = self.joined.load(Ordering::SeqCst);
        if self.waiting() > 0 && connection.takes_calls() && self.hand_over(connection) {
            return;
        }
        connection.unreserve();
        if self.waiting() > 0 {
            self.offer_freed(connection, joined);
        }
    }

    /// Offers a stream that a call has just made free. `joined` is the number of calls that had joined the queue before.
    #[inline(never)]
    fn offer_freed(&self, connection: &Arc<ReadyConnection>, joined: u64) {
        if let Some(requests) = connection.requests() {
            // The first waiting call may be able to use another connection of the endpoint, now that its requests are below their limit.
            return self.offer_all(&requests.connections());
        }
        // A call that joined the queue after `joined` was read may have searched the set before this stream was released. The stream is
        // offered to that call.
        if self.joined.load(Ordering::SeqCst) != joined {
            self.offer(connection);
        }
    }

    fn offer_one(&self, connection: &Arc<ReadyConnection>) {
        loop {
            let joined = self.joined.load(Ordering::SeqCst);
            if self.waiting() == 0 || !connection.takes_calls() {
                return;
            }
            if connection.reserve() {
                if self.hand_over(connection) {
                    continue;
                }
                connection.unreserve();
            } else if !connection.is_full() && !connection.is_limited() {
                // Another thread held the last stream or the last place while it tried to get both, or has just released one of them. This
                // thread may have done the same to a stream that became free in the meantime.
                continue;
            } else if connection.requests().is_none() {
                return;
            }
            // A call that joined the queue in the meantime may have searched the set while this stream was reserved. The stream is then
            // offered once more.
            if self.joined.load(Ordering::SeqCst) == joined {
                return;
            }
        }
    }
}

/// A call in the wait queue. Dropping this value ends the wait. If the call was given a stream that it has not taken, the stream is handed to
/// the next waiter.
#[derive(Debug)]
pub(crate) struct Waiting {
    waiters: Arc<Waiters>,
    waiter: Arc<Waiter>,
    /// The place in the order of arrival.
    number: u64,
    awaited: Awaited,
}

impl Waiting {
    /// Sets the endpoints that the call waits for. The call keeps its place in the order of arrival. If it returns true, the endpoints have
    /// changed, and the call must search the ready set once more for streams that became free earlier.
    pub(crate) fn set_awaited(&mut self, awaited: Awaited) -> bool {
        if self.awaited == awaited {
            return false;
        }
        let mut queue = self.waiters.lock();
        if let Some(waiter) = queue.take(&self.awaited, self.number) {
            queue.insert(&awaited, self.number, waiter);
        }
        drop(queue);
        self.awaited = awaited;
        // As in `join`: a stream that was offered before this change is offered once more, or the call finds it in the ready set.
        self.waiters.joined.fetch_add(1, Ordering::SeqCst);
        true
    }

    /// Waits for a stream.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future keeps the call in the queue.
    pub(crate) async fn stream(&self) -> Reserved {
        std::future::poll_fn(|cx| {
            let mut handover = self.waiter.lock();
            if let Handover::Waiting { waker, .. } = &mut *handover {
                if waker
                    .as_ref()
                    .is_none_or(|waker| !waker.will_wake(cx.waker()))
                {
                    *waker = Some(cx.waker().clone());
                }
                return Poll::Pending;
            }
            match std::mem::replace(&mut *handover, Handover::Done) {
                Handover::Given(stream) => Poll::Ready(stream),
                _ => Poll::Pending,
            }
        })
        .await
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.waiters.waiting.fetch_sub(1, Ordering::SeqCst);
        // A stream in `handover` is dropped only after the lock is released, because its drop hands it to the next waiter.
        let handover = std::mem::replace(&mut *self.waiter.lock(), Handover::Done);
        drop(handover);
    }
}

/// Entries of calls that no longer wait are removed when the queue has more entries than twice the number of waiting calls plus this
/// number. Empty lanes are removed when there are more lanes than entries plus this number.
const MAX_STALE: usize = 64;
