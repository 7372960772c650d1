//! Publishes the ready set and the summary, and refreshes the latency estimates.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::driver::{Class, Driver, State};
use crate::address::Address;
use crate::balance::endpoint::EndpointState;
use crate::balance::health::Health;
use crate::balance::load::{Ticks, median};
use crate::balance::shared::Published;

impl Driver {
    pub(super) fn refresh(&mut self, now: Instant) {
        self.grow_shares(now);
        self.wake_resting_for_calls();
        self.try_foreign(now);
        self.dial_spares(now);
        self.shrink(now);
        self.median = self.find_median();
        let now = Ticks::at(now, self.shared.started);
        for entry in self.primary.entries().chain(self.last_resort.entries()) {
            entry.load().refresh(self.median, now);
        }
        self.draining.retain(|(endpoint, subchannel)| {
            let drained = subchannel.is_drained();
            let entry = self.endpoints.get(endpoint.address());
            // The endpoint is forgotten only if it was removed. If it is still registered, only one of its connections has ended.
            if drained && entry.is_none_or(|entry| !Arc::ptr_eq(&entry.endpoint, endpoint)) {
                self.shared.forget(endpoint);
            }
            !drained
        });
    }

    fn find_median(&self) -> f32 {
        let estimates = self
            .primary
            .entries()
            .filter_map(|entry| entry.load().estimate());
        let mut latencies: Vec<_> = estimates.map(|estimate| estimate.mean()).collect();
        median(&mut latencies)
    }

    pub(super) fn reclassify(&mut self, address: &Address) {
        let Some(entry) = self.endpoints.get_mut(address) else {
            return;
        };
        let states = entry
            .subchannels
            .iter()
            .filter_map(|id| self.subchannels.get(id));
        let mut class = Class::Failing;
        let mut shown = EndpointState::Idle;
        for (_, state) in states {
            let (of_one, seen) = match state {
                State::Ready(one) if one.is_stalled() => {
                    (Class::Failing, EndpointState::TransientFailure)
                }
                State::Ready(one) => match one.health() {
                    Health::Serving => (Class::Ready, EndpointState::Ready),
                    Health::Unknown => (Class::Pending, EndpointState::Connecting),
                    Health::NotServing(_) => (Class::Failing, EndpointState::TransientFailure),
                },
                State::Connecting(one) if one.is_failing() => {
                    (Class::Failing, EndpointState::Connecting)
                }
                State::Connecting(_) => (Class::Pending, EndpointState::Connecting),
                State::Idle(one) if one.is_failing() || entry.attributes.is_last_resort() => {
                    (Class::Failing, EndpointState::Idle)
                }
                // A resting subchannel is dialled when a call waits, so it counts as pending.
                State::Idle(_) | State::Resting(_) => (Class::Pending, EndpointState::Idle),
                State::TransientFailure(_) => (Class::Failing, EndpointState::TransientFailure),
            };
            if class == Class::Failing || of_one == Class::Ready {
                (class, shown) = (of_one, seen);
            }
        }
        let before = std::mem::replace(&mut entry.class, class);
        match (before, class) {
            // `Ready` means that calls can pick the endpoint, so the state is set only after the new set is published.
            (Class::Ready, Class::Ready) => {}
            (_, Class::Ready) => self.joined.push(address.clone()),
            _ => entry.endpoint.set_state(shown),
        }
        self.pending += usize::from(class == Class::Pending);
        self.pending -= usize::from(before == Class::Pending);
        if before != class {
            self.publish_soon();
        }
    }

    pub(super) fn publish_soon(&mut self) {
        let delay = if self.summary.ready < FEW {
            Duration::ZERO
        } else {
            GATHER
        };
        self.publish_at
            .get_or_insert_with(|| Instant::now() + delay);
    }

    pub(super) fn publish_now(&mut self) {
        self.publish_at = Some(Instant::now());
    }

    pub(super) fn publish(&mut self) {
        self.publish_at = None;
        if self.shared.has_ended() {
            return;
        }
        self.weigh_zones();
        self.summary.pending = self.pending;
        // Both builders are frozen: each one keeps the connections of its last frozen set open.
        let (primary, held) = (self.primary.freeze(), self.last_resort.freeze());
        let last_resort = primary.len() == 0;
        if std::mem::replace(&mut self.is_last_resort, last_resort) != last_resort {
            for entry in self.last_resort.entries() {
                entry.connection().set_takes_calls(last_resort);
            }
        }
        let ready = if last_resort { held } else { primary };
        let were_ready = std::mem::replace(&mut self.summary.ready, ready.len());
        if (were_ready == 0) != (ready.len() == 0) {
            tracing::info!(
                ready = ready.len(),
                endpoints = self.summary.endpoints,
                last_resort = last_resort && ready.len() > 0,
                "channel {}",
                if ready.len() > 0 {
                    "ready"
                } else {
                    "has no ready endpoint"
                }
            );
        }
        let summary = self.summary.clone();
        self.shared
            .published
            .store(Arc::new(Published { ready, summary }));
        for address in std::mem::take(&mut self.joined) {
            let entry = self.endpoints.get(&address);
            if let Some(entry) = entry.filter(|entry| entry.class == Class::Ready) {
                entry.endpoint.set_state(EndpointState::Ready);
            }
        }
        self.shared.changed.notify_waiters();
        for (endpoint, drains) in self.removed.drain(..) {
            if drains {
                endpoint.set_state(EndpointState::Draining);
            } else {
                self.shared.forget(&endpoint);
            }
        }
    }
}

/// Up to this many ready connections, a publication takes a few microseconds, and a change is published at once.
const FEW: usize = 64;
/// How long changes to a larger set are collected before they are published.
const GATHER: Duration = Duration::from_millis(1);
