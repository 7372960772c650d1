//! The state of the key of a service config: the value in force, and the newest value if it cannot be used. Without I/O.

use tonic_balance::channel::ServiceConfig;

use super::status::ServiceConfigStatus;
use crate::error::ServiceConfigError;
use crate::keyspace::{Event, Key, KeyValue, Revision};

/// The state of the key of a service config.
#[derive(Debug)]
pub(super) struct ConfigState {
    key: Key,
    /// The store revision up to which the key is known. An event up to this revision is already part of what was read.
    known_at: Revision,
    /// The revision and the value of the newest write. `None` if the key does not exist.
    newest: Option<(Revision, Vec<u8>)>,
    /// Why the newest value cannot be used.
    rejection: Option<String>,
    /// Why the key cannot be read or watched.
    trouble: Option<String>,
    status: ServiceConfigStatus,
}

/// A change of the service config, for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ConfigChange {
    Applied(Revision),
    Removed,
    Rejected(Revision),
}

impl ConfigState {
    pub(super) fn new(key: Key) -> Self {
        let status = ServiceConfigStatus::new(key.escaped());
        Self {
            key,
            known_at: Revision::ZERO,
            newest: None,
            rejection: None,
            trouble: None,
            status,
        }
    }

    pub(super) fn status(&self) -> &ServiceConfigStatus {
        &self.status
    }

    /// Handles an event of the watch.
    pub(super) fn on_event(&mut self, event: Event) -> Option<ConfigChange> {
        let revision = event.mod_revision();
        if *event.key() != self.key || revision <= self.known_at {
            return None;
        }
        self.known_at = revision;
        match event {
            Event::Put(kv) => self.on_value(Some(kv)),
            Event::Delete { .. } => self.on_value(None),
        }
    }

    /// Handles a linearizable read at a store revision. Its result is the truth even if the revision is lower than that of an earlier
    /// event: the data of etcd was then wiped or restored.
    pub(super) fn on_read(
        &mut self,
        revision: Revision,
        found: Option<KeyValue>,
    ) -> Option<ConfigChange> {
        self.known_at = revision;
        self.trouble = None;
        let change = self.on_value(found);
        self.update_error();
        change
    }

    /// Records that the key cannot be read or watched. The service config in force stays.
    pub(super) fn on_trouble(&mut self, trouble: String) {
        self.trouble = Some(trouble);
        self.update_error();
    }

    fn on_value(&mut self, found: Option<KeyValue>) -> Option<ConfigChange> {
        let found = found.map(|kv| (kv.mod_revision, kv.value));
        if found == self.newest {
            return None;
        }
        self.newest = found;
        self.rejection = None;
        let change = match &self.newest {
            None => {
                self.status.config = None;
                self.status.revision.take().map(|_| ConfigChange::Removed)
            }
            Some((revision, value)) => Some(match parse(value) {
                Ok(config) => {
                    self.status.config = Some(config);
                    self.status.revision = Some(*revision);
                    ConfigChange::Applied(*revision)
                }
                Err(reason) => {
                    self.rejection = Some(format!("revision {revision}: {reason}"));
                    self.status.rejected += 1;
                    ConfigChange::Rejected(*revision)
                }
            }),
        };
        self.update_error();
        change
    }

    fn update_error(&mut self) {
        let error = self.trouble.as_ref().or(self.rejection.as_ref());
        self.status.last_error = error.cloned();
    }
}

fn parse(value: &[u8]) -> Result<ServiceConfig, String> {
    if value.len() > VALUE_MAX {
        return Err(format!("the value has more than {VALUE_MAX} bytes"));
    }
    let text = std::str::from_utf8(value).map_err(|error| error.to_string())?;
    text.parse()
        .map_err(|error: ServiceConfigError| error.to_string())
}

