//! When a PING is due, and what its answer, or none, says of the peer.
//!
//! h2 holds one PING at a time, so one machine decides for both of its uses. The *keep-alive*, an option, pings a connection whose peer was
//! silent for a while, and gives it up without an answer. The *stall detection* pings only after a call has overrun its deadline while
//! nothing at all was read: a peer that does not answer that is frozen, or cut off, however alive its TCP looks. It keeps its connection,
//! since most peers that freeze thaw again, and is back with its answer.

use std::time::Duration;

use tokio::time::Instant;

/// Pings that keep a connection alive, whether calls are open or not.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KeepAlive {
    /// From one ping's answer to the next ping.
    pub(crate) interval: Duration,
    /// How long an answer may take; then the connection counts as lost.
    pub(crate) timeout: Duration,
}

/// Decides on the PINGs of one connection.
#[derive(Debug)]
pub(super) struct Pings {
    keep_alive: Option<KeepAlive>,
    /// How long a suspect may take to answer.
    patience: Duration,
    /// Whether an answer is to come.
    outstanding: bool,
    /// When the keep-alive pings next.
    next: Option<Instant>,
    /// When the connection is lost without an answer.
    lost_at: Option<Instant>,
    /// When the peer has stalled without an answer.
    stalled_at: Option<Instant>,
    stalled: bool,
    /// How much was read when the suspicion came.
    read_then: u64,
    /// How much was read when the last suspicion sent a ping.
    read_at_ping: u64,
    /// Pings of suspicions since something other than their answers was read.
    unrewarded: u32,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Send a PING.
    Ping,
    /// Say that the peer has stalled.
    Stalled,
    /// Say that it is back.
    Recovered,
    /// Give the connection up.
    Lost,
}

impl Pings {
    pub(super) fn new(keep_alive: Option<KeepAlive>, round_trip: Duration, now: Instant) -> Self {
        let mut pings = Self {
            keep_alive,
            patience: PATIENCE.max(round_trip.saturating_mul(ROUND_TRIPS)),
            outstanding: false,
            next: None,
            lost_at: None,
            stalled_at: None,
            stalled: false,
            read_then: 0,
            read_at_ping: 0,
            unrewarded: 0,
        };
        pings.rest(now);
        pings
    }

    /// When [`on_time`](Self::on_time) has something to say.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        let wakes = [self.next, self.lost_at, self.stalled_at];
        wakes.into_iter().flatten().min()
    }

    pub(super) fn is_outstanding(&self) -> bool {
        self.outstanding
    }

    /// A call has overrun its deadline, and since it was sent nothing was read. `read` is how many bytes ever were.
    pub(super) fn on_suspicion(&mut self, now: Instant, read: u64) -> Option<Action> {
        if self.stalled || self.stalled_at.is_some() {
            return None;
        }
        if !self.outstanding {
            if read > self.read_at_ping + PONG {
                self.unrewarded = 0;
            }
            if self.unrewarded >= UNREWARDED {
                return None;
            }
            self.unrewarded += 1;
            self.read_at_ping = read;
        }
        self.read_then = read;
        self.stalled_at = now.checked_add(self.patience);
        let ping = !self.outstanding;
        self.outstanding = true;
        ping.then_some(Action::Ping)
    }

    /// The answer is here.
    pub(super) fn on_pong(&mut self, now: Instant) -> Option<Action> {
        self.outstanding = false;
        self.lost_at = None;
        self.stalled_at = None;
        self.rest(now);
        let stalled = std::mem::take(&mut self.stalled);
        stalled.then_some(Action::Recovered)
    }

    /// Time has passed.
    pub(super) fn on_time(&mut self, now: Instant, read: u64) -> Option<Action> {
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if is_due(self.lost_at) {
            return Some(Action::Lost);
        }
        if is_due(self.stalled_at) {
            self.stalled_at = None;
            // A peer that sends anything is there, and only late with its answer.
            self.stalled = read == self.read_then;
            if self.stalled {
                return Some(Action::Stalled);
            }
        }
        if is_due(self.next) {
            self.next = None;
            let keep_alive = self.keep_alive?;
            self.lost_at = now.checked_add(keep_alive.timeout);
            // A suspicion's ping is as good as one of its own.
            let ping = !self.outstanding;
            self.outstanding = true;
            return ping.then_some(Action::Ping);
        }
        None
    }

    fn rest(&mut self, now: Instant) {
        self.next = self
            .keep_alive
            .and_then(|keep_alive| now.checked_add(keep_alive.interval));
    }
}

