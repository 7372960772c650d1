//! The contents of a registration in etcd: its keys and their values.

use std::time::Duration;

use super::ttl::Ttl;
use crate::format::{Format, FormatError, MAX_VALUE, MAX_WEIGHT};
use crate::instance::{Advertisement, Instance};
use crate::keyspace::Key;

/// The keys of a registration and their values.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// At least one key.
    pub(super) keys: Vec<Key>,
    /// The services of the keys, in the same order. Empty for an exact key.
    pub(super) services: Vec<String>,
    pub(super) instance: Instance,
    pub(super) format: Format,
    pub(super) ttl: Ttl,
    /// Whether this is the status of a controlled server, and not the entry of a server.
    pub(super) is_status: bool,
    /// The checked value of each key. The values can differ, because some formats repeat the key in the value.
    values: Vec<Vec<u8>>,
}

impl Entry {
    /// Creates an entry with encoded values. Fails if the format cannot represent every attribute, or if a value can exceed
    /// [`MAX_VALUE`], the size above which resolvers reject a value.
    pub(super) fn new(
        keys: &[String],
        services: Vec<String>,
        advertisement: Advertisement,
        format: Format,
        ttl: Ttl,
    ) -> Result<Self, FormatError> {
        let entry = Self {
            keys: keys.iter().map(|key| Key::from(key.as_str())).collect(),
            services,
            instance: Instance::from(advertisement),
            format,
            ttl,
            is_status: false,
            values: Vec::new(),
        };
        let entry = entry.encoded()?;
        entry.check_room()?;
        Ok(entry)
    }

    /// Creates an entry with the same value under every key. The value is not that of an instance.
    pub(super) fn raw(keys: &[Key], value: &[u8], of: &Self, ttl: Duration) -> Self {
        Self {
            keys: keys.to_vec(),
            services: Vec::new(),
            instance: of.instance.clone(),
            // This format has no leave marker.
            format: Format::Plain,
            ttl: Ttl::Fixed(ttl),
            is_status: true,
            values: vec![value.to_vec(); keys.len()],
        }
    }

    fn encoded(mut self) -> Result<Self, FormatError> {
        let encode = |key: &Key| self.format.encode(&key.to_string(), &self.instance);
        self.values = self.keys.iter().map(encode).collect::<Result<_, _>>()?;
        Ok(self)
    }

    /// Checks that the largest value that the entry can ever have is not longer than [`MAX_VALUE`]. This value has the maximum weight and
    /// the leave marker, a field that tells clients that the server is about to deregister.
    fn check_room(&self) -> Result<(), FormatError> {
        let mut largest = self.instance.clone();
        largest.advertisement_mut().weight = MAX_WEIGHT;
        largest.advertisement_mut().leaving = true;
        for key in &self.keys {
            let size = self
                .format
                .encode_unchecked(&key.to_string(), &largest)?
                .len();
            if size > MAX_VALUE {
                return Err(FormatError::new(format!(
                    "can make the value {size} bytes long, over the limit of {MAX_VALUE} bytes; use less metadata"
                )));
            }
        }
        Ok(())
    }

    /// Returns a copy of the entry with another weight. Fails if the format cannot represent the weight.
    pub(super) fn weighted(&self, weight: u32) -> Result<Self, FormatError> {
        let instance = self.instance.clone().with_weight(weight);
        let entry = Self {
            instance,
            ..self.clone()
        };
        entry.encoded()
    }

    /// Returns whether the value has the address of this entry.
    pub(super) fn has_own_address(&self, index: usize, value: &[u8]) -> bool {
        self.decode(index, value).is_some()
    }

