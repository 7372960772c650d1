//! The permit of a call on a connection, and the outcomes that the call reports through it.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tonic::Code;

use super::dial_permit::DialPermit;
use super::endpoint::{Blame, Endpoint};
use super::observation::AttemptObservation;
use super::ready_connection::ReadyConnection;
use crate::load_report::LoadReport;
use crate::metrics::AttemptRecord;
use crate::transport::http2::Connection;

/// The right to send one call on a connection. Dropping the permit releases the stream, however the call ended, and the place of the call
/// below the limits on requests.
#[derive(Debug)]
pub(crate) struct Permit {
    connection: Arc<ReadyConnection>,
    /// The time at which the call was sent. `None` before the call is sent, and after its outcome was recorded.
    sent: Option<Instant>,
    /// What most calls do not have. Boxed together, so that other calls move a small permit, and check one pointer when they drop it.
    extras: Option<Box<Extras>>,
}

#[derive(Debug, Default)]
struct Extras {
    /// Set if the connection is private.
    private: Option<PrivateConnection>,
    /// The metrics and the span of the attempt, from its send to its end, if either is enabled.
    observation: Option<AttemptObservation>,
}

/// A private connection: it carries a single call, whose metadata may be larger than the endpoint accepts.
#[derive(Debug)]
struct PrivateConnection {
    metadata: usize,
    dial_permit: DialPermit,
    /// Holds the place of the call below the limits on requests, if there are limits. The stream of this permit is the one that counts as in
    /// flight at the endpoint.
    place: Option<Permit>,
}

impl Permit {
    /// Creates the permit for a stream that was already reserved on the connection, by a call that has a place below the limits on requests.
    pub(super) fn reserved(connection: &Arc<ReadyConnection>) -> Self {
        Self {
            connection: Arc::clone(connection),
            sent: None,
            extras: None,
        }
    }

    /// Creates the permit for the only call of a private connection. `metadata`: the size of the metadata of the call, in bytes. `place`: the
    /// permit on another connection that holds the place of the call below the limits on requests, if there are limits.
    pub(super) fn private(
        connection: &Arc<ReadyConnection>,
        metadata: usize,
        dial_permit: DialPermit,
        place: Option<Self>,
    ) -> Self {
        let mut permit = Self::reserved(connection);
        permit.extras().private = Some(PrivateConnection {
            metadata,
            dial_permit,
            place,
        });
        permit
    }

    /// Returns whether the connection was replaced, is about to be closed, or does not answer.
    pub(crate) fn is_evicted(&self) -> bool {
        self.connection.is_evicted()
    }

    /// Returns whether the connection carries only this call.
    pub(crate) fn is_private(&self) -> bool {
        let extras = self.extras.as_ref();
        extras.is_some_and(|extras| extras.private.is_some())
    }

    /// Returns whether the connection must be checked before the call is sent, because nothing was read from it for too long. After a long
    /// silence, a middlebox may have dropped the flow. `single_threaded`: whether the tasks of the connections share one thread with the
    /// callers. If they do, a connection is doubtful after a much shorter silence, because the runtime may not have read the end of the
    /// connection yet.
    pub(crate) fn is_doubtful(&self, now: Instant, single_threaded: bool) -> bool {
        let connection = &self.connection;
        // The time of the last sample is compared first, because the pick has just loaded the cache line that contains it. The time of the
        // last read is in another cache line.
        let since_last_sample = connection.load().since_last_sample(connection.ticks(now));
        let recent = if single_threaded {
            RECENT_SAMPLE_SINGLE_THREADED
        } else {
            RECENT_SAMPLE
        };
        if since_last_sample < recent {
            return false;
        }
        let silence = connection.http2().silence(now);
        silence > connection.endpoint().trusted_silence(now)
            || (single_threaded && silence > SINGLE_THREADED_SILENCE)
    }

