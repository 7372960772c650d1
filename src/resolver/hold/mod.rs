//! The mass-removal hold: pure. Instances that vanish from the registry together with most others are kept for a while, as a last resort.
//!
//! ```text
//!               vanished, less than half is left            the hold is over, or half is back
//!   registered ──────────────────────────────────▶ held ──────────────────────────────────────▶ gone
//!      ▲  │                                         │                                            ▲
//!      │  └──── vanished otherwise, or said that it would leave ────────────────────────────────┤
//!      └──────────────── registered again ──────────┘
//! ```
//!
//! *Half* is half of the largest set of the last 10 s. A set that etcd loses through a bug or a stuck leader does not vanish in one step:
//! leases that expire together arrive one by one. So nothing but the sum over a while tells such a loss from servers that come and go; and
//! since sizes are what is compared, a fleet that is replaced by another at other addresses is no loss.
//!
//! Who said in its last value that it would leave is not missed: it counts neither as vanished nor as part of the set that it was in.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use crate::instance::Instance;
use tonic_balance::Address;

/// The instances that are held, and what tells whether the next one to vanish will be.
#[derive(Debug)]
pub(super) struct Hold {
    /// How long an instance is held; `None` holds nothing.
    length: Option<Duration>,
    rng: fastrand::Rng,
    registered: HashSet<Address>,
    /// How many have left on purpose, ever.
    left: usize,
    /// The sizes that the set had within the window, each with the time of its end; only those that no later one exceeds.
    peaks: VecDeque<Peak>,
    held: HashMap<Address, Held>,
    /// Who is held, in the order in which the holds end; those that have come back meanwhile included.
    queue: VecDeque<(Instant, Address)>,
    episode: Option<Episode>,
    /// How often instances began to be held.
    episodes: u64,
}

/// A size that the set had. `strength` is the size plus the number of those that had left on purpose by then: a planned departure leaves
/// it as it is, so that it lowers the size to be compared with by just one.
#[derive(Clone, Copy, Debug)]
struct Peak {
    ended: Instant,
    strength: usize,
}

#[derive(Debug)]
struct Held {
    instance: Instance,
    until: Instant,
}

/// From the first instance that is held to the last.
#[derive(Clone, Copy, Debug)]
struct Episode {
    /// That of the set before the loss.
    strength: usize,
    /// Instances whose hold has ended without their return.
    removed: usize,
}

/// What came of a step.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// Addresses that are held no longer, though they are not registered again.
    pub(super) released: Vec<Address>,
    pub(super) news: Option<News>,
}

/// What an operator is to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum News {
    /// Instances are held, for the first time after none was.
    Began {
        registered: usize,
        /// The size of the set before the loss.
        of: usize,
        length: Duration,
    },
    /// Half of the set is back, or all that were held are.
    Recovered { registered: usize, removed: usize },
    /// The last hold has ended, and most instances are not back.
    Over { registered: usize, removed: usize },
}

impl Hold {
    pub(super) fn new(length: Option<Duration>, rng: fastrand::Rng) -> Self {
        Self {
            length: length
                .filter(|length| !length.is_zero())
                .map(|length| length.min(LENGTH_MAX)),
            rng,
            registered: HashSet::new(),
            left: 0,
            peaks: VecDeque::new(),
            held: HashMap::new(),
            queue: VecDeque::new(),
            episode: None,
            episodes: 0,
        }
    }

    /// The instance held at an address, marked as a last resort.
    pub(super) fn get(&self, address: &Address) -> Option<&Instance> {
        self.held.get(address).map(|held| &held.instance)
    }

    /// The instances held, in no order.
    pub(super) fn instances(&self) -> impl Iterator<Item = &Instance> {
        self.held.values().map(|held| &held.instance)
    }

    /// How many instances are held.
    pub(super) fn len(&self) -> usize {
        self.held.len()
    }

    pub(super) fn episodes(&self) -> u64 {
        self.episodes
    }

