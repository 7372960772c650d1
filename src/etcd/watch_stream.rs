//! Shared watch streams: all watches of a client are multiplexed on few streams.
//!
//! One stream per watch does not scale. Servers and proxies limit the streams of a connection (`--max-concurrent-streams`). Watches beyond
//! the limit would wait forever, and so would reads and writes on the same connection. Each silent stream also costs a probe now and then:
//! a request that shows whether the stream still works. So watches share streams. One task owns each stream, and delivers each message to
//! the watch that the message is for. A watch has one watcher at the server for each of its ranges.
//!
//! If the server cancels or rejects a watch, or has compacted the history that the watch needs, only that watch ends. A watch whose owner
//! does not receive the messages fast enough is cancelled, so that the messages do not fill the memory. When the stream ends, all its
//! watches end, and their owners open new watches on another stream.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use etcd_client::proto::PbWatchResponse;
use etcd_client::{WatchFilterType, WatchOptions, WatchStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use tracing::Instrument;

use super::cluster_id::ClusterId;
use super::decode::{header, key_value};
use super::error;
use super::limits::{DEADLINE, MAX_MESSAGE};
use super::request_channel::RequestChannel;
use super::token_cell::Token;
use crate::error::{EtcdError, EtcdErrorKind};
use crate::keyspace::{Event, Key, Range, Revision, WatchMessage};

/// The watch streams of a client. Clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct WatchStreams(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    cluster: Arc<ClusterId>,
    /// Locked while a stream is opened, so that watches that start at the same time share one stream.
    opening: tokio::sync::Mutex<()>,
    open: Mutex<Vec<OpenStream>>,
}

impl Shared {
    fn open(&self) -> MutexGuard<'_, Vec<OpenStream>> {
        // No code panics while it holds this lock.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An open stream to which watches can be added.
#[derive(Debug)]
struct OpenStream {
    commands: mpsc::UnboundedSender<Command>,
    channel: RequestChannel,
    /// The token that the stream was opened with. etcd checks every watcher on the stream with this token, so watches with a newer token
    /// need another stream.
    token: Option<Token>,
    /// The number of watchers on the stream.
    watchers: usize,
}

#[derive(Debug)]
enum Command {
    Subscribe(Subscriber),
    Unsubscribe(u64),
}

/// A delivery from the task of a stream to one watch: a message, or the end of the watch.
#[derive(Debug)]
pub(super) enum Delivery {
    Message(WatchMessage),
    /// The watch has ended. The watches of one stream share `is_reported`, so that the end of the stream is recorded as a failure of its
    /// member only once.
    Ended {
        error: EtcdError,
        is_reported: Arc<AtomicBool>,
    },
}

/// A started watch: the channel of the stream, the receiver of the watch's deliveries, and the guard of the watch.
pub(super) type Subscribed = (
    RequestChannel,
    mpsc::UnboundedReceiver<Delivery>,
    WatchGuard,
);

/// A watch, as the task of its stream stores it.
#[derive(Debug)]
struct Subscriber {
    id: u64,
    ranges: Vec<Range>,
    from: Option<Revision>,
    /// Whether the stream is probed for this watch when it is silent.
    is_probed: bool,
    deliveries: mpsc::UnboundedSender<Delivery>,
    /// Estimated number of bytes of the queued messages: those that the owner of the watch has not received yet.
    backlog: Arc<AtomicUsize>,
}

/// Keeps a watch on its stream. Dropping the guard cancels the watch.
#[derive(Debug)]
pub(super) struct WatchGuard {
    id: u64,
    commands: mpsc::UnboundedSender<Command>,
    backlog: Arc<AtomicUsize>,
}

impl WatchGuard {
    pub(super) fn on_received(&self, message: &WatchMessage) {
        self.backlog.fetch_sub(size(message), Ordering::Relaxed);
    }
}

impl Drop for WatchGuard {
    fn drop(&mut self) {
        // The send fails only if the stream has ended. The watch has then ended as well.
        let _ = self.commands.send(Command::Unsubscribe(self.id));
    }
}

impl WatchStreams {
    pub(super) fn new(cluster: Arc<ClusterId>) -> Self {
        Self(Arc::new(Shared {
            cluster,
            ..Shared::default()
        }))
    }

