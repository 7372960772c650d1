//! Before a call is sent on the connection that was picked: is the path to the peer still there, and may the call end the connection?

use std::sync::Arc;

use tokio::time::Instant;
use tonic::Status;

use super::core::Core;
use super::history::History;
use super::request::Call;
use super::status;
use crate::balance::Permit;

/// Whether a call can be sent on a connection as it is: the connection was not silent for long, and nothing about the call is unusual.
pub(super) fn is_unquestioned(core: &Core, call: &Call, permit: &Permit, now: Instant) -> bool {
    is_harmless(call, permit) && !permit.is_doubtful(now, core.is_single_threaded)
}

/// Whether the call's metadata is too small to end the connection.
pub(super) fn is_harmless(call: &Call, permit: &Permit) -> bool {
    let metadata = call.metadata_size();
    metadata == 0
        || (metadata <= TRUSTED_METADATA && metadata <= permit.http2().max_header_list() as usize)
}

/// What became of a place before the call was sent.
pub(super) enum Prepared {
    /// Send the call there.
    Ready(Permit),
    /// Pick another one. The connection is not to be picked again.
    Unfit,
}

/// Checks the picked connection, or replaces it with a private one if the call could end it.
///
/// Nothing was sent on the connection yet, so whatever is found here costs the call a moment and nothing else.
pub(super) async fn prepare(
    core: &Core,
    call: &Call,
    permit: Permit,
    history: &mut History,
) -> Result<Prepared, Status> {
    let metadata = call.metadata_size();
    let limit = permit.http2().max_header_list();
    if metadata > limit as usize {
        let address = permit.endpoint().address();
        return Err(status::too_large(&core.service, address, metadata, limit));
    }
    let is_announced = limit != u32::MAX;
    let is_large = metadata > TRUSTED_METADATA && !is_announced;
    let is_accepted = metadata <= permit.endpoint().largest_metadata();
    if history.is_suspect() || (is_large && !is_accepted) {
        return Ok(alone(core, metadata, permit, history).await);
    }
    if core.is_single_threaded {
        // The tasks that read connections and drive the channel have their turn: in a program that drives its runtime only while it makes a
        // call, they have not run since the last one.
        tokio::task::yield_now().await;
        tokio::task::yield_now().await;
    }
    if !history.trusts(&permit)
        && permit.is_doubtful(Instant::now(), false)
        && let Err(bytes) = permit.check().await
    {
        let address = permit.endpoint().address();
        tracing::debug!(%address, "a connection does not answer after a silence: picking another");
        core.shared().check_silent();
        history.add_silent(&permit, bytes);
        return Ok(Prepared::Unfit);
    }
    Ok(Prepared::Ready(permit))
}

/// Gives a call a connection of its own, so that no other call is lost with it.
///
/// Peers that announce no limit on metadata (nginx, haproxy) end the whole connection when a call exceeds it; the same call over a shared
/// connection would cost all calls on it. A size that the endpoint has accepted once needs no such care again.
async fn alone(core: &Core, metadata: usize, permit: Permit, history: &mut History) -> Prepared {
    // Its place on the shared connection is not needed any more.
    let endpoint = Arc::clone(permit.endpoint());
    drop(permit);
    let trial = endpoint.trial().await;
    if !history.is_suspect() && metadata <= endpoint.largest_metadata() {
        // Another call has shown meanwhile that the endpoint accepts it.
        return Prepared::Unfit;
    }
    // Boxed: the future of a handshake is large, and every call that waits would be.
    let dialled = Box::pin(core.shared().dial_alone(&endpoint, metadata, trial));
    match dialled.await {
        Ok(alone) => Prepared::Ready(alone),
        Err(error) => {
            let status = status::not_alone(&core.service, endpoint.address(), &error);
            history.add_undialled(&endpoint, status);
            Prepared::Unfit
        }
    }
}

/// Up to this size, in bytes, metadata is sent like any other. It is the limit of grpc-java's servers and of nginx's buffer for a header;
/// what is larger has ended connections of nginx from 14 kB, of haproxy from 16.5 kB and of tonic from 60 kB on.
pub(super) const TRUSTED_METADATA: usize = 8 << 10;
