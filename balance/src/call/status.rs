//! The statuses of failed calls. The message of a status that is created here names the service. It also names the endpoint, or the number
//! of ready endpoints, unless the request itself is malformed. If the call failed at an endpoint, the source of the status is a
//! [`CallError`]. This also applies to a status that the server returned.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use h2::Reason;
use http::HeaderMap;
use tokio::time::Instant;
use tonic::{Code, Status};

use super::core::Core;
use super::http_status::{Head, NonGrpcResponse};
use crate::address::Address;
use crate::balance::{Blame, Endpoint, Summary};
use crate::causes::causes;
use crate::transport::deadline::Deadline;
use crate::transport::h2_error::is_unprocessed;

/// Names the endpoint at which a call failed, and the reason.
///
/// The error is in the source chain of the call's `Status`. Walk the whole chain, because after retries another `Status` precedes the
/// error. The error is present in these cases: the server returned an error, the response was not gRPC, the connection failed, the deadline
/// passed after the call was sent, the metadata was too large for the call to be sent, or the call needed a private connection (for this
/// call alone) that could not be dialled. The error is absent if no endpoint was picked, and if the deadline of a hedged call passed. The
/// message of a status that the server returned does not name the endpoint, but this error does.
///
/// ```
/// use std::error::Error;
/// use tonic_balance::error::CallError;
///
/// fn log(status: &tonic::Status) {
///     let mut cause = status.source();
///     while let Some(error) = cause {
///         if let Some(call) = error.downcast_ref::<CallError>() {
///             println!("{} failed the call: {call}", call.address());
///         }
///         cause = error.source();
///     }
/// }
/// ```
#[derive(Clone, Debug)]
pub struct CallError {
    address: Address,
    reason: String,
    source: Option<Arc<dyn Error + Send + Sync>>,
}

impl CallError {
    fn new(address: &Address, reason: impl Into<String>) -> Self {
        Self {
            address: address.clone(),
            reason: reason.into(),
            source: None,
        }
    }

    fn with_source(mut self, source: h2::Error) -> Self {
        self.source = Some(Arc::new(source));
        self
    }

    /// Returns the endpoint at which the call failed.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }
}

impl std::fmt::Display for CallError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "endpoint {}: {}", self.address, self.reason)
    }
}

impl Error for CallError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

/// Returns the status of a call whose connection or stream failed. `blame` is the error code of the endpoint's GOAWAY, if any. If `error`
/// is not the GOAWAY itself, the message contains this code as well. `error` is not the GOAWAY if the stream id of the call is at most the
/// GOAWAY's last stream id: such a call fails only later, when the socket closes, and its error does not contain the code.
pub(super) fn connection_or_stream_failed(
    service: &str,
    address: &Address,
    error: h2::Error,
    blame: Option<Reason>,
) -> Status {
    let (code, reason) = classify(&error);
    let mut message = format!("{service}: endpoint {address}: {reason}: {error}");
    if let Some(blame) = blame.filter(|_| !error.is_go_away()) {
        message = format!("{message}; the endpoint has ended the connection with {blame:?}");
    }
    let source = CallError::new(address, reason).with_source(error);
    with_source(code, message, Arc::new(source))
}

/// Returns the status of a call on a private connection that the endpoint ended. The call itself is the likely cause.
pub(super) fn private_connection_ended(
    service: &str,
    address: &Address,
    metadata: usize,
    error: h2::Error,
) -> Status {
    let reason = format!(
        "ended a connection that carried only this call, which has {metadata} bytes of metadata"
    );
    let message = format!("{service}: endpoint {address}: {reason}: {error}");
    let source = CallError::new(address, reason).with_source(error);
    let code = if metadata > 0 {
        Code::ResourceExhausted
    } else {
        Code::Unavailable
    };
    with_source(code, message, Arc::new(source))
}