    /// Returns how many streams are open.
    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.0.open().len()
    }

    /// Starts a watch on a shared stream. If no open stream with this token has room, opens a stream over `channel`, and waits for its
    /// response headers. Does not wait until the watchers are created.
    pub(super) async fn watch(
        &self,
        channel: RequestChannel,
        token: Option<Token>,
        ranges: Vec<Range>,
        from: Option<Revision>,
        is_probed: bool,
    ) -> Result<Subscribed, EtcdError> {
        let (deliveries, received) = mpsc::unbounded_channel();
        let backlog = Arc::new(AtomicUsize::new(0));
        let subscriber = Subscriber {
            id: fastrand::u64(..),
            ranges,
            from,
            is_probed,
            deliveries,
            backlog: Arc::clone(&backlog),
        };
        let id = subscriber.id;
        let joined = match self.subscribe(subscriber, token.as_ref()) {
            Ok(joined) => joined,
            Err(subscriber) => {
                let _opening = self.0.opening.lock().await;
                // Another watch may have opened a stream in the meantime.
                match self.subscribe(subscriber, token.as_ref()) {
                    Ok(joined) => joined,
                    Err(subscriber) => self.open(channel, token, subscriber).await?,
                }
            }
        };
        let (commands, channel) = joined;
        let guard = WatchGuard {
            id,
            commands,
            backlog,
        };
        Ok((channel, received, guard))
    }

    /// Adds a watch to an open stream with the same token. If no such stream has room, returns the watch as the error.
    fn subscribe(
        &self,
        subscriber: Subscriber,
        token: Option<&Token>,
    ) -> Result<(mpsc::UnboundedSender<Command>, RequestChannel), Subscriber> {
        let mut all = self.0.open();
        // Removes the streams whose runtime has ended: their tasks could not remove them.
        all.retain(|open| !open.commands.is_closed());
        let is_same = |open: &OpenStream| match (&open.token, token) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            (None, None) => true,
            _ => false,
        };
        let found = all
            .iter_mut()
            .find(|open| is_same(open) && open.watchers < MAX_WATCHERS);
        let Some(open) = found else {
            return Err(subscriber);
        };
        let watchers = subscriber.ranges.len();
        match open.commands.send(Command::Subscribe(subscriber)) {
            Ok(()) => {
                open.watchers += watchers;
                Ok((open.commands.clone(), open.channel.clone()))
            }
            Err(mpsc::error::SendError(Command::Subscribe(subscriber))) => Err(subscriber),
            Err(_) => unreachable!("the command that was sent is a `Subscribe`"),
        }
    }

    /// Opens a stream, with `subscriber` as its first watch.
    async fn open(
        &self,
        channel: RequestChannel,
        token: Option<Token>,
        subscriber: Subscriber,
    ) -> Result<(mpsc::UnboundedSender<Command>, RequestChannel), EtcdError> {
        let mut watcher_requests = watcher_requests(&subscriber);
        let Some((range, from)) = watcher_requests
            .pop_front()
            .map(|request| (request.range, request.from))
        else {
            let reason = "a watch without a range";
            let kind = EtcdErrorKind::InvalidRequest;
            return Err(EtcdError::new(kind, "watch", &channel.endpoint(), reason));
        };
        let client = channel.client.watch_client();
        let mut client = client.max_decoding_message_size(MAX_MESSAGE);
        let options = options(&range, from).with_watch_id(FIRST_ID);
        let stream = client.watch(range.start.as_bytes(), Some(options)).await;
        let stream =
            stream.map_err(|source| error::of_client("watch", &channel.endpoint(), source))?;
        let (commands, received) = mpsc::unbounded_channel();
        let may_be_rejected = token.is_some() || channel.service.is_none();
        self.0.open().push(OpenStream {
            commands: commands.clone(),
            channel: channel.clone(),
            token,
            watchers: subscriber.ranges.len(),
        });
        let task = Task {
            streams: self.clone(),
            channel: channel.clone(),
            stream,
            own_commands: commands.clone(),
            commands: received,
            probe: range,
            may_be_rejected,
            creating: VecDeque::from([(FIRST_ID, Creating::Watcher(subscriber.id))]),
            last_id: FIRST_ID,
            numbering: Numbering::Unknown,
            queue: watcher_requests,
            watchers: HashMap::new(),
            subscribers: HashMap::from([(subscriber.id, SubscriberState::new(subscriber))]),
            last_activity: Instant::now(),
            probe_after: probe_after(&channel),
            probing: false,
        };
        tokio::spawn(task.run().in_current_span());
        Ok((commands, channel))
    }
}

