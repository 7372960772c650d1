//! The events that connections and health watches report to the driver.

use tokio::sync::mpsc;

use super::subchannel_table::DialId;
use crate::balance::health_status::Health;
use crate::transport::connection_task::ConnectionEvent;

/// An event of the connection of a subchannel.
#[derive(Debug)]
pub(super) enum SubchannelEvent {
    Connection(ConnectionEvent),
    Health(Health),
}

/// The queue of events. Each event is stored with the number of the dial that made its connection.
#[derive(Debug)]
pub(super) struct Events {
    sender: mpsc::UnboundedSender<(DialId, SubchannelEvent)>,
    receiver: mpsc::UnboundedReceiver<(DialId, SubchannelEvent)>,
}

impl Events {
    pub(super) fn new() -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        Self { sender, receiver }
    }

    /// Returns a function that reports events of one connection.
    pub(super) fn reporter(
        &self,
        dial_id: DialId,
    ) -> impl Fn(SubchannelEvent) + Clone + Send + 'static + use<> {
        let sender = self.sender.clone();
        move |event| {
            // The send fails only if the driver has ended, and then the event is not needed.
            let _ = sender.send((dial_id, event));
        }
    }

    /// Waits for the next event.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses no event.
    pub(super) async fn recv(&mut self) -> Option<(DialId, SubchannelEvent)> {
        self.receiver.recv().await
    }
}
