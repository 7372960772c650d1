//! Handles that are created at the first use of a name, such as a method or a zone.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

use arc_swap::ArcSwap;

/// A map that calls read without a lock. An insert copies the map, which is rare: each name is inserted once.
pub(super) struct Interned<V> {
    map: ArcSwap<Map<V>>,
    limit: usize,
}

type Map<V> = HashMap<Box<str>, Arc<V>, BuildHasherDefault<NameHasher>>;

impl<V> Interned<V> {
    /// Creates an empty map with at most about `limit` names.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            map: ArcSwap::default(),
            limit,
        }
    }

    /// Returns the value of a name. If the name is new, inserts the value that `create` returns, or returns `None` if the map is full.
    pub(super) fn get(&self, name: &str, create: impl Fn() -> V) -> Option<Arc<V>> {
        if let Some(value) = self.map.load().get(name) {
            return Some(Arc::clone(value));
        }
        if self.map.load().len() >= self.limit {
            return None;
        }
        let created = Arc::new(create());
        self.map.rcu(|map| {
            let mut map = Map::clone(map);
            // Another call may have inserted the name meanwhile. Its value is kept, so that all calls use the same handles.
            map.entry(name.into())
                .or_insert_with(|| Arc::clone(&created));
            map
        });
        self.map.load().get(name).cloned()
    }
}

/// Hashes a name with one multiplication for each eight bytes, because each call looks up its method. Names that are chosen to collide do
/// little harm: the number of names is limited.
#[derive(Default)]
struct NameHasher(u64);

impl NameHasher {
    fn add(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(MULTIPLIER);
    }
}

impl Hasher for NameHasher {
    fn write(&mut self, bytes: &[u8]) {
        let mut words = bytes.chunks_exact(8);
        for word in &mut words {
            self.add(u64::from_le_bytes(word.try_into().unwrap_or_default()));
        }
        let rest = words.remainder().iter();
        self.add(rest.fold(0, |word, byte| (word << 8) | u64::from(*byte)));
    }

    fn finish(&self) -> u64 {
        // The map uses the lowest bits, and a multiplication mixes the highest bits best.
        self.0.rotate_left(26)
    }
}

/// An odd number without a pattern: the fractional part of the golden ratio.
const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;
