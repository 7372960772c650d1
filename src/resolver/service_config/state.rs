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
    /// Whether a read or an event of etcd has reported the key.
    is_known: bool,
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
    /// A service config from the cache is in force until etcd answers.
    Cached(Revision),
    Removed,
    Rejected(Revision),
}

/// What the cache must contain.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum ToCache<'a> {
    Config(Revision, &'a ServiceConfig),
    /// Nothing, because the key does not exist.
    Nothing,
    /// What it contains already: the service config in force is from the cache, or there is none because the newest value cannot be used.
    Unchanged,
}

impl ConfigState {
    pub(super) fn new(key: Key) -> Self {
        let status = ServiceConfigStatus::new(key.escaped());
        Self {
            key,
            known_at: Revision::ZERO,
            is_known: false,
            newest: None,
            rejection: None,
            trouble: None,
            status,
        }
    }

    pub(super) fn status(&self) -> &ServiceConfigStatus {
        &self.status
    }

    /// Returns whether etcd has reported the key since the start.
    pub(super) fn is_known(&self) -> bool {
        self.is_known
    }

    /// Returns what the cache must contain.
    pub(super) fn to_cache(&self) -> ToCache<'_> {
        match (&self.status.config, self.status.revision) {
            _ if self.status.stale || !self.is_known => ToCache::Unchanged,
            (Some(config), Some(revision)) => ToCache::Config(revision, config),
            _ if self.newest.is_some() => ToCache::Unchanged,
            _ => ToCache::Nothing,
        }
    }

    /// Uses a service config from the cache, unless etcd has already reported the key.
    ///
    /// # Errors
    ///
    /// Returns the reason why the value cannot be used.
    pub(super) fn on_cached(
        &mut self,
        revision: Revision,
        value: &[u8],
    ) -> Result<Option<ConfigChange>, String> {
        if self.is_known {
            return Ok(None);
        }
        self.status.config = Some(parse(value)?);
        self.status.revision = Some(revision);
        self.status.stale = true;
        Ok(Some(ConfigChange::Cached(revision)))
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
        let is_first = !std::mem::replace(&mut self.is_known, true);
        if found == self.newest && !is_first {
            return None;
        }
        let existed = std::mem::replace(&mut self.newest, found).is_some();
        self.rejection = None;
        let change = match &self.newest {
            None => {
                self.status.config = None;
                self.status.stale = false;
                // The cache can have a service config although none was in force since the start.
                let was_in_force = self.status.revision.take().is_some();
                (existed || was_in_force).then_some(ConfigChange::Removed)
            }
            Some((revision, value)) => Some(match parse(value) {
                Ok(config) => {
                    self.status.config = Some(config);
                    self.status.revision = Some(*revision);
                    self.status.stale = false;
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
    fn a_cached_service_config_is_in_force_until_etcd_reports_the_key() {
        let cached = || {
            let mut state = state();
            let change = state.on_cached(Revision::new(5), GOOD.as_bytes());
            assert_eq!(change, Ok(Some(ConfigChange::Cached(Revision::new(5)))));
            state.on_trouble("read: etcd is unavailable".to_owned());
            assert_eq!(in_force(&state), Some((5, GOOD)));
            assert!(state.status().stale);
            assert_eq!(state.to_cache(), ToCache::Unchanged);
            state
        };
        let applied = |revision| Some(ConfigChange::Applied(Revision::new(revision)));
        // The key still has the value, has another value, or does not exist.
        let mut same = cached();
        assert_eq!(
            same.on_read(Revision::new(6), Some(kv(5, GOOD))),
            applied(5)
        );
        let mut other = cached();
        assert_eq!(
            other.on_read(Revision::new(9), Some(kv(8, BETTER))),
            applied(8)
        );
        let mut event = cached();
        assert_eq!(event.on_event(put(3, BETTER)), applied(3));
        for state in [&same, &other, &event] {
            assert!(!state.status().stale);
            assert!(matches!(state.to_cache(), ToCache::Config(..)));
        }
        let mut none = cached();
        assert_eq!(
            none.on_read(Revision::new(6), None),
            Some(ConfigChange::Removed)
        );
        assert_eq!((in_force(&none), none.status().stale), (None, false));
        assert_eq!(none.to_cache(), ToCache::Nothing);
        // A value that cannot be used replaces no good one.
        let mut bad = cached();
        let rejected = Some(ConfigChange::Rejected(Revision::new(8)));
        assert_eq!(bad.on_read(Revision::new(9), Some(kv(8, BAD))), rejected);
        assert_eq!(
            (in_force(&bad), bad.status().stale),
            (Some((5, GOOD)), true)
        );
        // Without a service config from the cache, the file still keeps the last good one.
        let mut unused = state();
        unused.on_read(Revision::new(9), Some(kv(8, BAD)));
        assert_eq!(bad.to_cache(), ToCache::Unchanged);
        assert_eq!(unused.to_cache(), ToCache::Unchanged);
    }

    #[test]
    fn a_key_that_is_deleted_after_an_unusable_value_clears_the_cache() {
        let rejected = Some(ConfigChange::Rejected(Revision::new(5)));
        let mut event = state();
        assert_eq!(event.on_event(put(5, BAD)), rejected);
        assert_eq!(event.to_cache(), ToCache::Unchanged);
        assert_eq!(event.on_event(delete(6)), Some(ConfigChange::Removed));
        let mut read = state();
        assert_eq!(read.on_read(Revision::new(5), Some(kv(5, BAD))), rejected);
        let removed = read.on_read(Revision::new(6), None);
        assert_eq!(removed, Some(ConfigChange::Removed));
        for state in [&event, &read] {
            assert_eq!(state.to_cache(), ToCache::Nothing);
            assert_eq!(state.status().last_error, None);
        }
        // The key still does not exist.
        assert_eq!(read.on_read(Revision::new(7), None), None);
    }

    #[test]
    fn a_cached_service_config_is_not_used_after_an_answer_or_if_it_is_invalid() {
        let mut known = state();
        known.on_read(Revision::new(9), None);
        assert_eq!(known.on_cached(Revision::new(5), GOOD.as_bytes()), Ok(None));
        let mut unknown = state();
        let error = unknown.on_cached(Revision::new(5), BAD.as_bytes());
        assert!(error.is_err_and(|error| error.contains("timeout")));
        for state in [&known, &unknown] {
            assert_eq!((in_force(state), state.status().stale), (None, false));
        }
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