    /// When [`Hold::on_time`] is due.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.queue.front().map(|(until, _)| *until)
    }

    /// Takes what has changed in one step: addresses that are registered, of old or anew, and the last instance of each that is not any
    /// more.
    ///
    /// The order within a step says nothing. So the new ones count first, or a fleet replaced in one transaction would look lost; and of
    /// those that vanish together chance decides which are held, or all clients would keep to the same few servers.
    pub(super) fn on_changes(
        &mut self,
        here: impl IntoIterator<Item = Address>,
        gone: Vec<Instance>,
        now: Instant,
    ) -> Outcome {
        let Some(length) = self.length else {
            return Outcome::default();
        };
        let before = self.registered.len() + self.left;
        let began_before = self.episodes;
        for address in here {
            self.held.remove(&address);
            self.registered.insert(address);
        }
        let mut vanished = self.depart(gone);
        if !vanished.is_empty() {
            self.rng.shuffle(&mut vanished);
            let strength = self.strength(before, now);
            for instance in vanished {
                self.registered.remove(instance.address());
                if self.is_lost(strength) {
                    self.keep(instance, strength, now + length);
                }
            }
        }
        if self.episodes > began_before {
            let began = News::Began {
                registered: self.registered.len(),
                of: self
                    .episode
                    .map_or(0, |episode| self.size(episode.strength)),
                length,
            };
            return Outcome {
                released: Vec::new(),
                news: Some(began),
            };
        }
        self.conclude()
    }

    /// Takes away those that leave on purpose; hands back the others that were there.
    fn depart(&mut self, gone: Vec<Instance>) -> Vec<Instance> {
        let mut vanished = Vec::new();
        for instance in gone {
            if !self.registered.contains(instance.address()) {
                continue;
            }
            if instance.is_leaving() {
                self.registered.remove(instance.address());
                self.left += 1;
            } else {
                vanished.push(instance);
            }
        }
        vanished
    }

    /// The strength to compare with, once the set ceases to be as it was `before`.
    fn strength(&mut self, before: usize, now: Instant) -> usize {
        while self
            .peaks
            .back()
            .is_some_and(|peak| peak.strength <= before)
        {
            self.peaks.pop_back();
        }
        self.peaks.push_back(Peak {
            ended: now,
            strength: before,
        });
        while self
            .peaks
            .front()
            .is_some_and(|peak| now.saturating_duration_since(peak.ended) > WINDOW)
        {
            self.peaks.pop_front();
        }
        let recent = self.peaks.front().map_or(before, |peak| peak.strength);
        // As long as instances are held, the set before the loss is what there ought to be.
        self.episode
            .map_or(recent, |episode| episode.strength.max(recent))
    }

    /// How large the set of a strength would be now, without those that have left on purpose since.
    fn size(&self, strength: usize) -> usize {
        strength.saturating_sub(self.left)
    }

    /// Whether less than half is left of the set. With a single instance there is nothing that tells its loss from its end.
    fn is_lost(&self, strength: usize) -> bool {
        let size = self.size(strength);
        size > 1 && self.registered.len() * 2 < size
    }

    fn keep(&mut self, instance: Instance, strength: usize, until: Instant) {
        if self.episode.is_none() {
            self.episodes += 1;
            self.episode = Some(Episode {
                strength,
                removed: 0,
            });
        }
        let address = instance.address().clone();
        self.queue.push_back((until, address.clone()));
        let instance = instance.with_last_resort(true);
        self.held.insert(address, Held { instance, until });
    }

    /// Ends the holds that are over.
    pub(super) fn on_time(&mut self, now: Instant) -> Outcome {
        let mut over = Vec::new();
        while self.deadline().is_some_and(|until| until <= now) {
            let Some((until, address)) = self.queue.pop_front() else {
                break;
            };
            // It may have come back, and may even be held again since.
            if self
                .held
                .get(&address)
                .is_some_and(|held| held.until == until)
            {
                self.held.remove(&address);
                over.push(address);
            }
        }
        if let Some(episode) = &mut self.episode {
            episode.removed += over.len();
        }
        let mut outcome = self.conclude();
        outcome.released.extend(over);
        outcome
    }

    /// Ends the episode if half of the set is back, or nobody is held any more.
    fn conclude(&mut self) -> Outcome {
        let mut outcome = Outcome::default();
        let Some(Episode { strength, removed }) = self.episode else {
            return outcome;
        };
        let registered = self.registered.len();
        let back = registered * 2 >= self.size(strength);
        if back || self.held.is_empty() {
            outcome.released = self.held.drain().map(|(address, _)| address).collect();
            outcome.news = Some(if back || removed == 0 {
                let removed = removed + outcome.released.len();
                News::Recovered {
                    registered,
                    removed,
                }
            } else {
                News::Over {
                    registered,
                    removed,
                }
            });
            self.episode = None;
            self.queue.clear();
        }
        outcome
    }
}

/// A time to come has to fit into an `Instant`.
const LENGTH_MAX: Duration = Duration::from_secs(365 * 24 * 3600);
/// Longer than leases of the default TTL of 15 s need to expire one after another when all are lost at once: they are renewed at a third
/// of it, so that is how far apart their ends are.
const WINDOW: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests;
