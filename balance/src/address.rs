//! Addresses of instances, and the policy for addresses that a client may dial.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use ipnet::IpNet;

/// The address of an instance in canonical form: `host:port`, or `unix:/path` for a Unix socket on the same machine.
///
/// The host is an IPv4 address, an IPv6 address in brackets, or a host name in lower case. Two addresses are equal if and only if their
/// canonical forms are equal: `[::ffff:10.0.0.5]:80` and `10.0.0.5:80` are the same address. A clone only increments a reference count.
///
/// ```
/// use tonic_balance::Address;
///
/// let address: Address = "[::1]:50051".parse()?;
/// assert_eq!(address.host(), Some("::1"));
/// assert_eq!(address.port(), Some(50051));
/// assert!("10.0.0.5".parse::<Address>().is_err()); // a port is required
///
/// let socket: Address = "unix:///run/greeter.sock".parse()?;
/// assert_eq!(socket.as_str(), "unix:/run/greeter.sock");
/// assert_eq!(socket.port(), None);
/// # Ok::<(), tonic_balance::error::AddressError>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address(Arc<str>);

impl Address {
    /// Returns the host, which is an IP address without brackets or a host name; `None` for a Unix socket.
    #[must_use]
    pub fn host(&self) -> Option<&str> {
        Some(self.host_and_port()?.0)
    }

    /// Returns the TCP port, which is never 0; `None` for a Unix socket.
    #[must_use]
    pub fn port(&self) -> Option<u16> {
        Some(self.host_and_port()?.1)
    }

    /// Returns the host and the port of a TCP address.
    pub(crate) fn host_and_port(&self) -> Option<(&str, u16)> {
        if self.socket_path().is_some() {
            return None;
        }
        let (host, port) = self.0.rsplit_once(':')?;
        let v6 = host.strip_prefix('[');
        let v6 = v6.and_then(|host| host.strip_suffix(']'));
        Some((v6.unwrap_or(host), port.parse().ok()?))
    }

    /// Creates a TCP address. An IPv4-mapped IPv6 address becomes IPv4, because both reach the same socket.
    fn of_socket(ip: IpAddr, port: u16) -> Self {
        Self(SocketAddr::new(ip.to_canonical(), port).to_string().into())
    }

    /// Returns the path of a Unix socket; `None` for a TCP address.
    #[must_use]
    pub fn socket_path(&self) -> Option<&Path> {
        self.0.strip_prefix(UNIX).map(Path::new)
    }

    /// Returns the address as `host:port`, with IPv6 in brackets, or as `unix:/path`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the IP address; `None` if the host is a name or the address is a Unix socket.
    #[must_use]
    pub fn ip(&self) -> Option<IpAddr> {
        self.host()?.parse().ok()
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = |reason| AddressError::new(text, reason);
        if let Some(path) = text.strip_prefix(UNIX) {
            let path = check_path(path).map_err(invalid)?;
            return Ok(Self(format!("{UNIX}{path}").into()));
        }
        if let Some((scheme, _)) = text.split_once("://") {
            return Err(invalid(match scheme {
                "http" => "has the scheme http://, but an address has no scheme; write host:port",
                "https" => "has the scheme https://, but an address has no scheme; write host:port",
                _ => "has a scheme, but an address has none; write host:port",
            }));
        }
        let (host, port) = text
            .rsplit_once(':')
            .ok_or_else(|| invalid("has no port; write host:port"))?;
        let port = parse_port(port).map_err(invalid)?;
        if let Some(v6) = host.strip_prefix('[') {
            let v6: Ipv6Addr = v6
                .strip_suffix(']')
                .and_then(|v6| v6.parse().ok())
                .ok_or_else(|| invalid("is not a valid IPv6 address"))?;
            return Ok(Self::of_socket(v6.into(), port));
        }
        if host.contains(':') {
            return Err(invalid(
                "has an IPv6 address without brackets; write [host]:port",
            ));
        }
        if let Ok(v4) = host.parse::<Ipv4Addr>() {
            return Ok(Self::of_socket(v4.into(), port));
        }
        check_name(host).map_err(invalid)?;
        Ok(Self(format!("{}:{port}", host.to_ascii_lowercase()).into()))
    }
}

