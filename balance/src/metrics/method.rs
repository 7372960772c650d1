//! The instruments of one method on one channel. Their labels are resolved at the first call of the method.

use std::sync::{Arc, OnceLock};

use tonic::Code;

use super::instrument::{
    ATTEMPT_DURATION, ATTEMPT_RECEIVED, ATTEMPT_SENT, ATTEMPT_STARTED, CALL_DURATION, CALL_HEDGES,
    CALL_RETRIES, CALL_RETRY_DELAY, CALL_TRANSPARENT_RETRIES, LOCALITY, METHOD, STATUS,
};
use super::interned::Interned;
use super::recorder::{Counter, Histogram};
use super::scope::Scope;

/// The handles of one method.
pub(crate) struct MethodMetrics {
    scope: Arc<Scope>,
    method: Box<str>,
    pub(super) started: Option<Box<dyn Counter>>,
    pub(super) retries: Option<Box<dyn Histogram>>,
    pub(super) transparent_retries: Option<Box<dyn Histogram>>,
    pub(super) hedges: Option<Box<dyn Histogram>>,
    pub(super) retry_delay: Option<Box<dyn Histogram>>,
    calls: [OnceLock<Option<Box<dyn Histogram>>>; CODES],
    /// The handles of attempts without a zone, and of all attempts if the label for the zone is disabled.
    attempts: ByStatus,
    attempts_by_zone: Interned<ByStatus>,
}

type ByStatus = [OnceLock<EndedAttempts>; CODES];

/// The handles for attempts that ended with one status.
pub(super) struct EndedAttempts {
    pub(super) duration: Option<Box<dyn Histogram>>,
    pub(super) sent: Option<Box<dyn Histogram>>,
    pub(super) received: Option<Box<dyn Histogram>>,
}

impl MethodMetrics {
    pub(super) fn new(scope: Arc<Scope>, method: &str) -> Self {
        let labels = scope.labels(&[(METHOD, method)]);
        let histogram = |instrument| scope.metrics.histogram(instrument, &labels);
        Self {
            started: scope.metrics.counter(&ATTEMPT_STARTED, &labels),
            retries: histogram(&CALL_RETRIES),
            transparent_retries: histogram(&CALL_TRANSPARENT_RETRIES),
            hedges: histogram(&CALL_HEDGES),
            retry_delay: histogram(&CALL_RETRY_DELAY),
            calls: std::array::from_fn(|_| OnceLock::new()),
            attempts: std::array::from_fn(|_| OnceLock::new()),
            attempts_by_zone: Interned::new(MAX_ZONES),
            method: method.into(),
            scope,
        }
    }

    /// Returns whether the attempts are recorded with the zone of their endpoint.
    pub(crate) fn has_zones(&self) -> bool {
        self.scope.has_zones
    }

    /// Returns the handles for attempts with this status and zone.
    pub(super) fn attempts(&self, code: Code, zone: &str) -> Option<&EndedAttempts> {
        let (by_status, zone) = if zone.is_empty() {
            (&self.attempts, "")
        } else {
            let create = || std::array::from_fn(|_| OnceLock::new());
            match self.attempts_by_zone.get(zone, create) {
                Some(by_status) => (by_status, zone),
                None => (&self.attempts, ""),
            }
        };
        let handles = by_status.get(code as usize)?;
        Some(handles.get_or_init(|| self.bind_attempts(code, zone)))
    }

    #[cold]
    fn bind_attempts(&self, code: Code, zone: &str) -> EndedAttempts {
        let own = [
            (METHOD, &*self.method),
            (STATUS, status_name(code)),
            (LOCALITY, zone),
        ];
        let labels = self.scope.labels(&own);
        let histogram = |instrument| self.scope.metrics.histogram(instrument, &labels);
        EndedAttempts {
            duration: histogram(&ATTEMPT_DURATION),
            sent: histogram(&ATTEMPT_SENT),
            received: histogram(&ATTEMPT_RECEIVED),
        }
    }

    /// Returns the histogram of the durations of calls with this status.
    pub(super) fn call_duration(&self, code: Code) -> Option<&dyn Histogram> {
        let handle = self.calls.get(code as usize)?.get_or_init(|| {
            let own = [(METHOD, &*self.method), (STATUS, status_name(code))];
            let labels = self.scope.labels(&own);
            self.scope.metrics.histogram(&CALL_DURATION, &labels)
        });
        handle.as_deref()
    }
}

impl std::fmt::Debug for MethodMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MethodMetrics")
            .field("method", &self.method)
            .finish_non_exhaustive()
    }
}

/// Returns the name of a status code as gRPC spells it.
pub(crate) fn status_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// The number of status codes.
const CODES: usize = 17;
/// Limit on the zones with handles of their own. Attempts in further zones are recorded without a zone.
const MAX_ZONES: usize = 100;
