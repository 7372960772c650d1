//! The part of a request that is kept until its call ends, so that it can be sent again.

use bytes::Bytes;
use http::{Extensions, Method, Uri};

use super::request_headers::Headers;
use crate::transport::request_body::Outgoing;

/// What is kept of a request for sending it, and for sending it again.
pub(super) struct Call {
    pub(super) method: Method,
    pub(super) uri: Uri,
    pub(super) headers: Headers,
    pub(super) extensions: Extensions,
    pub(super) wait_for_ready: bool,
}

impl Call {
    /// The method's path.
    pub(super) fn path(&self) -> &str {
        self.uri.path()
    }

    pub(super) fn extensions_mut(&mut self) -> &mut Extensions {
        &mut self.extensions
    }

    /// The size of the header list in bytes, as peers count it; 0 for a call without metadata.
    pub(super) fn metadata_size(&self) -> usize {
        match self.headers.size() {
            0 => 0,
            size => size + self.uri.path().len() + AUTHORITY,
        }
    }
}

/// What is left of a body after it was sent.
pub(super) enum KeptBody {
    Empty,
    Single(Bytes),
    /// In the hands of its pump.
    Pumped,
}

impl KeptBody {
    pub(super) fn of(body: &Outgoing) -> Self {
        match body {
            Outgoing::Empty => Self::Empty,
            Outgoing::Single(frame) => Self::Single(frame.clone()),
            Outgoing::Stream { .. } => Self::Pumped,
        }
    }

    pub(super) fn is_pumped(&self) -> bool {
        matches!(self, Self::Pumped)
    }

    /// The body again, unless its pump has it.
    pub(super) fn body(&self) -> Option<Outgoing> {
        match self {
            Self::Empty => Some(Outgoing::Empty),
            Self::Single(frame) => Some(Outgoing::Single(frame.clone())),
            Self::Pumped => None,
        }
    }
}

/// The length of an IPv4 address and its port: the authority itself is the endpoint's.
const AUTHORITY: usize = 21;
