//! The TTL that a registration requests for its lease.

use std::time::Duration;

use crate::keyspace::Range;

/// The TTL that a registration requests for its lease.
#[derive(Clone, Debug)]
pub(super) enum Ttl {
    Fixed(Duration),
    /// The TTL depends on the number of keys in this range ([`by_servers`]). The range contains the keys of the service.
    ByServers(Range),
}

impl Ttl {
    /// Returns the lowest TTL that the registration can request.
    pub(super) const fn lowest(&self) -> Duration {
        match self {
            Self::Fixed(ttl) => *ttl,
            Self::ByServers(_) => DEFAULT_TTL,
        }
    }
}

/// Returns the TTL for a service with this number of servers. A server renews its lease every TTL/3. With a fixed TTL, the renewals would
/// grow with the fleet until they are most of the requests that etcd receives. Nomad limits the heartbeats of its clients in the same way.
pub(super) fn by_servers(servers: usize) -> Duration {
    let servers = u32::try_from(servers).unwrap_or(u32::MAX);
    let ttl = PER_SERVER.saturating_mul(servers);
    // etcd grants whole seconds.
    Duration::from_secs(ttl.as_secs()).clamp(DEFAULT_TTL, MAX_TTL_BY_SERVERS)
}

/// The TTL for up to 250 servers.
pub(super) const DEFAULT_TTL: Duration = Duration::from_secs(15);
/// The TTL for 2 000 servers and more. The entry of a dead server remains for this long. Clients do not call such a server, but connect to
/// it now and then, which costs little among so many servers.
const MAX_TTL_BY_SERVERS: Duration = Duration::from_secs(120);
/// With this part of the TTL for each server, the servers of a service together send 50 renewals per second, which cost etcd 2 % of a core.
const PER_SERVER: Duration = Duration::from_millis(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn up_to_two_thousand_servers_together_renew_about_fifty_times_per_second() {
        for (servers, ttl) in [
            (0, 15),
            (1, 15),
            (250, 15),
            (267, 16),
            (1_000, 60),
            (2_000, 120),
            (10_000, 120),
            (usize::MAX, 120),
        ] {
            assert_eq!(by_servers(servers).as_secs(), ttl, "{servers} servers");
        }
        for servers in 250..=2_000_u32 {
            let renewals = f64::from(servers) * 3.0 / by_servers(servers as usize).as_secs_f64();
            assert!(
                (46.0..=54.0).contains(&renewals),
                "{servers} servers send {renewals} renewals per second"
            );
        }
    }
}
