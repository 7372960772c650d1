//! A call's place on a connection, and what the call says of it.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::endpoint::Endpoint;
use super::member::Member;
use crate::transport::http2::Connection;

/// Who is to blame for a failed call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Blame {
    /// The connection, or the server as a whole.
    Connection,
    /// The server, in what it did for this call.
    Server,
}

/// A place taken on a connection for one call. It is given up on drop, however the call ended.
#[derive(Debug)]
pub(crate) struct Ticket {
    member: Arc<Member>,
    /// When the call was sent, until its outcome is noted.
    sent: Option<Instant>,
}

impl Ticket {
    /// Wraps a place that was acquired on the member.
    pub(super) fn taken(member: &Arc<Member>) -> Self {
        Self {
            member: Arc::clone(member),
            sent: None,
        }
    }

    pub(crate) fn connection(&self) -> &Connection {
        self.member.connection()
    }

    pub(crate) fn member(&self) -> &Arc<Member> {
        &self.member
    }

    pub(crate) fn endpoint(&self) -> &Arc<Endpoint> {
        self.member.endpoint()
    }

    /// The call is on its way.
    pub(crate) fn on_sent(&mut self, now: Instant) {
        self.sent = Some(now);
        self.member.endpoint().on_call();
    }

    /// The response's head is here, and with it perhaps a failure already.
    pub(crate) fn on_head(&mut self, now: Instant, failure: Option<Blame>) {
        let Some(sent) = self.sent.take() else {
            return;
        };
        let elapsed = now.saturating_duration_since(sent);
        match failure {
            Some(blame) => self.fail(elapsed, now, blame),
            None => self.member.load().on_head(elapsed, self.member.ticks(now)),
        }
    }

    /// The server, or the connection to it, has failed the call, before the head or after it.
    pub(crate) fn on_failure(&mut self, now: Instant, blame: Blame) {
        let sent = self.sent.take().unwrap_or(now);
        self.fail(now.saturating_duration_since(sent), now, blame);
    }

    /// The call has overrun its deadline. Whether the server is slow or not there any more, a PING will tell.
    pub(crate) fn on_overdue(&mut self, now: Instant) {
        self.member.endpoint().on_overrun();
        // A response that has stopped coming is suspect from when the last of it came, which the connection knows.
        let silent_since = now.checked_sub(SUSPECT).unwrap_or(now);
        let sent = self.sent.take();
        self.member
            .connection()
            .suspect(sent.unwrap_or(silent_since));
        if let Some(sent) = sent {
            let elapsed = now.saturating_duration_since(sent);
            let ticks = self.member.ticks(now);
            self.member.load().on_abandoned(elapsed, ticks);
        }
    }

    /// The server has refused to look at the call: that says nothing of how fast it answers.
    pub(crate) fn on_refused(&mut self) {
        self.sent = None;
        self.member.endpoint().on_unjudged();
    }

    fn fail(&self, elapsed: Duration, now: Instant, blame: Blame) {
        self.member.endpoint().on_failure(blame);
        let ticks = self.member.ticks(now);
        self.member.load().on_failure(elapsed, ticks);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(sent) = self.sent {
            let now = Instant::now();
            let elapsed = now.saturating_duration_since(sent);
            let ticks = self.member.ticks(now);
            self.member.load().on_abandoned(elapsed, ticks);
            self.member.endpoint().on_unjudged();
            // Callers that keep the time themselves drop the call.
            if elapsed >= SUSPECT {
                self.member.connection().suspect(sent);
            }
        }
        self.member.release();
    }
}

/// A call that was dropped earlier than this was not dropped because it took too long. Half of the shortest deadlines that are in use.
const SUSPECT: Duration = Duration::from_millis(100);
