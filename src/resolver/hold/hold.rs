//! The held instances, which vanished together with most others and are kept for a limited time. Also the rule that decides whether an
//! instance that vanishes is held.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use crate::instance::Instance;
use tonic_balance::Address;

/// The held instances, and the state that decides whether the next instance that vanishes is held.
#[derive(Debug)]
pub(in crate::resolver) struct Hold {
    /// Time for which an instance is held; `None` disables holds.
    length: Option<Duration>,
    pub(super) rng: fastrand::Rng,
    registered: HashSet<Address>,
    /// Number of planned departures since the start.
    planned_departures: usize,
    /// Strengths (see [`Peak`]) that the set had in the last 10 s. A strength is omitted if a later one is at least as large.
    peaks: VecDeque<Peak>,
    held: HashMap<Address, Held>,
    /// Held addresses with the deadlines of their holds, ordered by deadline. An address that is registered again stays in the queue until
    /// this deadline, or until the episode ends.
    queue: VecDeque<(Instant, Address)>,
    episode: Option<Episode>,
    /// Number of episodes since the start.
    episodes: u64,
}

/// A past size of the set. `strength` is the size plus the number of planned departures up to then. A planned departure reduces the size by
/// one and increases the number of departures by one, so it does not change the strength. To compare the current set with a past one,
/// [`Hold::size`] subtracts all planned departures up to now from the strength.
#[derive(Clone, Copy, Debug)]
struct Peak {
    /// The time until which the set had this strength.
    ended: Instant,
    strength: usize,
}

#[derive(Debug)]
struct Held {
    instance: Instance,
    until: Instant,
}

/// The period in which instances are held, from the first hold to the end of the last one.
#[derive(Clone, Copy, Debug)]
struct Episode {
    /// Strength of the set before the loss.
    strength: usize,
    /// Number of instances whose hold has ended at its deadline, because they were not registered again.
    removed: usize,
}

/// The outcome of [`Hold::on_changes`] or [`Hold::on_time`].
#[derive(Debug, Default)]
pub(in crate::resolver) struct Outcome {
    /// Addresses whose hold has ended without a new registration. They are removed from the set.
    pub(in crate::resolver) released: Vec<Address>,
    pub(in crate::resolver) news: Option<News>,
}

/// An event for the operator's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::resolver) enum News {
    /// The first instances are held. Before, no instance was held.
    Began {
        registered: usize,
        /// The size of the set before the loss.
        of: usize,
        length: Duration,
    },
    /// Half of the set is registered again, or all held instances are registered again.
    Recovered { registered: usize, removed: usize },
    /// No instance is held any more, at least one hold has ended at its deadline, and fewer than half of the set is registered.
    Over { registered: usize, removed: usize },
}

impl Hold {
    pub(in crate::resolver) fn new(length: Option<Duration>, rng: fastrand::Rng) -> Self {
        Self {
            length: length
                .filter(|length| !length.is_zero())
                .map(|length| length.min(LENGTH_MAX)),
            rng,
            registered: HashSet::new(),
            planned_departures: 0,
            peaks: VecDeque::new(),
            held: HashMap::new(),
            queue: VecDeque::new(),
            episode: None,
            episodes: 0,
        }
    }

    /// Returns the held instance at an address, marked as a last resort.
    pub(in crate::resolver) fn get(&self, address: &Address) -> Option<&Instance> {
        self.held.get(address).map(|held| &held.instance)
    }

    /// Returns the held instances, in arbitrary order.
    pub(in crate::resolver) fn instances(&self) -> impl Iterator<Item = &Instance> {
        self.held.values().map(|held| &held.instance)
    }

    /// Returns the number of held instances.
    pub(in crate::resolver) fn len(&self) -> usize {
        self.held.len()
    }

    pub(in crate::resolver) fn episodes(&self) -> u64 {
        self.episodes
    }

