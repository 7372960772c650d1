//! Where a member of etcd is, as users write it.

use std::time::Duration;

use http::Uri;
use tonic::transport;

use crate::error::ConnectError;

/// One member's address, parsed.
#[derive(Clone, Debug)]
pub(crate) struct MemberEndpoint {
    uri: Uri,
    authority: String,
}

impl MemberEndpoint {
    /// Parses `host:port`, `http://host:port` or `https://host:port`; `tls` decides the scheme where none is given.
    pub(crate) fn parse(endpoint: &str, tls: bool) -> Result<Self, ConnectError> {
        let invalid = |reason: String| ConnectError::InvalidEndpoint {
            endpoint: endpoint.to_owned(),
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
                "credentials belong into `.user(name, password)`".to_owned(),
            ));
        }
        if uri.host().is_none_or(str::is_empty) {
            return Err(invalid("it has no host".to_owned()));
        }
        if uri.port_u16().is_none_or(|port| port == 0) {
            return Err(invalid("it has no port".to_owned()));
        }
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(invalid("it has a path".to_owned()));
        }
        Ok(Self { uri, authority })
    }

    /// `host:port`.
    pub(crate) fn authority(&self) -> &str {
        &self.authority
    }

    pub(crate) fn is_tls(&self) -> bool {
        self.uri.scheme_str() == Some("https")
    }

    /// The tonic endpoint, with defaults that survive real networks.
    pub(super) fn transport(&self) -> transport::Endpoint {
        tuned(self.uri.clone().into())
    }

    /// The same for a connector that makes the connection secure by itself.
    #[cfg(feature = "tls")]
    pub(super) fn transport_over_own_tls(&self) -> transport::Endpoint {
        // tonic refuses `https` without a TLS configuration of its own; requests say it all the same.
        let plain = format!("http://{}", self.authority).parse();
        let plain = plain.unwrap_or_else(|_| self.uri.clone());
        tuned(plain.into()).origin(self.uri.clone())
    }
}

fn tuned(endpoint: transport::Endpoint) -> transport::Endpoint {
    endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .tcp_keepalive(Some(TCP_KEEPALIVE))
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(false)
        .initial_stream_window_size(1 << 20)
        // Many stream windows: a watch that is not read for a while must not stop the calls beside it.
        .initial_connection_window_size(16 << 20)
}

/// Within a call's deadline of 2 s, so that a member whose packets are dropped is told from one that is slow.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const TCP_KEEPALIVE: Duration = Duration::from_secs(30);
/// HTTP/2 pings go out only while a stream is open: etcd closes connections that ping while idle, and watches that ping more often
/// than every 5 s (measured on 3.4.23 and 3.5.30).
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_taken_with_and_without_scheme() {
        for (endpoint, authority) in [
            ("127.0.0.1:2379", "127.0.0.1:2379"),
            ("http://127.0.0.1:2379/", "127.0.0.1:2379"),
            ("[::1]:2379", "[::1]:2379"),
            (" etcd-0.etcd:2379 ", "etcd-0.etcd:2379"),
        ] {
            let parsed = MemberEndpoint::parse(endpoint, false).expect("valid");
            assert_eq!(parsed.authority(), authority);
            assert!(!parsed.is_tls());
        }
    }

    #[test]
    fn what_is_no_endpoint_is_refused_by_name() {
        for endpoint in [
            "",
            "http://",
            "127.0.0.1",
            "127.0.0.1:0",
            "ftp://a:1",
            "http://a:1/path",
            "http://u:p@a:1",
            "a b:1",
            "::1:2379",
            ":2379",
        ] {
            let error = MemberEndpoint::parse(endpoint, false).expect_err("invalid");
            assert!(
                error.to_string().contains(&format!("{endpoint:?}")),
                "{error}"
            );
        }
        assert!(MemberEndpoint::parse("http://127.0.0.1:2379", true).is_err());
    }
}
