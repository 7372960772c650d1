//! `host:port`, and URLs of it.

use super::DecodeError;
use crate::address::Address;
use crate::instance::Advertisement;

/// Reads `host:port` alone.
pub(super) fn decode(text: &str) -> Result<Advertisement, DecodeError> {
    Ok(Advertisement::new(text.parse()?))
}

/// Reads the address out of `scheme://host:port/…`, for the schemes a gRPC server may be registered under. The scheme decides
/// nothing but the port that `http` and `https` leave out: whether TLS is spoken is the client's decision alone.
pub(super) fn address_of_url(url: &str) -> Result<Address, DecodeError> {
    let (scheme, rest) = url
        .split_once("://")
        .ok_or(DecodeError::Form("is not a URL"))?;
    let authority = rest.split(['/', '?', '#']).next().unwrap_or(rest);
    if authority.contains('@') {
        return Err(DecodeError::Form("is a URL with credentials in it"));
    }
    let default_port = match scheme.to_ascii_lowercase().as_str() {
        "http" => Some(80),
        "https" => Some(443),
        "grpc" | "grpcs" | "tcp" | "tri" => None,
        _ => return Err(DecodeError::Form("is a URL of an unknown scheme")),
    };
    let has_port = authority
        .rsplit_once(':')
        .is_some_and(|(_, port)| !port.ends_with(']'));
    match default_port {
        Some(port) if !has_port => Ok(format!("{authority}:{port}").parse()?),
        _ => Ok(authority.parse()?),
    }
}