/// A request for a watcher that is queued and not sent yet.
#[derive(Debug)]
struct WatcherRequest {
    subscriber: u64,
    range: Range,
    from: Option<Revision>,
}

fn watcher_requests(subscriber: &Subscriber) -> VecDeque<WatcherRequest> {
    let create = |range: &Range| WatcherRequest {
        subscriber: subscriber.id,
        range: range.clone(),
        from: subscriber.from,
    };
    subscriber.ranges.iter().map(create).collect()
}

/// Whether the server uses the watch ids that the requests ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Numbering {
    /// Not known yet, because no watcher was created.
    Unknown,
    /// The server uses the requested ids, as etcd does. It also answers in the order of the requests.
    AsRequested,
    /// The server chooses the ids, as `etcd grpc-proxy` does. It may answer in any order, so only one watcher is requested at a time.
    ByServer,
}

/// A watcher that was requested and is not created yet.
#[derive(Clone, Copy, Debug)]
enum Creating {
    /// A watcher of the subscriber with this id.
    Watcher(u64),
    /// A probe: a watcher whose only purpose is to show that the stream works.
    Probe,
}

/// A subscriber and its watchers.
#[derive(Debug)]
struct SubscriberState {
    subscriber: Subscriber,
    watchers: Vec<i64>,
    /// Whether the server may still send history (past events) that the watch has requested. Only history can make a message exceed the
    /// size limit.
    is_behind: bool,
}

impl SubscriberState {
    fn new(subscriber: Subscriber) -> Self {
        Self {
            is_behind: subscriber.from.is_some(),
            subscriber,
            watchers: Vec::new(),
        }
    }
}

/// The task that owns one stream.
struct Task {
    streams: WatchStreams,
    channel: RequestChannel,
    stream: WatchStream,
    /// A sender to `commands`. It identifies this stream in the list of open streams.
    own_commands: mpsc::UnboundedSender<Command>,
    commands: mpsc::UnboundedReceiver<Command>,
    /// The range of the probes.
    probe: Range,
    /// Whether etcd may reject a probe because of the token of the stream.
    may_be_rejected: bool,
    /// The requests for watchers that were not answered yet, with the requested ids.
    creating: VecDeque<(i64, Creating)>,
    last_id: i64,
    numbering: Numbering,
    queue: VecDeque<WatcherRequest>,
    /// The id of each watcher's subscriber, by the id of the watcher.
    watchers: HashMap<i64, u64>,
    subscribers: HashMap<u64, SubscriberState>,
    /// The start of the current timeout: the time of the last message or probe, or of a new watch on a stream without open requests.
    last_activity: Instant,
    /// The silence after which the next probe is sent.
    probe_after: Duration,
    probing: bool,
}

