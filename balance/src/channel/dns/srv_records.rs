//! The choice of SRV records by their priority, and the weights of their endpoints (RFC 2782).

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

/// The fields of an SRV record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SrvRecord<N> {
    pub(super) priority: u16,
    pub(super) weight: u16,
    pub(super) port: u16,
    pub(super) target: N,
}

/// Returns the records in groups of the same priority. The first group has the lowest priority, which a client must prefer.
pub(super) fn by_priority<N>(records: Vec<SrvRecord<N>>) -> Vec<Vec<SrvRecord<N>>> {
    let mut groups: BTreeMap<u16, Vec<_>> = BTreeMap::new();
    for record in records {
        groups.entry(record.priority).or_default().push(record);
    }
    groups.into_values().collect()
}

/// Returns the endpoints of a group and their weights. Each item has a record and the addresses of its target.
///
/// RFC 2782 picks a record with weight 0 only if a random number from 0 to the sum of the weights is 0. With weight 1, its share is the
/// same.
pub(super) fn endpoints<N>(group: &[(&SrvRecord<N>, Vec<IpAddr>)]) -> BTreeMap<SocketAddr, u32> {
    let mut counts = group.iter().map(|(_, addresses)| addresses.len());
    let first = group.iter().map(|(_, addresses)| addresses.len()).max();
    let is_uniform = counts.all(|count| count == 0 || Some(count) == first);
    let mut weights = BTreeMap::new();
    for (record, addresses) in group {
        let weight = u32::from(record.weight.max(1));
        let weight = if is_uniform {
            weight
        } else {
            let count = u32::try_from(addresses.len()).unwrap_or(u32::MAX);
            (weight * PARTS).checked_div(count).unwrap_or(0).max(1)
        };
        for address in addresses {
            // Several records can name the same server.
            let sum: &mut u32 = weights
                .entry(SocketAddr::new(*address, record.port))
                .or_default();
            *sum = sum.saturating_add(weight);
        }
    }
    weights
}

/// The parts into which a weight is divided among the addresses of a target. The division is exact for up to six addresses.
const PARTS: u32 = 60;

#[cfg(test)]
mod tests {
    use super::*;

    fn record(priority: u16, weight: u16, port: u16) -> SrvRecord<&'static str> {
        SrvRecord {
            priority,
            weight,
            port,
            target: "a.test",
        }
    }

    fn addresses(addresses: &[&str]) -> Vec<IpAddr> {
        let parsed = addresses.iter().map(|address| address.parse());
        parsed.collect::<Result<_, _>>().expect("addresses")
    }

    fn shares(group: &[(&SrvRecord<&'static str>, Vec<IpAddr>)]) -> Vec<(String, u32)> {
        let endpoints = endpoints(group).into_iter();
        endpoints
            .map(|(address, weight)| (address.to_string(), weight))
            .collect()
    }

    #[test]
    fn the_group_of_the_lowest_priority_is_the_first() {
        let records = vec![record(20, 1, 1), record(0, 1, 2), record(20, 1, 3)];
        let groups = by_priority(records);
        let ports: Vec<Vec<_>> = groups
            .iter()
            .map(|group| group.iter().map(|record| record.port).collect())
            .collect();
        assert_eq!(ports, [vec![2], vec![1, 3]]);
    }

    #[test]
    fn weights_are_kept_and_zero_counts_as_one() {
        let (zero, some) = (record(0, 0, 1), record(0, 60_000, 2));
        let group = [
            (&zero, addresses(&["10.0.0.1"])),
            (&some, addresses(&["10.0.0.2"])),
        ];
        let expected = [
            ("10.0.0.1:1".to_owned(), 1),
            ("10.0.0.2:2".to_owned(), 60_000),
        ];
        assert_eq!(shares(&group), expected);
    }

    #[test]
    fn the_addresses_of_a_target_share_its_weight() {
        let (two, one) = (record(0, 3, 1), record(0, 3, 2));
        let group = [
            (&two, addresses(&["10.0.0.1", "fd00::1"])),
            (&one, addresses(&["10.0.0.2"])),
        ];
        let expected = [("10.0.0.1:1", 90), ("10.0.0.2:2", 180), ("[fd00::1]:1", 90)];
        let expected = expected.map(|(address, weight)| (address.to_owned(), weight));
        assert_eq!(shares(&group), expected);
        // If each target has two addresses, or none, the shares are right without a factor.
        let group = [
            (&two, addresses(&["10.0.0.1", "fd00::1"])),
            (&one, Vec::new()),
        ];
        let expected = [("10.0.0.1:1".to_owned(), 3), ("[fd00::1]:1".to_owned(), 3)];
        assert_eq!(shares(&group), expected);
    }

    #[test]
    fn the_weights_of_records_for_one_server_are_added() {
        let (one, other) = (record(0, 2, 1), record(0, 5, 1));
        let group = [
            (&one, addresses(&["10.0.0.1"])),
            (&other, addresses(&["10.0.0.1"])),
        ];
        assert_eq!(shares(&group), [("10.0.0.1:1".to_owned(), 7)]);
    }
}
