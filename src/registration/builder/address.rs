//! Selects the address that a server advertises.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use super::registration_builder::RegistrationBuilder;
use crate::error::RegisterError;
use tonic_balance::{Address, error::AddressError};

impl RegistrationBuilder {
    pub(super) async fn advertised(
        &self,
        bound: Option<SocketAddr>,
    ) -> Result<Address, RegisterError> {
        let address = match (&self.address, &self.host, bound) {
            (Some(address), _, _) => address.parse(),
            (None, Some(host), Some(bound)) => with_port(host, bound.port()),
            (None, None, Some(bound)) if bound.ip().is_unspecified() => self.routed(bound).await,
            (None, None, Some(bound)) => bound.try_into(),
            (None, Some(host), None) => Err(AddressError::new(
                host,
                "has no port; without a server that binds a port, set the whole `address`",
            )),
            (None, None, None) => Err(AddressError::new("", "is not set; call `address`")),
        };
        self.accepted(address)
    }

    /// Returns the local IP address from which the kernel would send to etcd, with the port of the listener. Clients that reach the same
    /// etcd can most likely reach the server at this address.
    async fn routed(&self, bound: SocketAddr) -> Result<Address, AddressError> {
        // An etcd client that the application passed to `Registry::from_client` does not expose the addresses of etcd. The list is then
        // empty, and the local address of the default route is the best guess.
        let endpoints = self.etcd.endpoints();
        for target in &endpoints {
            if let Some(ip) = local_ip(target, bound.ip()).await {
                if ip.is_loopback() {
                    // If each host of a fleet runs an etcd proxy, all servers that listen on the same port advertise the same loopback
                    // address, and overwrite each other's key.
                    tracing::warn!(
                        %ip,
                        "etcd is on this host, so the registration advertises a loopback address, which no other host can reach; set the host or the address, for example from POD_IP"
                    );
                }
                return SocketAddr::new(ip, bound.port()).try_into();
            }
        }
        // These addresses are reserved for documentation, so no route except the default route leads to them.
        for target in ["192.0.2.1:9", "[2001:db8::1]:9"] {
            let Some(ip) = local_ip(target, bound.ip()).await else {
                continue;
            };
            if !endpoints.is_empty() {
                tracing::warn!(
                    %ip,
                    ?endpoints,
                    "no route to etcd is known yet: the registration advertises the address of the default route; set the host or the address if clients cannot reach it"
                );
            }
            return SocketAddr::new(ip, bound.port()).try_into();
        }
        let reason = "is unspecified, and this host has no route to etcd and no default route";
        Err(AddressError::new(&bound.to_string(), reason))
    }
}

/// Returns the local address from which the kernel would send to `target`. To find this address, a UDP socket is connected. This sends no
/// packet.
async fn local_ip(target: &str, bound: IpAddr) -> Option<IpAddr> {
    let targets = tokio::time::timeout(LOOKUP, tokio::net::lookup_host(target));
    let targets = targets.await.ok()?.ok()?;
    for target in targets {
        let any: SocketAddr = match target {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            // A listener on 0.0.0.0 does not accept IPv6, so an IPv6 address cannot be advertised. A listener on [::] also accepts IPv4
            // with the default settings of Linux and macOS.
            SocketAddr::V6(_) if bound.is_ipv4() => continue,
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let local = UdpSocket::bind(any).and_then(|socket| {
            socket.connect(target)?;
            socket.local_addr()
        });
        if let Ok(local) = local
            && !local.ip().is_unspecified()
        {
            return Some(local.ip());
        }
    }
    None
}

/// Timeout of the DNS lookup for one etcd endpoint. A DNS server that does not respond would otherwise delay the registration by minutes.
const LOOKUP: Duration = Duration::from_secs(5);

fn with_port(host: &str, port: u16) -> Result<Address, AddressError> {
    match host.trim_matches(['[', ']']).parse::<IpAddr>() {
        Ok(ip) => SocketAddr::new(ip, port).try_into(),
        Err(_) => format!("{host}:{port}").parse(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_advertised_host_gets_the_bound_port() {
        for (host, address) in [
            ("10.0.0.5", "10.0.0.5:80"),
            ("::1", "[::1]:80"),
            ("[::1]", "[::1]:80"),
            ("greeter", "greeter:80"),
        ] {
            assert_eq!(with_port(host, 80).expect("an address").as_str(), address);
        }
        assert!(with_port("a:1", 80).is_err());
    }

    #[tokio::test]
    async fn the_route_to_a_loopback_etcd_is_loopback() {
        let local = local_ip("127.0.0.1:2379", Ipv4Addr::UNSPECIFIED.into()).await;
        assert_eq!(local, Some(Ipv4Addr::LOCALHOST.into()));
    }
}
