//! The pushback of a server, as far as it concerns other calls.

use http::HeaderMap;
use tokio::time::Instant;
use tonic::Code;

use super::core::Core;
use super::retry::decision::Pushback;
use crate::balance::Permit;

/// Records the pushback of a server that has refused a call because it cannot serve it now. `headers`: those that carry the status. New calls
/// then prefer other endpoints. A pushback that forbids retries is about this call only. A pushback on a connection that is closing is about the
/// previous server.
#[cold]
pub(super) fn record_pushback(
    core: &Core,
    failure: Code,
    headers: &HeaderMap,
    permit: &Permit,
    now: Instant,
) {
    if matches!(failure, Code::Unavailable | Code::ResourceExhausted)
        && !permit.is_evicted()
        && let Pushback::After(wait) = Pushback::of(headers)
    {
        core.shared().on_pushback(permit.endpoint(), wait, now);
    }
}
