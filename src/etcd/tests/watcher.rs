//! One watch stream of the scripted etcd.

use etcd_client::proto::{
    PbEvent, PbResponseHeader, PbWatchRequest, PbWatchRequestUnion, PbWatchResponse,
};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tonic::{Status, Streaming};

use super::fake::Fake;

/// A watcher on the stream.
struct Watcher {
    id: i64,
    next: i64,
    start: Vec<u8>,
    end: Vec<u8>,
    /// Whether the watcher filters out puts and deletes. The client requests such a watcher only as a probe, to check whether the stream
    /// works.
    deaf: bool,
}

/// `Ok` if the stream stays open, `Err` if it ends.
type Alive = Result<(), ()>;

struct Stream {
    fake: Fake,
    answers: mpsc::Sender<Result<PbWatchResponse, Status>>,
    watchers: Vec<Watcher>,
    ids: i64,
    /// Whether the server sends no more messages on this stream. A silent stream stays open.
    silent: bool,
    /// If set, every watcher is rejected with this reason.
    refusal: Option<Status>,
}

pub(super) async fn serve(
    fake: Fake,
    mut requests: Streaming<PbWatchRequest>,
    answers: mpsc::Sender<Result<PbWatchResponse, Status>>,
    silent: bool,
    refusal: Option<Status>,
) {
    let mut changed = fake.changed.subscribe();
    let epoch = fake.store().epoch;
    let mut stream = Stream {
        fake,
        answers,
        watchers: Vec::new(),
        ids: 0,
        silent,
        refusal,
    };
    let mut delayed = JoinSet::new();
    loop {
        let alive = tokio::select! {
            biased;
            () = stream.answers.closed() => return,
            request = requests.message() => match request {
                Ok(Some(request)) => {
                    let delay = stream.fake.script().delay;
                    if delay.is_zero() {
                        stream.on_request(request).await
                    } else {
                        let open = stream.fake.open_request(kind(&request));
                        delayed.spawn(async move {
                            tokio::time::sleep(delay).await;
                            drop(open);
                            request
                        });
                        Ok(())
                    }
                }
                _ => return,
            },
            Some(Ok(request)) = delayed.join_next() => stream.on_request(request).await,
            _ = changed.changed() => {
                // A member that restarts loses its streams.
                if stream.fake.store().epoch != epoch {
                    return;
                }
                stream.catch_up().await
            }
        };
        if alive.is_err() {
            return;
        }
    }
}

/// Returns the kind of a request, for the counts of the requests that have no response yet.
fn kind(request: &PbWatchRequest) -> &'static str {
    match &request.request_union {
        Some(PbWatchRequestUnion::CreateRequest(create)) if create.key.ends_with(b"/config") => {
            "watcher of a service config"
        }
        Some(PbWatchRequestUnion::CreateRequest(_)) => "watcher",
        _ => "other",
    }
}

impl Stream {
    async fn send(&mut self, answer: PbWatchResponse) -> Alive {
        if self.silent || self.fake.script().mute == Some(&*self.fake.member) {
            return Ok(());
        }
        self.answers.send(Ok(answer)).await.map_err(drop)
    }

    fn header(&self) -> PbResponseHeader {
        self.fake.store().header()
    }

    fn message(&self, watch_id: i64) -> PbWatchResponse {
        PbWatchResponse {
            // As measured: the revision in the header may be higher than the revisions of the events.
            header: Some(self.header()),
            watch_id,
            ..PbWatchResponse::default()
        }
    }

    async fn on_request(&mut self, request: PbWatchRequest) -> Alive {
        self.fake.count("watch request");
        match request.request_union {
            Some(PbWatchRequestUnion::CreateRequest(create)) => {
                let deaf = !create.filters.is_empty();
                let fake = &self.fake;
                fake.insist(
                    !create.fragment,
                    "fragments must not be requested, because they are slow",
                );
                fake.insist(
                    !deaf || create.filters.len() == 2,
                    "a probe must filter puts and deletes",
                );
                if let Some(refusal) = &self.refusal {
                    let refused = PbWatchResponse {
                        created: true,
                        canceled: true,
                        cancel_reason: refusal.message().to_owned(),
                        ..self.message(-1)
                    };
                    return self.send(refused).await;
                }
                self.ids += 1;
                let own = self.fake.script().numbers_watchers || create.watch_id == 0;
                let id = if own {
                    1_000 - self.ids
                } else {
                    create.watch_id
                };
                if self.watchers.iter().any(|watcher| watcher.id == id) {
                    let refused = PbWatchResponse {
                        created: true,
                        canceled: true,
                        cancel_reason: "mvcc: duplicate watch ID provided on the WatchStream"
                            .to_owned(),
                        ..self.message(-1)
                    };
                    return self.send(refused).await;
                }
                let created = PbWatchResponse {
                    created: true,
                    ..self.message(id)
                };
                let (revision, compacted) = {
                    let store = self.fake.store();
                    (store.revision, store.compacted)
                };
                self.send(created).await?;
                if create.start_revision > 0 && create.start_revision < compacted {
                    return self.overtaken(id, compacted).await;
                }
                let next = match create.start_revision {
                    0 => revision + 1,
                    start => start,
                };
                self.watchers.push(Watcher {
                    id,
                    next,
                    start: create.key,
                    end: create.range_end,
                    deaf,
                });
                self.catch_up().await
            }
            Some(PbWatchRequestUnion::CancelRequest(cancel)) => {
                self.watchers
                    .retain(|watcher| watcher.id != cancel.watch_id);
                let cancelled = PbWatchResponse {
                    canceled: true,
                    ..self.message(cancel.watch_id)
                };
                self.send(cancelled).await
            }
            _ => Ok(()),
        }
    }

