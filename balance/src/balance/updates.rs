//! Reads the stream of endpoint changes in batches, and catches a panic of the stream.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio_stream::Stream;

/// A stream of endpoint changes, and a future that completes once the whole set of endpoints was sent to the stream for the first time.
pub(crate) struct Updates<S> {
    changes: Option<Pin<Box<S>>>,
    known: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    /// Whether a batch must be returned even if no change is ready, to report that the set is known. True after `known` has completed, or
    /// after a full batch if `known` is not awaited, until the stream has no further change ready.
    settling: bool,
}

/// Changes that were ready at the same time.
#[derive(Debug)]
pub(super) struct Batch<T> {
    pub(super) changes: Vec<T>,
    /// Whether the whole set is known after these changes.
    pub(super) known: bool,
}

impl<S: Stream> Updates<S> {
    /// Wraps a stream. The set counts as known once changes were read and no further change is ready, or when the stream ends.
    pub(crate) fn new(changes: S) -> Self {
        Self {
            changes: Some(Box::pin(changes)),
            known: None,
            settling: false,
        }
    }

    /// Wraps a stream. The set counts as known once `known` has completed and the changes that were ready at that time were read, or when
    /// the stream ends.
    pub(crate) fn known_after(
        changes: S,
        known: impl Future<Output = ()> + Send + 'static,
    ) -> Self {
        Self {
            known: Some(Box::pin(known)),
            ..Self::new(changes)
        }
    }

    /// Waits for changes. Returns all changes that are ready, up to a limit, so that they take effect together.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses no changes.
    pub(super) async fn next(&mut self) -> Batch<S::Item> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Batch<S::Item>> {
        // `known` is polled before the stream. When `known` completes, the whole set was already sent to the stream, so all its changes are
        // read below.
        if let Some(known) = &mut self.known
            && known.as_mut().poll(cx).is_ready()
        {
            self.known = None;
            self.settling = true;
        }
        let mut changes = Vec::new();
        while changes.len() < BATCH {
            match self.poll_change(cx) {
                Poll::Ready(Some(change)) => changes.push(change),
                Poll::Ready(None) => {
                    if self.changes.take().is_some() {
                        self.known = None;
                        return Poll::Ready(Batch {
                            changes,
                            known: true,
                        });
                    }
                    return Poll::Pending;
                }
                Poll::Pending if changes.is_empty() && !self.settling => return Poll::Pending,
                Poll::Pending => {
                    let known = self.known.is_none();
                    self.settling = false;
                    return Poll::Ready(Batch { changes, known });
                }
            }
        }
        // If the stream has no further change, the next poll returns an empty batch, after which the set is known.
        self.settling |= self.known.is_none();
        Poll::Ready(Batch {
            changes,
            known: false,
        })
    }

    /// Polls the stream. A panic of the stream counts as its end: the driver must keep running with the current set.
    fn poll_change(&mut self, cx: &mut Context<'_>) -> Poll<Option<S::Item>> {
        let Some(changes) = &mut self.changes else {
            return Poll::Ready(None);
        };
        let polled = catch_unwind(AssertUnwindSafe(|| changes.as_mut().poll_next(cx)));
        polled.unwrap_or_else(|_| {
            tracing::error!(
                "the stream of changes has panicked; the set of endpoints no longer changes"
            );
            Poll::Ready(None)
        })
    }
}

/// Maximum number of changes in a batch. Because of the limit, the driver can handle its connections between two batches.
const BATCH: usize = 1024;

#[cfg(test)]
mod tests {
    use tokio_test::{assert_pending, assert_ready, task};

    use super::*;

    #[test]
    fn all_available_updates_form_one_batch() {
        let (sender, changes) = tokio::sync::mpsc::unbounded_channel();
        let mut feed = Updates::new(tokio_stream::wrappers::UnboundedReceiverStream::new(
            changes,
        ));
        let mut next = task::spawn(feed.next());
        assert_pending!(next.poll());
        sender.send(1).expect("the channel should be open");
        sender.send(2).expect("the channel should be open");
        assert!(next.is_woken());
        let batch = assert_ready!(next.poll());
        assert_eq!((batch.changes, batch.known), (vec![1, 2], true));
        drop(next);
        drop(sender);
        let batch = assert_ready!(task::spawn(feed.next()).poll());
        assert!(batch.known && batch.changes.is_empty());
        assert_pending!(task::spawn(feed.next()).poll());
    }

    #[test]
    fn a_set_that_fills_whole_batches_is_known() {
        let (sender, changes) = tokio::sync::mpsc::unbounded_channel();
        let changes = tokio_stream::wrappers::UnboundedReceiverStream::new(changes);
        let mut feed = Updates::new(changes);
        for change in 0..2 * BATCH {
            sender.send(change).expect("open");
        }
        for _ in 0..2 {
            let batch = assert_ready!(task::spawn(feed.next()).poll());
            assert_eq!((batch.changes.len(), batch.known), (BATCH, false));
        }
        let batch = assert_ready!(task::spawn(feed.next()).poll());
        assert!(batch.known && batch.changes.is_empty());
        assert_pending!(task::spawn(feed.next()).poll());
    }

    #[test]
    fn an_empty_set_is_known_once_its_source_reports_it() {
        let (signal, known) = tokio::sync::oneshot::channel::<()>();
        let known = async {
            let _ = known.await;
        };
        let mut feed = Updates::known_after(tokio_stream::pending::<u8>(), known);
        let mut next = task::spawn(feed.next());
        assert_pending!(next.poll());
        signal.send(()).expect("the channel should be open");
        assert!(assert_ready!(next.poll()).known);
    }

    #[test]
    fn a_partial_set_is_not_known() {
        let known = std::future::pending();
        let (sender, changes) = tokio::sync::mpsc::unbounded_channel();
        let changes = tokio_stream::wrappers::UnboundedReceiverStream::new(changes);
        let mut feed = Updates::known_after(changes, known);
        sender.send(1).expect("the channel should be open");
        assert!(!assert_ready!(task::spawn(feed.next()).poll()).known);
    }

    #[test]
    fn a_stream_that_panics_counts_as_ended() {
        let feed = tokio_stream::StreamExt::map(tokio_stream::once(1), |_: u8| -> u8 {
            panic!("a panic in a stream")
        });
        let mut feed = Updates::new(feed);
        assert!(assert_ready!(task::spawn(feed.next()).poll()).known);
    }
}
