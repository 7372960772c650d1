//! The values of control keys, and what they together demand from the server.

use serde::Deserialize;

use crate::keyspace::{KeyValue, Revision};
use crate::registration::entry::check_weight;

/// The value of a control key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Instruction {
    pub(super) state: DesiredState,
    /// Replaces the weight of the registration.
    pub(super) weight: Option<u32>,
    /// Whether a server that starts later obeys as well.
    pub(super) sticky: bool,
}

/// The state that an operator demands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum DesiredState {
    #[default]
    Serving,
    Draining,
    Paused,
}

impl Instruction {
    pub(super) fn parse(value: &[u8]) -> Result<Self, String> {
        if value.len() > VALUE_MAX {
            return Err(format!(
                "the value has {} bytes; the limit is {VALUE_MAX}",
                value.len()
            ));
        }
        let parsed: Self = serde_json::from_slice(value).map_err(|error| error.to_string())?;
        parsed.weight.map_or(Ok(()), check_weight)?;
        Ok(parsed)
    }
}

/// What the control keys of a registration demand.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Demand {
    /// Whether the entry must be removed.
    pub(super) out: bool,
    pub(super) weight: Option<u32>,
    /// The mod revision of the newest control key. `None` if no control key exists.
    pub(super) revision: Option<Revision>,
    /// Why the newest value cannot be used.
    pub(super) error: Option<String>,
}

/// The control keys of a registration, one for each service.
#[derive(Debug, Default)]
pub(super) struct Instructions {
    /// The last good value of each key, with its revision.
    good: Vec<Option<(Revision, Instruction)>>,
    /// For each key, the revision of a value that was written for an earlier run of the server.
    ignored: Vec<Option<Revision>>,
}

impl Instructions {
    /// Handles the first read of the keys. A value that is already in etcd when the server starts was written for an earlier run of the
    /// server. It applies only if it is sticky.
    pub(super) fn on_start(&mut self, found: &[Option<KeyValue>]) -> Demand {
        let ignored = |kv: &Option<KeyValue>| {
            let kv = kv.as_ref()?;
            let sticky = Instruction::parse(&kv.value).is_ok_and(|parsed| parsed.sticky);
            (!sticky).then_some(kv.mod_revision)
        };
        self.ignored = found.iter().map(ignored).collect();
        self.on_read(found)
    }

    /// Handles a later read of the keys. If a value cannot be used, the last good value of its key remains in force. If several services
    /// have control keys, the entry is removed while one of them demands it, and the newest weight is used.
    pub(super) fn on_read(&mut self, found: &[Option<KeyValue>]) -> Demand {
        self.good.resize(found.len(), None);
        self.ignored.resize(found.len(), None);
        let mut demand = Demand::default();
        for (index, kv) in found.iter().enumerate() {
            let Some(kv) = kv else {
                self.good[index] = None;
                self.ignored[index] = None;
                continue;
            };
            if self.ignored[index] == Some(kv.mod_revision) {
                continue;
            }
            self.ignored[index] = None;
            let parsed = Instruction::parse(&kv.value);
            let is_newest = demand
                .revision
                .is_none_or(|newest| kv.mod_revision > newest);
            if is_newest {
                demand.revision = Some(kv.mod_revision);
                demand.error = parsed.as_ref().err().cloned();
            }
            if let Ok(parsed) = parsed {
                self.good[index] = Some((kv.mod_revision, parsed));
            }
        }
        let good = self.good.iter().flatten();
        demand.out = good
            .clone()
            .any(|(_, parsed)| parsed.state != DesiredState::Serving);
        let weights = good.filter_map(|(revision, parsed)| Some((revision, parsed.weight?)));
        demand.weight = weights
            .max_by_key(|(revision, _)| *revision)
            .map(|(_, weight)| weight);
        demand
    }
}

