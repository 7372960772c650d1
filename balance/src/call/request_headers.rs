//! The headers of a request, which can be sent several times.

use http::header::{
    CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HOST, TE, TRANSFER_ENCODING, UPGRADE, USER_AGENT,
};
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::transport::deadline::GRPC_TIMEOUT;

/// The headers of a request, for any number of sends.
///
/// h2 takes ownership of the header map, so another send needs another map. Most calls have only the headers that every call has. Such a
/// call moves its map to h2 without a copy, and rebuilds the headers if it is sent again. A copy would need two allocations, and is rarely
/// used. Without the copy, a call costs 4 % less CPU.
#[derive(Debug)]
pub(super) struct Headers {
    /// Empty after the headers were moved out without a copy.
    map: HeaderMap,
    /// Whether these are the headers that every call has. Such headers are rebuilt for another send.
    plain: bool,
    /// The size in bytes to which a peer's `SETTINGS_MAX_HEADER_LIST_SIZE` applies; 0 for plain headers, which are below every limit in
    /// use.
    size: usize,
}

impl Headers {
    /// Takes a call's headers and removes those that HTTP/2 forbids. `deadline` is true if the call has a deadline. In this case each
    /// further send writes the remaining time to `grpc-timeout`, so that header need not be kept.
    pub(super) fn new(mut map: HeaderMap, user_agent: &HeaderValue, deadline: bool) -> Self {
        let plain = is_plain(&map, user_agent, deadline);
        let size = if plain { 0 } else { clean(&mut map) };
        Self { map, plain, size }
    }

    /// Returns the size of the header list in bytes as RFC 9113 counts it, or 0 for a call without metadata.
    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// Returns the headers for one send.
    pub(super) fn take(&mut self, user_agent: &HeaderValue) -> HeaderMap {
        if !self.plain {
            return self.map.clone();
        }
        if self.map.is_empty() {
            return plain(user_agent);
        }
        std::mem::take(&mut self.map)
    }
}

/// Returns whether the headers are exactly those that tonic and the channel add to every call.
fn is_plain(headers: &HeaderMap, user_agent: &HeaderValue, deadline: bool) -> bool {
    let is_known = |(name, value): (&HeaderName, &HeaderValue)| match *name {
        TE => value == TRAILERS,
        CONTENT_TYPE => value == GRPC,
        USER_AGENT => value == user_agent,
        _ => deadline && *name == GRPC_TIMEOUT,
    };
    headers.len() == 3 + usize::from(deadline)
        // If the number of names equals the number of values, no name occurs twice, so none of the known names is missing.
        && headers.keys_len() == headers.len()
        && headers.iter().all(is_known)
}

/// Removes the headers that a client must not send over HTTP/2. Returns the size of the header list before the removal.
///
/// Gateways copy the headers of their own callers into metadata. Headers that belong to one connection or one message make the request
/// malformed (RFC 9113, section 8.2.2). h2 rejects such a request, and a server may treat it as an error of the whole connection.
fn clean(headers: &mut HeaderMap) -> usize {
    let mut size = PSEUDO_HEADERS;
    let mut unclean = false;
    for (name, value) in &*headers {
        size += name.as_str().len() + value.len() + FIELD_OVERHEAD;
        unclean |= match *name {
            CONNECTION | CONTENT_LENGTH | HOST | TRANSFER_ENCODING | UPGRADE => true,
            TE => value != TRAILERS,
            _ => FORBIDDEN.contains(&name.as_str()),
        };
    }
    if unclean {
        remove_forbidden(headers);
    }
    size
}

#[cold]
fn remove_forbidden(headers: &mut HeaderMap) {
    // The `connection` header names further headers of the connection (RFC 9110, section 7.6.1).
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|names| names.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named {
        // Keeps the headers that gRPC needs, even if a copied `connection` header names them.
        if ![TE, CONTENT_TYPE, USER_AGENT].contains(&name) && !name.as_str().starts_with("grpc-") {
            headers.remove(name);
        }
    }
    for name in [CONNECTION, CONTENT_LENGTH, HOST, TRANSFER_ENCODING, UPGRADE] {
        headers.remove(name);
    }
    for name in FORBIDDEN {
        headers.remove(name);
    }
    if headers.contains_key(TE) {
        headers.insert(TE, HeaderValue::from_static(TRAILERS));
    }
}