/// Limit on the length of a value in bytes, as for the values of instances.
const VALUE_MAX: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keyspace::LeaseId;

    const KEY: &str = "/gRPC.control/greeter/config";
    const GOOD: &str = r#"{"methodConfig":[{"name":[{}],"timeout":"1s"}]}"#;
    const BETTER: &str = r#"{"methodConfig":[{"name":[{}],"timeout":"2s"}]}"#;
    const BAD: &str = r#"{"methodConfig":[{"name":[{}],"timeout":"soon"}]}"#;

    fn kv(revision: i64, value: &str) -> KeyValue {
        KeyValue {
            key: Key::from(KEY),
            value: value.as_bytes().to_vec(),
            create_revision: Revision::new(1),
            mod_revision: Revision::new(revision),
            lease: LeaseId::NONE,
        }
    }

    fn put(revision: i64, value: &str) -> Event {
        Event::Put(kv(revision, value))
    }

    fn delete(revision: i64) -> Event {
        Event::Delete {
            key: Key::from(KEY),
            mod_revision: Revision::new(revision),
        }
    }

    fn state() -> ConfigState {
        ConfigState::new(Key::from(KEY))
    }

    fn in_force(state: &ConfigState) -> Option<(i64, &str)> {
        let status = state.status();
        let config = status.config.as_ref()?;
        Some((status.revision?.get(), config.as_json()))
    }

    #[test]
    fn the_newest_good_value_is_in_force_until_the_key_is_deleted() {
        let mut state = state();
        let applied = |revision| Some(ConfigChange::Applied(Revision::new(revision)));
        assert_eq!(state.on_read(Revision::new(3), None), None);
        assert_eq!(state.on_event(put(5, GOOD)), applied(5));
        assert_eq!(in_force(&state), Some((5, GOOD)));
        let rejected = Some(ConfigChange::Rejected(Revision::new(6)));
        assert_eq!(state.on_event(put(6, BAD)), rejected);
        assert_eq!(in_force(&state), Some((5, GOOD)));
        let error = state.status().last_error.clone().expect("an error");
        assert!(
            error.starts_with("revision 6: methodConfig[0].timeout: "),
            "{error}"
        );
        assert_eq!(state.on_read(Revision::new(7), Some(kv(6, BAD))), None);
        assert_eq!(state.status().rejected, 1, "a write must be counted once");
        assert_eq!(state.on_event(put(8, BETTER)), applied(8));
        assert_eq!(state.status().last_error, None);
        assert_eq!(state.on_event(delete(9)), Some(ConfigChange::Removed));
        assert_eq!(in_force(&state), None);
    }

    #[test]
    fn an_event_that_a_read_has_covered_is_ignored() {
        let mut state = state();
        state.on_read(Revision::new(9), Some(kv(8, BETTER)));
        assert_eq!(state.on_event(put(5, GOOD)), None);
        assert_eq!(state.on_event(delete(9)), None);
        let other = Event::Put(KeyValue {
            key: Key::from("/gRPC.control/greeter/config2"),
            ..kv(10, GOOD)
        });
        assert_eq!(state.on_event(other), None);
        assert_eq!(in_force(&state), Some((8, BETTER)));
    }

    #[test]
    fn a_read_of_a_restored_store_replaces_the_config() {
        let mut state = state();
        state.on_event(put(900, BETTER));
        state.on_read(Revision::new(9), Some(kv(8, GOOD)));
        assert_eq!(in_force(&state), Some((8, GOOD)));
        // Both revisions are equal, and only the value differs.
        state.on_read(Revision::new(9), Some(kv(8, BETTER)));
        assert_eq!(in_force(&state), Some((8, BETTER)));
    }

    #[test]
    fn a_key_that_cannot_be_read_keeps_the_config() {
        let mut state = state();
        state.on_event(put(5, GOOD));
        state.on_trouble("read: permission denied".to_owned());
        assert_eq!(in_force(&state), Some((5, GOOD)));
        let error = state.status().last_error.as_deref();
        assert_eq!(error, Some("read: permission denied"));
        state.on_read(Revision::new(6), Some(kv(5, GOOD)));
        assert_eq!(state.status().last_error, None);
    }

    #[test]
    fn a_value_that_is_too_long_or_not_text_is_rejected() {
        let mut state = state();
        let long = format!("{GOOD}{}", " ".repeat(VALUE_MAX));
        for (revision, value) in (5..).zip([long.as_bytes(), b"\xff"]) {
            let event = Event::Put(KeyValue {
                value: value.to_vec(),
                ..kv(revision, "")
            });
            let rejected = Some(ConfigChange::Rejected(Revision::new(revision)));
            assert_eq!(state.on_event(event), rejected);
        }
        assert_eq!(in_force(&state), None);
    }
}
