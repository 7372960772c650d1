//! Endpoints from the DNS.

mod lookups;
#[cfg(feature = "dns-srv")]
mod name_servers;
#[cfg(feature = "dns-srv")]
mod srv;
#[cfg(feature = "dns-srv")]
mod srv_lookup;
#[cfg(feature = "dns-srv")]
mod srv_records;
mod task;

pub use lookups::Dns;
#[cfg(feature = "dns-srv")]
pub use srv::DnsSrv;

#[cfg(test)]
mod tests;
