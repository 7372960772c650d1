//! The hash of a call or an endpoint, for the consistent hash.

use std::fmt;

use twox_hash::XxHash64;

/// A request extension: the key by which [`LbPolicy::RingHash`](crate::LbPolicy::RingHash) picks the endpoint. It takes precedence over the
/// [header](crate::channel::ChannelBuilder::request_hash_header). Other policies ignore it.
///
/// The key is hashed with XXH64 and the seed 0, as in gRPC (gRFC A42). The hash is part of the interface: it is the same in every version of
/// this library, in every process and on every platform.
///
/// ```
/// use tonic_balance::channel::HashKey;
///
/// let mut request = tonic::Request::new("world");
/// request.extensions_mut().insert(HashKey::new("customer-17"));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct HashKey(u64);

impl HashKey {
    /// Creates the extension from the bytes of a key, for example the identifier of a customer.
    #[must_use]
    pub fn new(key: impl AsRef<[u8]>) -> Self {
        Self(hash(key.as_ref()))
    }

    pub(crate) fn hash(self) -> u64 {
        self.0
    }
}

/// Prints the hash. The key is not kept.
impl fmt::Debug for HashKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HashKey({:#018x})", self.0)
    }
}

/// Returns the XXH64 of these bytes with the seed 0.
pub(crate) fn hash(bytes: &[u8]) -> u64 {
    XxHash64::oneshot(0, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The reference values of the xxHash project, and others that were computed with `xxhsum -H64`. A change would send the keys of all
    /// callers to other servers.
    #[test]
    fn the_hash_is_xxh64_with_the_seed_zero() {
        assert_eq!(hash(b""), 0xef46_db37_51d8_e999);
        assert_eq!(hash(b"a"), 0xd24e_c4f1_a98c_6e5b);
        assert_eq!(hash(b"abc"), 0x44bc_2cf5_ad77_0999);
        assert_eq!(HashKey::new("abc").hash(), hash(b"abc"));
    }
}
