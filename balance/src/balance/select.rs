//! The selection of endpoints by a call: by label or by address.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::address::Address;
use crate::attributes::{Attributes, VERSION};

/// A request extension: sends the call only to endpoints with a label, a version or an address.
///
/// If no endpoint matches, or no matching endpoint can be reached, the call fails with `UNAVAILABLE`. The message contains the selection and
/// the values that the endpoints have. With [`or_any`](Self::or_any), the call is sent to any endpoint instead. While a matching endpoint is
/// being connected, the call waits for it, as calls without a selection do. A retry is sent to a matching endpoint as well. The policy of
/// the channel picks among the matching endpoints.
///
/// The labels are those of the [`Attributes`]. For an instance of `tonic-etcd`, they are its metadata, its version (`version`) and its zone
/// (`zone`).
///
/// The channel keeps a set of endpoints for each selection that is in use, at most 1 024, or 256 with
/// [`LbPolicy::RingHash`](crate::LbPolicy::RingHash). The first call with a selection searches all endpoints. If the policy needs data of the
/// call (`RingHash` or a [`PickPolicy`](crate::channel::PickPolicy)), the call waits until the set is made. A set that no call has used for
/// 30 s is dropped.
///
/// ```
/// use tonic_balance::channel::Select;
///
/// let mut request = tonic::Request::new("world");
/// request.extensions_mut().insert(Select::version("1.2").or_any());
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Select {
    criterion: Criterion,
    or_any: bool,
}

impl Select {
    fn new(criterion: Criterion) -> Self {
        IS_USED.store(true, Ordering::Relaxed);
        Self {
            criterion,
            or_any: false,
        }
    }

    /// Selects the endpoints of a version: those whose label `version` has this value.
    #[must_use]
    pub fn version(version: impl AsRef<str>) -> Self {
        Self::label(VERSION, version)
    }

    /// Selects the endpoints whose label `key` has this value.
    #[must_use]
    pub fn label(key: impl AsRef<str>, value: impl AsRef<str>) -> Self {
        Self::labels([(key, value)])
    }

    /// Selects the endpoints that have all of these labels. An empty list selects every endpoint.
    #[must_use]
    pub fn labels<K: AsRef<str>, V: AsRef<str>>(labels: impl IntoIterator<Item = (K, V)>) -> Self {
        Self::new(Criterion::labels(labels))
    }

    /// Selects the endpoint with this address.
    #[must_use]
    pub fn address(address: Address) -> Self {
        Self::new(Criterion::Address(address))
    }

    /// Sends the call to any endpoint if no matching endpoint is ready, or if an attempt of the call has failed at each of them. The call then
    /// does not wait for a matching endpoint. If all streams of the matching endpoints are in use, the call waits for a stream of any
    /// endpoint.
    #[must_use]
    pub fn or_any(mut self) -> Self {
        self.or_any = true;
        self
    }

    /// Returns whether this program has ever created a selection. Until then, no call searches its extensions for one.
    pub(crate) fn is_used() -> bool {
        // Relaxed: the request that carries the selection is passed to the channel after the selection was created.
        IS_USED.load(Ordering::Relaxed)
    }

    pub(crate) fn criterion(&self) -> &Criterion {
        &self.criterion
    }

    pub(crate) fn allows_any(&self) -> bool {
        self.or_any
    }
}

static IS_USED: AtomicBool = AtomicBool::new(false);

/// The condition for an endpoint to be selected.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Criterion {
    /// The endpoint has all of these labels, which are sorted by key.
    Labels(Arc<[Label]>),
    Address(Address),
    /// The endpoint matches none of these criteria.
    Rest(Arc<[Criterion]>),
}

/// The key and the value of a label.
type Label = (Box<str>, Box<str>);

impl Criterion {
    pub(crate) fn labels<K: AsRef<str>, V: AsRef<str>>(
        labels: impl IntoIterator<Item = (K, V)>,
    ) -> Self {
        let label = |(key, value): (K, V)| (key.as_ref().into(), value.as_ref().into());
        let mut labels: Vec<Label> = labels.into_iter().map(label).collect();
        // Sorted, so that the order in which the caller names the labels does not make another criterion.
        labels.sort();
        labels.dedup();
        Self::Labels(labels.into())
    }

    pub(crate) fn matches(&self, address: &Address, attributes: &Attributes) -> bool {
        match self {
            Self::Labels(labels) => labels
                .iter()
                .all(|(key, value)| attributes.label(key) == Some(value)),
            Self::Address(selected) => selected == address,
            Self::Rest(others) => !others
                .iter()
                .any(|other| other.matches(address, attributes)),
        }
    }

