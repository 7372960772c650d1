//! A watch stream.

use std::time::Duration;

use etcd_client::{WatchFilterType, WatchOptions, WatchStream};
use tokio::time::{Instant, timeout_at};

use super::request_channel::RequestChannel;
use super::{DEADLINE, MAX_MESSAGE, error, header, key_value};
use crate::error::{EtcdError, EtcdErrorKind};
use crate::keyspace::{Event, Key, Range, Revision, WatchMessage};

/// An open watch on one range or several, over one stream. Dropping it ends it at the server.
///
/// A silent stream is probed by creating and cancelling a throw-away watcher on it: any message is life. HTTP/2 pings do not see a
/// member whose process hangs behind a live connection, and etcd from 3.5.22 and 3.6.2 on leaves progress requests unanswered on a quiet
/// watch.
#[derive(Debug)]
pub(crate) struct Watch {
    stream: WatchStream,
    /// What it was opened over: the member whose end of it is to be answered for.
    pub(super) channel: RequestChannel,
    /// At least one; each has a watcher of its own.
    ranges: Vec<Range>,
    /// The watchers' ids, from their first messages on, which come in the order of the ranges. The throw-away watchers have others.
    ids: Vec<i64>,
    /// When the last message came, or the probe that is not answered yet was sent.
    heard: Instant,
    probing: bool,
}

pub(super) async fn open(
    channel: RequestChannel,
    range: Range,
    from: Option<Revision>,
) -> Result<Watch, EtcdError> {
    let mut options = options(&range);
    if let Some(revision) = from {
        options = options.with_start_revision(revision.get());
    }
    let watch = channel.client.watch_client();
    let mut watch = watch.max_decoding_message_size(MAX_MESSAGE);
    let stream = watch.watch(range.start.as_bytes(), Some(options)).await;
    let stream = stream.map_err(|source| error::of_client("watch", &channel.endpoint(), source))?;
    Ok(Watch {
        stream,
        channel,
        ranges: vec![range],
        ids: Vec::new(),
        heard: Instant::now(),
        probing: false,
    })
}

/// Not in fragments: to cut a batch into them etcd measures it anew for each event. A backlog of 50 000 events of 90 bytes, which comes after
/// 0.2 s as one message of 5 MiB, takes 3.4.23 14 s in fragments, 3.7.3 54 s, and a core of the server as long; no probe is answered
/// meanwhile. What is larger than [`MAX_MESSAGE`] is listed, page by page.
fn options(range: &Range) -> WatchOptions {
    WatchOptions::new().with_range(range.end.as_bytes())
}

impl Watch {
    /// Watches one range more, from now.
    pub(super) async fn add(&mut self, range: Range) -> Result<(), EtcdError> {
        let options = options(&range);
        let key = range.start.as_bytes().to_vec();
        self.ranges.push(range);
        let sent = self.stream.watch(key, Some(options)).await;
        self.sent(sent)
    }

    /// Waits until every range is watched. Events that come before that are dropped: whoever waits for this reads afterwards.
    pub(crate) async fn created(&mut self) -> Result<(), EtcdError> {
        while !self.is_created() {
            let message = self.message().await?;
            if message.canceled {
                return Err(self.cancel_error(&message));
            }
        }
        Ok(())
    }

    fn is_created(&self) -> bool {
        self.ids.len() >= self.ranges.len()
    }

    /// The next message of the watchers. A stream that ends, even without an error, is an error: a watch has no end. So is one that is
    /// silent for 5 s and does not answer a probe within 3 s, and one whose first message is not there within 2 s.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing.
    pub(crate) async fn message(&mut self) -> Result<WatchMessage, EtcdError> {
        loop {
            let patience = match (self.is_created(), self.probing) {
                // Every member says at once that a watcher is created, or why it is not.
                (false, _) => DEADLINE,
                (true, true) => PROBE_ANSWER,
                (true, false) => SILENCE,
            };
            let Ok(message) = timeout_at(self.heard + patience, self.stream.message()).await else {
                if !self.is_created() {
                    return Err(error::deadline("watch", &self.channel.endpoint(), DEADLINE));
                }
                if self.probing {
                    let waited = SILENCE + PROBE_ANSWER;
                    return Err(error::deadline("watch", &self.channel.endpoint(), waited));
                }
                self.probe().await?;
                continue;
            };
            self.heard = Instant::now();
            self.probing = false;
            let message = message
                .map_err(|source| error::of_client("watch", &self.channel.endpoint(), source))?;
            let Some(message) = message else {
                let reason = "the stream was closed";
                let kind = EtcdErrorKind::Unavailable;
                return Err(EtcdError::new(
                    kind,
                    "watch",
                    &self.channel.endpoint(),
                    reason,
                ));
            };
            let message = message.0;
            // Throw-away watchers are made when all others are there.
            if !self.is_created() && (message.created || self.ids.is_empty()) {
                self.ids.push(message.watch_id);
            }
            if self.ids.contains(&message.watch_id) {
                return Ok(own(message));
            }
            if message.created && !message.canceled {
                let sent = self.stream.cancel(message.watch_id).await;
                self.sent(sent)?;
            }
        }
    }

    /// The member that serves it.
    #[cfg(test)]
    pub(super) fn endpoint(&self) -> String {
        self.channel.endpoint()
    }

    /// Asks for a sign of life.
    async fn probe(&mut self) -> Result<(), EtcdError> {
        self.heard = Instant::now();
        self.probing = true;
        let filters = [WatchFilterType::NoPut, WatchFilterType::NoDelete];
        let Some(range) = self.ranges.first() else {
            return Ok(());
        };
        let options = WatchOptions::new()
            .with_range(range.end.as_bytes())
            .with_filters(filters);
        let key = range.start.as_bytes().to_vec();
        // The channel of requests has room for a hundred, and one at most is under way.
        let sent = self.stream.watch(key, Some(options)).await;
        self.sent(sent)
    }

    fn sent(&self, sent: Result<(), etcd_client::Error>) -> Result<(), EtcdError> {
        sent.map_err(|source| error::of_client("watch", &self.channel.endpoint(), source))
    }

    /// Why a message cancelled the watch, as an error.
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

fn own(message: etcd_client::proto::PbWatchResponse) -> WatchMessage {
    WatchMessage {
        header: header(message.header.as_ref()),
        events: message.events.into_iter().filter_map(event).collect(),
        fragment: message.fragment,
        created: message.created,
        canceled: message.canceled,
        compacted: Revision::new(message.compact_revision),
        cancel_reason: message.cancel_reason,
    }
}

/// Measured on 3.4.23 to 3.5.30: a probe is answered in 0.2 to 2 ms, also during catch-up and through grpc-proxy.
const SILENCE: Duration = Duration::from_secs(5);
const PROBE_ANSWER: Duration = Duration::from_secs(3);

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
