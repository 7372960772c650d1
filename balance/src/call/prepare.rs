//! The checks before a call is sent on the picked connection: whether the peer still responds, and whether the call could make the peer end
//! the connection.

use std::sync::Arc;

use tokio::time::Instant;
use tonic::Status;

use super::core::Core;
use super::history::History;
use super::request::Call;
use super::status;
use crate::balance::Permit;

/// Returns whether the call can be sent without a check: the connection was not silent for long, and the metadata is small.
pub(super) fn needs_no_check(core: &Core, call: &Call, permit: &Permit, now: Instant) -> bool {
    has_small_metadata(call, permit) && !permit.is_doubtful(now, core.is_single_threaded)
}

/// Returns true if the metadata is so small that it does not make the peer end the connection.
pub(super) fn has_small_metadata(call: &Call, permit: &Permit) -> bool {
    let metadata = call.metadata_size();
    metadata == 0
        || (metadata <= TRUSTED_METADATA && metadata <= permit.http2().max_header_list() as usize)
}

/// The result of [`prepare`].
pub(super) enum Prepared {
    /// The call can be sent with this permit.
    Ready(Permit),
    /// The call must pick again. If the connection failed a check, the history excludes the connection. If no private connection could be
    /// dialled, the history excludes the endpoint.
    Unfit,
}

/// Checks the picked connection. If the call could make the peer end the connection, a private connection, which carries no other call, is
/// dialled and used instead. Returns an error if the metadata exceeds the limit that the peer has announced.
///
/// The call was not sent yet, so a failed check only delays the call.
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
        return Ok(dial_private(core, metadata, permit, history).await);
    }
    if core.is_single_threaded {
        // Yields, so that the tasks that read connections and drive the channel can run. In a program that drives its runtime only during a
        // call, these tasks have not run since the last call.
        tokio::task::yield_now().await;
        tokio::task::yield_now().await;
    }
    if !history.trusts(&permit)
        && permit.is_doubtful(Instant::now(), false)
        && let Err(bytes) = permit.check().await
    {
        let address = permit.endpoint().address();
        tracing::debug!(%address, "a silent connection did not answer a PING; picking another connection");
        core.shared().check_silent();
        history.add_silent(&permit, bytes);
        return Ok(Prepared::Unfit);
    }
    Ok(Prepared::Ready(permit))
}

/// Dials a private connection, so that no other call is lost if this call ends the connection.
///
/// Peers that announce no limit on metadata (nginx, haproxy) end the whole connection when the metadata of a call exceeds their limit. On a
/// shared connection, all other calls would fail with it. After the endpoint has accepted metadata of some size, calls up to that size use
/// shared connections.
async fn dial_private(
    core: &Core,
    metadata: usize,
    permit: Permit,
    history: &mut History,
) -> Prepared {
    let endpoint = Arc::clone(permit.endpoint());
    // The permit on the shared connection is not needed any more, unless it holds the place of the call below a limit on requests.
    let place = Some(permit).filter(|_| core.shared().limits_requests());
    let dial_permit = endpoint.dial_permit().await;
    if !history.is_suspect() && metadata <= endpoint.largest_metadata() {
        // In the meantime, another call has shown that the endpoint accepts this size, so this call can use a shared connection.
        return Prepared::Unfit;
    }
    // Boxed, because the future of a handshake is large and would enlarge the future of every queued call.
    let dialled = Box::pin(
        core.shared()
            .dial_private(&endpoint, metadata, dial_permit, place),
    );
    match dialled.await {
        Ok(permit) => Prepared::Ready(permit),
        Err(error) => {
            let status = status::private_dial_failed(&core.service, endpoint.address(), &error);
            history.add_private_dial_failure(&endpoint, status);
            Prepared::Unfit
        }
    }
}

/// Maximum size in bytes of metadata that is sent on a shared connection although the peer announces no limit. It is the limit of
/// grpc-java's servers and the size of nginx's header buffer. Connections were ended by nginx from 14 kB of metadata on, by haproxy from
/// 16.5 kB on, and by tonic from 60 kB on.
pub(super) const TRUSTED_METADATA: usize = 8 << 10;
