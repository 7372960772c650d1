//! Parses the configured addresses of etcd members.

use http::Uri;

use crate::error::{RegistryError, without_password};
use tonic_balance::Address;

/// The parsed address of one member.
#[derive(Clone, Debug)]
pub(crate) struct MemberEndpoint {
    address: Address,
    tls: bool,
}

impl MemberEndpoint {
    /// Parses `host:port`, `http://host:port` or `https://host:port`. Without a scheme, the scheme is `https` if `tls` is true, and `http`
    /// otherwise.
    pub(crate) fn parse(endpoint: &str, tls: bool) -> Result<Self, RegistryError> {
        let invalid = |reason: String| RegistryError::InvalidEndpoint {
            endpoint: without_password(endpoint).into_owned(),
            reason,
        };
        let text = endpoint.trim().trim_end_matches('/');
        let url = if text.contains("://") {
            text.to_owned()
        } else {
            format!("{}://{text}", if tls { "https" } else { "http" })
        };
        let uri: Uri = url
            .parse()
            .map_err(|error: http::uri::InvalidUri| invalid(error.to_string()))?;
        match uri.scheme_str() {
            Some("https") if !cfg!(feature = "tls") => {
                return Err(invalid("https needs this crate's feature `tls`".to_owned()));
            }
            Some("http") if tls => {
                return Err(invalid(
                    "TLS is configured, but the scheme is http".to_owned(),
                ));
            }
            Some("http" | "https") => {}
            _ => return Err(invalid("the scheme is neither http nor https".to_owned())),
        }
        let authority = uri
            .authority()
            .ok_or_else(|| invalid("it has no host".to_owned()))?
            .to_string();
        if authority.contains('@') {
            return Err(invalid(
                "it has credentials; set them with `.user(name, password)`".to_owned(),
            ));
        }
        if uri.host().is_none_or(str::is_empty) {
            return Err(invalid("it has no host".to_owned()));
        }
        if uri.port_u16().is_none_or(|port| port == 0) {
            return Err(invalid("it has no port".to_owned()));
        }
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(invalid("it has a path or a query".to_owned()));
        }
        let address = authority.parse::<Address>();
        Ok(Self {
            address: address.map_err(|error| invalid(format!("it {}", error.reason())))?,
            tls: uri.scheme_str() == Some("https"),
        })
    }

    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    pub(crate) fn is_tls(&self) -> bool {
        self.tls
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_in_an_endpoint_is_not_in_the_error() {
        for endpoint in [
            "http://root:s3cret@a:1",
            "root:s3cret@a:1",
            "http://root:s3:cret@@a:1",
        ] {
            let error = MemberEndpoint::parse(endpoint, false).expect_err("a rejection");
            let text = format!("{error} {error:?}");
            assert!(!text.contains("s3"), "{text}");
            assert!(text.contains("root"), "{text}");
        }
    }

    #[test]
    fn endpoints_are_accepted_with_and_without_a_scheme() {
        for (endpoint, authority) in [
            ("127.0.0.1:2379", "127.0.0.1:2379"),
            ("http://127.0.0.1:2379/", "127.0.0.1:2379"),
            ("[::1]:2379", "[::1]:2379"),
            (" etcd-0.etcd:2379 ", "etcd-0.etcd:2379"),
        ] {
            let parsed = MemberEndpoint::parse(endpoint, false).expect("an endpoint");
            assert_eq!(parsed.address().as_str(), authority);
            assert!(!parsed.is_tls());
        }
    }

    #[test]
    fn the_error_for_an_invalid_endpoint_contains_the_endpoint() {
        for endpoint in [
            "",
            "http://",
            "127.0.0.1",
            "127.0.0.1:0",
            "ftp://a:1",
            "http://a:1/path",
            "a b:1",
            "::1:2379",
            ":2379",
        ] {
            let error = MemberEndpoint::parse(endpoint, false).expect_err("a rejection");
            assert!(
                error.to_string().contains(&format!("{endpoint:?}")),
                "{error}"
            );
        }
        assert!(MemberEndpoint::parse("http://127.0.0.1:2379", true).is_err());
    }
}
