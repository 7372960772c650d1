//! What the picks of a call depend on, besides the ready set: its selection, its hash, and the data for a policy of the program.

use super::pick_policy::PickInfo;
use super::select::Select;

/// The data of a call that its picks use. Most calls have none.
#[derive(Debug, Default)]
pub(crate) enum PickKey {
    /// The call can be sent to any endpoint, and the policy uses no data of the call.
    #[default]
    Any,
    /// The call has a hash, for the consistent hash.
    Hash(u64),
    Detailed(Box<Details>),
}

/// The data of a call that has more than a hash.
#[derive(Debug)]
pub(crate) struct Details {
    pub(crate) select: Option<Select>,
    pub(crate) hash: Option<u64>,
    /// The data for the policy that the program provides, if it provides one.
    pub(crate) call: Option<PickInfo>,
}

impl PickKey {
    pub(crate) fn new(details: Details) -> Self {
        match details {
            Details {
                select: None,
                call: None,
                hash,
            } => hash.map_or(Self::Any, Self::Hash),
            details => Self::Detailed(Box::new(details)),
        }
    }

    pub(crate) fn select(&self) -> Option<&Select> {
        match self {
            Self::Detailed(details) => details.select.as_ref(),
            Self::Any | Self::Hash(_) => None,
        }
    }

    /// Returns whether the policy picks the endpoint by data of the call: by its hash, or with a policy of the program.
    pub(crate) fn has_preference(&self) -> bool {
        self.hash().is_some() || self.call().is_some()
    }

    pub(super) fn hash(&self) -> Option<u64> {
        match self {
            Self::Detailed(details) => details.hash,
            Self::Hash(hash) => Some(*hash),
            Self::Any => None,
        }
    }

    pub(super) fn call(&self) -> Option<&PickInfo> {
        match self {
            Self::Detailed(details) => details.call.as_ref(),
            Self::Any | Self::Hash(_) => None,
        }
    }
}
