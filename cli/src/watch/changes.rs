//! The changes of the instances, and the time that each took. This file has no I/O.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;
use tonic_etcd::{Address, Instance};
use tower::discover::Change;

/// The known instances.
#[derive(Debug, Default)]
pub(super) struct Changes {
    known: BTreeMap<String, Instance>,
    /// The time of the last event of each address, also of those that have left.
    last: BTreeMap<String, Instant>,
}

/// An event of an instance.
#[derive(Clone, Debug)]
pub(super) struct Event {
    pub(super) kind: Kind,
    pub(super) instance: Instance,
    /// The time since the previous event of the address: how long the instance was registered, or how long it was away. `None` for the first
    /// event.
    pub(super) after: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Join,
    Leave,
    Change,
}

impl Kind {
    pub(super) fn mark(self) -> char {
        match self {
            Self::Join => '+',
            Self::Leave => '-',
            Self::Change => '~',
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Join => "join",
            Self::Leave => "leave",
            Self::Change => "change",
        }
    }
}

impl Changes {
    /// Applies a change. Returns `None` if it has no effect.
    pub(super) fn apply(
        &mut self,
        change: Change<Address, Instance>,
        now: Instant,
    ) -> Option<Event> {
        let (kind, instance) = match change {
            Change::Insert(address, instance) => {
                let before = self.known.insert(address.to_string(), instance.clone());
                let kind = before.map_or(Kind::Join, |_| Kind::Change);
                (kind, instance)
            }
            Change::Remove(address) => (Kind::Leave, self.known.remove(address.as_str())?),
        };
        let address = instance.address().to_string();
        let last = self.last.insert(address, now);
        if self.last.len() > self.known.len() + DEPARTED {
            self.last
                .retain(|address, _| self.known.contains_key(address));
        }
        Some(Event {
            kind,
            instance,
            after: last.map(|last| now.saturating_duration_since(last)),
        })
    }
}

/// Number of departed addresses whose times are kept. It bounds the memory of a watch that runs for weeks.
const DEPARTED: usize = 10_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_event_has_the_time_since_the_previous_event_of_its_address() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let instance: Instance = Instance::new("10.0.0.5:80".parse().expect("an address"));
        let address = instance.address().clone();
        let insert = || Change::Insert(address.clone(), instance.clone());
        let remove = || Change::Remove(address.clone());
        let mut changes = Changes::default();
        let mut event = |change, seconds| {
            let event = changes.apply(change, at(seconds));
            event.map(|event| (event.kind, event.after.map(|after| after.as_secs())))
        };
        assert_eq!(event(insert(), 0), Some((Kind::Join, None)));
        assert_eq!(event(insert(), 3), Some((Kind::Change, Some(3))));
        assert_eq!(event(remove(), 10), Some((Kind::Leave, Some(7))));
        assert_eq!(event(remove(), 11), None, "it has left already");
        assert_eq!(event(insert(), 12), Some((Kind::Join, Some(2))));
    }
}
