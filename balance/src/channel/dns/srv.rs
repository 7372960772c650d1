//! A source of endpoints that looks up SRV records.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;

use domain::base::Name;
use tower::BoxError;

use super::srv_lookup::SrvLookup;
use super::task::{self, Changes, INTERVAL};
use crate::address::Address;
use crate::attributes::Attributes;
use crate::channel::source::{EndpointSource, Endpoints, ServerName, SourceContext};

/// A source of endpoints that looks up SRV records in the DNS (RFC 2782), for example those of a named port of a headless service of
/// Kubernetes, or those of Consul.
///
/// Each SRV record has a target with its addresses, a port, a priority and a weight. Each address of a target is an endpoint, with the port
/// of the record.
///
/// - *Priority*: the endpoints are the targets of the records with the lowest priority. If none of these targets has an address, or if none
///   of them can be looked up at the start, the next priority is used, and so on. If the servers of the lowest priority fail, the channel
///   still does not use the next priority.
/// - *Weight*: the weight of the record is the [weight](Attributes::with_weight) of the endpoint. A weight of 0 counts as 1, so that a
///   record with weight 0 beside others has the small chance that RFC 2782 demands. If the targets have different numbers of addresses, the
///   addresses of a target share its weight, and all weights are multiplied by 60.
///
/// The name is looked up
///
/// - at the start,
/// - when the first of its records expires, but not within 5 s of the last lookup, and at the latest after the
///   [`interval`](Self::interval), 30 s by default,
/// - after the end of a connection, and after a failed attempt to connect, but not within 5 s of the start of the last successful lookup.
///
/// If a lookup fails, or its answer contains no record, or no target has an address, the endpoints stay as they are. If only the lookup of
/// a target fails, its last known addresses stay. The lookup is then repeated after 1 s, 2 s, 4 s and so on, at most after the interval. The
/// errors of calls that find no endpoint contain the failure. A lookup fails after 30 s, and if the name has more than 1 000 records or its
/// targets have more than 10 000 addresses.
///
/// The queries are sent to the name servers in `/etc/resolv.conf`, over UDP, and over TCP if an answer is truncated. After an error or 2 s
/// without an answer, the next name server is used. The name and the targets are absolute: `search` has no effect, and neither has
/// `/etc/hosts`.
///
/// The name without its first labels that begin with an underscore is the domain: `greeter.default.svc.cluster.local` in the example. It is
/// the server name for TLS, unless the TLS configuration contains another one, and the authority of calls. The targets are not, because an
/// answer without DNSSEC could name any target (RFC 6125).
///
/// ```no_run
/// use std::time::Duration;
/// use tonic_balance::BalancedChannel;
/// use tonic_balance::channel::DnsSrv;
///
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// let dns = DnsSrv::new("_grpc._tcp.greeter.default.svc.cluster.local").interval(Duration::from_secs(10));
/// let channel = BalancedChannel::builder().source(dns).connect().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct DnsSrv {
    name: String,
    interval: Duration,
    name_servers: Vec<SocketAddr>,
}

impl DnsSrv {
    /// Creates a source for a name in the form `_service._proto.domain`, or in another form that ends with the domain of the servers. If the
    /// name is not valid, or has no domain, the channel is [invalid](crate::error::ChannelError::InvalidOption).
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            interval: INTERVAL,
            name_servers: Vec::new(),
        }
    }

    /// Sets the maximum interval between two lookups. Default 30 s; values below 5 s count as 5 s.
    #[must_use]
    pub fn interval(mut self, interval: Duration) -> Self {
        self.interval = interval;
        self
    }

    /// Adds a name server, for example the one of Consul at `127.0.0.1:8600`. By default, the name servers in `/etc/resolv.conf` are used.
    ///
    /// The query for the SRV records is sent over TCP, and over UDP if that fails. Over UDP, Consul leaves out records of a long answer, and
    /// marks the answer as truncated only with the setting `dns_config.enable_truncate = true`. So this setting is necessary if Consul is
    /// behind one of the name servers in `/etc/resolv.conf`.
    ///
    /// ```
    /// use tonic_balance::channel::DnsSrv;
    ///
    /// let dns = DnsSrv::new("_greeter._tcp.service.consul").name_server(([127, 0, 0, 1], 8600));
    /// ```
    #[must_use]
    pub fn name_server(mut self, address: impl Into<SocketAddr>) -> Self {
        self.name_servers.push(address.into());
        self
    }

    /// Parses the name. Returns the name, and the domain of the servers.
    pub(super) fn parse(name: &str) -> Result<(Name<Vec<u8>>, String), String> {
        let invalid = |reason: String| format!("{name:?} is not a name of SRV records: {reason}");
        let parsed = Name::<Vec<u8>>::from_str(name).map_err(|error| invalid(error.to_string()))?;
        let mut domain = name.trim_end_matches('.');
        while domain.starts_with('_') {
            domain = domain.split_once('.').map_or("", |(_, rest)| rest);
        }
        // A domain is valid if it is valid as the host of an address.
        let address: Result<Address, _> = format!("{domain}:1").parse();
        let address = address.map_err(|error| invalid(error.to_string()))?;
        if address.ip().is_some() {
            return Err(invalid("it is an IP address".to_owned()));
        }
        Ok((parsed, domain.to_ascii_lowercase()))
    }
}

impl EndpointSource for DnsSrv {
    type Attributes = Attributes;
    type Error = Infallible;
    type Stream = Changes<Attributes>;

    fn start(self, context: &SourceContext) -> Result<Endpoints<Self::Stream>, BoxError> {
        let (name, domain) = Self::parse(&self.name)?;
        let shown = name.to_string();
        let lookup = SrvLookup::new(name, self.name_servers);
        let mut endpoints = task::start(shown, lookup, self.interval, context.policy.clone());
        endpoints.name = Some(ServerName {
            host: domain.as_str().into(),
            authority: domain,
        });
        Ok(endpoints)
    }
}