/// Returns the headers that every call has.
fn plain(user_agent: &HeaderValue) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(4);
    headers.insert(TE, HeaderValue::from_static(TRAILERS));
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(GRPC));
    headers.insert(USER_AGENT, user_agent.clone());
    headers
}

/// Appends the channel's user agent to the caller's user agent, if any.
pub(super) fn set_user_agent(ours: &HeaderValue, headers: &mut HeaderMap) {
    if let Some(theirs) = headers.insert(USER_AGENT, ours.clone()) {
        let both = [theirs.as_bytes(), b" ", ours.as_bytes()].concat();
        if let Ok(both) = HeaderValue::try_from(both) {
            headers.insert(USER_AGENT, both);
        }
    }
}

/// The values of the headers `te` and `content-type` of every gRPC call over HTTP/2.
const TRAILERS: &str = "trailers";
const GRPC: &str = "application/grpc";
/// Headers that belong to one connection, and that have no constant in the crate `http`.
const FORBIDDEN: [&str; 3] = ["keep-alive", "proxy-connection", "http2-settings"];
/// The size that each field adds to the length of its name and value (RFC 9113, section 6.5.2).
const FIELD_OVERHEAD: usize = 32;
/// The size of `:method: POST` and `:scheme: https`, and of the names `:authority` and `:path`. The lengths of the values of `:authority`
/// and `:path` are added in [`Call::metadata_size`](super::request::Call::metadata_size).
const PSEUDO_HEADERS: usize = 4 * FIELD_OVERHEAD + 11 + 12 + 10 + 5;

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: HeaderValue = HeaderValue::from_static("tonic-etcd/1");

    #[test]
    fn every_attempt_has_the_headers_of_the_first() {
        let metadata = |name, value| {
            let mut headers = plain(&OURS);
            headers.append(
                HeaderName::from_static(name),
                HeaderValue::from_static(value),
            );
            headers
        };
        let mut without = plain(&OURS);
        without.remove(TE);
        for given in [
            plain(&OURS),
            metadata("rack", "7"),
            metadata("user-agent", "another"),
            metadata("te", "trailers"),
            metadata("grpc-encoding", "gzip"),
            without,
        ] {
            let mut headers = Headers::new(given.clone(), &OURS, false);
            for _ in 0..3 {
                assert_eq!(headers.take(&OURS), given);
            }
        }
    }

    #[test]
    fn a_timeout_header_is_kept_unless_every_later_send_rewrites_it() {
        let mut given = plain(&OURS);
        given.insert(GRPC_TIMEOUT, HeaderValue::from_static("1S"));
        let mut known = Headers::new(given.clone(), &OURS, true);
        known.take(&OURS);
        assert_eq!(known.take(&OURS), plain(&OURS));
        let mut unreadable = Headers::new(given.clone(), &OURS, false);
        unreadable.take(&OURS);
        assert_eq!(unreadable.take(&OURS), given);
    }

    #[test]
    fn headers_of_a_connection_or_a_message_are_not_sent() {
        let mut given = plain(&OURS);
        given.insert("rack", HeaderValue::from_static("7"));
        let expected = given.clone();
        for (name, value) in [
            ("connection", "close, X-Hop"),
            ("x-hop", "1"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "keep-alive"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("http2-settings", "AAMAAABk"),
            ("content-length", "3"),
            ("host", "gateway"),
            ("te", "gzip"),
        ] {
            given.append(name, HeaderValue::from_static(value));
        }
        assert_eq!(Headers::new(given, &OURS, false).take(&OURS), expected);
    }

    #[test]
    fn a_copied_connection_header_cannot_remove_required_headers() {
        let mut given = plain(&OURS);
        let names = "te, content-type, user-agent, grpc-timeout";
        given.insert(CONNECTION, HeaderValue::from_static(names));
        assert_eq!(Headers::new(given, &OURS, false).take(&OURS), plain(&OURS));
    }

    #[test]
    fn the_header_size_follows_the_rfc() {
        let mut given = plain(&OURS);
        assert_eq!(Headers::new(given.clone(), &OURS, false).size(), 0);
        given.insert(
            "big",
            HeaderValue::from_bytes(&[b'x'; 10_000]).expect("a value"),
        );
        let size = Headers::new(given, &OURS, false).size();
        assert!((10_035..10_500).contains(&size), "{size}");
    }
}