impl Task {
    async fn run(mut self) {
        let error = loop {
            if self.is_done() {
                return;
            }
            if let Err(error) = self.send_watcher_requests().await {
                break error;
            }
            let timeout = match (self.numbering, self.creating.is_empty(), self.probing) {
                // A healthy member immediately answers the first request for a watcher.
                (Numbering::Unknown, ..) => DEADLINE,
                (_, _, true) => PROBE_TIMEOUT,
                // The stream has worked before, and the answer may be queued behind a long message.
                (_, false, false) => ANSWER_TIMEOUT,
                (_, true, false) if self.is_probed() => self.probe_after,
                (_, true, false) => NEVER,
            };
            let message = tokio::select! {
                biased;
                command = self.commands.recv() => {
                    if let Some(command) = command
                        && let Err(error) = self.on_command(command).await
                    {
                        break error;
                    }
                    continue;
                }
                message = timeout_at(self.last_activity + timeout, self.stream.message()) => message,
            };
            let outcome = match message {
                Ok(Ok(Some(message))) => self.on_message(message.0).await,
                Ok(Ok(None)) => {
                    let reason = "the stream was closed";
                    let kind = EtcdErrorKind::Unavailable;
                    Err(EtcdError::new(kind, "watch", &self.endpoint(), reason))
                }
                Ok(Err(source)) => Err(error::of_client("watch", &self.endpoint(), source)),
                Err(_) if self.probing => {
                    let waited = self.probe_after + PROBE_TIMEOUT;
                    Err(error::deadline("watch", &self.endpoint(), waited))
                }
                Err(_) if !self.creating.is_empty() => {
                    Err(error::deadline("watch", &self.endpoint(), timeout))
                }
                Err(_) if self.is_probed() => self.send_probe().await,
                Err(_) => {
                    self.last_activity = Instant::now();
                    Ok(())
                }
            };
            if let Err(error) = outcome {
                break error;
            }
        };
        self.fail(&error);
    }

    /// Returns whether the stream is probed when it is silent. A stream on which a registration watches only its own keys is not probed: the
    /// registration reads the keys at intervals, and opens another watch if it finds a change that the watch has not delivered. On the
    /// channel of an external client, each stream is probed, because nothing else may show that the connection is dead.
    fn is_probed(&self) -> bool {
        let mut watched = self.subscribers.values();
        self.channel.service.is_none() || watched.any(|watched| watched.subscriber.is_probed)
    }

    /// Returns whether the stream has no watch any more. If so, removes the stream from the list, so that no watch is added.
    fn is_done(&self) -> bool {
        if !self.subscribers.is_empty() {
            return false;
        }
        let mut open = self.streams.0.open();
        // Watches are added under the same lock, so no watch can be added between this check and the removal of the stream.
        if !self.commands.is_empty() {
            return false;
        }
        open.retain(|open| !open.commands.same_channel(&self.own_commands));
        true
    }

    fn endpoint(&self) -> String {
        self.channel.endpoint()
    }

    async fn on_command(&mut self, command: Command) -> Result<(), EtcdError> {
        match command {
            Command::Subscribe(subscriber) => {
                if self.creating.is_empty() && !self.probing {
                    // No request was open until now, so the silence of the stream was normal. The timeout of the new request starts now.
                    self.last_activity = Instant::now();
                }
                self.queue.extend(watcher_requests(&subscriber));
                self.subscribers
                    .insert(subscriber.id, SubscriberState::new(subscriber));
                Ok(())
            }
            Command::Unsubscribe(id) => self.unsubscribe(id).await,
        }
    }

    /// Sends the queued requests for watchers. The number of unanswered requests is limited, because the task reads no answers while it
    /// sends. Without the limit, both sides could block: the server until its answers are read, and the task until its requests are read.
    async fn send_watcher_requests(&mut self) -> Result<(), EtcdError> {
        let most = match self.numbering {
            Numbering::AsRequested => MAX_UNANSWERED,
            Numbering::Unknown | Numbering::ByServer => 1,
        };
        while self.creating.len() < most
            && let Some(request) = self.queue.pop_front()
        {
            if !self.subscribers.contains_key(&request.subscriber) {
                continue;
            }
            let options = options(&request.range, request.from);
            let creating = Creating::Watcher(request.subscriber);
            self.send_watcher_request(&request.range, options, creating)
                .await?;
        }
        Ok(())
    }

    async fn send_watcher_request(
        &mut self,
        range: &Range,
        options: WatchOptions,
        creating: Creating,
    ) -> Result<(), EtcdError> {
        self.last_id += 1;
        self.send_create(self.last_id, range, options, creating)
            .await
    }

    async fn send_create(
        &mut self,
        id: i64,
        range: &Range,
        options: WatchOptions,
        creating: Creating,
    ) -> Result<(), EtcdError> {
        let options = options.with_watch_id(id);
        let key = range.start.as_bytes().to_vec();
        let sent = self.stream.watch(key, Some(options)).await;
        self.sent(sent)?;
        self.creating.push_back((id, creating));
        Ok(())
    }