    /// Returns a copy of the entry with the weight and the metadata of a value that was written by hand. Returns `None` if the value has
    /// another address, or if the format does not accept the result.
    pub(super) fn edited(&self, index: usize, value: &[u8]) -> Option<Self> {
        let edited = self.decode(index, value)?;
        check_weight(edited.weight()).ok()?;
        let mut instance = self.instance.clone();
        let advertisement = instance.advertisement_mut();
        advertisement.weight = edited.weight();
        advertisement
            .metadata
            .clone_from(&edited.advertisement().metadata);
        let entry = Self {
            instance,
            ..self.clone()
        };
        let entry = entry.encoded().ok()?;
        entry.check_room().ok()?;
        Some(entry)
    }

    fn decode(&self, index: usize, value: &[u8]) -> Option<Instance> {
        let key = self.keys[index].to_string();
        let decoded = self.format.decode_unchecked(&key, value);
        let own = |decoded: &Instance| decoded.address() == self.instance.address();
        decoded.ok().flatten().filter(own)
    }

    fn leaving(&self) -> Instance {
        let mut leaving = self.instance.clone();
        leaving.advertisement_mut().leaving = true;
        leaving
    }

    /// Returns whether the format has a leave marker.
    pub(super) fn has_leave_marker(&self) -> bool {
        let leaving = self.leaving();
        let mut keys = self.keys.iter();
        keys.all(|key| self.format.encode(&key.to_string(), &leaving).is_ok())
    }

    /// Returns the value of the key with this index. If `leaving` is true, the value contains the leave marker, provided that the format
    /// has one.
    pub(super) fn encode(&self, index: usize, leaving: bool) -> Vec<u8> {
        let value = || self.values[index].clone();
        if !leaving {
            return value();
        }
        let leave_marker = self
            .format
            .encode_unchecked(&self.keys[index].to_string(), &self.leaving());
        leave_marker.unwrap_or_else(|_| value())
    }
}

/// Checks that a weight is within the limits.
pub(super) fn check_weight(weight: u32) -> Result<(), String> {
    if (1..=MAX_WEIGHT).contains(&weight) {
        return Ok(());
    }
    Err(format!(
        "the weight is {weight}; it must be from 1 to {MAX_WEIGHT}. To get no calls, pause the registration"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registration::ttl::DEFAULT_TTL;

    fn entry(format: Format, filler: usize) -> Result<Entry, FormatError> {
        let address = "127.0.0.1:1".parse().expect("valid");
        let mut advertisement = Advertisement::new(address);
        if filler > 0 {
            let filler = "x".repeat(filler);
            advertisement.metadata.insert("a".to_owned(), filler);
        }
        let keys = ["/s/a".to_owned(), "/s/b".to_owned()];
        Entry::new(
            &keys,
            Vec::new(),
            advertisement,
            format,
            Ttl::Fixed(DEFAULT_TTL),
        )
    }

    #[test]
    fn weights_from_one_to_the_maximum_are_accepted() {
        for (weight, accepted) in [
            (0, false),
            (1, true),
            (MAX_WEIGHT, true),
            (MAX_WEIGHT + 1, false),
        ] {
            assert_eq!(check_weight(weight).is_ok(), accepted, "{weight}");
        }
    }

    /// Every later value of an accepted entry must be accepted by the readers.
    #[test]
    fn an_entry_has_room_for_the_maximum_weight_and_the_leave_marker() {
        let accepted = (1..=MAX_VALUE).rev();
        let mut accepted = accepted.filter_map(|filler| entry(Format::EtcdNaming, filler).ok());
        let longest = accepted.next().expect("a short value is accepted");
        let weighted = longest.weighted(MAX_WEIGHT).expect("within the limits");
        assert_eq!(weighted.encode(0, true).len(), MAX_VALUE);
    }

    #[test]
    fn only_a_format_with_a_leave_marker_has_another_value_for_a_leaving_server() {
        for (format, has_leave_marker) in [(Format::EtcdNaming, true), (Format::Plain, false)] {
            let entry = entry(format, 0).expect("valid");
            assert_eq!(entry.has_leave_marker(), has_leave_marker);
            for index in 0..2 {
                let differs = entry.encode(index, true) != entry.encode(index, false);
                assert_eq!(differs, has_leave_marker);
            }
        }
    }
}
