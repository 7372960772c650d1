//! Deadline propagation: a call that a server makes while it serves another call inherits the deadline of that call.
//!
//! A caller that waits at most one second for service A does not need the responses of services B and C after this second. Without
//! propagation, A calls B without a deadline, and B works for a caller that has gone. With the [`PropagateDeadlineLayer`] on the server,
//! each call that the handler makes over a [`BalancedChannel`](crate::BalancedChannel) has a deadline: what is left of the deadline of the
//! served call, minus a [margin](PropagateDeadlineLayer::max_margin). If the call has a timeout of its own, or the channel has a default
//! timeout, the earlier deadline applies, as in grpc-go and grpc-java.
//!
//! ```no_run
//! use tonic::transport::Server;
//! use tonic_balance::deadline::PropagateDeadlineLayer;
//!
//! # async fn run<G>(greeter: G) -> Result<(), Box<dyn std::error::Error>>
//! # where
//! #     G: tower::Service<http::Request<tonic::body::Body>, Error = std::convert::Infallible, Response = http::Response<tonic::body::Body>>
//! #         + tonic::server::NamedService + Clone + Send + Sync + 'static,
//! #     G::Future: Send + 'static,
//! # {
//! Server::builder()
//!     .layer(PropagateDeadlineLayer::new())
//!     .add_service(greeter)
//!     .serve("0.0.0.0:50051".parse()?)
//!     .await?;
//! # Ok(())
//! # }
//! ```
//!
//! # What is not propagated
//!
//! - The deadline belongs to the task that serves the call. A task that the handler spawns does not have it, unless it runs in
//!   [`ServedDeadline::scope`].
//! - A request with the extension [`IgnoreServedDeadline`] does not inherit the deadline.
//! - Cancellation needs no layer. If the caller cancels the call or disconnects, tonic drops the future of the handler, and the calls that this future was
//!   waiting for are cancelled. Spawned tasks continue.
//! - Other channels, for example that of tonic, do not inherit the deadline.

mod layer;
mod served;

pub use layer::{PropagateDeadline, PropagateDeadlineLayer, ServedBody, ServedFuture};
pub(crate) use served::inherited_timeout;
pub use served::{IgnoreServedDeadline, Scope, ServedDeadline};