    /// Checks a doubtful connection.
    ///
    /// # Errors
    ///
    /// If the connection does not answer in time, returns how many bytes the peer had sent on it before the check.
    pub(crate) async fn check(&self) -> Result<(), u64> {
        let connection = self.connection.http2();
        let (silence, bytes) = (connection.silence(Instant::now()), connection.bytes_read());
        let is_alive = connection.is_alive().await;
        let endpoint = self.connection.endpoint();
        endpoint.on_checked(silence, is_alive, Instant::now());
        if is_alive { Ok(()) } else { Err(bytes) }
    }

    pub(crate) fn http2(&self) -> &Connection {
        self.connection.http2()
    }

    pub(crate) fn connection(&self) -> &Arc<ReadyConnection> {
        &self.connection
    }

    pub(crate) fn endpoint(&self) -> &Arc<Endpoint> {
        self.connection.endpoint()
    }

    /// Records that the call was sent.
    pub(crate) fn on_sent(&mut self, now: Instant) {
        self.sent = Some(now);
        self.connection.used().on_sent();
        self.connection.endpoint().on_call();
    }

    fn extras(&mut self) -> &mut Extras {
        self.extras.get_or_insert_default()
    }

    /// Sets the metrics and the span of the attempt that was sent.
    pub(crate) fn observe(&mut self, observation: AttemptObservation) {
        self.extras().observation = Some(observation);
    }

    /// Sets the metrics of the attempt that was sent, and keeps its span.
    pub(crate) fn measure(&mut self, record: AttemptRecord) {
        let observation = &mut self.extras().observation;
        let span = observation.take().and_then(|known| known.span);
        let metrics = Some(record);
        *observation = Some(AttemptObservation { metrics, span });
    }

    /// Adds a data frame of the response to the metrics of the attempt.
    pub(crate) fn on_data(&mut self, frame: &[u8]) {
        if let Some(extras) = &mut self.extras
            && let Some(observation) = &mut extras.observation
        {
            observation.on_data(frame);
        }
    }

    /// Ends the metrics and the span of the attempt. Later ends have no effect. A permit that is dropped before counts as a cancelled attempt.
    pub(crate) fn end_attempt(&mut self, code: Code) {
        let extras = self.extras.as_ref();
        if extras.is_some_and(|extras| extras.observation.is_some()) {
            self.end_attempt_at(code, Instant::now());
        }
    }

    /// Does the same as [`end_attempt`](Self::end_attempt), with a time that the caller has read already.
    pub(crate) fn end_attempt_at(&mut self, code: Code, now: Instant) {
        let extras = self.extras.as_mut();
        if let Some(observation) = extras.and_then(|extras| extras.observation.take()) {
            observation.end(code, self.connection.endpoint(), now);
        }
    }

    /// Records that the peer has sent a gRPC status and therefore is a gRPC server.
    pub(crate) fn on_answer(&self) {
        self.connection.endpoint().on_answer();
    }

    /// Records a load report that the server has sent with the response. The call must still be in flight, because the server has counted
    /// it.
    pub(crate) fn on_load_report(&self, report: LoadReport) {
        if let Some(in_flight) = report.requests_in_flight() {
            let received = self.connection.ticks(report.received_at());
            self.connection.load().on_server_load(in_flight, received);
        }
        self.connection.endpoint().on_load_report(report);
    }

    /// Records the head of the response. `failure`: the cause, if the head reports a failure.
    pub(crate) fn on_head(&mut self, now: Instant, failure: Option<Blame>) {
        let Some(sent) = self.sent.take() else {
            return;
        };
        self.connection.used().on_answer();
        let elapsed = now.saturating_duration_since(sent);
        if let Some(blame) = failure {
            return self.fail(elapsed, now, blame);
        }
        self.connection
            .load()
            .on_head(elapsed, self.connection.ticks(now));
        if let Some(extras) = &mut self.extras
            && let Some(private) = &mut extras.private
        {
            private.dial_permit.end();
            self.connection
                .endpoint()
                .on_metadata_accepted(private.metadata);
        }
    }

    /// Returns whether the head of the response, or the outcome of the whole call, was recorded. Also true before the call is sent.
    pub(crate) fn is_recorded(&self) -> bool {
        self.sent.is_none()
    }

