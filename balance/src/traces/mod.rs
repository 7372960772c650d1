//! Traces: a span for each call, and a span for each of its attempts (gRFC A72), through the crate `tracing`.
//!
//! [`ChannelBuilder::traces`](crate::channel::ChannelBuilder::traces) enables them. Without this option, a call checks one `Option`.
//!
//! ```
//! use tonic_balance::BalancedChannel;
//! use tonic_balance::traces::Traces;
//!
//! # fn run() {
//! let channel = BalancedChannel::builder().traces(Traces::new()).addresses(["10.0.0.5:50051"]).connect_lazy();
//! # }
//! ```
//!
//! A call has the following spans and events. Their target is `tonic_balance::traces`, and their level is `INFO`. The names of spans are static
//! in `tracing`, so the name of gRFC A72 is the field `otel.name`, as the crate `tracing-opentelemetry` expects it.
//!
//! | Span | Field | Value |
//! |---|---|---|
//! | `Sent` | `otel.name` | `Sent.<service>.<method>` |
//! | | `otel.kind` | `internal` |
//! | `Attempt` | `otel.name` | `Attempt.<service>.<method>` |
//! | | `otel.kind` | `client` |
//! | | `previous-rpc-attempts` | the number of earlier attempts, without transparent retries |
//! | | `transparent-retry` | whether the attempt is a transparent retry |
//! | | `server.address`, `server.port` | the endpoint; absent if no endpoint was picked. A Unix socket has only its path as the address |
//! | both | `otel.status_code` | `OK` or `ERROR` |
//! | | `otel.status_description` | the code of an error, as in `DEADLINE_EXCEEDED`. `CANCELLED` if the caller drops the call or the response |
//!
//! | Event | Span | Meaning |
//! |---|---|---|
//! | `Delayed name resolution complete` | `Sent` | The call has waited until the source reported its endpoints. |
//! | `Delayed LB pick complete` | `Attempt` | The attempt has waited for an endpoint or for a free stream. |
//!
//! `Sent` begins when the call is made, and is a child of the span that is current at this time. It ends with the response: for a stream,
//! after the last message. `Attempt` is a child of `Sent`, and ends at the same time or earlier. The spans are never entered, so they contain
//! no other events.
//!
//! gRFC A72 also has an event for each message. The channel has no such events: its bodies are sequences of bytes, and the events of one
//! stream would exceed the limit of the OpenTelemetry SDK, which is 128 events for each span by default.

mod attempt;
mod call;
mod open_span;
mod option;
mod target;

pub(crate) use attempt::AttemptSpan;
pub(crate) use call::CallTrace;
pub(crate) use open_span::OpenSpan;
pub use option::Traces;
