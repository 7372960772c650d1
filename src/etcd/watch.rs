//! A watch: the handle of one subscription on a shared watch stream.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use super::error;
use super::request_channel::RequestChannel;
use super::watch_stream::{Delivery, Subscribed, WatchGuard};
use crate::error::{EtcdError, EtcdErrorKind};
use crate::keyspace::WatchMessage;

/// An open watch on one or several key ranges. Dropping it cancels its watchers at the server.
#[derive(Debug)]
pub(crate) struct Watch {
    /// The channel of the shared stream. It identifies the member that serves the stream.
    pub(super) channel: RequestChannel,
    deliveries: mpsc::UnboundedReceiver<Delivery>,
    /// Ends the subscription when it is dropped.
    guard: WatchGuard,
    /// Number of watchers that the server has not created yet.
    uncreated: usize,
    /// `None` until [`message`](Self::message) has returned an error. Afterwards, the flag is true if the caller must not record the error
    /// as a failure of the member: another watch of the same stream has recorded it, or the error shows nothing about the member. All
    /// watches of a stream that has ended share the flag.
    is_reported: Option<Arc<AtomicBool>>,
    opened: Instant,
}

impl Watch {
    pub(super) fn new((channel, deliveries, guard): Subscribed, ranges: usize) -> Self {
        Self {
            channel,
            deliveries,
            guard,
            uncreated: ranges,
            is_reported: None,
            opened: Instant::now(),
        }
    }

    /// Waits until the server has created the watcher of every range. Events that arrive before that are dropped, because the caller reads
    /// the keys afterwards.
    pub(crate) async fn created(&mut self) -> Result<(), EtcdError> {
        while self.uncreated > 0 {
            let message = self.message().await?;
            if message.canceled {
                return Err(self.cancel_error(&message));
            }
        }
        Ok(())
    }

    /// Returns the next message of the watchers. The end of the stream is always an error, even without an error status, because a watch
    /// has no regular end.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses no message.
    pub(crate) async fn message(&mut self) -> Result<WatchMessage, EtcdError> {
        let received = if self.uncreated > 0 {
            // The task of the stream has shorter timeouts, but they are not sufficient: they do not fire if no thread drives the runtime of
            // the task, and each message for another watch on the stream restarts them.
            let received = timeout_at(self.opened + CREATED, self.deliveries.recv()).await;
            let Ok(received) = received else {
                self.is_reported = Some(Arc::new(AtomicBool::new(true)));
                return Err(error::deadline("watch", &self.channel.endpoint(), CREATED));
            };
            received
        } else {
            self.deliveries.recv().await
        };
        match received {
            Some(Delivery::Message(message)) => {
                self.guard.on_received(&message);
                self.uncreated -= usize::from(message.created).min(self.uncreated);
                Ok(message)
            }
            Some(Delivery::Ended { error, is_reported }) => {
                self.is_reported = Some(is_reported);
                Err(error)
            }
            None => {
                self.is_reported = Some(Arc::new(AtomicBool::new(true)));
                let reason = "the task of the watch stream has ended";
                let endpoint = self.channel.endpoint();
                let kind = EtcdErrorKind::Unavailable;
                Err(EtcdError::new(kind, "watch", &endpoint, reason))
            }
        }
    }

    /// Returns whether the caller must record the error of this watch as a failure of its member. If the stream has ended, returns true for
    /// only one of its watches. Returns false if the error shows nothing about the member.
    pub(super) fn take_report(&self) -> bool {
        let reported = self.is_reported.as_ref();
        reported.is_none_or(|reported| !reported.swap(true, Ordering::Relaxed))
    }

    /// Returns the member that serves the watch.
    #[cfg(test)]
    pub(super) fn endpoint(&self) -> String {
        self.channel.endpoint()
    }

    /// Converts a cancellation message of the server into an error.
    pub(crate) fn cancel_error(&self, message: &WatchMessage) -> EtcdError {
        if let Some(compacted) = message.compacted {
            let source = format!("history before revision {compacted} is compacted");
            return EtcdError::new(
                EtcdErrorKind::Compacted,
                "watch",
                &self.channel.endpoint(),
                source,
            );
        }
        error::of_reason("watch", &self.channel.endpoint(), &message.cancel_reason)
    }
}

/// Limit on the time until a watcher is created. It is longer than the timeouts of the stream's task.
const CREATED: Duration = Duration::from_secs(15);