/// How long a suspect may take to answer at least: a process that the scheduler has forgotten for a while is not frozen.
const PATIENCE: Duration = Duration::from_secs(1);
/// On a long way it may take this many round trips.
const ROUND_TRIPS: u32 = 4;
/// The bytes of a PING's answer.
const PONG: u64 = 17;
/// How many pings suspicions send while nothing but answers is read. grpc-go's server closes the connection at the fourth ping within five
/// minutes that finds no data sent between, the one at the connection's start included.
const UNREWARDED: u32 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn pings() -> (Pings, Instant) {
        let now = Instant::now();
        (Pings::new(None, ms(1), now), now)
    }

    #[test]
    fn a_suspect_that_stays_silent_has_stalled_and_its_answer_brings_it_back() {
        let (mut pings, now) = pings();
        assert_eq!(pings.wake_at(), None);
        assert_eq!(pings.on_suspicion(now, 100), Some(Action::Ping));
        assert_eq!(pings.on_suspicion(now, 100), None, "one ping at a time");
        assert_eq!(pings.on_time(now + ms(999), 100), None);
        assert_eq!(pings.on_time(now + ms(1_000), 100), Some(Action::Stalled));
        assert_eq!(pings.on_suspicion(now + ms(1_001), 100), None);
        assert_eq!(pings.wake_at(), None, "no timer brings it back");
        assert_eq!(pings.on_pong(now + ms(20_000)), Some(Action::Recovered));
        assert_eq!(pings.on_pong(now + ms(20_001)), None);
    }

    #[test]
    fn an_answer_in_time_clears_the_suspect_and_so_does_any_byte() {
        let (mut pings, now) = pings();
        pings.on_suspicion(now, 100);
        assert_eq!(pings.on_pong(now + ms(500)), None);
        assert_eq!(pings.on_time(now + ms(5_000), 117), None);
        pings.on_suspicion(now + ms(6_000), 1_000);
        assert_eq!(pings.on_time(now + ms(7_000), 1_001), None);
        assert!(pings.is_outstanding(), "its answer is still to come");
        assert_eq!(
            pings.on_suspicion(now + ms(7_100), 1_001),
            None,
            "h2 holds one ping"
        );
        assert_eq!(pings.on_time(now + ms(8_100), 1_001), Some(Action::Stalled));
    }

    #[test]
    fn a_peer_that_answers_pings_and_nothing_else_is_not_pinged_for_ever() {
        let (mut pings, now) = pings();
        let mut sent = 0;
        let mut read = 1_000;
        for second in 0..100 {
            let now = now + ms(1_000 * second);
            if pings.on_suspicion(now, read).is_some() {
                sent += 1;
                read += PONG;
                pings.on_pong(now);
            }
        }
        assert_eq!(sent, UNREWARDED);
        read += 100;
        assert_eq!(
            pings.on_suspicion(now + ms(200_000), read),
            Some(Action::Ping)
        );
    }

    #[test]
    fn a_long_way_is_given_its_round_trips() {
        let now = Instant::now();
        let mut pings = Pings::new(None, ms(400), now);
        pings.on_suspicion(now, 0);
        assert_eq!(pings.on_time(now + ms(1_599), 0), None);
        assert_eq!(pings.on_time(now + ms(1_600), 0), Some(Action::Stalled));
    }

    #[test]
    fn the_keep_alive_pings_and_gives_up() {
        let now = Instant::now();
        let keep_alive = KeepAlive {
            interval: ms(10_000),
            timeout: ms(3_000),
        };
        let mut pings = Pings::new(Some(keep_alive), ms(1), now);
        assert_eq!(pings.wake_at(), Some(now + ms(10_000)));
        assert_eq!(pings.on_time(now + ms(10_000), 0), Some(Action::Ping));
        assert_eq!(pings.on_pong(now + ms(10_500)), None);
        assert_eq!(pings.wake_at(), Some(now + ms(20_500)));
        assert_eq!(pings.on_time(now + ms(20_500), 17), Some(Action::Ping));
        // A suspicion meanwhile waits for the same answer.
        assert_eq!(pings.on_suspicion(now + ms(20_600), 17), None);
        assert_eq!(pings.on_time(now + ms(21_600), 17), Some(Action::Stalled));
        assert_eq!(pings.on_time(now + ms(23_500), 17), Some(Action::Lost));
    }

    #[test]
    fn the_keep_alive_waits_for_a_suspicions_answer() {
        let now = Instant::now();
        let keep_alive = KeepAlive {
            interval: ms(10_000),
            timeout: ms(3_000),
        };
        let mut pings = Pings::new(Some(keep_alive), ms(1), now);
        assert_eq!(pings.on_suspicion(now + ms(9_900), 0), Some(Action::Ping));
        assert_eq!(pings.on_time(now + ms(10_000), 0), None, "one at a time");
        assert_eq!(pings.on_time(now + ms(10_900), 0), Some(Action::Stalled));
        assert_eq!(pings.on_time(now + ms(13_000), 0), Some(Action::Lost));
    }
}
