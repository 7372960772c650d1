//! What a registration keeps in etcd.

use std::time::Duration;

use crate::format::{Format, FormatError, MAX_VALUE, MAX_WEIGHT};
use crate::instance::{Advertisement, Instance};
use crate::keyspace::Key;

/// What is kept in etcd.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// At least one.
    pub(super) keys: Vec<Key>,
    /// The services that the keys are of, in the same order; none for an exact key.
    pub(super) services: Vec<String>,
    pub(super) instance: Instance,
    pub(super) format: Format,
    pub(super) ttl: Duration,
    /// The value of each key, checked: formats may repeat the key in it.
    values: Vec<Vec<u8>>,
}

impl Entry {
    /// Checks that the format has room for all of it.
    pub(super) fn new(
        keys: &[String],
        services: Vec<String>,
        advertisement: Advertisement,
        format: Format,
        ttl: Duration,
    ) -> Result<Self, FormatError> {
        let entry = Self {
            keys: keys.iter().map(|key| Key::from(key.as_str())).collect(),
            services,
            instance: Instance::from(advertisement),
            format,
            ttl,
            values: Vec::new(),
        };
        let entry = entry.encoded()?;
        entry.check_room()?;
        Ok(entry)
    }

    fn encoded(mut self) -> Result<Self, FormatError> {
        let encode = |key: &Key| self.format.encode(&key.to_string(), &self.instance);
        self.values = self.keys.iter().map(encode).collect::<Result<_, _>>()?;
        Ok(self)
    }

    /// As large as it can become: what is written later must not be refused by its readers.
    fn check_room(&self) -> Result<(), FormatError> {
        let mut largest = self.instance.clone();
        largest.advertisement_mut().weight = MAX_WEIGHT;
        largest.advertisement_mut().leaving = true;
        for key in &self.keys {
            let size = self.format.write(&key.to_string(), &largest)?.len();
            if size > MAX_VALUE {
                return Err(FormatError::new(format!(
                    "can make the value {size} bytes long, over the limit of {MAX_VALUE}; use less metadata"
                )));
            }
        }
        Ok(())
    }

    /// The entry with another weight, if its format has room for that.
    pub(super) fn weighted(&self, weight: u32) -> Result<Self, FormatError> {
        let instance = self.instance.clone().with_weight(weight);
        let entry = Self {
            instance,
            ..self.clone()
        };
        entry.encoded()
    }

    fn leaving(&self) -> Instance {
        let mut leaving = self.instance.clone();
        leaving.advertisement_mut().leaving = true;
        leaving
    }

    /// Whether the format can say that the server is leaving.
    pub(super) fn has_leave_marker(&self) -> bool {
        let leaving = self.leaving();
        let mut keys = self.keys.iter();
        keys.all(|key| self.format.encode(&key.to_string(), &leaving).is_ok())
    }

    /// The value of the key with this index.
    pub(super) fn encode(&self, index: usize, leaving: bool) -> Vec<u8> {
        let value = || self.values[index].clone();
        if !leaving {
            return value();
        }
        let leave_marker = self
            .format
            .write(&self.keys[index].to_string(), &self.leaving());
        leave_marker.unwrap_or_else(|_| value())
    }
}