    /// Records that the call failed because of the server or the connection. The call may have failed before or after the head of the
    /// response.
    pub(crate) fn on_failure(&mut self, now: Instant, blame: Blame) {
        let sent = self.sent.take().unwrap_or(now);
        self.fail(now.saturating_duration_since(sent), now, blame);
    }

    /// Records that the call overran its deadline. If nothing was read since the call was sent, requests a PING, which shows whether the
    /// server is only slow, or does not answer any more.
    pub(crate) fn on_deadline_exceeded(&mut self, now: Instant) {
        self.end_attempt(Code::DeadlineExceeded);
        self.connection.endpoint().on_overrun();
        // If the head of the response was already received, `sent` is `None`. A PING is then sent only if nothing was read for
        // `MIN_OVERRUN`.
        let silent_since = now.checked_sub(MIN_OVERRUN).unwrap_or(now);
        let sent = self.sent.take();
        self.connection
            .http2()
            .request_ping_for_overrun(sent.unwrap_or(silent_since));
        if let Some(sent) = sent {
            let elapsed = now.saturating_duration_since(sent);
            let ticks = self.connection.ticks(now);
            self.connection.load().on_abandoned(elapsed, ticks);
        }
    }

    /// Records that the server refused to process the call. A refusal is no evidence about the server's latency.
    pub(crate) fn on_refused(&mut self) {
        self.end_attempt(Code::Unavailable);
        self.sent = None;
        self.connection.endpoint().on_inconclusive();
    }

    fn fail(&self, elapsed: Duration, now: Instant, blame: Blame) {
        self.connection.endpoint().on_failure(blame);
        let ticks = self.connection.ticks(now);
        self.connection.load().on_failure(elapsed, ticks);
    }
}

impl Permit {
    /// Ends a call that got no head of a response, or that has extras.
    // Not inlined, so that the drop of any other permit stays short.
    #[inline(never)]
    fn end(&mut self) {
        self.end_attempt(Code::Cancelled);
        if let Some(sent) = self.sent {
            let now = Instant::now();
            let elapsed = now.saturating_duration_since(sent);
            let ticks = self.connection.ticks(now);
            self.connection.load().on_abandoned(elapsed, ticks);
            self.connection.endpoint().on_inconclusive();
            // A caller may enforce its own timeout by dropping the call, so a late drop may be an overrun.
            if elapsed >= MIN_OVERRUN {
                self.connection.http2().request_ping_for_drop(sent);
            }
        }
        let extras = self.extras.as_ref();
        match extras.and_then(|extras| extras.private.as_ref()) {
            None => self.connection.release(),
            Some(private) if private.place.is_none() => self.connection.release_stream(),
            Some(_) => {}
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if self.sent.is_none() && self.extras.is_none() {
            self.connection.release();
        } else {
            self.end();
        }
    }
}

/// A stream that the wait queue has handed to a call. Dropping it hands the stream to the next call.
#[derive(Debug)]
pub(crate) struct Reserved {
    connection: Arc<ReadyConnection>,
    is_used: bool,
}

impl Reserved {
    pub(super) fn new(connection: &Arc<ReadyConnection>) -> Self {
        Self {
            connection: Arc::clone(connection),
            is_used: false,
        }
    }

    /// Converts the stream to the permit of a call that has a place below the limit of the channel.
    pub(crate) fn into_permit(mut self) -> Permit {
        self.is_used = true;
        Permit::reserved(&self.connection)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if !self.is_used {
            self.connection.release_stream();
        }
    }
}

/// If a call is dropped at least this long after it was sent, the drop may be a timeout that the caller enforces. The value is half of the
/// shortest deadlines in common use (200 ms).
const MIN_OVERRUN: Duration = Duration::from_millis(100);
/// If the last sample is younger than this, in seconds, a connection is not doubtful.
const RECENT_SAMPLE: f32 = 1.0;
/// The same limit, in seconds, if the tasks of the connections share one thread with the callers. It is longer than the gap between two
/// calls of a busy caller.
const RECENT_SAMPLE_SINGLE_THREADED: f32 = 0.005;
/// Silence above which a connection is doubtful if the tasks of the connections share one thread with the callers.
const SINGLE_THREADED_SILENCE: Duration = Duration::from_millis(5);
