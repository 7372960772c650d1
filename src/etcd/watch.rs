//! A watch: the handle of one subscription on a shared watch stream.

use tokio::sync::mpsc;

use super::error;
use super::request_channel::RequestChannel;
use super::watch_stream::{Delivery, Subscribed, Subscription};
use crate::error::{EtcdError, EtcdErrorKind};
use crate::keyspace::{Revision, WatchMessage};

/// An open watch on one range or several. Dropping it cancels its watchers at the server.
#[derive(Debug)]
pub(crate) struct Watch {
    /// The channel of the shared stream, which names the member that serves it.
    pub(super) channel: RequestChannel,
    deliveries: mpsc::UnboundedReceiver<Delivery>,
    /// Ends the subscription when it is dropped.
    subscription: Subscription,
    /// Watchers that the server has not created yet.
    uncreated: usize,
    /// Whether the end of the stream still counts against its member. Of all watches on a stream, one reports it.
    reports_end: bool,
}

impl Watch {
    pub(super) fn new((channel, deliveries, subscription): Subscribed, ranges: usize) -> Self {
        Self {
            channel,
            deliveries,
            subscription,
            uncreated: ranges,
            reports_end: true,
        }
    }

    /// Waits until the server has created the watcher of every range. Events before that are dropped: the caller reads the keys afterwards.
    pub(crate) async fn created(&mut self) -> Result<(), EtcdError> {
        while self.uncreated > 0 {
            let message = self.message().await?;
            if message.canceled {
                return Err(self.cancel_error(&message));
            }
        }
        Ok(())
    }

    /// Returns the next message of the watchers. The end of the stream is an error, even an orderly one: a watch has no end.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing.
    pub(crate) async fn message(&mut self) -> Result<WatchMessage, EtcdError> {
        match self.deliveries.recv().await {
            Some(Delivery::Message(message)) => {
                self.subscription.on_received(&message);
                self.uncreated -= usize::from(message.created).min(self.uncreated);
                Ok(message)
            }
            Some(Delivery::Ended { error, is_first }) => {
                self.reports_end = is_first;
                Err(error)
            }
            None => {
                self.reports_end = false;
                let reason = "the task of the watch stream has ended";
                let endpoint = self.channel.endpoint();
                let kind = EtcdErrorKind::Unavailable;
                Err(EtcdError::new(kind, "watch", &endpoint, reason))
            }
        }
    }

    /// Returns whether an error of this watch counts for or against its member.
    pub(super) fn reports_end(&self) -> bool {
        self.reports_end
    }

    /// Returns the member that serves the watch.
    #[cfg(test)]
    pub(super) fn endpoint(&self) -> String {
        self.channel.endpoint()
    }

    /// Returns the reason of a message that cancelled the watch, as an error.
    pub(crate) fn cancel_error(&self, message: &WatchMessage) -> EtcdError {
        if message.compacted > Revision::ZERO {
            let source = format!("history before revision {} is compacted", message.compacted);
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
