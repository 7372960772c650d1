//! Load reports of a server (ORCA, gRFC A51): each response contains the load of the server.
//!
//! With the [`ReportLoadLayer`], each response of the server has the trailer `endpoint-load-metrics-bin`. It contains the message
//! `xds.data.orca.v3.OrcaLoadReport`, with these fields:
//!
//! | Field | Content | Source |
//! |---|---|---|
//! | `named_metrics["requests_in_flight"]` | calls whose response has not ended, including this one | the layer |
//! | `rps_fractional` | calls per second that have ended, over the last second | the layer |
//! | `eps` | those of them that have failed: `UNKNOWN`, `RESOURCE_EXHAUSTED`, `INTERNAL`, `UNAVAILABLE`, `DATA_LOSS`, or a response without a status | the layer |
//! | `cpu_utilization` | CPU time of the process, as a fraction of the CPUs that it can use | the program, or else `/proc/self/stat` (Linux only), over the last second |
//! | `application_utilization`, `mem_utilization`, `utilization`, other `named_metrics` | what the program defines | the program, with a [`LoadRecorder`] |
//!
//! A client of this library reads the reports with [`load_reports`](crate::channel::ChannelBuilder::load_reports), grpc-go with its policy
//! `weighted_round_robin`, and Envoy with its load-balancing policy `client_side_weighted_round_robin`. Any client that does not know the
//! trailer ignores it.
//!
//! ```no_run
//! use tonic::transport::Server;
//! use tonic_balance::orca::{LoadRecorder, ReportLoadLayer};
//!
//! # async fn run<G>(greeter: G) -> Result<(), Box<dyn std::error::Error>>
//! # where
//! #     G: tower::Service<http::Request<tonic::body::Body>, Error = std::convert::Infallible, Response = http::Response<tonic::body::Body>>
//! #         + tonic::server::NamedService + Clone + Send + Sync + 'static,
//! #     G::Future: Send + 'static,
//! # {
//! let recorder = LoadRecorder::new();
//! // For example after each change of a queue:
//! recorder.set_application_utilization(0.7);
//! Server::builder()
//!     .layer(ReportLoadLayer::new(recorder))
//!     .add_service(greeter)
//!     .serve("0.0.0.0:50051".parse()?)
//!     .await?;
//! # Ok(())
//! # }
//! ```
//!
//! Calls of the health service are not counted and get no report.
//!
//! # Out-of-band reports
//!
//! [`LoadRecorder::service`] returns the service `xds.service.orca.v3.OpenRcaService`. Its clients receive the report at an interval, without
//! calls. Channels of this library do not use it.

mod cpu;
mod layer;
mod recorder;
mod service;
mod traffic;

pub use layer::{ReportLoad, ReportLoadBody, ReportLoadFuture, ReportLoadLayer};
pub use recorder::LoadRecorder;
pub use service::OpenRcaService;