    /// Returns the part of an endpoint's data that this criterion compares, as text.
    fn compared(&self, address: &Address, attributes: &Attributes) -> String {
        match self {
            Self::Labels(labels) => {
                let value = |key: &str| {
                    let shown = key.escape_debug();
                    match attributes.label(key) {
                        Some(value) => format!("{shown} {value:?}"),
                        None => format!("no {shown}"),
                    }
                };
                let values: Vec<_> = labels.iter().map(|(key, _)| value(key)).collect();
                values.join(" and ")
            }
            Self::Address(_) | Self::Rest(_) => address.to_string(),
        }
    }

    /// Explains why no endpoint is selected: the criterion, and what the endpoints have instead.
    pub(crate) fn explain<'a>(
        &self,
        endpoints: impl Iterator<Item = (&'a Address, &'a Attributes)>,
    ) -> String {
        let (mut matching, mut others) = (0_usize, BTreeMap::<String, usize>::new());
        for (address, attributes) in endpoints {
            if self.matches(address, attributes) {
                matching += 1;
            } else {
                let compared = self.compared(address, attributes);
                *others.entry(compared).or_default() += 1;
            }
        }
        if matching > 0 {
            return format!("none of the {matching} selected endpoints ({self}) is ready");
        }
        let more = others.len().saturating_sub(MAX_SHOWN);
        let mut there: Vec<_> = others
            .iter()
            .take(MAX_SHOWN)
            .map(|(compared, count)| match count {
                1 => compared.clone(),
                _ => format!("{count} x {compared}"),
            })
            .collect();
        if more > 0 {
            there.push(format!("{more} more"));
        }
        format!("no endpoint has {self}; there are {}", there.join(", "))
    }
}

impl fmt::Display for Criterion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Labels(labels) => {
                for (index, (key, value)) in labels.iter().enumerate() {
                    let separator = if index > 0 { " and " } else { "" };
                    write!(f, "{separator}{} {value:?}", key.escape_debug())?;
                }
                Ok(())
            }
            Self::Address(address) => write!(f, "the address {address}"),
            Self::Rest(_) => f.write_str("no part of the traffic split"),
        }
    }
}

/// Limit on the values that an error message lists.
const MAX_SHOWN: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    fn address(port: u16) -> Address {
        let address = format!("10.0.0.5:{port}");
        address.parse().expect("a valid address")
    }

    fn version(version: &str) -> Attributes {
        Attributes::new().with_version(version).with_zone("a")
    }

    #[test]
    fn a_criterion_compares_labels_addresses_and_their_absence() {
        let matches = |select: &Select| select.criterion().matches(&address(1), &version("1.2"));
        assert!(matches(&Select::version("1.2")));
        assert!(!matches(&Select::version("1.3")));
        assert!(matches(&Select::label("zone", "a")));
        let both = |version| Select::labels([("zone", "a"), ("version", version)]);
        assert!(matches(&both("1.2")));
        assert!(!matches(&both("1.3")));
        assert!(matches(&Select::address(address(1))));
        assert!(!matches(&Select::address(address(2))));
        let rest = |version| Criterion::Rest([Criterion::labels([("version", version)])].into());
        assert!(!rest("1.2").matches(&address(1), &version("1.2")));
        assert!(rest("1.3").matches(&address(1), &version("1.2")));
        assert_eq!(both("1"), Select::labels([("version", "1"), ("zone", "a")]));
    }

    #[test]
    fn an_error_contains_the_selection_and_what_is_there() {
        let old = (address(1), version("1.1"));
        let bare = (address(2), Attributes::new());
        let explain = |select: Select| {
            let endpoints = [&old, &bare, &old].into_iter();
            let endpoints = endpoints.map(|(address, attributes)| (address, attributes));
            select.criterion().explain(endpoints)
        };
        assert_eq!(
            explain(Select::version("1.3")),
            r#"no endpoint has version "1.3"; there are no version, 2 x version "1.1""#
        );
        assert_eq!(
            explain(Select::address(address(9))),
            "no endpoint has the address 10.0.0.5:9; there are 2 x 10.0.0.5:1, 10.0.0.5:2"
        );
        assert_eq!(
            explain(Select::version("1.1")),
            r#"none of the 2 selected endpoints (version "1.1") is ready"#
        );
    }
}
