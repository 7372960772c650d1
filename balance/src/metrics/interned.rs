//! Handles that are created at the first use of a name, such as a method or a zone.

use std::collections::HashMap;
use std::sync::Arc;

use arc_swap::ArcSwap;

/// A map that calls read without a lock. An insert copies the map, which is rare: each name is inserted once.
pub(super) struct Interned<V> {
    map: ArcSwap<HashMap<Box<str>, Arc<V>>>,
    limit: usize,
}

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
            let mut map = HashMap::clone(map);
            // Another call may have inserted the name meanwhile. Its value is kept, so that all calls use the same handles.
            map.entry(name.into())
                .or_insert_with(|| Arc::clone(&created));
            map
        });
        self.map.load().get(name).cloned()
    }
}
