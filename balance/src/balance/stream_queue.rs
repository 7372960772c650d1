//! The wait queue: calls that wait for a free stream, in order of arrival.
//!
//! A stream that becomes free is handed directly to a waiter that can use it, so that no other call can take it first. A notification alone
//! is not enough: the call that is woken may be excluded from using that stream, or may not find the stream among thousands of connections.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use super::permit::Permit;
use super::ready_connection::{Queue, ReadyConnection};
use super::select::Select;
use crate::address::Address;

/// The wait queue of a channel.
#[derive(Debug)]
pub(crate) struct Waiters {
    waiting: AtomicUsize,
    limit: usize,
    /// The number of calls that have ever joined the queue.
    joined: AtomicU64,
    queue: Mutex<VecDeque<Arc<Waiter>>>,
}

/// Connections and endpoints that a call must not use.
#[derive(Clone, Debug, Default)]
pub(crate) struct Exclusions {
    pub(crate) connections: Vec<Arc<ReadyConnection>>,
    /// Connections that did not answer a check, with the number of bytes that were read from each before the check. A connection is usable
    /// again after more bytes were read from it.
    pub(crate) silent: Vec<(Arc<ReadyConnection>, u64)>,
    pub(crate) endpoints: Vec<Address>,
    /// The call can use only the endpoints that this selection matches.
    pub(crate) select: Option<Select>,
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
            && self.select.as_ref().is_none_or(|select| {
                let endpoint = connection.endpoint();
                let attributes = endpoint.attributes();
                select.criterion().matches(endpoint.address(), &attributes)
            })
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
    Given(Permit),
    /// The call does not wait any more.
    Done,
}

impl Waiter {
    fn lock(&self) -> MutexGuard<'_, Handover> {
        // No code panics while it holds this lock.
        self.handover.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiters {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            waiting: AtomicUsize::new(0),
            limit,
            joined: AtomicU64::new(0),
            queue: Mutex::new(VecDeque::new()),
        }
    }

    /// Adds a call to the queue. Returns `None` if the queue is full.
    pub(crate) fn join(self: &Arc<Self>, exclusions: Exclusions) -> Option<Waiting> {
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
        let mut queue = self.lock();
        if queue.len() > 2 * waiting + MAX_STALE {
            queue.retain(|waiter| matches!(*waiter.lock(), Handover::Waiting { .. }));
        }
        queue.push_back(Arc::clone(&waiter));
        drop(queue);
        self.joined.fetch_add(1, Ordering::SeqCst);
        Some(Waiting {
            waiters: Arc::clone(self),
            waiter,
        })
    }

    /// Returns the number of waiting calls. A call counts until its [`Waiting`] is dropped, even if a permit was already given to the call.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }

    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    /// Gives a stream that is already reserved to the first waiter that can use it. Returns false if there is no such waiter.
    fn hand_over(&self, connection: &Arc<ReadyConnection>) -> bool {
        let mut queue = self.lock();
        let mut index = 0;
        while let Some(waiter) = queue.get(index).map(Arc::clone) {
            let mut handover = waiter.lock();
            match &mut *handover {
                Handover::Waiting { waker, exclusions } if exclusions.allow(connection) => {
                    let waker = waker.take();
                    let given = Handover::Given(Permit::reserved(connection));
                    let before = std::mem::replace(&mut *handover, given);
                    drop(handover);
                    queue.remove(index);
                    drop(queue);
                    // Dropped outside the locks, because `before` may hold the last reference to a connection.
                    drop(before);
                    if let Some(waker) = waker {
                        waker.wake();
                    }
                    return true;
                }
                Handover::Waiting { .. } => index += 1,
                Handover::Given(_) | Handover::Done => {
                    drop(handover);
                    queue.remove(index);
                }
            }
        }
        false
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Arc<Waiter>>> {
        // No code panics while it holds this lock.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue for Waiters {
    fn release(&self, connection: &Arc<ReadyConnection>) {
        let joined = self.joined.load(Ordering::SeqCst);
        if self.waiting() > 0 && connection.takes_calls() && self.hand_over(connection) {
            return;
        }
        connection.load().release();
        // A call that joined the queue after `joined` was read may have searched the set before this stream was released. The stream is
        // offered to that call.
        if self.waiting() > 0 && self.joined.load(Ordering::SeqCst) != joined {
            self.offer(connection);
        }
    }

    fn offer(&self, connection: &Arc<ReadyConnection>) {
        loop {
            let joined = self.joined.load(Ordering::SeqCst);
            if self.waiting() == 0 || !connection.takes_calls() || !connection.load().acquire() {
                return;
            }
            if self.hand_over(connection) {
                continue;
            }
            connection.load().release();
            // A call that joined the queue in the meantime may have searched the set while this stream was reserved. The stream is then
            // offered once more.
            if self.joined.load(Ordering::SeqCst) == joined {
                return;
            }
        }
    }
}

/// A call in the wait queue. Dropping this value ends the wait. If the call was given a permit that it has not taken, the stream of the
/// permit is handed to the next waiter.
#[derive(Debug)]
pub(crate) struct Waiting {
    waiters: Arc<Waiters>,
    waiter: Arc<Waiter>,
}

impl Waiting {
    /// Waits for a permit.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future keeps the call in the queue.
    pub(crate) async fn permit(&self) -> Permit {
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
                Handover::Given(permit) => Poll::Ready(permit),
                _ => Poll::Pending,
            }
        })
        .await
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.waiters.waiting.fetch_sub(1, Ordering::SeqCst);
        // A permit in `handover` is dropped only after the lock is released, because its drop hands the stream to the next waiter.
        let handover = std::mem::replace(&mut *self.waiter.lock(), Handover::Done);
        drop(handover);
    }
}

/// Entries of calls that no longer wait are removed when the queue has more entries than twice the number of waiting calls plus this
/// number.
const MAX_STALE: usize = 64;
