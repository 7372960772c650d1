//! A watch stream.

use std::sync::Arc;

use etcd_client::{Client, WatchOptions, WatchStream};

use super::{MAX_MESSAGE, error, header, key_value};
use crate::error::{EtcdError, EtcdErrorKind};
use crate::keyspace::{Event, Key, Range, Revision, WatchMessage};

/// An open watch. Dropping it ends it at the server.
#[derive(Debug)]
pub(crate) struct Watch {
    stream: WatchStream,
    endpoint: Arc<str>,
}

pub(super) async fn open(
    client: Client,
    endpoint: Arc<str>,
    range: Range,
    from: Option<Revision>,
) -> Result<Watch, EtcdError> {
    let mut options = WatchOptions::new()
        .with_range(range.end.as_bytes())
        .with_fragment();
    if let Some(revision) = from {
        options = options.with_start_revision(revision.get());
    }
    let mut watch = client.watch_client().max_decoding_message_size(MAX_MESSAGE);
    let stream = watch.watch(range.start.as_bytes(), Some(options)).await;
    let stream = stream.map_err(|source| error::of_client("watch", &endpoint, source))?;
    Ok(Watch { stream, endpoint })
}

impl Watch {
    /// The next message. A stream that ends, even without an error, is an error: a watch has no end.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing.
    pub(crate) async fn message(&mut self) -> Result<WatchMessage, EtcdError> {
        let message = self.stream.message().await;
        let message =
            message.map_err(|source| error::of_client("watch", &self.endpoint, source))?;
        let Some(message) = message else {
            return Err(EtcdError::new(
                EtcdErrorKind::Unavailable,
                "watch",
                &self.endpoint,
                "the stream was closed",
            ));
        };
        let message = message.0;
        Ok(WatchMessage {
            header: header(message.header.as_ref()),
            events: message.events.into_iter().filter_map(event).collect(),
            fragment: message.fragment,
            created: message.created,
            canceled: message.canceled,
            compacted: Revision::new(message.compact_revision),
            cancel_reason: message.cancel_reason,
        })
    }

    /// Why a message cancelled the watch, as an error.
    pub(crate) fn cancel_error(&self, message: &WatchMessage) -> EtcdError {
        if message.compacted > Revision::ZERO {
            let source = format!("history before revision {} is compacted", message.compacted);
            return EtcdError::new(EtcdErrorKind::Compacted, "watch", &self.endpoint, source);
        }
        error::of_reason("watch", &self.endpoint, &message.cancel_reason)
    }
}

/// An event of a kind we know. `etcd-client`'s own accessor panics on others, hence the raw field.
fn event(event: etcd_client::proto::PbEvent) -> Option<Event> {
    let kv = event.kv?;
    match event.r#type {
        0 => Some(Event::Put(key_value(kv))),
        1 => Some(Event::Delete {
            key: Key::from(kv.key),
            mod_revision: Revision::new(kv.mod_revision),
        }),
        _ => None,
    }
}
