//! Detects that a peer is stalled or dead. This module decides when a PING is sent, and what a missing answer means. It performs no I/O.
//!
//! A PING has one of four causes:
//!
//! - The *stall detection*: a call has overrun its deadline or was dropped after a while, and nothing was read since the call was sent.
//! - The *check*: a call is about to be sent on a connection after a silence in which a middlebox may have dropped the flow.
//! - The *sweep*: one connection was found dead after a silence, so other silent connections are tested as well.
//! - The *keep-alive*, if it is enabled: nothing was read for an interval.
//!
//! All PINGs of a connection share one budget, because servers count them together. gRFC A8 lets a server close a connection if the client
//! sends more PINGs than the server allows. Between two HEADERS or DATA frames that they send, grpc-go and grpc-java allow two PINGs. The
//! PING that checks whether a new connection is ready (the ready check) is one of them. Beyond that, they allow one PING every five minutes
//! while calls are open, and one every two hours otherwise.
//!
//! If the budget allows no PING, the cause determines what follows:
//!
//! - The keep-alive waits until the next PING is allowed.
//! - A request for the sweep or after a dropped call is ignored.
//! - After an overrun deadline, and for the check, no PING is sent, but the next read is awaited. If nothing is read in time, the channel
//!   dials a second connection beside the first. The first connection stays in use until the second is ready.
//!
//! Any byte that is read shows that the peer is alive, not only a PONG. On a slow link, the PONG is queued behind the responses.

use std::time::Duration;

use tokio::time::Instant;

use super::activity::ReadProgress;

/// The options of the keep-alive.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KeepAlive {
    /// The shortest interval between PINGs that the servers permit. It applies to PINGs beyond the two that all servers permit.
    pub(crate) permit: Duration,
    /// The interval without a read after which a PING is sent.
    pub(crate) interval: Duration,
    /// If nothing is read within this time after a PING, the connection counts as lost.
    pub(crate) timeout: Duration,
    /// Whether PINGs are also sent on a connection without calls.
    pub(crate) while_idle: bool,
}

/// Decides on the PINGs of one connection.
#[derive(Debug)]
pub(super) struct Pings {
    keep_alive: Option<KeepAlive>,
    /// Limit on the silence of the peer after a call has overrun its deadline or was dropped.
    overrun_timeout: Duration,
    /// Limit on the time that a call waits for the answer to a check.
    check_timeout: Duration,
    /// Whether a PING was sent that is not answered yet. h2 allows one PING at a time.
    outstanding: bool,
    /// The number of PINGs since the peer's last HEADERS or DATA frame.
    without_response: u32,
    /// The number of HEADERS and DATA frames that the peer had sent when the last PING was sent or answered.
    responses_at_ping: u64,
    last_ping: Instant,
    /// The time when the keep-alive checks the connection next.
    keep_alive_at: Option<Instant>,
    /// The time at which the connection counts as lost, unless something is read before.
    keep_alive_expiry: Option<Expiry>,
    /// The time at which the peer counts as silent, unless something is read before.
    stall_expiry: Option<Expiry>,
    /// The number of bytes read when the peer was found silent. Reset to `None` when further bytes are read.
    silent_at: Option<u64>,
    /// True if the peer was found silent because it did not answer a PING; false if the PING budget allowed no PING.
    ping_unanswered: bool,
}

/// A time limit for the peer. If at the time `at` no more than `bytes` bytes were read, the peer counts as silent.
#[derive(Clone, Copy, Debug)]
struct Expiry {
    at: Instant,
    bytes: u64,
    /// Whether the answer to a PING is due by that time. If false, no PING was sent, and any read is awaited.
    pinged: bool,
    /// The number of times that the limit was extended because our own process was not scheduled.
    extended: u32,
}

impl Expiry {
    fn is_due(self, now: Instant) -> bool {
        self.at <= now
    }
}

