//! A server that reports how many calls it serves, compared with its capacity.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;
use tonic::transport::Server;
use tonic::transport::server::Router;
use tonic::{Request, Status};
use tonic_etcd::orca::{LoadRecorder, ReportLoadLayer};
use tower::layer::util::{Identity, Stack};

use super::greeter::NamedGreeter;
use super::greeter::greeter_server::GreeterServer;

/// The router of a server with the layer of the load reports.
pub type ReportingRouter = Router<Stack<ReportLoadLayer, Identity>>;

/// Returns a greeter that reports its load in its responses and out of band. Its utilization is the number of calls in the last second,
/// divided by `capacity`.
pub fn reporting_greeter(name: &str, capacity: f64) -> ReportingRouter {
    let recorder = LoadRecorder::new();
    let recent = Arc::new(Mutex::new(VecDeque::new()));
    let recording = recorder.clone();
    let record = move |request: Request<()>| -> Result<Request<()>, Status> {
        let now = Instant::now();
        let mut recent = recent.lock().unwrap();
        recent.push_back(now);
        let is_old = |call: &Instant| now.saturating_duration_since(*call) > SECOND;
        while recent.front().is_some_and(is_old) {
            recent.pop_front();
        }
        let calls = u32::try_from(recent.len()).unwrap();
        recording.set_application_utilization(f64::from(calls) / capacity);
        Ok(request)
    };
    let greeter = NamedGreeter(name.to_owned());
    Server::builder()
        .layer(ReportLoadLayer::new(recorder.clone()))
        .add_service(GreeterServer::with_interceptor(greeter, record))
        .add_service(recorder.service(Duration::from_millis(100)))
}

const SECOND: Duration = Duration::from_secs(1);