    /// Removes and returns the request that a `created` message answers. A rejection has the requested id, or -1 (from etcd 3.4.22 and
    /// 3.5.6 on), or an id that a proxy has chosen.
    fn take_answered(&mut self, id: i64, is_refused: bool) -> Option<Creating> {
        let requested = self
            .creating
            .iter()
            .position(|(requested, _)| *requested == id);
        if self.numbering == Numbering::Unknown && !is_refused {
            self.numbering = if requested.is_some() {
                Numbering::AsRequested
            } else {
                Numbering::ByServer
            };
        }
        let index = match self.numbering {
            Numbering::AsRequested => requested.unwrap_or(0),
            Numbering::Unknown | Numbering::ByServer => 0,
        };
        self.creating.remove(index).map(|(_, creating)| creating)
    }

    async fn unsubscribe(&mut self, id: u64) -> Result<(), EtcdError> {
        let Some(watched) = self.subscribers.remove(&id) else {
            return Ok(());
        };
        let ranges = watched.subscriber.ranges.len();
        for open in self.streams.0.open().iter_mut() {
            if open.commands.same_channel(&self.own_commands) {
                open.watchers = open.watchers.saturating_sub(ranges);
            }
        }
        for watcher in watched.watchers {
            self.watchers.remove(&watcher);
            self.cancel(watcher).await?;
        }
        Ok(())
    }

    async fn cancel(&mut self, watcher: i64) -> Result<(), EtcdError> {
        let sent = self.stream.cancel(watcher).await;
        self.sent(sent)
    }

    async fn on_message(&mut self, message: PbWatchResponse) -> Result<(), EtcdError> {
        self.last_activity = Instant::now();
        self.probing = false;
        let id = message.watch_id;
        // A message that rejects a watcher has both `created` and `canceled` set. A message with only `canceled` set may be the answer to a
        // cancellation that this task has sent.
        let subscriber = if message.created {
            if message.canceled && message.cancel_reason.contains(DUPLICATE) {
                // The answer to a probe.
                if let Some(Creating::Probe) = self.take_answered(id, true) {
                    self.on_caught_up();
                }
                return Ok(());
            }
            if message.canceled && self.watchers.contains_key(&id) {
                // A probe with the id of an existing watcher was rejected, for another reason than the duplicate id. Up to etcd 3.4.21 and
                // 3.5.5, the rejection has the id of the existing watcher, and etcd sends no more events of that watcher.
                let kind = EtcdErrorKind::Unavailable;
                let reason = format!("a probe was rejected: {}", message.cancel_reason);
                return Err(EtcdError::new(kind, "watch", &self.endpoint(), reason));
            }
            if message.canceled {
                // The reason for the rejection may be the token of the stream, so no further watch is added to the stream.
                self.retire();
            }
            match self.take_answered(id, message.canceled) {
                Some(Creating::Watcher(subscriber)) => subscriber,
                Some(Creating::Probe) | None if message.canceled => return Ok(()),
                Some(Creating::Probe) | None => {
                    self.on_caught_up();
                    return self.cancel(id).await;
                }
            }
        } else {
            match self.watchers.get(&id) {
                Some(subscriber) => *subscriber,
                None => return Ok(()),
            }
        };
        let Some(watched) = self.subscribers.get_mut(&subscriber) else {
            // The watch was dropped before its watcher was created.
            return if message.canceled {
                Ok(())
            } else {
                self.cancel(id).await
            };
        };
        if message.created && !message.canceled {
            let header = header(message.header.as_ref());
            let endpoint = self.channel.endpoint();
            self.streams.0.cluster.check(header, "watch", &endpoint)?;
            self.watchers.insert(id, subscriber);
            watched.watchers.push(id);
            let from = watched.subscriber.from;
            watched.is_behind = from.is_some_and(|from| header.revision >= from);
        } else if message.canceled && !message.created {
            self.watchers.remove(&id);
            watched.watchers.retain(|known| *known != id);
        } else if !message.events.is_empty() {
            watched.is_behind = false;
        }
        let mut message = watch_message(message);
        // Events outside the ranges of the watch are dropped: if a server confuses its watchers, events of one service must not reach
        // another service.
        let ranges = &watched.subscriber.ranges;
        message
            .events
            .retain(|event| ranges.iter().any(|range| range.contains(event.key())));
        let bytes = size(&message);
        let before = watched
            .subscriber
            .backlog
            .fetch_add(bytes, Ordering::Relaxed);
        let delivery = if before > 0 && before + bytes > MAX_BACKLOG {
            let reason = format!("the unread events of the watch exceed {MAX_BACKLOG} bytes");
            let kind = EtcdErrorKind::ResponseTooLarge;
            let error = EtcdError::new(kind, "watch", &self.channel.endpoint(), reason);
            Delivery::Ended {
                error,
                is_reported: Arc::new(AtomicBool::new(true)),
            }
        } else {
            Delivery::Message(message)
        };
        let has_ended = matches!(delivery, Delivery::Ended { .. });
        // The send fails only if the watch is being dropped.
        let _ = watched.subscriber.deliveries.send(delivery);
        if has_ended {
            return self.unsubscribe(subscriber).await;
        }
        Ok(())
    }