/// Maximum length of a value, in bytes. A valid value has less than 100.
const VALUE_MAX: usize = 4_096;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keyspace::{Key, LeaseId};

    #[expect(clippy::unnecessary_wraps, reason = "a read returns an option")]
    fn kv(revision: i64, value: &str) -> Option<KeyValue> {
        Some(KeyValue {
            key: Key::from("/gRPC.control/greeter/instances/a"),
            value: value.as_bytes().to_vec(),
            create_revision: Revision::new(1),
            mod_revision: Revision::new(revision),
            lease: LeaseId::NONE,
        })
    }

    #[test]
    fn values_are_parsed() {
        for (value, state, weight, sticky) in [
            ("{}", DesiredState::Serving, None, false),
            (
                r#"{"state":"draining"}"#,
                DesiredState::Draining,
                None,
                false,
            ),
            (
                r#"{"state":"paused","sticky":true}"#,
                DesiredState::Paused,
                None,
                true,
            ),
            (r#"{"weight":7}"#, DesiredState::Serving, Some(7), false),
        ] {
            let expected = Instruction {
                state,
                weight,
                sticky,
            };
            assert_eq!(
                Instruction::parse(value.as_bytes()),
                Ok(expected),
                "{value}"
            );
        }
    }

    #[test]
    fn a_bad_value_is_an_error_that_names_the_cause() {
        for (value, cause) in [
            ("", "EOF"),
            ("drain", "expected value"),
            (r#"{"state":"gone"}"#, "unknown variant `gone`"),
            (r#"{"wieght":7}"#, "unknown field `wieght`"),
            (r#"{"weight":0}"#, "from 1 to 1000000"),
            (r#"{"weight":-1}"#, "invalid value"),
        ] {
            let error = Instruction::parse(value.as_bytes()).expect_err(value);
            assert!(error.contains(cause), "{value}: {error}");
        }
        let long = Instruction::parse(&[b' '; VALUE_MAX + 1]);
        assert!(long.expect_err("too long").contains("the limit is 4096"));
    }

    #[test]
    fn a_value_for_an_earlier_run_applies_only_if_it_is_sticky() {
        let drain = r#"{"state":"draining"}"#;
        let mut instructions = Instructions::default();
        assert_eq!(instructions.on_start(&[kv(5, drain)]), Demand::default());
        assert_eq!(instructions.on_read(&[kv(5, drain)]), Demand::default());
        assert!(instructions.on_read(&[kv(6, drain)]).out);
        assert_eq!(instructions.on_read(&[None]), Demand::default());

        let sticky = r#"{"state":"paused","sticky":true}"#;
        let mut instructions = Instructions::default();
        let demand = instructions.on_start(&[kv(5, sticky)]);
        assert!(demand.out);
        assert_eq!(demand.revision, Some(Revision::new(5)));
    }

    #[test]
    fn a_bad_value_keeps_the_last_good_one_and_is_reported() {
        let mut instructions = Instructions::default();
        instructions.on_start(&[None]);
        let good = instructions.on_read(&[kv(5, r#"{"state":"paused","weight":3}"#)]);
        assert_eq!((good.out, good.weight, good.error), (true, Some(3), None));
        let bad = instructions.on_read(&[kv(6, "resume")]);
        assert_eq!((bad.out, bad.weight), (true, Some(3)));
        assert_eq!(bad.revision, Some(Revision::new(6)));
        assert!(bad.error.is_some());
        assert_eq!(instructions.on_read(&[None]), Demand::default());
    }

    #[test]
    fn the_keys_of_several_services_are_combined() {
        let mut instructions = Instructions::default();
        instructions.on_start(&[None, None]);
        let first = kv(5, r#"{"state":"draining","weight":3}"#);
        let second = kv(6, r#"{"weight":4}"#);
        let both = instructions.on_read(&[first, second.clone()]);
        assert_eq!((both.out, both.weight), (true, Some(4)));
        let one = instructions.on_read(&[None, second]);
        assert_eq!((one.out, one.weight), (false, Some(4)));
    }
}
