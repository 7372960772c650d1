//! What a registration keeps in etcd.

use std::time::Duration;

use crate::format::{Format, FormatError, MAX_VALUE, MAX_WEIGHT};
use crate::instance::{Advertisement, Instance};
use crate::keyspace::Key;

/// What is kept in etcd.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) key: Key,
    pub(super) instance: Instance,
    pub(super) format: Format,
    pub(super) ttl: Duration,
    /// The value that was checked.
    value: Vec<u8>,
}

impl Entry {
    /// Checks that the format has room for all of it.
    pub(super) fn new(
        key: &str,
        advertisement: Advertisement,
        format: Format,
        ttl: Duration,
    ) -> Result<Self, FormatError> {
        let instance = Instance::from(advertisement);
        let value = format.encode(key, &instance)?;
        let entry = Self {
            key: Key::from(key),
            instance,
            format,
            ttl,
            value,
        };
        entry.check_room()?;
        Ok(entry)
    }

    /// As large as it can become: what is written later must not be refused by its readers.
    fn check_room(&self) -> Result<(), FormatError> {
        let mut largest = self.instance.clone();
        largest.advertisement_mut().weight = MAX_WEIGHT;
        largest.advertisement_mut().leaving = true;
        let size = self.format.write(&self.key.to_string(), &largest)?.len();
        if size > MAX_VALUE {
            return Err(FormatError::new(format!(
                "can make the value {size} bytes long, over the limit of {MAX_VALUE}; use less metadata"
            )));
        }
        Ok(())
    }

    /// The entry with another weight, if its format has room for that.
    pub(super) fn weighted(&self, weight: u32) -> Result<Self, FormatError> {
        let instance = self.instance.clone().with_weight(weight);
        let value = self.format.encode(&self.key.to_string(), &instance)?;
        Ok(Self {
            instance,
            value,
            ..self.clone()
        })
    }

    fn leaving(&self) -> Instance {
        let mut leaving = self.instance.clone();
        leaving.advertisement_mut().leaving = true;
        leaving
    }

    /// Whether the format can say that the server is leaving.
    pub(super) fn says_goodbye(&self) -> bool {
        let key = self.key.to_string();
        self.format.encode(&key, &self.leaving()).is_ok()
    }

    pub(super) fn encode(&self, leaving: bool) -> Vec<u8> {
        if !leaving {
            return self.value.clone();
        }
        let value = self.format.write(&self.key.to_string(), &self.leaving());
        value.unwrap_or_else(|_| self.value.clone())
    }
}