    /// Returns the time at which [`Hold::on_time`] must be called.
    pub(in crate::resolver) fn deadline(&self) -> Option<Instant> {
        self.queue.front().map(|(until, _)| *until)
    }

    /// Applies a batch of changes. `here` contains the changed addresses that are registered now, whether they are new or not. `gone`
    /// contains the last instance of each address that is no longer registered.
    ///
    /// The order of changes within a batch has no meaning. New addresses are therefore counted first. Otherwise, a fleet that is replaced
    /// in one transaction would look lost. If only some of the instances that vanish in one batch must be held, these are chosen at random.
    /// Otherwise, all clients would use the same few servers.
    pub(in crate::resolver) fn on_changes(
        &mut self,
        here: impl IntoIterator<Item = Address>,
        gone: Vec<Instance>,
        now: Instant,
    ) -> Outcome {
        let Some(length) = self.length else {
            return Outcome::default();
        };
        let before = self.registered.len() + self.planned_departures;
        let began_before = self.episodes;
        for address in here {
            self.held.remove(&address);
            self.registered.insert(address);
        }
        let mut vanished = self.remove_leaving(gone);
        if !vanished.is_empty() {
            self.rng.shuffle(&mut vanished);
            let strength = self.strength(before, now);
            for instance in vanished {
                self.registered.remove(instance.address());
                if self.is_lost(strength) {
                    self.hold(instance, strength, now + length);
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
        self.end_episode_if_over()
    }

    /// Removes the instances that are marked as leaving. Returns the other registered instances of `gone`. These stay in `registered` until
    /// the caller removes them.
    fn remove_leaving(&mut self, gone: Vec<Instance>) -> Vec<Instance> {
        let mut vanished = Vec::new();
        for instance in gone {
            if !self.registered.contains(instance.address()) {
                continue;
            }
            if instance.is_leaving() {
                self.registered.remove(instance.address());
                self.planned_departures += 1;
            } else {
                vanished.push(instance);
            }
        }
        vanished
    }

    /// Records that the set had the strength `before` until now. Returns the strength that [`Hold::is_lost`] compares with: the greatest
    /// strength of the last 10 s, or the strength of the set before the current episode, whichever is greater.
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
        // While instances are held, the result is at least the strength of the set before the loss.
        self.episode
            .map_or(recent, |episode| episode.strength.max(recent))
    }

    /// Returns the size that a set of this strength would have if only the planned departures up to now had reduced it.
    fn size(&self, strength: usize) -> usize {
        strength.saturating_sub(self.planned_departures)
    }

    /// Returns whether fewer than half of the instances of a set with this strength are registered. A set of one instance never counts as
    /// lost, because the loss of one instance looks the same as its shutdown.
    fn is_lost(&self, strength: usize) -> bool {
        let size = self.size(strength);
        size > 1 && self.registered.len() * 2 < size
    }

    fn hold(&mut self, instance: Instance, strength: usize, until: Instant) {
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

    /// Ends the holds whose deadline has passed.
    pub(in crate::resolver) fn on_time(&mut self, now: Instant) -> Outcome {
        let mut over = Vec::new();
        while self.deadline().is_some_and(|until| until <= now) {
            let Some((until, address)) = self.queue.pop_front() else {
                break;
            };
            // The instance may have been registered again, and may have a new hold with a later deadline.
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
        let mut outcome = self.end_episode_if_over();
        outcome.released.extend(over);
        outcome
    }

    /// Ends the episode if half of the set is registered again, or if no instance is held any more.
    fn end_episode_if_over(&mut self) -> Outcome {
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

/// Limit on the length of a hold, so that its deadline fits into an `Instant`.
const LENGTH_MAX: Duration = Duration::from_secs(365 * 24 * 3600);
/// The time over which removals are summed. When all leases are lost at once, they expire one after another. Leases with the default TTL of
/// 15 s are renewed every 5 s (a third of the TTL), so all of them expire within a period of 5 s. The window must be longer than these 5 s.
const WINDOW: Duration = Duration::from_secs(10);
