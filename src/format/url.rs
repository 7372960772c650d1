//! The format whose values are URLs such as `http://host:port`, and the functions that parse and write URLs.

use percent_encoding::percent_decode_str;
use serde_json::{Map, Value};

use super::error::FormatError;
use super::instance_format::InstanceFormat;
use super::text::text;
use crate::instance::{Advertisement, Instance};
use tonic_balance::Address;

/// The key is `<service>/<id>`, and the address is the authority of the value. The scheme shows whether the server uses TLS.
#[derive(Debug)]
pub(super) struct Url;

impl InstanceFormat for Url {
    fn name(&self) -> &'static str {
        NAME
    }

    fn encode(&self, _: &str, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        let advertisement = instance.advertisement();
        let kept = advertisement.kept(NAME);
        let part = |name| kept.get(name).and_then(Value::as_str);
        let scheme = part("scheme")
            .filter(|scheme| is_tls(scheme) == advertisement.tls)
            .unwrap_or(if advertisement.tls { "https" } else { "http" });
        let tail = part("tail").unwrap_or_default();
        Ok(format!("{scheme}://{}{tail}", advertisement.address).into_bytes())
    }

    fn decode(&self, _: &str, value: &[u8]) -> Result<Option<Instance>, FormatError> {
        read(text(value)?).map(Some)
    }
}

/// Decodes a URL. Fails if the scheme is not one of those under which gRPC servers are registered.
pub(super) fn read(url: &str) -> Result<Instance, FormatError> {
    let parts = Parts::of(url)?;
    if !["http", "https", "grpc", "grpcs", "tcp", "tri"].contains(&&*parts.scheme) {
        return Err(FormatError::of("is a URL of an unknown scheme"));
    }
    let mut advertisement = Advertisement::new(parts.address()?);
    advertisement.tls = is_tls(&parts.scheme);
    let mut kept = Map::new();
    if !["http", "https"].contains(&&*parts.scheme) {
        kept.insert("scheme".to_owned(), parts.scheme.into());
    }
    if !parts.tail.is_empty() {
        kept.insert("tail".to_owned(), parts.tail.into());
    }
    advertisement.keep(NAME, kept);
    Ok(advertisement.into())
}

/// The parts of a URL that a registry uses.
#[derive(Debug)]
pub(super) struct Parts<'a> {
    /// The scheme, in lower case.
    pub(super) scheme: String,
    authority: &'a str,
    /// Path, query and fragment.
    pub(super) tail: &'a str,
}

impl<'a> Parts<'a> {
    pub(super) fn of(url: &'a str) -> Result<Self, FormatError> {
        let (scheme, rest) = url
            .split_once("://")
            .ok_or(FormatError::of("is not a URL"))?;
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, tail) = rest.split_at(end);
        if authority.contains('@') {
            return Err(FormatError::of("is a URL with credentials in it"));
        }
        Ok(Self {
            scheme: scheme.to_ascii_lowercase(),
            authority,
            tail,
        })
    }

    /// Returns the address from the authority. If the scheme is `http` or `https` and the authority has no port, the default port of
    /// the scheme is added.
    pub(super) fn address(&self) -> Result<Address, FormatError> {
        let default_port = match &*self.scheme {
            "http" => Some(80),
            "https" => Some(443),
            _ => None,
        };
        let authority = self.authority;
        let has_port = authority
            .rsplit_once(':')
            .is_some_and(|(_, port)| !port.ends_with(']'));
        match default_port {
            Some(port) if !has_port => Ok(format!("{authority}:{port}").parse()?),
            _ => Ok(authority.parse()?),
        }
    }

    /// Returns the path without its leading slash.
    pub(super) fn path(&self) -> &'a str {
        let path = self.tail.split(['?', '#']).next().unwrap_or_default();
        path.strip_prefix('/').unwrap_or(path)
    }

    pub(super) fn query(&self) -> &'a str {
        let tail = self.tail.split('#').next().unwrap_or_default();
        tail.split_once('?').map_or("", |(_, query)| query)
    }
}

fn is_tls(scheme: &str) -> bool {
    matches!(scheme, "https" | "grpcs")
}

/// Parses a query like Go's `url.ParseQuery`, except that invalid escapes stay unchanged. A name that occurs once has a string as its
/// value. A name that occurs several times has a list of strings.
pub(super) fn read_query(query: &str) -> Map<String, Value> {
    let mut map = Map::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = Value::from(unescape(value));
        match map.entry(unescape(name)) {
            serde_json::map::Entry::Vacant(vacant) => {
                vacant.insert(value);
            }
            serde_json::map::Entry::Occupied(mut known) => match known.get_mut() {
                Value::Array(values) => values.push(value),
                first => *first = Value::Array(vec![first.take(), value]),
            },
        }
    }
    map
}

/// Writes a query sorted by name, like Go's `Values.Encode`, except that a space becomes `%20`.
pub(super) fn write_query(map: &Map<String, Value>) -> String {
    let mut pairs = Vec::new();
    // If another crate enables the feature `preserve_order` of serde_json, the map is not sorted by name.
    let mut sorted: Vec<_> = map.iter().collect();
    sorted.sort_by_key(|(name, _)| *name);
    for (name, value) in sorted {
        let values = match value {
            Value::Array(values) => values.as_slice(),
            value => std::slice::from_ref(value),
        };
        for value in values {
            let value = value.as_str().unwrap_or_default();
            pairs.push(format!("{}={}", escape(name), escape(value)));
        }
    }
    pairs.join("&")
}

/// Escapes like Go's `url.QueryEscape`, except that a space becomes `%20`.
pub(super) fn escape(text: &str) -> String {
    percent_encoding::utf8_percent_encode(text, ESCAPED).to_string()
}

/// Unescapes like Go's `url.QueryUnescape`, except that invalid escapes stay unchanged and invalid UTF-8 is replaced.
pub(super) fn unescape(text: &str) -> String {
    let text = text.replace('+', " ");
    percent_decode_str(&text).decode_utf8_lossy().into_owned()
}

const NAME: &str = "Url";
const ESCAPED: &percent_encoding::AsciiSet = &percent_encoding::NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'~');