impl TryFrom<SocketAddr> for Address {
    type Error = AddressError;

    /// Converts a socket address. Fails if the port is 0, because no client can dial it.
    fn try_from(address: SocketAddr) -> Result<Self, AddressError> {
        if address.port() == 0 {
            return Err(AddressError::new(&address.to_string(), "has port 0"));
        }
        Ok(Self::of_socket(address.ip(), address.port()))
    }
}

impl TryFrom<&str> for Address {
    type Error = AddressError;

    fn try_from(address: &str) -> Result<Self, AddressError> {
        address.parse()
    }
}

impl TryFrom<String> for Address {
    type Error = AddressError;

    fn try_from(address: String) -> Result<Self, AddressError> {
        address.parse()
    }
}

impl AsRef<str> for Address {
    fn as_ref(&self) -> &str {
        self.as_str()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.as_str().to_owned()
    }
}

impl From<&Address> for String {
    fn from(address: &Address) -> Self {
        address.as_str().to_owned()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn parse_port(port: &str) -> Result<u16, &'static str> {
    // `u16::from_str` accepts a leading plus sign, which is not valid in an address.
    if port.is_empty() || !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("has a port that is not a number");
    }
    match port.parse() {
        Ok(0) => Err("has port 0, which cannot be dialled"),
        Ok(port) => Ok(port),
        Err(_) => Err("has a port above 65535"),
    }
}

/// Checks the part of an address after `unix:`, and returns the path of the socket. Accepts both forms of an absolute path in gRPC's naming
/// document: `unix:/path` and `unix:///path`.
fn check_path(path: &str) -> Result<&str, &'static str> {
    let path = path.strip_prefix("//").unwrap_or(path);
    if !path.starts_with('/') || path.starts_with("//") {
        return Err("names a Unix socket by a path that is not absolute; write unix:/path");
    }
    if path.len() > SOCKET_PATH {
        return Err("names a Unix socket by a path of more than 107 bytes");
    }
    if path.ends_with('/') || path.chars().any(char::is_control) {
        return Err(
            "names a Unix socket by a path that ends with a slash or contains a control character",
        );
    }
    Ok(path)
}

fn check_name(host: &str) -> Result<(), &'static str> {
    let name = host.strip_suffix('.').unwrap_or(host);
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    if name.is_empty() {
        return Err("has an empty host");
    }
    if name.len() > 253 || !name.split('.').all(label) {
        return Err("has a host that is neither an IP address nor a host name");
    }
    // `getaddrinfo` parses "127.1", "2130706433" and "0x7f.1" as IPv4 addresses, which would bypass the address policy. So this function
    // applies the rule of the URL standard: a host whose last label is a number must be a valid IPv4 address.
    let last = name.rsplit('.').next().unwrap_or(name).to_ascii_lowercase();
    let numeric = last.bytes().all(|byte| byte.is_ascii_digit())
        || last
            .strip_prefix("0x")
            .is_some_and(|hex| hex.bytes().all(|byte| byte.is_ascii_hexdigit()));
    if numeric {
        return Err("has a host that looks like an IPv4 address but is not one");
    }
    Ok(())
}

/// The reason why an address is rejected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("address {address:?} {reason}")]
pub struct AddressError {
    address: String,
    reason: Cow<'static, str>,
}

impl AddressError {
    /// Returns the reason as a phrase that follows the address.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// Creates an error from an address and a reason. Keeps only the first 80 characters of the address, and removes a password.
    #[must_use]
    pub fn new(address: &str, reason: impl Into<Cow<'static, str>>) -> Self {
        let address = &*without_password(address);
        // A hostile value can be 64 KiB long. The first characters of a value are enough to find it in the registry.
        let end = address
            .char_indices()
            .nth(80)
            .map_or(address.len(), |(end, _)| end);
        Self {
            address: address[..end].to_owned(),
            reason: reason.into(),
        }
    }
}

