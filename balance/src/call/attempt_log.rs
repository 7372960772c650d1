//! The failed attempts of a call, for its error message.

use std::fmt::Write;
use std::sync::Arc;

use bytes::Bytes;
use tonic::{Code, Status};

use crate::address::Address;

/// The failed attempts of a call.
#[derive(Debug, Default)]
pub(super) struct AttemptLog(Vec<Entry>);

#[derive(Debug)]
struct Entry {
    /// `None` if no endpoint was available.
    address: Option<Address>,
    code: Code,
}

impl AttemptLog {
    pub(super) fn add(&mut self, address: Option<Address>, code: Code) {
        self.0.push(Entry { address, code });
    }

    /// Returns the list of attempts, with the reason why no further attempt was made. Returns `None` if the call made only one attempt and
    /// `why` is `None`.
    fn list(&self, why: Option<&str>) -> Option<String> {
        if self.0.len() < 2 && why.is_none() {
            return None;
        }
        let plural = if self.0.len() == 1 { "" } else { "s" };
        let mut text = format!(" ({} attempt{plural}: ", self.0.len());
        for (index, Entry { address, code }) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            // A write to a string cannot fail.
            let _ = match address {
                Some(address) => write!(text, "{comma}{address} {code:?}"),
                None => write!(text, "{comma}no ready endpoint ({code:?})"),
            };
        }
        text.push_str(&why.map_or_else(|| ")".to_owned(), |why| format!("; {why})")));
        Some(text)
    }

    /// Returns the final status of a failed call. The list of attempts is appended to the message of `last`.
    pub(super) fn into_status(self, last: Status, why: Option<&str>) -> Status {
        let Some(attempts) = self.list(why) else {
            return last;
        };
        // Keeps the details and metadata that the server sent.
        let mut status = Status::with_details_and_metadata(
            last.code(),
            format!("{}{attempts}", last.message()),
            Bytes::copy_from_slice(last.details()),
            last.metadata().clone(),
        );
        status.set_source(Arc::new(last));
        status
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use super::*;

    fn attempt_log(addresses: &[&str]) -> AttemptLog {
        let mut attempt_log = AttemptLog::default();
        for address in addresses {
            attempt_log.add(address.parse().ok(), Code::Unavailable);
        }
        attempt_log
    }

    #[test]
    fn the_log_lists_every_attempt_and_its_status() {
        let last = Status::unavailable("gone");
        let status = attempt_log(&["a:1", "", "b:2"]).into_status(last, Some("enough"));
        assert_eq!(
            status.message(),
            "gone (3 attempts: a:1 Unavailable, no ready endpoint (Unavailable), b:2 Unavailable; enough)"
        );
        assert!(status.source().is_some(), "the status must have a source");
    }

    #[test]
    fn a_single_attempt_without_a_reason_leaves_the_status_unchanged() {
        let status = attempt_log(&["a:1"]).into_status(Status::unavailable("gone"), None);
        assert_eq!(status.message(), "gone");
    }

    #[test]
    fn a_servers_error_keeps_its_details() {
        let details = Bytes::from_static(&[1, 2, 3]);
        let mut last = Status::with_details(Code::Unavailable, "gone", details);
        last.metadata_mut()
            .insert("rack", "7".parse().expect("a value"));
        let status = attempt_log(&["a:1", "unix:/100%"]).into_status(last, None);
        let expected = "gone (2 attempts: a:1 Unavailable, unix:/100% Unavailable)";
        assert_eq!(status.message(), expected);
        assert_eq!(status.details(), [1, 2, 3]);
        assert_eq!(status.metadata().get("rack").expect("metadata"), "7");
    }
}
