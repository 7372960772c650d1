//! Classifies the errors of etcd by their texts.

use std::time::Duration;

use crate::error::{EtcdError, EtcdErrorKind};

/// Classifies an error of `etcd-client`.
pub(super) fn of_client(
    operation: &'static str,
    endpoint: &str,
    error: etcd_client::Error,
) -> EtcdError {
    match error {
        etcd_client::Error::GRpcStatus(status) => of_status(operation, endpoint, status),
        // The first response of a keep-alive had a TTL of 0. `etcd-client` reports this only in the text of the error.
        etcd_client::Error::LeaseKeepAliveError(text) if text == "lease not found" => {
            EtcdError::new(EtcdErrorKind::LeaseNotFound, operation, endpoint, text)
        }
        other => EtcdError::new(EtcdErrorKind::Unavailable, operation, endpoint, other),
    }
}

/// Classifies a gRPC status.
pub(super) fn of_status(
    operation: &'static str,
    endpoint: &str,
    status: tonic::Status,
) -> EtcdError {
    let kind = match of_text(status.message()) {
        // A server that does not implement the gRPC service returns this code, with a text that is not in `TEXTS`.
        EtcdErrorKind::Unavailable if status.code() == tonic::Code::Unimplemented => {
            EtcdErrorKind::Unimplemented
        }
        // Usually the client's own channel created this status when the deadline of the request passed.
        EtcdErrorKind::Unavailable if status.code() == tonic::Code::DeadlineExceeded => {
            EtcdErrorKind::DeadlineExceeded
        }
        kind => kind,
    };
    EtcdError::new(kind, operation, endpoint, status)
}

/// Classifies the reason that a server states when it cancels a watch.
pub(super) fn of_reason(operation: &'static str, endpoint: &str, reason: &str) -> EtcdError {
    EtcdError::new(
        of_text(reason),
        operation,
        endpoint,
        format!("watch cancelled: {reason:?}"),
    )
}

pub(super) fn deadline(operation: &'static str, endpoint: &str, deadline: Duration) -> EtcdError {
    let source = format!("no answer within {} s", deadline.as_secs_f64());
    EtcdError::new(EtcdErrorKind::DeadlineExceeded, operation, endpoint, source)
}

/// Parts of error texts and their kinds: the texts of etcd's `rpctypes`, which are identical from 3.4 to 3.7, and the texts of tonic and of
/// grpc-go for a message over their size limit. An error matches if its text contains the part, because services built on etcd's Go client
/// add a prefix or wrap the text.
const TEXTS: &[(&str, EtcdErrorKind)] = &[
    (
        "required revision has been compacted",
        EtcdErrorKind::Compacted,
    ),
    (
        "required revision is a future revision",
        EtcdErrorKind::FutureRevision,
    ),
    (
        "decoded message length too large",
        EtcdErrorKind::ResponseTooLarge,
    ),
    ("request is too large", EtcdErrorKind::RequestTooLarge),
    (
        "too many operations in txn request",
        EtcdErrorKind::RequestTooLarge,
    ),
    // The text of grpc-go, which rejects the message before etcd receives it.
    (
        "received message larger than max",
        EtcdErrorKind::RequestTooLarge,
    ),
    ("requested lease not found", EtcdErrorKind::LeaseNotFound),
    ("lease already exists", EtcdErrorKind::LeaseExists),
    ("too large lease TTL", EtcdErrorKind::LeaseTtlTooLarge),
    ("database space exceeded", EtcdErrorKind::NoSpace),
    ("no leader", EtcdErrorKind::NoLeader),
    ("permission denied", EtcdErrorKind::PermissionDenied),
    ("invalid auth token", EtcdErrorKind::InvalidToken),
    ("revision of auth store is old", EtcdErrorKind::InvalidToken),
    ("user name is empty", EtcdErrorKind::CredentialsRequired),
    ("invalid user ID or password", EtcdErrorKind::BadCredentials),
    ("user name not found", EtcdErrorKind::BadCredentials),
    (
        "authentication is not enabled",
        EtcdErrorKind::AuthNotEnabled,
    ),
];

fn of_text(text: &str) -> EtcdErrorKind {
    TEXTS
        .iter()
        .find_map(|(part, kind)| text.contains(part).then_some(*kind))
        .unwrap_or(EtcdErrorKind::Unavailable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_determines_the_error_kind_only_if_the_message_is_unknown() {
        use tonic::{Code, Status};
        for (code, text, kind) in [
            (
                Code::OutOfRange,
                "etcdserver: mvcc: required revision has been compacted",
                EtcdErrorKind::Compacted,
            ),
            (
                Code::OutOfRange,
                "etcdserver: mvcc: required revision is a future revision",
                EtcdErrorKind::FutureRevision,
            ),
            (
                Code::OutOfRange,
                "Error, decoded message length too large: found 5 bytes, the limit is: 4 bytes",
                EtcdErrorKind::ResponseTooLarge,
            ),
            (
                Code::OutOfRange,
                "etcdserver: too large lease TTL",
                EtcdErrorKind::LeaseTtlTooLarge,
            ),
            (
                Code::InvalidArgument,
                "etcdserver: revision of auth store is old",
                EtcdErrorKind::InvalidToken,
            ),
            (
                Code::InvalidArgument,
                "etcdserver: authentication failed, invalid user ID or password",
                EtcdErrorKind::BadCredentials,
            ),
            (
                Code::InvalidArgument,
                "etcdserver: user name is empty",
                EtcdErrorKind::CredentialsRequired,
            ),
            (
                Code::Unauthenticated,
                "etcdserver: invalid auth token",
                EtcdErrorKind::InvalidToken,
            ),
            (
                Code::Unknown,
                "etcdserver: invalid auth token",
                EtcdErrorKind::InvalidToken,
            ),
            (
                Code::FailedPrecondition,
                "etcdserver: authentication is not enabled",
                EtcdErrorKind::AuthNotEnabled,
            ),
            (
                Code::FailedPrecondition,
                "etcdserver: lease already exists",
                EtcdErrorKind::LeaseExists,
            ),
            (
                Code::Unavailable,
                "etcdserver: no leader",
                EtcdErrorKind::NoLeader,
            ),
            (
                Code::ResourceExhausted,
                "etcdserver: mvcc: database space exceeded",
                EtcdErrorKind::NoSpace,
            ),
            (Code::Unknown, "transport error", EtcdErrorKind::Unavailable),
            (
                Code::DeadlineExceeded,
                "context deadline exceeded",
                EtcdErrorKind::DeadlineExceeded,
            ),
            (
                Code::Unimplemented,
                "unknown service etcdserverpb.KV",
                EtcdErrorKind::Unimplemented,
            ),
        ] {
            let error = of_status("range", "127.0.0.1:2379", Status::new(code, text));
            assert_eq!(error.kind(), kind, "{text}");
        }
    }
}