/// The cause of a request for a PING.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PingCause {
    /// A call has overrun its deadline, and nothing was read since the call was sent.
    Overrun,
    /// A call was dropped before its response and some time after it was sent, and nothing was read in between.
    Dropped,
    /// A call is about to be sent after a long silence.
    Silence,
    /// Another connection was found dead after a silence. No call waits for the answer to this PING.
    Sweep,
}

/// An action for the caller of [`Pings`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Send a PING.
    Ping,
    /// Report that the peer has left a PING unanswered.
    Stalled,
    /// Report that nothing was read in time, and that the budget allowed no PING.
    Doubtful,
    /// Report that the peer answers again.
    Recovered,
    /// Close the connection.
    Lost,
}

impl Pings {
    /// Creates the state after the ready check, whose PING is the first of the budget.
    pub(super) fn new(
        keep_alive: Option<KeepAlive>,
        round_trip: Duration,
        progress: ReadProgress,
        now: Instant,
    ) -> Self {
        let long_way = round_trip.saturating_mul(ROUND_TRIPS);
        Self {
            keep_alive,
            overrun_timeout: OVERRUN_TIMEOUT.max(long_way),
            check_timeout: CHECK_TIMEOUT.max(long_way),
            outstanding: false,
            without_response: 1,
            responses_at_ping: progress.responses,
            last_ping: now,
            keep_alive_at: keep_alive.and_then(|keep_alive| now.checked_add(keep_alive.interval)),
            keep_alive_expiry: None,
            stall_expiry: None,
            silent_at: None,
            ping_unanswered: false,
        }
    }