    /// Removes the stream from the list, so that no further watch is added. The watches on the stream continue.
    fn retire(&self) {
        let mut open = self.streams.0.open();
        open.retain(|open| !open.commands.same_channel(&self.own_commands));
    }

    /// Handles the answer to a probe. A probe is sent only after a silence, so its answer shows that the server has sent all history.
    fn on_caught_up(&mut self) {
        for watched in self.subscribers.values_mut() {
            watched.is_behind = false;
        }
    }

    /// Sends a probe: a request for a watcher. The answer, or any other message, shows that the stream works.
    ///
    /// Usually, the request has the id of an existing watcher. etcd rejects it with one message, so a probe costs one request and one
    /// answer. If no watcher exists, if the server chooses the ids itself, or if it may reject the token of the stream, the request has a
    /// new id. The server then creates a watcher, which receives no events and is cancelled as soon as it is created.
    ///
    /// A progress request cannot be the probe: from 3.5.22 and 3.6.2 on, etcd does not answer it on a quiet watch.
    async fn send_probe(&mut self) -> Result<(), EtcdError> {
        self.last_activity = Instant::now();
        self.probe_after = probe_after(&self.channel);
        self.probing = true;
        let filters = [WatchFilterType::NoPut, WatchFilterType::NoDelete];
        let range = self.probe.clone();
        let options = options(&range, None).with_filters(filters);
        let existing = self.watchers.keys().next().copied();
        let has_own_numbers = self.numbering == Numbering::AsRequested;
        let existing = existing.filter(|_| has_own_numbers && !self.may_be_rejected);
        if let Some(id) = existing {
            return self.send_create(id, &range, options, Creating::Probe).await;
        }
        self.send_watcher_request(&range, options, Creating::Probe)
            .await
    }

    fn sent(&self, sent: Result<(), etcd_client::Error>) -> Result<(), EtcdError> {
        sent.map_err(|source| error::of_client("watch", &self.endpoint(), source))
    }

    /// Ends all watches of the stream with the error.
    fn fail(mut self, error: &EtcdError) {
        self.retire();
        // Watches that were added before the stream was removed from the list, and that the task has not handled yet, end as well.
        while let Ok(command) = self.commands.try_recv() {
            if let Command::Subscribe(subscriber) = command {
                self.subscribers
                    .insert(subscriber.id, SubscriberState::new(subscriber));
            }
        }
        let is_too_large = error.kind() == EtcdErrorKind::ResponseTooLarge;
        let has_cause = self.subscribers.values().any(|watched| watched.is_behind);
        let is_reported = Arc::new(AtomicBool::new(false));
        for watched in self.subscribers.into_values() {
            // Only history makes a message too large, so a watch that has received its history is not the cause. Such a watch gets a
            // different error, after which its owner resumes the watch and does not list the keys.
            let error = if is_too_large && has_cause && !watched.is_behind {
                let reason = "a message for another watch on the stream was too large";
                let kind = EtcdErrorKind::Unavailable;
                EtcdError::new(kind, "watch", &self.channel.endpoint(), reason)
            } else {
                error.clone()
            };
            let delivery = Delivery::Ended {
                error,
                is_reported: Arc::clone(&is_reported),
            };
            // The send fails only if the watch is being dropped.
            let _ = watched.subscriber.deliveries.send(delivery);
        }
    }
}

