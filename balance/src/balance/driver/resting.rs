//! Resting subchannels: their connections ended while no call needed them. A resting subchannel is dialled when a call needs a connection,
//! or after a wait.

use std::collections::HashSet;

use super::subchannel_table::SubchannelId;

/// The set of resting subchannels.
#[derive(Debug, Default)]
pub(super) struct Resting {
    subchannels: HashSet<SubchannelId>,
    /// The total number of calls up to the last scan; `None` if no subchannel rested at that time.
    calls: Option<u64>,
}

impl Resting {
    pub(super) fn insert(&mut self, id: SubchannelId) {
        self.subchannels.insert(id);
    }

    pub(super) fn remove(&mut self, id: SubchannelId) {
        self.subchannels.remove(&id);
    }

    /// Removes and returns all subchannels.
    pub(super) fn take(&mut self) -> HashSet<SubchannelId> {
        std::mem::take(&mut self.subchannels)
    }

    /// Returns one of the subchannels if calls were sent since the last scan and a subchannel rested at that time. The subchannel stays in
    /// the set. `calls` returns the total number of calls.
    pub(super) fn scan(&mut self, calls: impl FnOnce() -> u64) -> Option<SubchannelId> {
        let Some(&id) = self.subchannels.iter().next() else {
            // No subchannel rests. The count is discarded, so that calls that are sent before a subchannel rests again do not cause a dial.
            self.calls = None;
            return None;
        };
        let calls = calls();
        let before = self.calls.replace(calls);
        before.filter(|before| *before < calls).map(|_| id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subchannel_is_dialled_only_if_calls_were_sent_while_it_rests() {
        let mut resting = Resting::default();
        assert_eq!(resting.scan(|| unreachable!("nothing rests")), None);
        resting.insert(7);
        assert_eq!(resting.scan(|| 100), None, "earlier calls must not count");
        assert_eq!(resting.scan(|| 100), None);
        assert_eq!(resting.scan(|| 101), Some(7));
        assert_eq!(resting.scan(|| 101), None);
        assert_eq!(resting.scan(|| 60), None, "a decrease must cause no dial");
        assert_eq!(resting.scan(|| 61), Some(7));
        resting.remove(7);
        assert_eq!(resting.scan(|| 102), None);
        resting.insert(8);
        assert_eq!(resting.scan(|| 103), None, "the count must start again");
    }
}
