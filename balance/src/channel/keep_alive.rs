//! The options of a channel that concern PINGs.

use std::time::Duration;

use super::ChannelBuilder;
use crate::balance::LONGEST;
use crate::transport::pings::KeepAlive;

impl<S> ChannelBuilder<S> {
    /// Pings a connection on which calls are open and nothing was read for `interval`, and gives it up if nothing is read for `timeout` after
    /// that. Disabled by default.
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
    pub fn http2_keep_alive(mut self, interval: Duration, timeout: Duration) -> Self {
        let while_idle = self.config.keep_alive_while_idle;
        self.config.connector.http2.keep_alive = Some(KeepAlive {
            interval: interval.clamp(SHORTEST_INTERVAL, LONGEST),
            timeout: timeout.min(LONGEST),
            while_idle,
            permit: self.config.keep_alive_permit_time,
        });
        self
    }

    /// Sets the shortest interval between PINGs that the servers permit: `MinTime` of grpc-go's enforcement policy, `permitKeepAliveTime` of
    /// grpc-java. Default 5 minutes, which is their default. Without [`http2_keep_alive`](Self::http2_keep_alive) it has no effect.
    pub fn keep_alive_permit_time(mut self, interval: Duration) -> Self {
        self.config.keep_alive_permit_time = interval;
        if let Some(keep_alive) = &mut self.config.connector.http2.keep_alive {
            keep_alive.permit = interval;
        }
        self
    }

    /// Sets whether the keep-alive also pings connections without open calls. Default `false`, as in tonic and in gRFC A8.
    ///
    /// Enable it only if the servers permit it (`PermitWithoutStream` in grpc-go, `permitKeepAliveWithoutCalls` in grpc-java): by default they
    /// allow such a PING once in two hours and close the connection otherwise. Without [`http2_keep_alive`](Self::http2_keep_alive) the
    /// channel is [invalid](crate::ChannelError::InvalidOption).
    pub fn keep_alive_while_idle(mut self, enabled: bool) -> Self {
        self.config.keep_alive_while_idle = enabled;
        if let Some(keep_alive) = &mut self.config.connector.http2.keep_alive {
            keep_alive.while_idle = enabled;
        }
        self
    }
}

/// A keep-alive without a pause would do nothing but ping.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(10);