    /// Returns the time at which [`on_time`](Self::on_time) must be called.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        let expiries = [self.keep_alive_expiry, self.stall_expiry]
            .map(|expiry| expiry.map(|expiry| expiry.at));
        expiries
            .into_iter()
            .chain([self.keep_alive_at])
            .flatten()
            .min()
    }

    pub(super) fn is_outstanding(&self) -> bool {
        self.outstanding
    }

    /// Returns true from the time when the peer is found silent until [`on_read`](Self::on_read) handles further bytes.
    pub(super) fn is_stalled(&self) -> bool {
        self.silent_at.is_some()
    }

    /// Handles a request for a PING. `busy`: whether calls are open.
    pub(super) fn on_request(
        &mut self,
        cause: PingCause,
        now: Instant,
        progress: ReadProgress,
        busy: bool,
    ) -> Option<Action> {
        let is_silent = self.silent_at == Some(progress.bytes);
        if is_silent && self.ping_unanswered {
            return None;
        }
        let timeout = match cause {
            PingCause::Overrun | PingCause::Dropped => self.overrun_timeout,
            PingCause::Silence | PingCause::Sweep => self.check_timeout,
        };
        let at = now.checked_add(timeout)?;
        // If nothing was read since the last request, the time limit of that request still runs. The earlier of the two limits applies.
        if let Some(stall) = self
            .stall_expiry
            .as_mut()
            .filter(|stall| stall.bytes == progress.bytes)
        {
            stall.at = stall.at.min(at);
            return None;
        }
        // The server counts a connection without open streams as idle. `busy` may count a call without an open stream: a call that waits
        // for a check has no stream yet, and a dropped call has none any more.
        let busy = busy && cause == PingCause::Overrun;
        let may_ping = self.outstanding || self.may_ping(now, progress, busy);
        if !may_ping && matches!(cause, PingCause::Dropped | PingCause::Sweep) {
            return None;
        }
        if is_silent && !may_ping {
            // The peer was found silent before, and the budget still allows no PING, so another wait would give the same result.
            return (cause == PingCause::Silence).then_some(Action::Doubtful);
        }
        self.stall_expiry = Some(Expiry {
            at,
            bytes: progress.bytes,
            pinged: may_ping,
            extended: 0,
        });
        if may_ping {
            self.ping(now, progress)
        } else {
            None
        }
    }

    /// Handles bytes that were read.
    pub(super) fn on_read(&mut self, progress: ReadProgress) -> Option<Action> {
        let stalled = self.silent_at?;
        (progress.bytes > stalled).then(|| {
            self.silent_at = None;
            self.ping_unanswered = false;
            Action::Recovered
        })
    }

    /// Handles the answer to the PING.
    pub(super) fn on_pong(&mut self, now: Instant, progress: ReadProgress) {
        self.outstanding = false;
        // HEADERS and DATA frames that the server sent before it received the PING do not reset the server's count of PINGs, so they do not
        // count here either.
        self.responses_at_ping = progress.responses;
        self.keep_alive_expiry = None;
        self.stall_expiry = None;
        self.schedule_keep_alive(now);
    }

    /// Handles the timer.
    pub(super) fn on_time(
        &mut self,
        now: Instant,
        progress: ReadProgress,
        busy: bool,
    ) -> Option<Action> {
        if let Some(lost) = self.keep_alive_expiry.take_if(|lost| lost.is_due(now)) {
            if progress.bytes == lost.bytes {
                return Some(Action::Lost);
            }
            self.schedule_keep_alive(progress.at);
        }
        if let Some(mut stall) = self.stall_expiry.take_if(|stall| stall.is_due(now))
            && progress.bytes == stall.bytes
        {
            // If the timer fires late, the runtime is overloaded, and the bytes that the peer has sent are possibly not read yet. The limit
            // is extended, because new connections would add to the load.
            let late = now.saturating_duration_since(stall.at);
            if late < LATE_TIMER || stall.extended >= MAX_EXTENSIONS {
                return Some(self.on_silence(stall));
            }
            stall.at = now + self.check_timeout.max(late);
            stall.extended += 1;
            self.stall_expiry = Some(stall);
        }
        if self.keep_alive_at.is_some_and(|at| at <= now) {
            return self.keep_alive(now, progress, busy);
        }
        None
    }

    fn on_silence(&mut self, stall: Expiry) -> Action {
        self.silent_at = Some(stall.bytes);
        self.ping_unanswered = stall.pinged;
        if stall.pinged {
            Action::Stalled
        } else {
            Action::Doubtful
        }
    }

    fn keep_alive(&mut self, now: Instant, progress: ReadProgress, busy: bool) -> Option<Action> {
        let keep_alive = self.keep_alive?;
        let due = progress.at.checked_add(keep_alive.interval);
        if due.is_none_or(|due| due > now) {
            self.keep_alive_at = due;
            return None;
        }
        if !busy && !keep_alive.while_idle {
            self.schedule_keep_alive(now);
            return None;
        }
        // `while_idle` means that the servers permit PINGs on idle connections, so the interval for open calls applies.
        if !self.outstanding && !self.may_ping(now, progress, true) {
            self.keep_alive_at = self.last_ping.checked_add(keep_alive.permit);
            return None;
        }
        self.keep_alive_at = None;
        self.keep_alive_expiry = now.checked_add(keep_alive.timeout).map(|at| Expiry {
            at,
            bytes: progress.bytes,
            pinged: true,
            extended: 0,
        });
        self.ping(now, progress)
    }

    /// Sends a PING, unless an earlier PING is not answered yet. In that case, one answer serves both requests.
    fn ping(&mut self, now: Instant, progress: ReadProgress) -> Option<Action> {
        if self.outstanding {
            return None;
        }
        if progress.responses > self.responses_at_ping {
            self.without_response = 0;
        }
        self.without_response += 1;
        self.responses_at_ping = progress.responses;
        self.last_ping = now;
        self.outstanding = true;
        Some(Action::Ping)
    }

    /// Returns true if the budget allows a PING now. `busy`: whether the server counts the connection as having open calls.
    fn may_ping(&self, now: Instant, progress: ReadProgress, busy: bool) -> bool {
        let permit = self
            .keep_alive
            .map_or(BUSY_INTERVAL, |keep_alive| keep_alive.permit);
        let interval = if busy { permit } else { IDLE_INTERVAL };
        progress.responses > self.responses_at_ping
            || self.without_response < MAX_PINGS_WITHOUT_RESPONSE
            || now.saturating_duration_since(self.last_ping) >= interval
    }

    /// Schedules the keep-alive one interval after this time.
    fn schedule_keep_alive(&mut self, from: Instant) {
        self.keep_alive_at = self
            .keep_alive
            .and_then(|keep_alive| from.checked_add(keep_alive.interval));
    }
}

