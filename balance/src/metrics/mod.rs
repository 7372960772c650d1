//! Metrics: the instruments of a channel, and the interface to the library that exports them.
//!
//! A program implements [`Recorder`] for its metrics library, or uses the crate `tonic-etcd-opentelemetry`, and passes the recorder to
//! [`ChannelBuilder::metrics`](crate::channel::ChannelBuilder::metrics). [`Metrics`] selects the instruments. The instruments are those of
//! gRPC (gRFCs A66, A78, A91, A94 and A96); the interface is modelled on gRFC A79. Without a recorder, a call checks one `Option`.
//!
//! [`instruments`] returns all instruments of this crate.
//!
//! ```
//! use std::sync::Arc;
//! use std::sync::atomic::{AtomicU64, Ordering};
//! use tonic_balance::BalancedChannel;
//! use tonic_balance::metrics::{Counter, Histogram, Instrument, Label, Observations, Recorder, UpDownCounter};
//!
//! /// Counts the attempts of all methods, and ignores everything else.
//! #[derive(Default)]
//! struct Attempts(Arc<AtomicU64>);
//!
//! struct Adder(Arc<AtomicU64>);
//!
//! impl Counter for Adder {
//!     fn add(&self, count: u64) {
//!         self.0.fetch_add(count, Ordering::Relaxed);
//!     }
//! }
//!
//! impl Recorder for Attempts {
//!     fn counter(&self, instrument: &'static Instrument, _: &[Label<'_>]) -> Option<Box<dyn Counter>> {
//!         let is_wanted = instrument.name() == "grpc.client.attempt.started";
//!         is_wanted.then(|| Box::new(Adder(Arc::clone(&self.0))) as Box<dyn Counter>)
//!     }
//!
//!     fn up_down_counter(&self, _: &'static Instrument, _: &[Label<'_>]) -> Option<Box<dyn UpDownCounter>> {
//!         None
//!     }
//!
//!     fn histogram(&self, _: &'static Instrument, _: &[Label<'_>]) -> Option<Box<dyn Histogram>> {
//!         None
//!     }
//!
//!     fn gauge(&self, _: &'static Instrument, _: Observations) {}
//! }
//!
//! # fn run() {
//! let recorder = Attempts::default();
//! let channel = BalancedChannel::builder().metrics(recorder).addresses(["10.0.0.5:50051"]).connect_lazy();
//! # }
//! ```

mod attempt;
mod call;
mod channel;
mod instrument;
mod interned;
mod message_size;
mod method;
mod observe;
mod recorder;
mod scope;
mod selection;
mod subchannel;

pub(crate) use attempt::{AttemptRecord, SentSize};
pub(crate) use call::{CallRecord, Sends};
pub(crate) use channel::{ChannelMetrics, EjectionCounts};
pub use instrument::{Instrument, Kind, Label, instruments};
pub(crate) use instrument::{LB_ENDPOINTS, LB_WAITING_CALLS, STATE, TARGET};
pub(crate) use message_size::MessageSize;
pub(crate) use method::{MethodMetrics, status_name};
pub use observe::{GaugeSource, Observation, Observations};
pub use recorder::{Counter, Histogram, Recorder, UpDownCounter};
pub use selection::Metrics;
pub(crate) use subchannel::ConnectionRecord;

#[cfg(test)]
pub(crate) mod tests;
