//! The index of a client among its peers, which determines its aperture: its part of the ring of all servers.

use std::collections::BTreeSet;

use super::hash_key::hash;
use crate::address::Address;

/// The index of a client among its peers, for an [aperture](crate::channel::ChannelBuilder::aperture).
///
/// The peers are the clients that call the same service, for example all instances of the service `frontend`. They have the indexes from 0
/// to `count - 1`, and no two of them have the same index.
///
/// ```
/// use tonic_balance::channel::PeerIndex;
///
/// let index = PeerIndex::new(2, 300).expect("2 is less than 300");
/// assert_eq!((index.index(), index.count()), (2, 300));
/// assert_eq!(PeerIndex::new(300, 300), None);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PeerIndex {
    index: usize,
    count: usize,
}

impl PeerIndex {
    /// Creates an index. Returns `None` if `index` is not less than `count`, the number of peers.
    #[must_use]
    pub const fn new(index: usize, count: usize) -> Option<Self> {
        if index < count {
            Some(Self { index, count })
        } else {
            None
        }
    }

    /// Returns the index of a client in the list of its peers, which contains the client itself. Returns `None` if the list does not contain
    /// it.
    ///
    /// The index is the place of the address in the order of the hashes of all addresses (XXH64, seed 0). It does not depend on the order of
    /// the list. An address that occurs twice counts once.
    #[must_use]
    pub fn among<'a>(own: &Address, peers: impl IntoIterator<Item = &'a Address>) -> Option<Self> {
        let own = ring_place(own);
        let peers: BTreeSet<_> = peers.into_iter().map(ring_place).collect();
        let index = peers.iter().position(|peer| *peer == own)?;
        Self::new(index, peers.len())
    }

    /// Returns the index, from 0.
    #[must_use]
    pub const fn index(self) -> usize {
        self.index
    }

    /// Returns the number of peers, including the client itself.
    #[must_use]
    pub const fn count(self) -> usize {
        self.count
    }

    /// Returns the positions of `size` servers in a ring of `servers`: neighbours, from the position `index * servers / count` on, rounded
    /// down.
    ///
    /// If all peers use the same ring and the same size, the numbers of peers per server differ by at most 1. The reason: the positions at
    /// which the peers begin are as evenly spread as integers can be. So each range of `size` neighbours contains the first positions of
    /// `count * size / servers` peers, rounded up or down.
    pub(super) fn arc(self, servers: usize, size: usize) -> impl Iterator<Item = usize> {
        // The product of two `usize` fits into 128 bits.
        let start = (self.index as u128 * servers as u128) / self.count as u128;
        let start = usize::try_from(start).unwrap_or_default();
        (0..size.min(servers)).map(move |step| (start + step) % servers)
    }
}

/// Returns the place of a server or of a client in the ring: the order of their hashes, in which the addresses of a rack are not neighbours.
pub(super) fn ring_place(address: &Address) -> (u64, &Address) {
    (hash(address.as_str().as_bytes()), address)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(count: usize) -> Vec<Address> {
        let address = |index| format!("10.0.0.{index}:50051").parse();
        let addresses = (1..=count).map(|index| address(index).expect("an address"));
        addresses.collect()
    }

    #[test]
    fn every_client_has_distinct_servers_and_every_server_as_many_clients_give_or_take_one() {
        for servers in [1, 2, 7, 20, 64, 99] {
            for clients in [1, 2, 3, 10, 63, 101] {
                for size in [1, 2, 5, 20, 98, 200] {
                    let mut loads = vec![0_usize; servers];
                    for client in 0..clients {
                        let peer = PeerIndex::new(client, clients).expect("an index");
                        let arc: BTreeSet<_> = peer.arc(servers, size).collect();
                        assert_eq!(arc.len(), size.min(servers));
                        for server in arc {
                            loads[server] += 1;
                        }
                    }
                    let least = clients * size.min(servers) / servers;
                    let is_even = loads.iter().all(|load| (least..=least + 1).contains(load));
                    assert!(is_even, "{servers} {clients} {size}: {loads:?}");
                }
            }
        }
    }

    #[test]
    fn each_peer_has_another_index_whatever_the_order_of_the_list_is() {
        let mut peers = addresses(9);
        let indexes = |peers: &[Address]| -> Vec<_> {
            let index = |own| PeerIndex::among(own, peers).expect("one of the peers");
            addresses(9).iter().map(index).collect()
        };
        let before = indexes(&peers);
        let distinct: BTreeSet<_> = before.iter().map(|peer| peer.index()).collect();
        assert_eq!(distinct, (0..9).collect());
        assert!(before.iter().all(|peer| peer.count() == 9));
        peers.reverse();
        peers.push(peers[3].clone());
        assert_eq!(indexes(&peers), before);
    }

    #[test]
    fn a_client_that_is_not_listed_has_no_index() {
        let peers = addresses(3);
        let other = "10.0.1.1:50051".parse().expect("an address");
        assert_eq!(PeerIndex::among(&other, &peers), None);
        assert_eq!(PeerIndex::among(&other, []), None);
    }
}