/// Returns the status of a call that needs a private connection, if the connection could not be dialled. The call was not sent.
pub(super) fn private_dial_failed(
    service: &str,
    address: &Address,
    error: &(dyn Error + 'static),
) -> Status {
    let reason = format!(
        "the private connection for a call that may end its connection could not be dialled: {}",
        causes(error)
    );
    let message = format!("{service}: endpoint {address}: {reason}");
    let source = CallError::new(address, reason);
    with_source(Code::Unavailable, message, Arc::new(source))
}

/// Returns the status of a call whose metadata is larger than the endpoint accepts. The call was not sent.
pub(super) fn too_large(service: &str, address: &Address, metadata: usize, limit: u32) -> Status {
    let reason = format!("accepts metadata of at most {limit} bytes, and the call has {metadata}");
    let message = format!("{service}: endpoint {address} {reason}; the call was not sent");
    let source = CallError::new(address, reason);
    with_source(Code::ResourceExhausted, message, Arc::new(source))
}

/// Returns the status of a call whose response is not gRPC.
pub(super) fn not_grpc(service: &str, address: &Address, response: &NonGrpcResponse) -> Status {
    let reason = response.to_string();
    let message = format!("{service}: endpoint {address}: {reason}");
    let source = CallError::new(address, reason);
    with_source(response.code(), message, Arc::new(source))
}

/// Returns the status of a response that ended without a gRPC status.
pub(super) fn missing_trailers(service: &str, address: &Address) -> Status {
    let message = format!("{service}: endpoint {address}: {MISSING_TRAILERS}");
    let source = CallError::new(address, MISSING_TRAILERS);
    with_source(Code::Unknown, message, Arc::new(source))
}

/// The description of a response that ended without a gRPC status.
pub(super) const MISSING_TRAILERS: &str =
    "the response ended without trailers, which carry the gRPC status";

/// Returns the error that a server sent in headers or trailers, with the endpoint as its source. Returns `None` if they carry no error.
pub(super) fn server_error(address: &Address, headers: &HeaderMap) -> Option<Status> {
    let mut status = Status::from_header_map(headers)?;
    if status.code() == Code::Ok {
        return None;
    }
    let reason = format!("answered with {:?}", status.code());
    status.set_source(Arc::new(CallError::new(address, reason)));
    Some(status)
}

/// Returns true if a cancellation by the server at `now` counts as an exceeded deadline. A server can cancel shortly before the client's
/// own timer fires.
pub(super) fn is_deadline_cancellation(deadline: Option<Deadline>, now: Instant) -> bool {
    deadline.is_some_and(|deadline| now + DEADLINE_TOLERANCE >= deadline.at())
}

/// Returns whether the server cancelled the call.
pub(super) fn is_cancelled(error: &h2::Error) -> bool {
    error.is_reset() && error.is_remote() && error.reason() == Some(Reason::CANCEL)
}

/// A cancellation by the server at most this long before the deadline is reported as `DEADLINE_EXCEEDED`. When the deadline passes, servers
/// reset the call with CANCEL or respond with CANCELLED. They can do so slightly early, because the timeout that they receive is rounded
/// down, and because their timers are as coarse as the client's.
const DEADLINE_TOLERANCE: Duration = Duration::from_millis(2);

/// Maps an error to a gRPC code and a description, as in gRPC's table for HTTP/2 error codes. A failed connection is always `UNAVAILABLE`.
fn classify(error: &h2::Error) -> (Code, &'static str) {
    if is_unprocessed(error) {
        return (Code::Unavailable, "the call was refused");
    }
    if !error.is_reset() {
        return (Code::Unavailable, "the connection was lost");
    }
    let code = match error.reason() {
        Some(Reason::REFUSED_STREAM) => Code::Unavailable,
        Some(Reason::CANCEL) => Code::Cancelled,
        Some(Reason::ENHANCE_YOUR_CALM) => Code::ResourceExhausted,
        Some(Reason::INADEQUATE_SECURITY) => Code::PermissionDenied,
        _ => Code::Internal,
    };
    (code, "the stream was reset")
}

/// Returns the status of a request that HTTP/2 does not allow.
pub(super) fn malformed(service: &str, error: h2::Error) -> Status {
    let message = format!("{service}: the request is malformed: {error}");
    with_source(Code::Internal, message, Arc::new(error))
}

/// Returns the status of a call that no endpoint can take.
pub(super) fn unready(core: &Core, summary: &Summary, why: &str) -> Status {
    let message = format!(
        "{}: {why} ({})",
        core.service,
        endpoint_counts(core, summary)
    );
    match &summary.last_error {
        Some(error) => with_source(Code::Unavailable, message, error.clone()),
        None => Status::unavailable(message),
    }
}

/// Returns the status of a call that was rejected because the wait queue is full.
pub(super) fn wait_queue_full(core: &Core, limit: usize) -> Status {
    let endpoint_counts = endpoint_counts(core, &core.shared().summary());
    Status::resource_exhausted(format!(
        "{}: {limit} calls are waiting already ({endpoint_counts})",
        core.service
    ))
}

/// Returns the status of a call that was not sent, because the channel has `max` requests already.
#[cold]
pub(super) fn channel_limited(core: &Core, max: usize) -> Status {
    limited(
        core,
        &format!(
            "the channel has {} in flight, which is its limit",
            requests(max)
        ),
    )
}

/// Returns the status of a call that was not sent, because all endpoints that it may use have as many requests as their limit allows.
#[cold]
pub(super) fn endpoints_limited(core: &Core) -> Status {
    let max = core
        .shared()
        .max_requests_per_endpoint()
        .unwrap_or_default();
    limited(
        core,
        &format!(
            "each endpoint that the call may use has {} in flight, which is its limit",
            requests(max as usize)
        ),
    )
}

fn requests(number: usize) -> String {
    if number == 1 {
        "1 request".to_owned()
    } else {
        format!("{number} requests")
    }
}

fn limited(core: &Core, reason: &str) -> Status {
    if let Some(metrics) = &core.metrics {
        metrics.on_dropped();
    }
    let endpoint_counts = endpoint_counts(core, &core.shared().summary());
    Status::unavailable(format!(
        "{}: {reason}; the call was not sent ({endpoint_counts})",
        core.service
    ))
}

/// Returns the status of a call whose deadline passed while it was `doing` something.
pub(super) fn deadline_exceeded(core: &Core, deadline: Deadline, doing: &str) -> Status {
    let endpoint_counts = endpoint_counts(core, &core.shared().summary());
    let deadline = deadline.describe();
    Status::deadline_exceeded(format!(
        "{}: {deadline} exceeded while {doing} ({endpoint_counts})",
        core.service
    ))
}

/// Returns the status of a call whose deadline passed while it was `doing` something at an endpoint.
pub(super) fn deadline_exceeded_at(
    core: &Core,
    deadline: Deadline,
    doing: &str,
    endpoint: &Endpoint,
) -> Status {
    let (address, deadline) = (endpoint.address(), deadline.describe());
    let reason = format!("{deadline} exceeded while {doing}");
    let message = format!("{}: endpoint {address}: {reason}", core.service);
    let source = CallError::new(address, reason);
    with_source(Code::DeadlineExceeded, message, Arc::new(source))
}

/// Returns the number of ready and known endpoints and the last failures, as text.
fn endpoint_counts(core: &Core, summary: &Summary) -> String {
    let mut text = if summary.known {
        let Summary {
            endpoints, ready, ..
        } = summary;
        format!("{ready} of {endpoints} endpoints ready")
    } else {
        "endpoints unknown".to_owned()
    };
    if let Some(error) = &summary.last_error {
        text = format!("{text}; last error: {error}");
    }
    if let Some(error) = &summary.source_error {
        text = format!("{text}; discovery: {error}");
    }
    if let Some(source_error) = core.source_error() {
        text = format!("{text}; {source_error}");
    }
    text
}

fn with_source(code: Code, message: String, source: Arc<dyn Error + Send + Sync>) -> Status {
    let mut status = Status::new(code, message);
    status.set_source(source);
    status
}

/// Returns what failed at the endpoint, according to the response head: the connection or the server. Returns `None` if the endpoint is not
/// at fault.
pub(super) fn head_blame(head: Head) -> Option<Blame> {
    match head {
        Head::Grpc(code) => code.and_then(blame),
        Head::NotGrpc(_) => Some(Blame::Connection),
    }
}

/// Returns what failed at the endpoint, according to the status code: the connection or the server. Returns `None` if the endpoint is not
/// at fault.
pub(super) fn blame(code: Code) -> Option<Blame> {
    match code {
        // gRPC uses this code for a lost connection, and proxies use it for a failed server behind them.
        Code::Unavailable => Some(Blame::Connection),
        Code::Internal | Code::Unknown | Code::DataLoss | Code::ResourceExhausted => {
            Some(Blame::Server)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn a_servers_error_keeps_its_details_and_names_the_server() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("grpc-status", "14"),
            ("grpc-message", "gr%C3%BC%C3%9Fe"),
            ("grpc-status-details-bin", "AQID"),
            ("rack", "7"),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        let address = "10.0.0.5:50051".parse().expect("an address");
        let status = server_error(&address, &headers).expect("an error");
        assert_eq!(status.code(), Code::Unavailable);
        assert_eq!(status.message(), "grüße");
        assert_eq!(status.details(), [1, 2, 3]);
        assert_eq!(status.metadata().get("rack").expect("metadata"), "7");
        let source = status
            .source()
            .and_then(|source| source.downcast_ref::<CallError>());
        assert_eq!(source.expect("a CallError").address(), &address);
        headers.insert("grpc-status", HeaderValue::from_static("0"));
        assert!(server_error(&address, &headers).is_none());
    }
}
