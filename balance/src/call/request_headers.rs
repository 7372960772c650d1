//! The headers of a request, which can be sent several times.

use std::time::Duration;

use http::header::{
    CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HOST, TE, TRANSFER_ENCODING, UPGRADE, USER_AGENT,
};
use http::{HeaderMap, HeaderName, HeaderValue};

use super::kept_fields::Fields;
use crate::transport::deadline::{self, GRPC_TIMEOUT};

/// The headers of a request, for any number of sends.
///
/// h2 takes ownership of the header map, so another send needs another map. Few calls are sent twice, so the first send moves the map to h2,
/// and keeps only what another send cannot rebuild: the metadata, as one block of bytes. A clone of the map would need two allocations, and
/// two more for each entry of metadata, because the first clone of a [`Bytes`](bytes::Bytes) makes it shared.
#[derive(Debug)]
pub(super) struct Headers {
    /// Empty after the first send.
    map: HeaderMap,
    /// The fields that another send cannot rebuild. Empty before the first send, and for a call without metadata.
    kept: Fields,
    /// The size in bytes to which a peer's `SETTINGS_MAX_HEADER_LIST_SIZE` applies; 0 for calls without metadata, which are below every
    /// limit in use.
    size: usize,
    /// Whether the map has all fields that every call has, each of them once. If so, another send rebuilds them.
    is_complete: bool,
    /// The value of `grpc-timeout`. If there is one, each further send writes the remaining time to that field, so the field is not kept.
    timeout: Option<Duration>,
}

impl Headers {
    /// Takes a call's headers and removes those that HTTP/2 forbids.
    pub(super) fn new(mut map: HeaderMap, user_agent: &HeaderValue) -> Self {
        let mut size = PSEUDO_HEADERS;
        let (mut plain, mut timeout, mut is_unclean) = (0, None, false);
        // One pass for all questions, because a lookup by name costs more than a step of the iterator.
        for (name, value) in &map {
            size += field_size(name, value);
            if is_plain(name, value, user_agent) {
                plain += 1;
            } else if *name == GRPC_TIMEOUT {
                timeout = timeout.or_else(|| deadline::parse(value));
            } else {
                is_unclean |= is_forbidden(name);
            }
        }
        // If the number of names equals the number of values, no name occurs twice, so none of the plain fields is missing.
        let is_complete = plain == PLAIN && map.keys_len() == map.len();
        if is_complete && map.len() == PLAIN + usize::from(timeout.is_some()) {
            size = 0;
        }
        if is_unclean {
            remove_forbidden(&mut map);
        }
        Self {
            map,
            kept: Fields::default(),
            size,
            is_complete,
            timeout,
        }
    }

    /// Returns the timeout in the headers. A value that the gRPC protocol does not allow is ignored.
    pub(super) fn timeout(&self) -> Option<Duration> {
        self.timeout
    }

    /// Sets the timeout and its field, in place of those of the request.
    pub(super) fn set_timeout(&mut self, timeout: Duration, field: &HeaderValue) {
        self.timeout = Some(timeout);
        let replaced = self.map.insert(GRPC_TIMEOUT, field.clone());
        if self.size > 0 {
            let replaced = replaced.map_or(0, |field| field_size(&GRPC_TIMEOUT, &field));
            self.size = (self.size + field_size(&GRPC_TIMEOUT, field)).saturating_sub(replaced);
        }
    }

    /// Returns the size of the header list in bytes as RFC 9113 counts it, or 0 for a call without metadata.
    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// Returns the headers for one send.
    pub(super) fn take(&mut self, user_agent: &HeaderValue) -> HeaderMap {
        if self.map.is_empty() {
            let mut map = if self.is_complete {
                plain(user_agent)
            } else {
                HeaderMap::new()
            };
            self.kept.append_to(&mut map);
            return map;
        }
        let map = std::mem::take(&mut self.map);
        if self.size > 0 {
            self.kept = Fields::with_capacity(self.size);
            for (name, value) in &map {
                let is_rebuilt = self.is_complete && is_plain(name, value, user_agent);
                if !is_rebuilt && (self.timeout.is_none() || *name != GRPC_TIMEOUT) {
                    self.kept.push(name, value);
                }
            }
        }
        map
    }
}

/// Returns the size of a field as RFC 9113 counts it.
fn field_size(name: &HeaderName, value: &HeaderValue) -> usize {
    name.as_str().len() + value.len() + FIELD_OVERHEAD
}

/// Returns whether every call has this field.
fn is_plain(name: &HeaderName, value: &HeaderValue, user_agent: &HeaderValue) -> bool {
    match *name {
        TE => value == TRAILERS,
        CONTENT_TYPE => value == GRPC,
        USER_AGENT => value == user_agent,
        _ => false,
    }
}

/// Returns whether a client must not send this field over HTTP/2. The only value of `te` that is permitted is plain.
///
/// Gateways copy the headers of their own callers into metadata. Headers that belong to one connection or one message make the request
/// malformed (RFC 9113, section 8.2.2). h2 rejects such a request, and a server may treat it as an error of the whole connection.
fn is_forbidden(name: &HeaderName) -> bool {
    match *name {
        TE | CONNECTION | CONTENT_LENGTH | HOST | TRANSFER_ENCODING | UPGRADE => true,
        _ => FORBIDDEN.contains(&name.as_str()),
    }
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

/// The number of fields of [`plain`].
const PLAIN: usize = 3;
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
            let mut headers = Headers::new(given.clone(), &OURS);
            for _ in 0..3 {
                assert_eq!(headers.take(&OURS), given);
            }
        }
    }

    #[test]
    fn a_timeout_header_is_kept_unless_every_later_send_rewrites_it() {
        let mut given = plain(&OURS);
        given.insert(GRPC_TIMEOUT, HeaderValue::from_static("1S"));
        let mut known = Headers::new(given.clone(), &OURS);
        assert_eq!(known.take(&OURS), given);
        assert_eq!(known.take(&OURS), plain(&OURS));
        given.insert(GRPC_TIMEOUT, HeaderValue::from_static("1s"));
        let mut invalid = Headers::new(given.clone(), &OURS);
        assert_eq!(invalid.timeout(), None);
        invalid.take(&OURS);
        assert_eq!(invalid.take(&OURS), given);
        given.insert("rack", HeaderValue::from_static("7"));
        let mut replaced = Headers::new(given.clone(), &OURS);
        replaced.set_timeout(Duration::from_secs(1), &HeaderValue::from_static("1S"));
        assert_eq!(replaced.take(&OURS)[GRPC_TIMEOUT], "1S");
        given.remove(GRPC_TIMEOUT);
        assert_eq!(replaced.take(&OURS), given);
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
        assert_eq!(Headers::new(given, &OURS).take(&OURS), expected);
    }

    #[test]
    fn a_copied_connection_header_cannot_remove_required_headers() {
        let mut given = plain(&OURS);
        let names = "te, content-type, user-agent, grpc-timeout";
        given.insert(CONNECTION, HeaderValue::from_static(names));
        assert_eq!(Headers::new(given, &OURS).take(&OURS), plain(&OURS));
    }

    #[test]
    fn the_header_size_follows_the_rfc() {
        let mut given = plain(&OURS);
        assert_eq!(Headers::new(given.clone(), &OURS).size(), 0);
        given.insert(
            "big",
            HeaderValue::from_bytes(&[b'x'; 10_000]).expect("a value"),
        );
        let size = Headers::new(given, &OURS).size();
        assert!((10_035..10_500).contains(&size), "{size}");
    }
}
