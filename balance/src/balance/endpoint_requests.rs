//! The limit on the requests of an endpoint (gRFC A32), which all its connections share.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// The requests of one endpoint that are in flight. `C` is the type of its connections.
#[derive(Debug)]
pub(super) struct EndpointRequests<C> {
    max: u32,
    in_flight: AtomicU32,
    /// The connections of the endpoint. If a request on one of them ends, a waiting call may be able to use another one.
    connections: Mutex<Vec<Weak<C>>>,
}

impl<C> EndpointRequests<C> {
    pub(super) fn new(max: u32) -> Self {
        Self {
            max,
            in_flight: AtomicU32::new(0),
            connections: Mutex::default(),
        }
    }

    /// Counts one more request. Returns false if the limit is reached.
    pub(super) fn acquire(&self) -> bool {
        // SeqCst: see `Load::acquire`.
        let one_more = |before| (before < self.max).then_some(before + 1);
        let taken = self
            .in_flight
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_more);
        taken.is_ok()
    }

    pub(super) fn release(&self) {
        self.in_flight.fetch_sub(1, Ordering::SeqCst);
    }

    pub(super) fn is_full(&self) -> bool {
        self.in_flight.load(Ordering::SeqCst) >= self.max
    }

    pub(super) fn add_connection(&self, connection: &Arc<C>) {
        let mut connections = self.lock();
        connections.retain(|known| known.strong_count() > 0);
        connections.push(Arc::downgrade(connection));
    }

    pub(super) fn connections(&self) -> Vec<Arc<C>> {
        self.lock().iter().filter_map(Weak::upgrade).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Weak<C>>> {
        // No code panics while it holds this lock.
        let connections = self.connections.lock();
        connections.unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_beyond_the_limit_is_not_counted() {
        let requests = EndpointRequests::<()>::new(2);
        assert!(requests.acquire() && requests.acquire());
        assert!(!requests.acquire() && requests.is_full());
        requests.release();
        assert!(!requests.is_full());
        assert!(requests.acquire());
    }

    #[test]
    fn closed_connections_are_forgotten() {
        let requests = EndpointRequests::new(1);
        for connection in 0..100 {
            requests.add_connection(&Arc::new(connection));
        }
        let open = Arc::new(100);
        requests.add_connection(&open);
        assert_eq!(requests.connections(), [open]);
        assert!(requests.lock().len() <= 2);
    }
}
