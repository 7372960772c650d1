//! Resting subchannels: the server closed their connections while no call used them, and they are dialled again when a call needs one.

use std::collections::HashSet;

use super::subchannel_table::SubchannelId;

/// The set of resting subchannels.
#[derive(Debug, Default)]
pub(super) struct Resting {
    subchannels: HashSet<SubchannelId>,
    /// The total number of calls at the last scan.
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

    /// Returns one subchannel if calls were sent since the last scan. `calls` returns the total number of calls.
    pub(super) fn scan(&mut self, calls: impl FnOnce() -> u64) -> Option<SubchannelId> {
        let Some(&id) = self.subchannels.iter().next() else {
            // Calls that were sent before the first connection rests do not count.
            self.calls = None;
            return None;
        };
        let calls = calls();
        let before = self.calls.replace(calls);
        before.filter(|before| *before != calls).map(|_| id)
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
        assert_eq!(resting.scan(|| 100), None, "calls from before the rest");
        assert_eq!(resting.scan(|| 100), None);
        assert_eq!(resting.scan(|| 101), Some(7));
        assert_eq!(resting.scan(|| 101), None);
        resting.remove(7);
        assert_eq!(resting.scan(|| 102), None);
        resting.insert(8);
        assert_eq!(resting.scan(|| 103), None, "the count starts again");
    }
}
