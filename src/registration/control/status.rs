//! The value of a status key.

use serde::Serialize;

use super::instruction::Demand;

/// The state of a controlled server, as its status key reports it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Status {
    pub(super) state: ReportedState,
    pub(super) weight: u32,
    pub(super) address: String,
    /// The mod revision of the newest control key that the server has read.
    pub(super) applied: i64,
    /// Number of open connections. Absent if the registration does not belong to a server that registers itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) connections: Option<usize>,
    /// Why the newest value of the control key cannot be used. The last good value remains in force.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum ReportedState {
    /// The entry is in etcd, or is being written.
    Serving,
    /// The entry is being removed, or is removed and connections are still open.
    Draining,
    /// The entry is removed, and no connection is open.
    Paused,
}

impl ReportedState {
    /// `removed` states whether the entry is removed from etcd.
    pub(super) fn of(demand: &Demand, removed: bool, connections: Option<usize>) -> Self {
        match demand.out {
            false => Self::Serving,
            true if removed && connections.unwrap_or(0) == 0 => Self::Paused,
            true => Self::Draining,
        }
    }
}

impl Status {
    /// Encodes the status as JSON.
    pub(super) fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_paused_once_its_entry_is_removed_and_its_connections_are_closed() {
        let out = Demand {
            out: true,
            ..Demand::default()
        };
        for (demand, removed, connections, expected) in [
            (&Demand::default(), false, Some(3), ReportedState::Serving),
            (&out, false, Some(0), ReportedState::Draining),
            (&out, true, Some(1), ReportedState::Draining),
            (&out, true, Some(0), ReportedState::Paused),
            (&out, true, None, ReportedState::Paused),
        ] {
            assert_eq!(ReportedState::of(demand, removed, connections), expected);
        }
    }

    #[test]
    fn absent_fields_are_left_out() {
        let status = Status {
            state: ReportedState::Draining,
            weight: 1,
            address: "10.0.0.5:1".to_owned(),
            applied: 7,
            connections: None,
            error: None,
        };
        let json = r#"{"state":"draining","weight":1,"address":"10.0.0.5:1","applied":7}"#;
        assert_eq!(String::from_utf8_lossy(&status.encode()), json);
    }
}
