//! Where a call has failed, for whoever reads its error.

use std::fmt::Write;
use std::sync::Arc;

use http::{HeaderName, HeaderValue, Response};
use tonic::{Code, Status};

use crate::address::Address;

/// The attempts of a call that have failed.
#[derive(Debug, Default)]
pub(super) struct Journal(Vec<Entry>);

#[derive(Debug)]
struct Entry {
    /// None if there was no endpoint to send it to.
    address: Option<Address>,
    code: Code,
}

impl Journal {
    pub(super) fn add(&mut self, address: Option<Address>, code: Code) {
        self.0.push(Entry { address, code });
    }

    /// The list of attempts, and why there is none more. None if there is nothing to be said: one attempt, and no reason.
    fn list(&self, why: Option<&str>) -> Option<String> {
        if self.0.len() < 2 && why.is_none() {
            return None;
        }
        let plural = if self.0.len() == 1 { "" } else { "s" };
        let mut text = format!(" ({} attempt{plural}: ", self.0.len());
        for (index, Entry { address, code }) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            // Writing to a string cannot fail.
            let _ = match address {
                Some(address) => write!(text, "{comma}{address} {code:?}"),
                None => write!(text, "{comma}no endpoint {code:?}"),
            };
        }
        text.push_str(&why.map_or_else(|| ")".to_owned(), |why| format!("; {why})")));
        Some(text)
    }

    /// The status of a call that is given up.
    pub(super) fn into_status(self, last: Status, why: Option<&str>) -> Status {
        let Some(attempts) = self.list(why) else {
            return last;
        };
        let mut status = Status::new(last.code(), format!("{}{attempts}", last.message()));
        status.set_source(Arc::new(last));
        status
    }

    /// Adds the list to the message of a server's error. The rest of it, details included, stays as it is.
    pub(super) fn annotate<T>(&self, response: &mut Response<T>, why: Option<&str>) {
        let Some(attempts) = self.list(why) else {
            return;
        };
        let http = response.status();
        let headers = response.headers_mut();
        let message = headers.get(GRPC_MESSAGE).map(HeaderValue::as_bytes);
        let mut message = message.unwrap_or_default().to_vec();
        if !headers.contains_key(GRPC_STATUS)
            && let Some(last) = self.0.last()
        {
            // Not of a gRPC server, so that nobody would look for a message.
            message = format!("HTTP status {}", http.as_u16()).into_bytes();
            headers.insert(GRPC_STATUS, i32::from(last.code).into());
        }
        // gRPC's messages are percent-encoded. The path of a Unix socket is the one place for a `%` of ours.
        message.extend_from_slice(attempts.replace('%', "%25").as_bytes());
        if let Ok(message) = HeaderValue::try_from(message) {
            headers.insert(GRPC_MESSAGE, message);
        }
    }
}

/// The headers of gRPC over HTTP/2.
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

#[cfg(test)]
mod tests {
    use std::error::Error;

    use super::*;

    fn journal(addresses: &[&str]) -> Journal {
        let mut journal = Journal::default();
        for address in addresses {
            journal.add(address.parse().ok(), Code::Unavailable);
        }
        journal
    }

    #[test]
    fn the_list_names_every_attempt_and_why_it_ended() {
        let last = Status::unavailable("gone");
        let status = journal(&["a:1", "", "b:2"]).into_status(last, Some("enough"));
        assert_eq!(
            status.message(),
            "gone (3 attempts: a:1 Unavailable, no endpoint Unavailable, b:2 Unavailable; enough)"
        );
        assert!(status.source().is_some(), "the last failure is the cause");
    }

    #[test]
    fn one_attempt_without_a_reason_is_a_call_like_any_other() {
        let status = journal(&["a:1"]).into_status(Status::unavailable("gone"), None);
        assert_eq!(status.message(), "gone");
        let mut response = Response::new(());
        journal(&["a:1"]).annotate(&mut response, None);
        assert!(response.headers().is_empty());
    }

    #[test]
    fn a_servers_error_keeps_its_details() {
        let mut response = Response::new(());
        for (name, value) in [
            ("grpc-status", "14"),
            ("grpc-message", "gr%C3%BC%C3%9Fe"),
            ("grpc-status-details-bin", "AQID"),
        ] {
            let value = value.parse().expect("a value");
            response.headers_mut().insert(name, value);
        }
        journal(&["a:1", "unix:/100%"]).annotate(&mut response, None);
        let status = Status::from_header_map(response.headers()).expect("a status");
        let expected = "grüße (2 attempts: a:1 Unavailable, unix:/100% Unavailable)";
        assert_eq!(status.message(), expected);
        assert_eq!(status.details(), [1, 2, 3]);
    }

    #[test]
    fn an_error_that_is_not_grpcs_becomes_one() {
        let mut response = Response::new(());
        *response.status_mut() = http::StatusCode::BAD_GATEWAY;
        journal(&["a:1", "b:2"]).annotate(&mut response, Some("enough"));
        let status = Status::from_header_map(response.headers()).expect("a status");
        assert_eq!(status.code(), Code::Unavailable);
        assert!(status.message().starts_with("HTTP status 502 (2 attempts"));
    }
}
