//! What an error of h2 means for the call that gets it.

use h2::Reason;

/// Whether the peer closes the connection without blaming anything that was sent on it.
pub(crate) fn is_orderly_goaway(error: &h2::Error) -> bool {
    error.is_go_away() && error.is_remote() && error.reason() == Some(Reason::NO_ERROR)
}

/// Whether a call that failed with this error before its response's head has certainly not been processed.
///
/// `is_go_away` alone is not enough: errors that h2 detects by itself have it too, and the peer may have processed the call then. That the
/// call was not processed does not mean that it is innocent: see [`Connection::blame`](super::http2::Connection::blame).
pub(crate) fn is_unprocessed(error: &h2::Error) -> bool {
    let refused = error.is_reset() && error.reason() == Some(Reason::REFUSED_STREAM);
    error.is_remote() && (error.is_go_away() || refused)
}

/// Whether the connection broke with the call on it.
pub(crate) fn is_connection_lost(error: &h2::Error) -> bool {
    !error.is_reset() && !is_orderly_goaway(error)
}
