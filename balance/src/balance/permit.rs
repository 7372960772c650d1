//! A call's place on a connection, and what the call says of it.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::dial_permit::DialPermit;
use super::endpoint::{Blame, Endpoint};
use super::ready_connection::ReadyConnection;
use crate::transport::http2::Connection;

/// A place taken on a connection for one call. It is given up on drop, however the call ended.
#[derive(Debug)]
pub(crate) struct Permit {
    connection: Arc<ReadyConnection>,
    /// When the call was sent, until its outcome is noted.
    sent: Option<Instant>,
    /// For a call on a connection of its own.
    alone: Option<Box<Alone>>,
}

/// A connection that carries one call, whose metadata may be more than the endpoint takes.
#[derive(Debug)]
struct Alone {
    metadata: usize,
    trial: DialPermit,
}

impl Permit {
    /// Wraps a place that was acquired on the member.
    pub(super) fn taken(connection: &Arc<ReadyConnection>) -> Self {
        Self {
            connection: Arc::clone(connection),
            sent: None,
            alone: None,
        }
    }

    /// Takes the only place of a connection for one call.
    pub(super) fn alone(
        connection: &Arc<ReadyConnection>,
        metadata: usize,
        trial: DialPermit,
    ) -> Self {
        let mut permit = Self::taken(connection);
        permit.alone = Some(Box::new(Alone { metadata, trial }));
        permit
    }

    /// Whether the connection carries this call alone.
    pub(crate) fn is_alone(&self) -> bool {
        self.alone.is_some()
    }

    /// Returns whether the connection was silent for so long that a middlebox may have dropped the flow, or, with `single_threaded` tasks, that
    /// the runtime may not have read its end.
    pub(crate) fn is_doubtful(&self, now: Instant, single_threaded: bool) -> bool {
        let connection = &self.connection;
        // The time of the last sample is in the cache line that the pick has just written to; the time of the last read is not.
        let quiet = connection.load().quiet(connection.ticks(now));
        if quiet < if single_threaded { UNDRIVEN } else { QUIET } {
            return false;
        }
        let silence = connection.http2().silence(now);
        silence > connection.endpoint().trusted_silence(now)
            || (single_threaded && silence > UNDRIVEN_FOR)
    }

    /// Checks a connection that is doubtful. If it does not answer in time, returns how many bytes its peer had sent before the check.
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

    /// The call is on its way.
    pub(crate) fn on_sent(&mut self, now: Instant) {
        self.sent = Some(now);
        self.connection.used().on_sent();
        self.connection.endpoint().on_call();
    }

    /// A gRPC status is here: the peer is a gRPC server.
    pub(crate) fn on_answer(&self) {
        self.connection.endpoint().on_answer();
    }

    /// The response's head is here, and with it perhaps a failure already.
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
        if let Some(alone) = &mut self.alone {
            alone.trial.end();
            self.connection.endpoint().on_metadata(alone.metadata);
        }
    }

    /// Whether the outcome of the call's head, or of the call, was noted.
    pub(crate) fn is_noted(&self) -> bool {
        self.sent.is_none()
    }

    /// The server, or the connection to it, has failed the call, before the head or after it.
    pub(crate) fn on_failure(&mut self, now: Instant, blame: Blame) {
        let sent = self.sent.take().unwrap_or(now);
        self.fail(now.saturating_duration_since(sent), now, blame);
    }

    /// The call has overrun its deadline. Whether the server is slow or not there any more, a PING will tell.
    pub(crate) fn on_overdue(&mut self, now: Instant) {
        self.connection.endpoint().on_overrun();
        // A response that has stopped coming is suspect from when the last of it came, which the connection knows.
        let silent_since = now.checked_sub(SUSPECT).unwrap_or(now);
        let sent = self.sent.take();
        self.connection
            .http2()
            .suspect(sent.unwrap_or(silent_since));
        if let Some(sent) = sent {
            let elapsed = now.saturating_duration_since(sent);
            let ticks = self.connection.ticks(now);
            self.connection.load().on_abandoned(elapsed, ticks);
        }
    }

    /// The server has refused to look at the call: that says nothing of how fast it answers.
    pub(crate) fn on_refused(&mut self) {
        self.sent = None;
        self.connection.endpoint().on_unjudged();
    }

    fn fail(&self, elapsed: Duration, now: Instant, blame: Blame) {
        self.connection.endpoint().on_failure(blame);
        let ticks = self.connection.ticks(now);
        self.connection.load().on_failure(elapsed, ticks);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(sent) = self.sent {
            let now = Instant::now();
            let elapsed = now.saturating_duration_since(sent);
            let ticks = self.connection.ticks(now);
            self.connection.load().on_abandoned(elapsed, ticks);
            self.connection.endpoint().on_unjudged();
            // Callers that keep the time themselves drop the call.
            if elapsed >= SUSPECT {
                self.connection.http2().suspect_dropped(sent);
            }
        }
        self.connection.release();
    }
}

/// A call that was dropped earlier than this was not dropped because it took too long. Half of the shortest deadlines that are in use.
const SUSPECT: Duration = Duration::from_millis(100);
/// In seconds: a connection that has answered a call since is not looked at more closely.
const QUIET: f32 = 1.0;
/// The same where tasks share a thread with their callers: longer than the gap between two calls of a busy caller.
const UNDRIVEN: f32 = 0.005;
const UNDRIVEN_FOR: Duration = Duration::from_millis(5);
