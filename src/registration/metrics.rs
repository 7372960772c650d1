//! The instruments of a registration.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::time::Instant;

use super::lease::Phase;
use super::status::RegistrationState;
use crate::metrics::{
    GaugeSource, Instrument, LEASE_REMAINING, LOSSES, Label, Metrics, REASON, REGISTERED, SERVICE,
};

/// The instruments of one registration. The gauges are read until the registration has ended, and the value is dropped.
#[derive(Debug)]
pub(super) struct RegistrationMetrics {
    metrics: Metrics,
    /// The services. One empty name for an exact key, because the key may contain the address of the server.
    services: Vec<String>,
    states: watch::Receiver<RegistrationState>,
}

impl RegistrationMetrics {
    pub(super) fn start(
        metrics: &Metrics,
        services: &[String],
        states: watch::Receiver<RegistrationState>,
    ) -> Arc<Self> {
        let mut services = services.to_vec();
        if services.is_empty() {
            services.push(String::new());
        }
        let this = Arc::new(Self {
            metrics: metrics.clone(),
            services,
            states,
        });
        metrics.observe(&REGISTERED, &this);
        metrics.observe(&LEASE_REMAINING, &this);
        this
    }

    /// Records the loss of the registration. `expires` is the time at which its lease would have expired, and `phase` follows the loss.
    pub(super) fn on_loss(&self, expires: Instant, phase: Phase, now: Instant) {
        let reason = match phase {
            Phase::Superseded(_) => "superseded",
            _ if now >= expires => "expired",
            // etcd has reported that the key or the lease does not exist.
            _ => "removed",
        };
        for service in &self.services {
            // Losses are rare, so the handle is not kept.
            let labels = [(SERVICE, service.as_str()), (REASON, reason)];
            if let Some(losses) = self.metrics.counter(&LOSSES, &labels) {
                losses.add(1);
            }
        }
    }
}

impl GaugeSource for RegistrationMetrics {
    fn observe(&self, instrument: &'static Instrument, observe: &mut dyn FnMut(&[Label<'_>], f64)) {
        let remaining = match &*self.states.borrow() {
            RegistrationState::Registered { expires, .. } => {
                Some(expires.saturating_duration_since(Instant::now()))
            }
            // The server has ended on purpose. A handle of the registration can keep this value.
            RegistrationState::Deregistered => return,
            _ => None,
        };
        let value = if std::ptr::eq(instrument, &raw const REGISTERED) {
            f64::from(u8::from(remaining.is_some()))
        } else {
            remaining.map_or(0.0, |remaining| remaining.as_secs_f64())
        };
        for service in &self.services {
            observe(&[(SERVICE, service.as_str())], value);
        }
    }
}
