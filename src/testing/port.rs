//! Free loopback ports.

use std::{
    collections::BTreeSet,
    io,
    net::{Ipv4Addr, TcpListener},
    ops::Range,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// The range from which ports are drawn. It is below the default ephemeral ports of Linux (from
/// 32768) and macOS (from 49152). Therefore no outgoing connection can take a port before etcd has
/// bound it, or while the member that uses the port is stopped.
const CANDIDATES: Range<u16> = 10_000..30_000;

/// Maximum number of candidates that [`Port::draw`] tries before it returns the last error.
const ATTEMPTS: usize = 1_000;

/// The ports of all existing [`Port`] values. This set is needed because the operating system
/// regards the port of a stopped member as free.
static TAKEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());

/// A loopback port that was free when it was drawn. This process does not draw it again while the
/// value exists.
#[derive(Debug)]
pub(super) struct Port(u16);

impl Port {
    /// Draws a random free port.
    pub(super) fn draw() -> io::Result<Self> {
        let mut last = io::Error::from(io::ErrorKind::AddrInUse);
        for _ in 0..ATTEMPTS {
            let Some(port) = Self::reserve(fastrand::u16(CANDIDATES)) else {
                continue;
            };
            match TcpListener::bind((Ipv4Addr::LOCALHOST, port.0)) {
                Ok(_) => return Ok(port),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Reserves a port. Returns `None` if another [`Port`] already has this number.
    fn reserve(number: u16) -> Option<Self> {
        taken().insert(number).then(|| Self(number))
    }

    /// Returns the number of the port.
    pub(super) fn number(&self) -> u16 {
        self.0
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        taken().remove(&self.0);
    }
}

/// Locks the set of taken ports. A poisoned lock is accepted, because a panic cannot leave the set
/// half changed.
fn taken() -> MutexGuard<'static, BTreeSet<u16>> {
    TAKEN.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_reserved_until_it_is_dropped() {
        // The port is outside the candidates, so that no parallel draw can return it.
        let port = Port::reserve(9_999).expect("no other test uses the port");
        assert!(
            Port::reserve(9_999).is_none(),
            "a reserved port must not be reserved again"
        );
        drop(port);
        assert!(
            Port::reserve(9_999).is_some(),
            "a dropped port must be free again"
        );
    }

    #[test]
    fn a_drawn_port_is_in_the_range_of_candidates() {
        let port = Port::draw().expect("some port is free");
        assert!(CANDIDATES.contains(&port.number()));
    }
}