/// Returns a URL or an address in a form for errors and logs. If the text contains an `@`, the part between the user name and the last `@`
/// is replaced by `:***`, because this part may be a password.
#[must_use]
pub fn without_password(given: &str) -> Cow<'_, str> {
    let (scheme, rest) = match given.split_once("://") {
        Some((scheme, rest)) => (format!("{scheme}://"), rest),
        None => (String::new(), given),
    };
    match rest.rsplit_once('@') {
        Some((user, host)) => {
            let user = user.split(':').next().unwrap_or_default();
            format!("{scheme}{user}:***@{host}").into()
        }
        None => given.into(),
    }
}

/// The rules for the addresses that a client may dial, and that a server may advertise in the registry.
///
/// Without a policy, a process with write access to the registry could direct a client's traffic to any address. The policy always rejects
/// these addresses: unspecified (`0.0.0.0/8`, `::`), multicast, broadcast, link-local (`169.254.0.0/16`, which clouds use for their
/// metadata service, and `fe80::/10`), and the other metadata services of AWS (`fd00:ec2::254`), Alibaba Cloud (`100.100.100.200`) and
/// Azure (`168.63.129.16`). By default it accepts all other IP addresses, including loopback, and all host names. It rejects Unix sockets
/// by default, because the same path is a different socket on every machine.
///
/// ```
/// use tonic_balance::AddressPolicy;
///
/// let policy = AddressPolicy::default().forbid_loopback().allow("10.0.0.0/8".parse()?);
/// assert!(policy.check(&"10.1.2.3:80".parse()?).is_ok());
/// assert!(policy.check(&"192.0.2.1:80".parse()?).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct AddressPolicy {
    loopback_forbidden: bool,
    sockets_allowed: bool,
    networks: Vec<IpNet>,
}

impl AddressPolicy {
    /// Rejects loopback addresses (`127.0.0.0/8`, `::1`) and `localhost`. They are accepted by default.
    #[must_use]
    pub fn forbid_loopback(mut self) -> Self {
        self.loopback_forbidden = true;
        self
    }

    /// Adds a network to the accepted networks. By default, all networks are accepted. Once a network is added, the policy rejects IP
    /// addresses outside the added networks. It then also rejects host names, because their IP addresses are unknown before the dial.
    #[must_use]
    pub fn allow(mut self, network: IpNet) -> Self {
        self.networks.push(network);
        self
    }

    /// Accepts Unix sockets. They are rejected by default. This affects only addresses from the registry: a Unix socket that the program
    /// itself configures is always dialled.
    #[must_use]
    pub fn allow_unix_sockets(mut self) -> Self {
        self.sockets_allowed = true;
        self
    }

    /// Checks an address against the policy.
    ///
    /// # Errors
    ///
    /// Fails with the first rule that the address violates.
    pub fn check(&self, address: &Address) -> Result<(), AddressError> {
        let checked = match (address.host(), address.ip()) {
            (None, _) if self.sockets_allowed => Ok(()),
            (None, _) => Err("is a Unix socket, which the address policy does not allow"),
            (Some(_), Some(ip)) => self.check_ip(ip),
            (Some(host), None) => self.check_host(host),
        };
        checked.map_err(|reason| AddressError::new(address.as_str(), reason))
    }

    fn check_host(&self, host: &str) -> Result<(), &'static str> {
        let host = host.strip_suffix('.').unwrap_or(host);
        if self.loopback_forbidden && (host == "localhost" || host.ends_with(".localhost")) {
            return Err("is a loopback address, which the address policy forbids");
        }
        if !self.networks.is_empty() {
            return Err("is a host name, and the address policy allows only certain networks");
        }
        Ok(())
    }

    fn check_ip(&self, ip: IpAddr) -> Result<(), &'static str> {
        let ip = embedded_v4(ip.to_canonical());
        if is_unspecified(ip) {
            return Err("is an unspecified address, which other hosts cannot reach");
        }
        if ip.is_multicast() || ip == IpAddr::V4(Ipv4Addr::BROADCAST) {
            return Err("is a multicast or broadcast address");
        }
        if is_link_local(ip) {
            return Err("is link-local");
        }
        if is_metadata_service(ip) {
            return Err("is the metadata service of a cloud");
        }
        if self.loopback_forbidden && ip.is_loopback() {
            return Err("is a loopback address, which the address policy forbids");
        }
        if !self.networks.is_empty() && !self.networks.iter().any(|network| network.contains(&ip)) {
            return Err("is outside the networks that the address policy allows");
        }
        Ok(())
    }
}