/// The shortest `overrun_timeout`, which limits the silence of a peer after a call has overrun its deadline or was dropped. With a shorter
/// limit, a peer whose process the scheduler has delayed would count as frozen.
const OVERRUN_TIMEOUT: Duration = Duration::from_secs(1);
/// The shortest `check_timeout`: how long a call waits for the answer to a check before the call is sent elsewhere. RFC 8305, section 5,
/// recommends the same delay before the next address of a name is tried.
pub(super) const CHECK_TIMEOUT: Duration = Duration::from_millis(250);
/// If a timer fires at least this late, our own process was not scheduled in time.
const LATE_TIMER: Duration = Duration::from_millis(50);
/// The timeouts of a stall and of a check are at least this many round trips, so that they suit paths with a long round trip.
pub(super) const ROUND_TRIPS: u32 = 4;
/// Maximum number of PINGs between two HEADERS or DATA frames of the peer. A server that follows gRFC A8 tolerates two PINGs that are too
/// frequent.
const MAX_PINGS_WITHOUT_RESPONSE: u32 = 2;
/// Maximum number of extensions of a time limit. With this maximum, waits also end in a process that is never scheduled in time.
const MAX_EXTENSIONS: u32 = 3;
/// The shortest interval between PINGs that grpc-go and grpc-java allow by default while calls are open.
pub(crate) const BUSY_INTERVAL: Duration = Duration::from_secs(5 * 60);
/// The shortest interval between PINGs that grpc-go and grpc-java allow without open calls.
const IDLE_INTERVAL: Duration = Duration::from_secs(2 * 3600);

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn progress(bytes: u64, responses: u64, at: Instant) -> ReadProgress {
        ReadProgress {
            bytes,
            responses,
            at,
        }
    }

    fn pings(keep_alive: Option<KeepAlive>) -> (Pings, Instant) {
        let now = Instant::now();
        (
            Pings::new(keep_alive, ms(1), progress(17, 0, now), now),
            now,
        )
    }

    #[test]
    fn a_silent_peer_is_stalled_until_its_next_byte() {
        let (mut pings, now) = pings(None);
        let silent = progress(100, 0, now);
        assert_eq!(pings.wake_at(), None);
        let ping = pings.on_request(PingCause::Overrun, now, silent, true);
        assert_eq!(ping, Some(Action::Ping));
        let again = pings.on_request(PingCause::Overrun, now, silent, true);
        assert_eq!(again, None, "a second PING was sent");
        assert_eq!(pings.on_time(now + ms(999), silent, true), None);
        let stalled = pings.on_time(now + ms(1_000), silent, true);
        assert_eq!(stalled, Some(Action::Stalled));
        let cause = pings.on_request(PingCause::Overrun, now + ms(1_001), silent, true);
        assert_eq!(cause, None);
        assert_eq!(
            pings.wake_at(),
            None,
            "no timer must run while the peer counts as stalled"
        );
        assert_eq!(pings.on_read(silent), None);
        assert_eq!(
            pings.on_read(progress(117, 0, now)),
            Some(Action::Recovered)
        );
        assert_eq!(pings.on_read(progress(118, 0, now)), None);
    }

    #[test]
    fn a_check_keeps_its_short_timeout_while_a_stall_detection_is_in_progress() {
        let (mut pings, now) = pings(None);
        let silent = progress(100, 0, now);
        pings.on_request(PingCause::Overrun, now, silent, true);
        assert_eq!(
            pings.on_request(PingCause::Silence, now, silent, true),
            None
        );
        let stalled = pings.on_time(now + ms(250), silent, true);
        assert_eq!(stalled, Some(Action::Stalled));
    }

    #[test]
    fn late_timers_extend_the_wait_a_limited_number_of_times() {
        let (mut pings, mut now) = pings(None);
        let silent = progress(100, 0, now);
        pings.on_request(PingCause::Silence, now, silent, true);
        now += ms(400);
        assert_eq!(
            pings.on_time(now, silent, true),
            None,
            "a timer that is 150 ms late must extend the wait"
        );
        assert_eq!(pings.wake_at(), Some(now + ms(250)));
        for _ in 1..MAX_EXTENSIONS {
            now += ms(400);
            assert_eq!(pings.on_time(now, silent, true), None);
        }
        now += ms(400);
        assert_eq!(pings.on_time(now, silent, true), Some(Action::Stalled));
    }

    #[test]
    fn any_received_byte_shows_that_the_peer_is_alive() {
        let (mut pings, now) = pings(None);
        pings.on_request(PingCause::Overrun, now, progress(100, 1, now), true);
        pings.on_pong(now + ms(500), progress(117, 1, now));
        assert_eq!(
            pings.on_time(now + ms(5_000), progress(117, 1, now), true),
            None
        );
        let then = progress(1_000, 2, now);
        pings.on_request(PingCause::Overrun, now + ms(6_000), then, true);
        let read = progress(1_001, 2, now);
        assert_eq!(pings.on_time(now + ms(7_000), read, true), None);
        assert!(pings.is_outstanding(), "the PING must be unanswered");
        let second = pings.on_request(PingCause::Overrun, now + ms(7_100), read, true);
        assert_eq!(second, None, "a second PING was sent");
        let stalled = pings.on_time(now + ms(8_100), read, true);
        assert_eq!(stalled, Some(Action::Stalled));
    }

    #[test]
    fn an_overrun_after_a_received_byte_restarts_the_timeout() {
        let (mut pings, now) = pings(None);
        pings.on_request(PingCause::Overrun, now, progress(100, 0, now), true);
        let later = now + ms(900);
        pings.on_request(PingCause::Overrun, later, progress(113, 0, later), true);
        assert_eq!(
            pings.on_time(now + ms(1_000), progress(113, 0, later), true),
            None
        );
        let stalled = pings.on_time(later + ms(1_000), progress(113, 0, later), true);
        assert_eq!(stalled, Some(Action::Stalled));
    }

    /// Simulates a server that counts PINGs as grpc-java does: each PING is a strike against the client, and a HEADERS or DATA frame that
    /// the server sends later clears all strikes. PINGs and frames cross on the way, answers are late, streams are reset, calls are
    /// dropped, and the keep-alive sends PINGs as well.
    #[test]
    fn at_most_two_pings_are_sent_between_two_responses() {
        let seed = fastrand::u64(..);
        let mut rng = fastrand::Rng::with_seed(seed);
        for _ in 0..200 {
            let keep_alive = KeepAlive {
                interval: ms(1_000),
                timeout: ms(500),
                while_idle: rng.bool(),
                permit: BUSY_INTERVAL,
            };
            let (mut pings, start) = pings(rng.bool().then_some(keep_alive));
            let (mut strikes, mut now) = (1, start);
            // The numbers of bytes and responses that the server has sent, and that the client has read.
            let (mut sent, mut read) = ((117, 0), (117, 0));
            let mut pong_at = None;
            for _ in 0..400 {
                now += ms(rng.u64(1..500));
                match rng.u8(..10) {
                    0 => {
                        sent = (sent.0 + 50, sent.1 + 1);
                        strikes = 0;
                    }
                    1 => sent.0 += 13,
                    _ => {}
                }
                // Bytes may be read late, and an answer is read after all bytes that were sent before it.
                if rng.bool() {
                    read = sent;
                }
                let answered = pong_at.take_if(|bytes| read.0 >= *bytes).is_some();
                let now_heard = progress(read.0, read.1, now);
                if answered {
                    pings.on_pong(now, now_heard);
                }
                pings.on_read(now_heard);
                let busy = rng.bool();
                let action = match rng.u8(..6) {
                    0 => pings.on_request(PingCause::Silence, now, now_heard, busy),
                    1 => pings.on_request(PingCause::Overrun, now, now_heard, busy),
                    2 => pings.on_request(PingCause::Dropped, now, now_heard, busy),
                    3 => pings.on_request(PingCause::Sweep, now, now_heard, busy),
                    _ => pings.on_time(now, now_heard, busy),
                };
                if action == Some(Action::Ping) {
                    strikes += 1;
                    sent.0 += 17;
                    pong_at = Some(sent.0);
                }
                assert!(strikes <= 2, "more than two strikes, seed {seed}");
                if action == Some(Action::Lost) {
                    break;
                }
            }
        }
    }

    #[test]
    fn without_a_ping_budget_silence_is_doubtful_and_a_ping_follows_when_the_budget_allows_it() {
        let (mut pings, now) = pings(None);
        let silent = progress(100, 0, now);
        let ping = pings.on_request(PingCause::Overrun, now, silent, true);
        assert_eq!(ping, Some(Action::Ping));
        pings.on_pong(now, silent);
        for cause in [PingCause::Dropped, PingCause::Sweep] {
            assert_eq!(pings.on_request(cause, now, silent, true), None);
            assert_eq!(pings.wake_at(), None, "{cause:?} started a timer");
        }
        assert_eq!(
            pings.on_request(PingCause::Silence, now, silent, true),
            None
        );
        let doubtful = pings.on_time(now + ms(250), silent, true);
        assert_eq!(doubtful, Some(Action::Doubtful));
        let read_again = progress(101, 0, now);
        assert_eq!(pings.on_read(read_again), Some(Action::Recovered));
        let later = now + BUSY_INTERVAL;
        let idle = pings.on_request(PingCause::Silence, later, read_again, true);
        assert_eq!(
            idle, None,
            "a call that waits for a check must not make the connection busy"
        );
        pings.on_read(progress(102, 0, now));
        let busy = pings.on_request(PingCause::Overrun, later, progress(102, 0, now), true);
        assert_eq!(busy, Some(Action::Ping));
    }

    #[test]
    fn each_check_of_a_doubtful_connection_has_an_outcome() {
        let (mut pings, now) = pings(None);
        let silent = progress(100, 0, now);
        pings.on_request(PingCause::Overrun, now, silent, true);
        pings.on_pong(now, silent);
        pings.on_request(PingCause::Silence, now, silent, true);
        let doubtful = pings.on_time(now + ms(250), silent, true);
        assert_eq!(doubtful, Some(Action::Doubtful));
        let again = pings.on_request(PingCause::Silence, now + ms(300), silent, true);
        assert_eq!(again, Some(Action::Doubtful), "the call must not wait");
        let later = now + BUSY_INTERVAL;
        let ping = pings.on_request(PingCause::Overrun, later, silent, true);
        assert_eq!(ping, Some(Action::Ping), "the budget must be renewed");
        let stalled = pings.on_time(later + ms(1_000), silent, true);
        assert_eq!(stalled, Some(Action::Stalled));
        let proven = pings.on_request(PingCause::Silence, later + ms(1_001), silent, true);
        assert_eq!(proven, None);
    }

    #[test]
    fn a_check_concurrent_with_the_recovery_has_an_outcome() {
        let (mut pings, now) = pings(None);
        pings.on_request(PingCause::Silence, now, progress(100, 0, now), true);
        let stalled = pings.on_time(now + ms(250), progress(100, 0, now), true);
        assert_eq!(stalled, Some(Action::Stalled));
        let later = now + ms(300);
        let more = progress(110, 0, later);
        pings.on_request(PingCause::Silence, later, more, true);
        assert_eq!(pings.on_read(more), Some(Action::Recovered));
        let stalled = pings.on_time(later + ms(250), more, true);
        assert_eq!(stalled, Some(Action::Stalled));
    }

    #[test]
    fn the_check_timeout_is_at_least_four_round_trips() {
        let now = Instant::now();
        let silent = progress(0, 0, now);
        let mut pings = Pings::new(None, ms(400), silent, now);
        pings.on_request(PingCause::Silence, now, silent, true);
        assert_eq!(pings.on_time(now + ms(1_599), silent, true), None);
        let stalled = pings.on_time(now + ms(1_600), silent, true);
        assert_eq!(stalled, Some(Action::Stalled));
    }

    const KEEP_ALIVE: KeepAlive = KeepAlive {
        interval: ms(10_000),
        timeout: ms(3_000),
        while_idle: false,
        permit: ms(10_000),
    };

    #[test]
    fn the_keep_alive_sends_a_ping_after_silence_and_closes_the_connection_without_an_answer() {
        let (mut pings, now) = pings(Some(KEEP_ALIVE));
        let silent = progress(0, 0, now);
        assert_eq!(pings.wake_at(), Some(now + ms(10_000)));
        let ping = pings.on_time(now + ms(10_000), silent, true);
        assert_eq!(ping, Some(Action::Ping));
        let at = now + ms(10_500);
        let silent = progress(17, 0, at);
        pings.on_pong(at, silent);
        assert_eq!(pings.wake_at(), Some(now + ms(20_500)));
        let ping = pings.on_time(now + ms(20_500), silent, true);
        assert_eq!(ping, Some(Action::Ping), "a permitted PING must be sent");
        // A request for a PING in the meantime waits for the answer to the same PING.
        let cause = pings.on_request(PingCause::Overrun, now + ms(20_600), silent, true);
        assert_eq!(cause, None);
        let stalled = pings.on_time(now + ms(21_600), silent, true);
        assert_eq!(stalled, Some(Action::Stalled));
        let lost = pings.on_time(now + ms(23_500), silent, true);
        assert_eq!(lost, Some(Action::Lost));
    }

    #[test]
    fn the_keep_alive_respects_the_default_permit_time_of_servers() {
        let (mut pings, now) = pings(Some(KeepAlive {
            permit: BUSY_INTERVAL,
            ..KEEP_ALIVE
        }));
        let silent = progress(17, 0, now);
        let ping = pings.on_time(now + ms(10_000), silent, true);
        assert_eq!(
            ping,
            Some(Action::Ping),
            "the budget must allow a second PING, after that of the ready check"
        );
        pings.on_pong(now + ms(10_001), progress(34, 0, now));
        assert_eq!(
            pings.on_time(now + ms(20_001), progress(34, 0, now), true),
            None
        );
        let permitted = now + ms(10_000) + BUSY_INTERVAL;
        assert_eq!(pings.wake_at(), Some(permitted));
        let ping = pings.on_time(permitted, progress(34, 0, now), true);
        assert_eq!(ping, Some(Action::Ping));
    }

    #[test]
    fn received_bytes_delay_the_keep_alive_ping_and_prevent_the_close() {
        let (mut pings, now) = pings(Some(KEEP_ALIVE));
        let at = now + ms(9_999);
        assert_eq!(
            pings.on_time(now + ms(10_000), progress(5, 0, at), true),
            None
        );
        assert_eq!(pings.wake_at(), Some(at + ms(10_000)));
        let later = at + ms(10_000);
        let ping = pings.on_time(later, progress(5, 0, at), true);
        assert_eq!(ping, Some(Action::Ping));
        let trickle = progress(6, 0, later + ms(2_999));
        let queued = pings.on_time(later + ms(3_000), trickle, true);
        assert_eq!(queued, None, "a byte must show that the peer is alive");
        assert_eq!(pings.wake_at(), Some(trickle.at + ms(10_000)));
    }

    #[test]
    fn an_idle_connection_is_pinged_only_if_enabled() {
        let (mut pings, now) = pings(Some(KEEP_ALIVE));
        let silent = progress(0, 0, now);
        assert_eq!(pings.on_time(now + ms(10_000), silent, false), None);
        assert_eq!(pings.wake_at(), Some(now + ms(20_000)));
        let while_idle = KeepAlive {
            while_idle: true,
            ..KEEP_ALIVE
        };
        let mut pings = Pings::new(Some(while_idle), ms(1), silent, now);
        let ping = pings.on_time(now + ms(10_000), silent, false);
        assert_eq!(ping, Some(Action::Ping));
    }
}