/// Returns the options of a watcher. Fragments are not requested, because they are expensive: to divide a batch into fragments, etcd
/// measures the batch again for each event. A backlog of 50 000 events of 90 bytes arrives after 0.2 s as one message of 5 MiB. In
/// fragments, it takes 14 s with etcd 3.4.23 and 54 s with 3.7.3. During this time, one core of the server is busy, and the answers to
/// probes are delayed. If a backlog is larger than [`MAX_MESSAGE`], the keys are listed instead, page by page.
fn options(range: &Range, from: Option<Revision>) -> WatchOptions {
    let options = WatchOptions::new().with_range(range.end.as_bytes());
    match from {
        Some(revision) => options.with_start_revision(revision.get()),
        None => options,
    }
}

fn watch_message(message: PbWatchResponse) -> WatchMessage {
    WatchMessage {
        header: header(message.header.as_ref()),
        events: message.events.into_iter().filter_map(event).collect(),
        fragment: message.fragment,
        created: message.created,
        canceled: message.canceled,
        compacted: Revision::new(message.compact_revision).known(),
        cancel_reason: message.cancel_reason,
    }
}

/// Converts an event, or returns `None` for an unknown kind of event. The raw field is used because the accessor of `etcd-client` panics on
/// an unknown kind.
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

/// Returns the silence after which a probe is sent. On the channel of the registry, it is random, so that processes that were started
/// together do not send their probes together.
///
/// That channel also has an HTTP/2 keep-alive, which closes a dead connection within 9 s. So the probe is needed only if the peer answers
/// PINGs but does not serve watches. The peer is then an HTTP/2 proxy whose etcd is dead, or an etcd with a fault. An external client may
/// have no keep-alive, so its probes are sent earlier.
fn probe_after(channel: &RequestChannel) -> Duration {
    if channel.service.is_some() {
        PROBE_AFTER.mul_f64(0.75 + 0.5 * fastrand::f64())
    } else {
        PROBE_AFTER_EXTERNAL
    }
}

/// Mean silence after which a probe is sent on the channel of the registry.
const PROBE_AFTER: Duration = Duration::from_secs(30);
/// The silence after which a probe is sent on the channel of an external client.
const PROBE_AFTER_EXTERNAL: Duration = Duration::from_secs(5);
/// The timeout of a stream that is not probed. When it expires, nothing happens.
const NEVER: Duration = Duration::from_secs(24 * 60 * 60);
/// Limit on the time until a probe is answered. On etcd 3.4.23 to 3.5.30, an answer took 0.2 to 2 ms, even while the server sent history,
/// and through `etcd grpc-proxy`.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);
/// Limit on the time until the request for a watcher is answered on a stream that has worked before.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(8);
/// Part of the text with which etcd rejects a watcher whose id is in use (etcd 3.4.23 to 3.7.3).
const DUPLICATE: &str = "duplicate watch";
/// Limit on the watchers of one stream, because a long message delays all watchers of its stream.
const MAX_WATCHERS: usize = 1_000;
/// Maximum number of requests for watchers that are not answered yet. All of them fit into the queue of `etcd-client`, which has room for
/// 100 requests.
const MAX_UNANSWERED: usize = 64;
/// The id of the first watcher of a stream. With 0, the server would choose the id.
const FIRST_ID: i64 = 1;
/// Limit on the estimated bytes of the messages that are queued for a watch. A message is accepted at any size if no other message is
/// queued.
const MAX_BACKLOG: usize = 4 * MAX_MESSAGE;

/// Estimates the memory that a message takes.
fn size(message: &WatchMessage) -> usize {
    let of = |event: &Event| match event {
        Event::Put(kv) => kv.key.as_bytes().len() + kv.value.len() + EVENT_OVERHEAD,
        Event::Delete { key, .. } => key.as_bytes().len() + EVENT_OVERHEAD,
    };
    message.events.iter().map(of).sum()
}

/// The memory of an event without its key and value, in bytes.
const EVENT_OVERHEAD: usize = 100;
