//! The metrics and the span of a call.

use std::cell::RefCell;
use std::sync::Arc;

use arc_swap::Guard;
use tokio::time::Instant;
use tonic::Code;

use crate::attributes::Attributes;
use crate::balance::Permit;
use crate::metrics::{CallRecord, MethodMetrics, Sends, SentSize};
use crate::traces::OpenSpan;

/// The metrics and the span of a call that has not ended, as far as they are enabled. The future of the call holds this value, then the body
/// of the response. A call that is dropped before its end is recorded as cancelled.
#[derive(Debug, Default)]
pub(super) struct CallObservation {
    metrics: Option<CallRecord>,
    /// The attributes of the endpoint of the first attempt, if the metrics have the label for the zone.
    attributes: Option<Arc<Attributes>>,
    span: Option<OpenSpan>,
}

/// The part of the metrics of a call that has left the common path. It is kept with the request, for further attempts.
#[derive(Debug)]
pub(super) struct FurtherAttempts {
    pub(super) method: Arc<MethodMetrics>,
    pub(super) sends: Arc<Sends>,
}

impl CallObservation {
    /// Creates the value for a call with a span.
    pub(super) fn traced(span: OpenSpan) -> Box<Self> {
        let mut this = spare();
        this.span = Some(span);
        this
    }

    /// Starts the metrics of a call.
    pub(super) fn measure(this: &mut Option<Box<Self>>, method: Arc<MethodMetrics>, now: Instant) {
        this.get_or_insert_with(spare).metrics = Some(CallRecord::start(method, now));
    }

    /// Records the first attempt, which was sent with this permit.
    pub(super) fn on_sent(&mut self, sent: SentSize, permit: &Permit) {
        if let Some(metrics) = &mut self.metrics {
            metrics.on_sent(sent);
            if metrics.method().has_zones() {
                self.attributes = Some(Guard::into_inner(permit.endpoint().attributes()));
            }
        }
    }

    /// Adds a data frame of the response to the first attempt.
    pub(super) fn on_data(&mut self, frame: &[u8]) {
        if let Some(metrics) = &mut self.metrics {
            metrics.on_data(frame);
        }
    }

    /// Starts to count the sends of a call that leaves the common path, if metrics are enabled. `sent` is the permit of the first attempt, if
    /// it was sent. From here on, the permit holds the metrics of the attempt.
    pub(super) fn count_sends(
        &mut self,
        is_hedged: bool,
        sent: Option<&mut Permit>,
    ) -> Option<FurtherAttempts> {
        let metrics = self.metrics.as_mut()?;
        let (sends, first) = metrics.count_sends(is_hedged);
        if let (Some(permit), Some(first)) = (sent, first) {
            permit.measure(first);
        }
        let method = Arc::clone(metrics.method());
        Some(FurtherAttempts { method, sends })
    }

    /// Records the end of the call, and of its first attempt unless the call has left the common path.
    pub(super) fn end(mut self: Box<Self>, code: Code, now: Instant) {
        self.record_end(code, now);
        keep(self);
    }

    fn record_end(&mut self, code: Code, now: Instant) {
        if let Some(metrics) = &mut self.metrics {
            let attributes = self.attributes.as_ref();
            let zone = attributes.and_then(|attributes| attributes.zone());
            metrics.end(code, zone.unwrap_or_default(), now);
        }
        if let Some(span) = &mut self.span {
            span.end(code);
        }
    }
}

impl Drop for CallObservation {
    fn drop(&mut self) {
        let metrics = self.metrics.as_ref();
        if metrics.is_some_and(|metrics| !metrics.has_ended()) {
            self.record_end(Code::Cancelled, Instant::now());
        }
    }
}

thread_local! {
    /// The memory of calls that have ended on this thread, for its next calls.
    ///
    /// The memory is on the heap so that the future of a call without metrics and traces is not larger. An allocation for each call would
    /// add 230 instructions: the allocator keeps seven blocks of a size at hand, and a thread often has more calls in flight.
    #[expect(clippy::vec_box, reason = "the boxes are used again")]
    static SPARE: RefCell<Vec<Box<CallObservation>>> = const { RefCell::new(Vec::new()) };
}

fn spare() -> Box<CallObservation> {
    let spare = SPARE.try_with(|spare| spare.borrow_mut().pop());
    spare.ok().flatten().unwrap_or_default()
}

fn keep(mut ended: Box<CallObservation>) {
    // Dropped here, and not while the list is borrowed: the end of a span may run code that makes calls.
    *ended = CallObservation::default();
    // The thread may have dropped the list already.
    let _ = SPARE.try_with(|spare| {
        let mut spare = spare.borrow_mut();
        if spare.len() < MAX_SPARE {
            spare.push(ended);
        }
    });
}

/// About 15 kB for each thread.
const MAX_SPARE: usize = 64;
