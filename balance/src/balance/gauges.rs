//! The gauges of a channel: its endpoints by state, and its waiting calls.

use std::sync::{Arc, Weak};

use super::endpoint_status::EndpointState;
use super::shared::Shared;
use crate::metrics::{
    ChannelMetrics, GaugeSource, Instrument, LB_ENDPOINTS, LB_WAITING_CALLS, Label, STATE, TARGET,
};

/// Reads the gauges of a channel from the state that its calls and its driver share.
#[derive(Debug)]
pub(crate) struct Gauges {
    channel: Arc<ChannelMetrics>,
    /// Weak, so that an export of metrics at the end of a channel does not prolong its life.
    shared: Weak<Shared>,
}

impl Gauges {
    /// Adds the gauges of a channel to its metrics. They are read until the returned value is dropped.
    pub(crate) fn start(channel: &Arc<ChannelMetrics>, shared: &Arc<Shared>) -> Arc<Self> {
        let gauges = Arc::new(Self {
            channel: Arc::clone(channel),
            shared: Arc::downgrade(shared),
        });
        channel.metrics().observe(&LB_ENDPOINTS, &gauges);
        channel.metrics().observe(&LB_WAITING_CALLS, &gauges);
        gauges
    }
}

impl GaugeSource for Gauges {
    #[expect(
        clippy::cast_precision_loss,
        reason = "numbers of endpoints and calls are below 2^53"
    )]
    fn observe(&self, instrument: &'static Instrument, observe: &mut dyn FnMut(&[Label<'_>], f64)) {
        let Some(shared) = self.shared.upgrade() else {
            return;
        };
        let target = (TARGET, self.channel.target());
        if std::ptr::eq(instrument, &raw const LB_WAITING_CALLS) {
            return observe(&[target], shared.waiters().all_waiting() as f64);
        }
        let states = shared.states();
        for (state, name) in STATES {
            let count = states.iter().filter(|known| **known == state).count();
            observe(&[target, (STATE, name)], count as f64);
        }
    }
}

/// Every state is observed, also one without endpoints, so that a series does not end at its last value.
const STATES: [(EndpointState, &str); 5] = [
    (EndpointState::Idle, "idle"),
    (EndpointState::Connecting, "connecting"),
    (EndpointState::Ready, "ready"),
    (EndpointState::TransientFailure, "transient_failure"),
    (EndpointState::Draining, "draining"),
];