/// If a gateway translates this IPv6 address to an IPv4 address, returns that IPv4 address. Returns any other address unchanged. The
/// gateway forwards to the IPv4 address, so the policy must check that address. The prefixes are those of NAT64 (`64:ff9b::/96`, RFC 6052;
/// `64:ff9b:1::/48`, RFC 8215) and of 6to4 (`2002::/16`, RFC 3056).
fn embedded_v4(ip: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = ip else {
        return ip;
    };
    let octets = v6.octets();
    let v4 = match v6.segments() {
        [0x64, 0xff9b, 0, 0, 0, 0, ..] => [octets[12], octets[13], octets[14], octets[15]],
        // With a prefix of 48 bits, octet 8 is not part of the IPv4 address (RFC 6052, section 2.2).
        [0x64, 0xff9b, 1, ..] => [octets[6], octets[7], octets[9], octets[10]],
        [0x2002, ..] => [octets[2], octets[3], octets[4], octets[5]],
        _ => return ip,
    };
    Ipv4Addr::from(v4).into()
}

/// Returns whether this is the address of a cloud's metadata service, which serves the credentials of a virtual machine. The list has the
/// addresses of AWS over IPv6, of Alibaba Cloud, and of Azure. It does not have 169.254.169.254, which AWS, Google and others use over
/// IPv4: the policy rejects this address because it is link-local.
fn is_metadata_service(ip: IpAddr) -> bool {
    const V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
    match ip {
        IpAddr::V4(v4) => matches!(v4.octets(), [100, 100, 100, 200] | [168, 63, 129, 16]),
        IpAddr::V6(v6) => v6 == V6,
    }
}

fn is_unspecified(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.octets()[0] == 0,
        IpAddr::V6(v6) => v6.is_unspecified(),
    }
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

