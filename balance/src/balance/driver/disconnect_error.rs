//! The values of the label `grpc.disconnect_error` (gRFC A94).

use std::borrow::Cow;
use std::io::ErrorKind;

use h2::Reason;

use crate::transport::connection_task::CloseReason;

/// Returns the reason for the end of a connection. A GOAWAY of the peer takes precedence, because it precedes the end of the socket.
pub(super) fn disconnect_error(goaway: Option<Reason>, reason: &CloseReason) -> Cow<'static, str> {
    if let Some(goaway) = goaway {
        return format!("GOAWAY {goaway:?}").into();
    }
    let error = match reason {
        CloseReason::Unresponsive => return "connection timed out".into(),
        CloseReason::Closed | CloseReason::Aborted => return "unknown".into(),
        CloseReason::Failed(error) => error,
    };
    if let Some(error) = error.get_io() {
        return of_socket(error.kind()).into();
    }
    match error.reason() {
        Some(reason) if error.is_go_away() && error.is_remote() => {
            format!("GOAWAY {reason:?}").into()
        }
        _ => "unknown".into(),
    }
}

fn of_socket(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::ConnectionReset => "connection reset",
        ErrorKind::TimedOut => "connection timed out",
        ErrorKind::ConnectionAborted => "connection aborted",
        _ => "socket error",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reasons_are_those_of_the_grfc() {
        let failed = || CloseReason::Failed(h2::Error::from(Reason::PROTOCOL_ERROR));
        for (goaway, reason, expected) in [
            (
                Some(Reason::NO_ERROR),
                CloseReason::Closed,
                "GOAWAY NO_ERROR",
            ),
            (
                Some(Reason::ENHANCE_YOUR_CALM),
                failed(),
                "GOAWAY ENHANCE_YOUR_CALM",
            ),
            (None, failed(), "unknown"),
            (None, CloseReason::Unresponsive, "connection timed out"),
            (None, CloseReason::Closed, "unknown"),
            (None, CloseReason::Aborted, "unknown"),
        ] {
            assert_eq!(disconnect_error(goaway, &reason), expected);
        }
        assert_eq!(of_socket(ErrorKind::ConnectionReset), "connection reset");
        assert_eq!(of_socket(ErrorKind::TimedOut), "connection timed out");
        assert_eq!(of_socket(ErrorKind::BrokenPipe), "socket error");
    }
}
