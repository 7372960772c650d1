//! One attempt of a call: a request that was sent on a connection.

use http::{HeaderName, Request, Version};
use tokio::time::Instant;
use tonic::{Code, Status};

use super::core::Core;
use super::counted_body::count;
use super::history::History;
use super::request::{Call, KeptBody};
use super::status;
use crate::balance::Permit;
use crate::transport::deadline::Deadline;
use crate::transport::exchange::Exchange;
use crate::transport::http2::OpenError;
use crate::transport::request_body::{Outgoing, Recall};

/// A request that was sent, with its permit to use a stream of the connection.
pub(super) struct Attempt {
    pub(super) exchange: Exchange,
    pub(super) permit: Permit,
    pub(super) kept: KeptBody,
}

/// The position of an attempt in its call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Try {
    /// The first send, without a wait before it. The timeout in the headers still equals the remaining time, so it is not rewritten.
    First,
    /// A send after a wait or after another send. The timeout in the headers is replaced with the remaining time. `previous` is the number
    /// of earlier attempts that a server may have received; it can be 0.
    Later { previous: u32 },
}

impl Try {
    pub(super) fn previous(self) -> u32 {
        match self {
            Self::First => 0,
            Self::Later { previous } => previous,
        }
    }
}

impl Attempt {
    /// Sends the request on the connection of `permit`. Returns [`Unsent`] if the connection does not accept the request. The caller must
    /// not yield between its last check of the connection and this function. After a yield, the result of the check could be outdated.
    pub(super) fn start(
        core: &Core,
        call: &mut Call,
        mut permit: Permit,
        mut body: Outgoing,
        deadline: Option<Deadline>,
        which: Try,
        now: Instant,
    ) -> Result<Self, Box<Unsent>> {
        let mut head = Request::new(());
        head.method_mut().clone_from(&call.method);
        *head.version_mut() = Version::HTTP_2;
        let uri = core.uri(&call.uri, permit.endpoint().authority());
        *head.uri_mut() = uri.unwrap_or_else(|| call.uri.clone());
        *head.headers_mut() = call.headers.take(&core.user_agent);
        if let Try::Later { previous } = which {
            if let Some(deadline) = deadline {
                deadline.rewrite(head.headers_mut(), now);
            }
            if previous > 0 {
                head.headers_mut()
                    .insert(PREVIOUS_ATTEMPTS, previous.into());
            }
        }
        call.start_span(which.previous());
        if let Some(trace) = &call.trace {
            trace.prepare(permit.endpoint().address(), head.headers_mut());
        }
        let kept = KeptBody::of(&body);
        let recall = match &kept {
            KeptBody::Pumped if core.retry(call).is_some() => Recall::Possible,
            _ => Recall::Never,
        };
        let sent = call.metrics.as_ref().map(|_| count(&mut body));
        match Exchange::start(permit.http2(), head, body, recall) {
            Ok(exchange) => {
                permit.on_sent(now);
                if sent.is_some() || call.trace.is_some() {
                    permit.observe(call.observe(sent, which.previous(), now));
                }
                Ok(Self {
                    exchange,
                    permit,
                    kept,
                })
            }
            Err((error, body)) => {
                if let OpenError::Malformed(_) = error {
                    call.end_unsent_span(Code::Internal);
                }
                Err(Box::new(Unsent {
                    permit,
                    body,
                    error,
                }))
            }
        }
    }
}

/// A request that a connection did not accept.
pub(super) struct Unsent {
    permit: Permit,
    body: Outgoing,
    error: OpenError,
}

impl Unsent {
    /// Returns the body for another send, and excludes this connection from the next picks. Returns an error if the request is malformed,
    /// because every connection would reject it.
    pub(super) fn into_retry(self, core: &Core, history: &mut History) -> Result<Outgoing, Status> {
        match self.error {
            OpenError::Malformed(error) => Err(status::malformed(&core.service, error)),
            OpenError::Gone(error) => {
                history.exclude_connection(&self.permit, error);
                Ok(self.body)
            }
        }
    }
}

/// The header with the number of earlier attempts, from the section "Exposed Retry Metadata" of gRPC's retry design (gRFC A6).
pub(super) const PREVIOUS_ATTEMPTS: HeaderName = HeaderName::from_static(PREVIOUS_ATTEMPTS_KEY);
pub(super) const PREVIOUS_ATTEMPTS_KEY: &str = "grpc-previous-rpc-attempts";
