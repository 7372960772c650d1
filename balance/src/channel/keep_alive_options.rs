//! The options of a channel that control PINGs.

use std::time::Duration;

use super::ChannelBuilder;
use crate::balance::MAX_DURATION;

impl<S> ChannelBuilder<S> {
    /// Enables keep-alive: a connection with open calls sends a PING if nothing was read for this long. Disabled by default. Values below
    /// 10 ms are raised to 10 ms.
    ///
    /// Keep-alive is rarely needed, because three checks are always enabled:
    ///
    /// - A connection that was silent for more than a second is checked with a PING before a call is sent on it. The check is skipped if a
    ///   connection to the same endpoint has survived a silence of at least the same length in the last ten minutes.
    /// - A connection is checked with a PING when a call on it exceeds its deadline while nothing is read from the connection.
    /// - The keep-alive of TCP is enabled.
    ///
    /// Keep-alive is useful if the network drops connections silently, and if calls have no deadline or streams are silent for minutes.
    ///
    /// Many servers close the connection of a client that sends PINGs more often than every five minutes. By default a connection sends at
    /// most two PINGs between two HEADERS or DATA frames of the server. The PING that checks a new connection counts as one of them. After
    /// these two PINGs, it sends at most one PING every five minutes while calls are open. If the servers permit more PINGs, set
    /// [`keep_alive_permit_time`](Self::keep_alive_permit_time). If a server still closes a connection with `too_many_pings`, the interval
    /// for that server doubles (gRFC A8).
    pub fn http2_keep_alive_interval(mut self, interval: Duration) -> Self {
        self.config.keep_alive.interval = Some(interval.clamp(SHORTEST_INTERVAL, MAX_DURATION));
        self
    }

    /// Sets the timeout of a keep-alive PING: the connection is closed if nothing is read for this long after the PING. Default 20 s, as in
    /// gRPC (gRFC A8). Without [`http2_keep_alive_interval`](Self::http2_keep_alive_interval) it has no effect.
    pub fn keep_alive_timeout(mut self, timeout: Duration) -> Self {
        self.config.keep_alive.timeout = timeout.min(MAX_DURATION);
        self
    }

    /// Sets the shortest interval between PINGs that the servers permit: `MinTime` of the enforcement policy in grpc-go,
    /// `permitKeepAliveTime` in grpc-java. Default 5 minutes, which is the default of both libraries. Without
    /// [`http2_keep_alive_interval`](Self::http2_keep_alive_interval) it has no effect.
    pub fn keep_alive_permit_time(mut self, interval: Duration) -> Self {
        self.config.keep_alive.permit = interval;
        self
    }

    /// Sets whether the keep-alive also sends PINGs on connections without open calls. Default `false`, as in tonic and in gRFC A8.
    ///
    /// Enable it only if the servers permit it (`PermitWithoutStream` in grpc-go, `permitKeepAliveWithoutCalls` in grpc-java). By default
    /// these servers permit one such PING in two hours and close the connection if they receive more. Without
    /// [`http2_keep_alive_interval`](Self::http2_keep_alive_interval) the channel is [invalid](crate::error::ChannelError::InvalidOption).
    pub fn keep_alive_while_idle(mut self, enabled: bool) -> Self {
        self.config.keep_alive.while_idle = enabled;
        self
    }
}

/// Minimum of the keep-alive interval. With an interval near zero, a connection would send PINGs without a pause.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(10);
