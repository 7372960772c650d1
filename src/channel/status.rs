//! What callers are told. The text names the service, the endpoint and the numbers; the typed cause is the status's source.

use std::sync::Arc;

use h2::Reason;
use tonic::{Code, Status};

use super::Core;
use crate::address::Address;
use crate::balance::{Blame, Summary};
use crate::transport::deadline::Deadline;
use crate::transport::http2::is_unprocessed;

/// A call that a connection has failed.
#[derive(Debug, thiserror::Error)]
#[error("endpoint {address}: {what}")]
pub(super) struct CallError {
    address: Address,
    what: &'static str,
    source: h2::Error,
}

/// The status of a call that an endpoint's connection has failed.
pub(super) fn broken(service: &str, address: &Address, error: h2::Error) -> Status {
    let (code, what) = classify(&error);
    let message = format!("{service}: endpoint {address}: {what}: {error}");
    let source = CallError {
        address: address.clone(),
        what,
        source: error,
    };
    with_source(code, message, Arc::new(source))
}

/// gRPC's table for HTTP/2 error codes. A connection that fails is always `UNAVAILABLE`.
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

/// The status of a request that HTTP/2 does not allow.
pub(super) fn malformed(service: &str, error: h2::Error) -> Status {
    let message = format!("{service}: the request is malformed: {error}");
    with_source(Code::Internal, message, Arc::new(error))
}

/// The status of a call that no endpoint can take.
pub(super) fn unready(core: &Core, summary: &Summary, why: &str) -> Status {
    let message = format!("{}: {why} ({})", core.service, numbers(core, summary));
    match &summary.last_error {
        Some(error) => with_source(Code::Unavailable, message, error.clone()),
        None => Status::unavailable(message),
    }
}

/// The status of a call that finds the queue full.
pub(super) fn crowded(core: &Core, limit: usize) -> Status {
    let numbers = numbers(core, &core.shared().summary());
    Status::resource_exhausted(format!(
        "{}: {limit} calls are waiting already ({numbers})",
        core.service
    ))
}

/// The status of a call whose deadline has passed while it was `doing` something.
pub(super) fn overdue(core: &Core, deadline: Deadline, doing: &str) -> Status {
    let numbers = numbers(core, &core.shared().summary());
    let timeout = deadline.timeout();
    Status::deadline_exceeded(format!(
        "{}: {timeout:?} have passed while {doing} ({numbers})",
        core.service
    ))
}

/// How many endpoints there are, and what happened last.
fn numbers(core: &Core, summary: &Summary) -> String {
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
    if let Some(trouble) = core.trouble() {
        text = format!("{text}; {trouble}");
    }
    text
}

fn with_source(
    code: Code,
    message: String,
    source: Arc<dyn std::error::Error + Send + Sync>,
) -> Status {
    let mut status = Status::new(code, message);
    status.set_source(source);
    status
}

/// What a response's status says against the endpoint, if anything.
pub(super) fn blame(code: Code) -> Option<Blame> {
    match code {
        // What gRPC says of a connection that is gone, and proxies of a server behind them.
        Code::Unavailable => Some(Blame::Connection),
        Code::Internal | Code::Unknown | Code::DataLoss | Code::ResourceExhausted => {
            Some(Blame::Server)
        }
        _ => None,
    }
}