    /// Cancels a watcher, because the events that it still needs are compacted. As measured, etcd first creates and then cancels such a
    /// watcher, and the header of the cancellation has no revision.
    async fn overtaken(&mut self, id: i64, compacted: i64) -> Alive {
        self.watchers.retain(|watcher| watcher.id != id);
        let cancelled = PbWatchResponse {
            header: Some(PbResponseHeader::default()),
            canceled: true,
            compact_revision: compacted,
            ..self.message(id)
        };
        self.send(cancelled).await
    }

    /// Sends the outstanding events to every watcher, possibly with one of the faults that real servers have shown.
    async fn catch_up(&mut self) -> Alive {
        let ids: Vec<_> = self.watchers.iter().map(|watcher| watcher.id).collect();
        for id in ids {
            let Some(index) = self.watchers.iter().position(|watcher| watcher.id == id) else {
                continue;
            };
            let Watcher { next, deaf, .. } = self.watchers[index];
            let (events, stale, reached, compacted) = {
                let (start, end) = (&self.watchers[index].start, &self.watchers[index].end);
                let store = self.fake.store();
                let events = store.events(next, start, end);
                let stale = store.events(next - 3, start, end);
                (events, stale, store.revision, store.compacted)
            };
            if next < compacted && !deaf {
                self.overtaken(id, compacted).await?;
                continue;
            }
            // As measured: if the revision of a wiped store is below the revision that the watcher waits for, the watcher receives nothing.
            if deaf || reached < next {
                continue;
            }
            let events = self.without_lost(events);
            if !events.is_empty() {
                self.disturb(id, stale).await?;
                self.batches(id, events).await?;
            }
            self.watchers[index].next = reached + 1;
        }
        Ok(())
    }

    /// Drops the next deletions, as many as [`Script::lost_deletes`](super::fake::Script::lost_deletes) contains. Real servers have also failed
    /// to send deletions.
    fn without_lost(&self, mut events: Vec<PbEvent>) -> Vec<PbEvent> {
        let mut script = self.fake.script();
        events.retain(|event| {
            let lost = event.r#type == 1 && script.lost_deletes > 0;
            script.lost_deletes -= usize::from(lost);
            !lost
        });
        events
    }

    /// Injects a random fault, or none, before the next events are sent. Some faults silence or end the stream, so that these events are
    /// never sent on it.
    async fn disturb(&mut self, id: i64, stale: Vec<PbEvent>) -> Alive {
        let fault = self.fake.script().fault(9);
        match fault {
            Some(0) => self.silent = true,
            // The stream ends without an error status.
            Some(1) => return Err(()),
            // The stream ends with an error status that gives no details.
            Some(2) => {
                let broken = Status::unknown("transport error");
                self.answers.send(Err(broken)).await.map_err(drop)?;
                return Err(());
            }
            // As measured: an answer to a progress request overtakes the events.
            Some(3) => {
                let progress = self.message(-1);
                self.send(progress).await?;
            }
            // As measured: a member that lags replays events that are older than the requested revision.
            Some(4 | 5) => {
                let replayed = PbWatchResponse {
                    events: stale,
                    ..self.message(id)
                };
                self.send(replayed).await?;
            }
            Some(way @ (6 | 7)) => {
                let reason = if way == 6 {
                    "etcdserver: no leader"
                } else {
                    ""
                };
                let cancelled = PbWatchResponse {
                    canceled: true,
                    cancel_reason: reason.to_owned(),
                    ..self.message(id)
                };
                self.send(cancelled).await?;
                return Err(());
            }
            // An empty message must have no effect.
            Some(_) => {
                let nothing = self.message(id);
                self.send(nothing).await?;
            }
            None => {}
        }
        Ok(())
    }

    /// Sends the events in messages of random length. A revision may be split into fragments, and the stream may end after each message.
    async fn batches(&mut self, id: i64, events: Vec<PbEvent>) -> Alive {
        let mut events = events.as_slice();
        while !events.is_empty() {
            let (length, ends) = {
                let mut script = self.fake.script();
                let length = script.rng.usize(1..=events.len());
                (length, script.fault(2) == Some(0))
            };
            let (batch, rest) = events.split_at(length);
            let revision = |event: Option<&PbEvent>| {
                event
                    .and_then(|event| event.kv.as_ref())
                    .map(|kv| kv.mod_revision)
            };
            let fragment = revision(batch.last()) == revision(rest.first());
            let message = PbWatchResponse {
                events: batch.to_vec(),
                fragment,
                ..self.message(id)
            };
            self.send(message).await?;
            if ends {
                return Err(());
            }
            events = rest;
        }
        Ok(())
    }
}
