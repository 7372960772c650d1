//! Limits the concurrency of a server, so that an overloaded server stays fast for the calls that it accepts.
//!
//! A server that receives more calls than it can serve queues them, and each call then takes longer than its caller waits. The
//! [`AdaptiveLimitLayer`] refuses the excess at once, with `RESOURCE_EXHAUSTED`. The limit follows the latency, so it needs no configuration.
//!
//! ```no_run
//! use tonic::transport::Server;
//! use tonic_etcd::limit::AdaptiveLimitLayer;
//! use tonic_etcd::{Registry, ServeRegistered};
//!
//! # async fn run<G>(greeter: G, registry: Registry) -> Result<(), Box<dyn std::error::Error>>
//! # where
//! #     G: tower::Service<http::Request<tonic::body::Body>, Error = std::convert::Infallible, Response = http::Response<tonic::body::Body>>
//! #         + tonic::server::NamedService + Clone + Send + Sync + 'static,
//! #     G::Future: Send + 'static,
//! # {
//! Server::builder()
//!     .layer(AdaptiveLimitLayer::new())
//!     .add_service(greeter)
//!     .serve_registered("0.0.0.0:50051".parse()?, registry.registration("helloworld.Greeter"))
//!     .await?;
//! # Ok(())
//! # }
//! ```

mod body;
mod call;
mod gradient;
mod layer;
mod window;

pub use body::{LimitBody, LimitRequestBody};
pub use layer::{AdaptiveLimit, AdaptiveLimitLayer, LimitFuture};

#[cfg(test)]
mod tests;
