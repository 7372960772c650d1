//! The options that limit the requests of a channel, and the reaction to servers that limit them.

use std::time::Duration;

#[cfg(doc)]
use super::ChannelError;
use super::builder::ChannelBuilder;
use crate::balance::MAX_DURATION;

impl<S> ChannelBuilder<S> {
    /// Limits the requests of the channel to all its endpoints together (circuit breaking, gRFC A32). Default: no limit. 0 makes the channel
    /// [invalid](ChannelError::InvalidOption).
    ///
    /// A call over the limit is not sent. It fails at once with `UNAVAILABLE`, and no retry policy sends it again. A call with
    /// [`wait_for_ready`](Self::wait_for_ready) waits instead. Such calls are sent in the order of their arrival, and at most
    /// [`max_waiters`](Self::max_waiters) of them wait. In gRFC A32, these calls fail as well.
    ///
    /// Each attempt counts as one request, also a retry or a hedge. It counts from the time at which an endpoint is ready for it until its
    /// response has ended or is dropped. The wait for a stream is included. So an open stream counts. A call between two attempts does not
    /// count, and neither does a call that waits for an endpoint to become ready. A hedge over the limit is not sent.
    ///
    /// All clones of the channel share the limit. A service config cannot set it: gRPC has no field for it.
    ///
    /// ```no_run
    /// use tonic_balance::BalancedChannel;
    ///
    /// # fn run() {
    /// let channel = BalancedChannel::builder()
    ///     .max_requests(1_000)
    ///     .max_requests_per_endpoint(100)
    ///     .addresses(["10.0.0.5:50051", "10.0.0.6:50051"])
    ///     .connect_lazy();
    /// # }
    /// ```
    pub fn max_requests(mut self, requests: usize) -> Self {
        if requests == 0 {
            self.config.refuse(every_call_fails("max_requests"));
        }
        self.config.options.max_requests = Some(requests);
        self
    }

    /// Limits the requests of the channel to each endpoint, on all connections to it. Default: no limit. 0 makes the channel
    /// [invalid](ChannelError::InvalidOption).
    ///
    /// An endpoint that has reached the limit is skipped: the call is sent to another endpoint, among those that its
    /// [`Select`](crate::channel::Select) allows. With a [traffic split](Self::split), a call is sent to another part if all endpoints of its part
    /// have reached the limit. If all endpoints have reached the limit, the call fails or waits as with [`max_requests`](Self::max_requests). A
    /// request counts for as long as it does for `max_requests`. gRFC A32 has no such limit.
    ///
    /// If an address is removed and registered again, its count starts at zero.
    pub fn max_requests_per_endpoint(mut self, requests: u32) -> Self {
        if requests == 0 {
            self.config
                .refuse(every_call_fails("max_requests_per_endpoint"));
        }
        self.config.options.max_requests_per_endpoint = Some(requests);
        self
    }

    /// Makes the pushback of a server keep new calls away from it, for this time at most. Disabled by default, and if the time is zero.
    ///
    /// A server sends a pushback if it fails a call with `UNAVAILABLE` or `RESOURCE_EXHAUSTED` and the metadata `grpc-retry-pushback-ms`, as
    /// the concurrency limit of `tonic-etcd` does. For that number of milliseconds, the endpoint gets calls only while no other endpoint is
    /// ready. Pushbacks begin at least 100 ms apart, and each lasts at least 100 ms, so short ones can be longer or have no effect. A negative
    /// or malformed number forbids retries of the call (gRFC A6) and does not concern other calls. A new generation of an endpoint ends its
    /// pushback.
    ///
    /// Pushbacks begin to take effect if the endpoints in pushback have at most half of the current weight of all, and cease above two thirds:
    /// all of them then get calls. So pushbacks never leave a channel without endpoints, and at most triple the load of the others. The same
    /// applies to the endpoints of a [`Select`](crate::channel::Select) and of a part of a [traffic split](Self::split), if the pushbacks take
    /// effect for the channel. [`LbPolicy::RingHash`](crate::LbPolicy::RingHash) ignores pushbacks, because they would move all keys of
    /// a server, and it has a bound on the load of each server.
    ///
    /// ```no_run
    /// use std::time::Duration;
    ///
    /// use tonic_balance::BalancedChannel;
    ///
    /// # fn run() {
    /// let channel = BalancedChannel::builder()
    ///     .max_pushback(Duration::from_secs(10))
    ///     .addresses(["10.0.0.5:50051", "10.0.0.6:50051"])
    ///     .connect_lazy();
    /// # }
    /// ```
    pub fn max_pushback(mut self, longest: Duration) -> Self {
        // The end of the pushback must be representable as an `Instant`.
        self.config.options.max_pushback = longest.min(MAX_DURATION);
        self
    }
}

fn every_call_fails(option: &str) -> String {
    format!("{option} is 0, so every call would fail")
}
