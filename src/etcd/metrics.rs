//! The durations of requests to etcd.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::error::EtcdErrorKind;
use crate::metrics::{ERROR, Histogram, Metrics, OPERATION, REQUEST_DURATION};

/// The histograms of requests, keyed by operation and error. The lock is uncontended: a process sends few requests to etcd.
pub(super) struct RequestMetrics {
    pub(super) metrics: Metrics,
    handles: Mutex<Handles>,
}

type Handles = HashMap<(&'static str, &'static str), Option<Arc<dyn Histogram>>>;

impl RequestMetrics {
    pub(super) fn new(metrics: Metrics) -> Self {
        Self {
            metrics,
            handles: Mutex::default(),
        }
    }

    pub(super) fn record(
        &self,
        operation: &'static str,
        error: Option<EtcdErrorKind>,
        duration: Duration,
    ) {
        let error = error.map_or("none", name);
        let mut handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
        let handle = handles.entry((operation, error)).or_insert_with(|| {
            let labels = [(OPERATION, operation), (ERROR, error)];
            let handle = self.metrics.histogram(&REQUEST_DURATION, &labels);
            handle.map(Arc::from)
        });
        let handle = handle.clone();
        drop(handles);
        if let Some(handle) = handle {
            handle.record(duration.as_secs_f64());
        }
    }
}

fn name(kind: EtcdErrorKind) -> &'static str {
    match kind {
        EtcdErrorKind::Unavailable => "unavailable",
        EtcdErrorKind::DeadlineExceeded => "deadline_exceeded",
        EtcdErrorKind::NoLeader => "no_leader",
        EtcdErrorKind::OtherCluster => "other_cluster",
        EtcdErrorKind::StaleTerm => "stale_term",
        EtcdErrorKind::NoSpace => "no_space",
        EtcdErrorKind::Compacted => "compacted",
        EtcdErrorKind::FutureRevision => "future_revision",
        EtcdErrorKind::ResponseTooLarge => "response_too_large",
        EtcdErrorKind::RequestTooLarge => "request_too_large",
        EtcdErrorKind::LeaseNotFound => "lease_not_found",
        EtcdErrorKind::LeaseExists => "lease_exists",
        EtcdErrorKind::LeaseTtlTooLarge => "lease_ttl_too_large",
        EtcdErrorKind::PermissionDenied => "permission_denied",
        EtcdErrorKind::InvalidToken => "invalid_token",
        EtcdErrorKind::BadCredentials => "bad_credentials",
        EtcdErrorKind::CredentialsRequired => "credentials_required",
        EtcdErrorKind::AuthNotEnabled => "auth_not_enabled",
        EtcdErrorKind::Unimplemented => "unimplemented",
        EtcdErrorKind::InvalidRequest => "invalid_request",
        EtcdErrorKind::TaskEnded => "task_ended",
    }
}
