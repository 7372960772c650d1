//! Converts the head of the final response to the result of the call: a response, or an error.

use std::sync::Arc;

use http::Response;
use tokio::time::Instant;
use tonic::{Code, Status};

use super::body::ResponseBody;
use super::core::Core;
use super::extension::ServedBy;
use super::http_status::{Head, NonGrpcResponse};
use super::load_report::record_load_report;
use super::pushback::record_pushback;
use super::request::Call;
use super::status;
use crate::balance::{AnswerFault, Permit};
use crate::transport::deadline::Deadline;
use crate::transport::response_body::Incoming;

/// Converts a received response to the caller's response or error.
pub(super) fn answer(
    core: Arc<Core>,
    call: &mut Call,
    response: Response<Incoming>,
    mut permit: Permit,
    deadline: Option<Deadline>,
) -> Result<Response<ResponseBody>, Status> {
    let head = Head::of(&response);
    let now = Instant::now();
    if head.failure().is_some() {
        let status = failed(&core, &response, head, &mut permit, deadline, now);
        permit.end_attempt(status.code());
        return Err(status);
    }
    permit.on_head(now, None);
    let status_in_head = head != Head::Grpc(None);
    if status_in_head {
        record_load_report(&core, response.headers(), &permit);
        permit.on_answer();
        core.on_success();
    }
    let served_by = ServedBy(permit.endpoint().address().clone());
    let (mut parts, incoming) = response.into_parts();
    // The request's extensions are not needed any more, so their allocation is reused for the response.
    std::mem::swap(&mut parts.extensions, call.extensions_mut());
    parts.extensions.clear();
    parts.extensions.insert(served_by);
    let bounds = (deadline, call.limits);
    let body = ResponseBody::new(incoming, status_in_head, permit, core, bounds);
    Ok(Response::from_parts(parts, body))
}

/// Returns the status of a call whose response head carries an error or is not gRPC.
#[cold]
pub(super) fn failed(
    core: &Core,
    response: &Response<Incoming>,
    head: Head,
    permit: &mut Permit,
    deadline: Option<Deadline>,
    now: Instant,
) -> Status {
    if head == Head::Grpc(Some(Code::Cancelled))
        && let Some(deadline) = deadline.filter(|_| status::is_deadline_cancellation(deadline, now))
    {
        permit.on_deadline_exceeded(now);
        let endpoint = permit.endpoint();
        return status::deadline_exceeded_at(core, deadline, "waiting for the response", endpoint);
    }
    record_head(core, response, permit, now);
    let address = permit.endpoint().address();
    if let Head::NotGrpc(_) = head {
        return status::not_grpc(&core.service, address, &NonGrpcResponse::of(response));
    }
    status::server_error(address, response.headers())
        .unwrap_or_else(|| status::missing_trailers(&core.service, address))
}

/// Records a response head as a success or a failure of the endpoint. Does nothing if the head was already recorded, so that each response
/// counts once.
pub(super) fn record_head<T>(
    core: &Core,
    response: &Response<T>,
    permit: &mut Permit,
    now: Instant,
) {
    let head = Head::of(response);
    if let Some(code) = head.failure() {
        permit.end_attempt(code);
    }
    if permit.is_recorded() {
        return;
    }
    permit.on_head(now, status::head_blame(head));
    if let Head::NotGrpc(_) = head {
        let not_grpc = NonGrpcResponse::of(response);
        let fault = AnswerFault::NotGrpc(not_grpc.http());
        core.shared()
            .on_not_grpc(permit.endpoint(), fault, || not_grpc.to_string());
    } else {
        record_load_report(core, response.headers(), permit);
        permit.on_answer();
        if let Some(code) = head.failure() {
            record_pushback(core, code, response.headers(), permit, now);
        }
    }
}
