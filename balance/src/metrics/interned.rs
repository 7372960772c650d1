//! Handles that are created at the first use of a name, such as a method or a zone.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A hash map that only grows. Calls read it without a lock and without a reference count, because no entry moves or ends before the map.
pub(super) struct Interned<V> {
    buckets: [Link<V>; BUCKETS],
    len: AtomicUsize,
    limit: usize,
}

/// The first or the next entry of a bucket; empty at the end.
type Link<V> = OnceLock<Box<Entry<V>>>;

struct Entry<V> {
    name: Box<str>,
    value: V,
    next: Link<V>,
}

impl<V> Interned<V> {
    /// Creates an empty map with at most about `limit` names.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            buckets: std::array::from_fn(|_| Link::new()),
            len: AtomicUsize::new(0),
            limit,
        }
    }

    /// Returns the value of a name, unless the name is new.
    pub(super) fn find(&self, name: &str) -> Option<&V> {
        let mut link = self.buckets.get(bucket(name))?;
        while let Some(entry) = link.get() {
            if *entry.name == *name {
                return Some(&entry.value);
            }
            link = &entry.next;
        }
        None
    }

    /// Returns the value of a name. If the name is new, inserts the value that `create` returns, or returns `None` if the map is full.
    pub(super) fn get(&self, name: &str, create: impl FnOnce() -> V) -> Option<&V> {
        self.find(name).or_else(|| self.insert(name, create))
    }

    #[cold]
    fn insert(&self, name: &str, create: impl FnOnce() -> V) -> Option<&V> {
        let mut link = self.buckets.get(bucket(name))?;
        if self.len.load(Ordering::Relaxed) >= self.limit {
            return None;
        }
        let mut created = Box::new(Entry {
            name: name.into(),
            value: create(),
            next: Link::new(),
        });
        loop {
            match link.set(created) {
                Ok(()) => {
                    self.len.fetch_add(1, Ordering::Relaxed);
                    return link.get().map(|entry| &entry.value);
                }
                Err(back) => created = back,
            }
            // The bucket has an entry here, which another call may have just inserted. If it has this name, its value is used, so that all
            // calls use the same handles.
            let entry = link.get()?;
            if *entry.name == *name {
                return Some(&entry.value);
            }
            link = &entry.next;
        }
    }
}

/// Returns the bucket of a name: a hash of its length and its last 8 or 16 bytes, because each call looks up its method, and methods differ at
/// their end. Names that are chosen to collide do little harm: the number of names is limited.
fn bucket(name: &str) -> usize {
    let bytes = name.as_bytes();
    let (before, last) = if let Some((rest, last)) = bytes.split_last_chunk() {
        let before = rest.last_chunk().copied().unwrap_or_default();
        (u64::from_le_bytes(before), u64::from_le_bytes(*last))
    } else {
        let add = |word, byte: &u8| (word << 8) | u64::from(*byte);
        (0, bytes.iter().fold(0, add))
    };
    let mixed = (last ^ bytes.len() as u64).wrapping_mul(MULTIPLIER);
    let hash = (mixed.rotate_left(32) ^ before).wrapping_mul(MULTIPLIER);
    // A multiplication mixes the highest bits best.
    usize::try_from(hash >> (u64::BITS - BUCKETS.ilog2())).unwrap_or_default()
}

/// The number of buckets. A bucket is a list, so it must be short for the number of methods that most programs have.
const BUCKETS: usize = 64;
/// An odd number without a pattern: the fractional part of the golden ratio.
const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_value_of_a_name_is_created_once() {
        let map = Interned::new(1_000);
        let names: Vec<_> = (0..300)
            .map(|index| format!("a.Service/Method{index}"))
            .collect();
        for _ in 0..2 {
            for (index, name) in names.iter().enumerate() {
                let value = map.get(name, || Some(index)).expect("the map is not full");
                assert_eq!(*value, Some(index));
            }
        }
        for name in &names {
            let value = map.get(name, || None).expect("the map is not full");
            assert!(value.is_some(), "{name} was created again");
        }
    }

    #[test]
    fn names_beyond_the_limit_have_no_value() {
        let map = Interned::new(2);
        assert_eq!(map.get("a", || 1), Some(&1));
        assert_eq!(map.get("b", || 2), Some(&2));
        assert_eq!(map.get("c", || 3), None);
        assert_eq!(map.get("a", || 4), Some(&1));
    }

    #[test]
    fn threads_that_insert_the_same_names_get_the_same_values() {
        let map = Interned::new(1_000);
        let all = || -> Vec<usize> {
            (0..500)
                .map(|index| {
                    let value = map.get(&index.to_string(), || Box::new(index));
                    let value: &usize = value.expect("the map is not full");
                    std::ptr::from_ref(value).addr()
                })
                .collect()
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(all)).collect();
            let mut seen = threads
                .into_iter()
                .map(|thread| thread.join().expect("no panic"));
            let first = seen.next().expect("one thread");
            assert!(seen.all(|other| other == first));
        });
    }

    #[test]
    fn the_methods_of_a_service_are_spread_over_the_buckets() {
        let mut sizes = [0; BUCKETS];
        for index in 0..BUCKETS {
            sizes[bucket(&format!("package.Service/Method{index}"))] += 1;
        }
        assert!(sizes.iter().max() <= Some(&6), "{sizes:?}");
    }
}
