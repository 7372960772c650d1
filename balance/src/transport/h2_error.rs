//! Classifies the errors of h2 by what they mean for a call.

use h2::Reason;

/// Returns whether the error is a GOAWAY from the peer with the code `NO_ERROR`. In this case, no request on the connection has caused the
/// GOAWAY.
pub(crate) fn is_graceful_goaway(error: &h2::Error) -> bool {
    error.is_go_away() && error.is_remote() && error.reason() == Some(Reason::NO_ERROR)
}

/// Returns true if this error proves that the peer did not process the call. The call must have failed before its response head was
/// received.
///
/// `is_go_away` alone is not enough: it is also true for errors that h2 itself detects. After such an error, the peer may have processed
/// the call. A call that was not processed may still be the cause of the error: see
/// [`Connection::goaway_error`](super::http2::Connection::goaway_error).
pub(crate) fn is_unprocessed(error: &h2::Error) -> bool {
    let refused = error.is_reset() && error.reason() == Some(Reason::REFUSED_STREAM);
    error.is_remote() && (error.is_go_away() || refused)
}

/// Returns true if the connection was lost while the call was open on it. A reset stream and a graceful GOAWAY do not count.
pub(crate) fn is_connection_lost(error: &h2::Error) -> bool {
    !error.is_reset() && !is_graceful_goaway(error)
}