/// The scheme of Unix sockets in gRPC's naming document.
const UNIX: &str = "unix:";
/// Limit on the length of the path of a Unix socket, in bytes: `sun_path` of unix(7) has 108 bytes, including the terminating NUL.
const SOCKET_PATH: usize = 107;

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<String, String> {
        text.parse::<Address>()
            .map(|address| address.to_string())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn cloud_metadata_addresses_are_rejected_in_every_notation() {
        let policy = AddressPolicy::default();
        for ip in [
            "169.254.169.254",
            "100.100.100.200",
            "168.63.129.16",
            "[fd00:ec2::254]",
            "[::ffff:169.254.169.254]",
            // 169.254.169.254 as a NAT64 address, as a NAT64 address with the prefix for local use, and as a 6to4 address.
            "[64:ff9b::a9fe:a9fe]",
            "[64:ff9b:1:a9fe:a9:fe00::]",
            "[2002:a9fe:a9fe::1]",
        ] {
            let address: Address = format!("{ip}:80").parse().expect("an address");
            policy.check(&address).expect_err(ip);
        }
        for ip in ["10.0.0.5", "[fd00:ec2::253]", "[2002:a00:5::1]"] {
            let address: Address = format!("{ip}:80").parse().expect("an address");
            policy.check(&address).expect(ip);
        }
    }

    #[test]
    fn addresses_have_one_canonical_form() {
        for (text, canonical) in [
            ("10.0.0.5:50051", "10.0.0.5:50051"),
            ("[::1]:80", "[::1]:80"),
            ("[0:0:0:0:0:0:0:1]:80", "[::1]:80"),
            ("[::ffff:10.0.0.5]:80", "10.0.0.5:80"),
            ("Greeter.Example.ORG:443", "greeter.example.org:443"),
            ("my_service-1:1", "my_service-1:1"),
            ("unix:/run/a.sock", "unix:/run/a.sock"),
            ("unix:///run/a.sock", "unix:/run/a.sock"),
        ] {
            assert_eq!(parse(text).as_deref(), Ok(canonical));
        }
    }

    #[test]
    fn a_socket_address_needs_a_port() {
        let of = |text: &str| Address::try_from(text.parse::<SocketAddr>().expect("valid"));
        assert_eq!(
            of("[::ffff:10.0.0.5]:80").expect("a port").as_str(),
            "10.0.0.5:80"
        );
        let error = of("10.0.0.5:0").expect_err("port 0").to_string();
        assert!(
            error.contains("10.0.0.5:0") && error.contains("has port 0"),
            "{error}"
        );
    }

    #[test]
    fn invalid_addresses_are_rejected() {
        for text in [
            "",
            ":80",
            "host",
            "host:",
            "host:+80",
            "host:0",
            "host:65536",
            "::1:80",
            "[::1]",
            "[::1:80",
            "[fe80::1%eth0]:80",
            "a b:80",
            "127.1:80",
            "2130706433:80",
            "0x7f.1:80",
            "a..b:80",
            "http://host:80",
            "user@host:80",
            "host/path:80",
            "1.2.3.4.5:80",
            "unix:",
            "unix:a.sock",
            "unix://host/a.sock",
            "unix:////a.sock",
            "unix:/run/",
            "unix:/run/a\0.sock",
            "UNIX:/run/a.sock",
        ] {
            assert!(parse(text).is_err(), "{text:?} must be refused");
        }
    }

    #[test]
    fn the_default_policy_rejects_addresses_that_no_peer_can_have() {
        let policy = AddressPolicy::default();
        for text in [
            "0.0.0.0:80",
            "0.1.2.3:80",
            "[::]:80",
            "224.0.0.1:80",
            "255.255.255.255:80",
            "[ff02::1]:80",
            "169.254.169.254:80",
            "[fe80::1]:80",
            "[::ffff:169.254.169.254]:80",
            "[64:ff9b::a9fe:a9fe]:80",
        ] {
            let address = text.parse().expect("valid form");
            assert!(policy.check(&address).is_err(), "{text} must be refused");
        }
        for text in [
            "127.0.0.1:80",
            "[::1]:80",
            "localhost:80",
            "10.0.0.1:80",
            "greeter:80",
        ] {
            let address = text.parse().expect("valid form");
            assert_eq!(policy.check(&address), Ok(()));
        }
    }

    #[test]
    fn unix_sockets_must_be_allowed_and_fit_the_system_limit() {
        let longest = format!("unix:/{}", "a".repeat(106));
        let socket: Address = longest.parse().expect("valid form");
        assert!(AddressPolicy::default().check(&socket).is_err());
        let policy = AddressPolicy::default().allow_unix_sockets();
        assert_eq!(policy.check(&socket), Ok(()));
        assert!(parse(&format!("{longest}a")).is_err());
        assert_eq!(
            (socket.host(), socket.port(), socket.ip()),
            (None, None, None)
        );
    }

    #[test]
    fn loopback_and_other_networks_can_be_forbidden() {
        let policy = AddressPolicy::default().forbid_loopback();
        for text in [
            "127.0.0.1:80",
            "[::1]:80",
            "localhost:80",
            "a.localhost.:80",
        ] {
            assert!(
                policy.check(&text.parse().expect("valid form")).is_err(),
                "{text} must be refused"
            );
        }
        let policy = AddressPolicy::default().allow("10.0.0.0/8".parse().expect("valid network"));
        assert!(
            policy
                .check(&"10.9.9.9:80".parse().expect("valid form"))
                .is_ok()
        );
        assert!(
            policy
                .check(&"11.9.9.9:80".parse().expect("valid form"))
                .is_err()
        );
        assert!(
            policy
                .check(&"greeter:80".parse().expect("valid form"))
                .is_err()
        );
    }
}
