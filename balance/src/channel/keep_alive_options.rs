//! The options of a channel that concern PINGs.

use std::time::Duration;

use super::ChannelBuilder;
use crate::balance::LONGEST;

impl<S> ChannelBuilder<S> {
    /// Enables keep-alive: a connection on which calls are open is pinged if nothing was read for this long. Disabled by default; values below
    /// 10 ms are raised to it.
    ///
    /// It is rarely needed, because three checks are always enabled. Before a call is sent on a connection that was silent for more than a
    /// second, a PING checks it; this is skipped if a connection to the same endpoint has survived a silence as long in the last ten minutes.
    /// When a call overruns its deadline, its connection is checked. TCP's own keep-alive is on. What is left are calls without a deadline, and
    /// streams that are silent for minutes, on a path that drops connections silently.
    ///
    /// Many servers close the connection of a client that pings more often than every five minutes. By default a connection sends at most two
    /// PINGs, the ready check included, between two HEADERS or DATA frames of the server. Beyond that it sends one every five minutes while
    /// calls are open. If the servers permit more, set [`keep_alive_permit_time`](Self::keep_alive_permit_time). If a server closes a
    /// connection with `too_many_pings` all the same, the interval for it doubles (gRFC A8).
    pub fn http2_keep_alive_interval(mut self, interval: Duration) -> Self {
        self.config.keep_alive.interval = Some(interval.clamp(SHORTEST_INTERVAL, LONGEST));
        self
    }

    /// Sets how long after a keep-alive PING the connection is closed if nothing is read. Default 20 s, as in gRPC (gRFC A8). Without
    /// [`http2_keep_alive_interval`](Self::http2_keep_alive_interval) it has no effect.
    pub fn keep_alive_timeout(mut self, timeout: Duration) -> Self {
        self.config.keep_alive.timeout = timeout.min(LONGEST);
        self
    }

    /// Sets the shortest interval between PINGs that the servers permit: `MinTime` of grpc-go's enforcement policy, `permitKeepAliveTime` of
    /// grpc-java. Default 5 minutes, which is their default. Without [`http2_keep_alive_interval`](Self::http2_keep_alive_interval) it has no effect.
    pub fn keep_alive_permit_time(mut self, interval: Duration) -> Self {
        self.config.keep_alive.permit = interval;
        self
    }

    /// Sets whether the keep-alive also pings connections without open calls. Default `false`, as in tonic and in gRFC A8.
    ///
    /// Enable it only if the servers permit it (`PermitWithoutStream` in grpc-go, `permitKeepAliveWithoutCalls` in grpc-java): by default they
    /// allow such a PING once in two hours and close the connection otherwise. Without [`http2_keep_alive_interval`](Self::http2_keep_alive_interval) the
    /// channel is [invalid](crate::ChannelError::InvalidOption).
    pub fn keep_alive_while_idle(mut self, enabled: bool) -> Self {
        self.config.keep_alive.while_idle = enabled;
        self
    }
}

/// A keep-alive without a pause would do nothing but ping.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(10);
