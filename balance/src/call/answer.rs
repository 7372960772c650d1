//! What a caller gets of a response: the response, or the error that its head carries.

use std::sync::Arc;

use http::Response;
use tokio::time::Instant;
use tonic::{Code, Status};

use super::body::ResponseBody;
use super::core::Core;
use super::extension::ServedBy;
use super::request::Call;
use super::response_head::{Foreign, Head};
use super::status;
use crate::balance::{AnswerFault, Permit};
use crate::transport::deadline::Deadline;
use crate::transport::response_body::Incoming;

/// Makes the caller's response, or its error, of the response that has come in.
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
        return Err(failed(&core, &response, head, &mut permit, deadline, now));
    }
    permit.on_head(now, None);
    let status_in_head = head != Head::Grpc(None);
    if status_in_head {
        permit.on_answer();
        core.on_success();
    }
    let served_by = ServedBy(permit.endpoint().address().clone());
    let (mut parts, incoming) = response.into_parts();
    // The request's extensions are of no use any more, but their memory is.
    std::mem::swap(&mut parts.extensions, call.extensions_mut());
    parts.extensions.clear();
    parts.extensions.insert(served_by);
    let body = ResponseBody::new(incoming, status_in_head, permit, core, deadline);
    Ok(Response::from_parts(parts, body))
}

/// The status of a call whose response is an error that its head carries, or is not gRPC's.
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
        && let Some(deadline) = deadline.filter(|_| status::is_deadline(deadline, now))
    {
        permit.on_overdue(now);
        let endpoint = permit.endpoint();
        return status::overdue_at(core, deadline, "waiting for the response", endpoint);
    }
    record_head(core, response, permit, now);
    let address = permit.endpoint().address();
    if let Head::Foreign(_) = head {
        return status::foreign(&core.service, address, &Foreign::of(response));
    }
    status::answered(address, response.headers())
        .unwrap_or_else(|| status::unfinished(&core.service, address))
}

/// Counts a response's head for or against its endpoint, once, whether the caller gets it or another attempt follows.
pub(super) fn record_head<T>(
    core: &Core,
    response: &Response<T>,
    permit: &mut Permit,
    now: Instant,
) {
    if permit.is_noted() {
        return;
    }
    let head = Head::of(response);
    permit.on_head(now, status::head_blame(head));
    if let Head::Foreign(_) = head {
        let foreign = Foreign::of(response);
        let noted = AnswerFault::Foreign(foreign.http());
        core.shared()
            .on_foreign(permit.endpoint(), noted, || foreign.to_string());
    } else {
        permit.on_answer();
    }
}
