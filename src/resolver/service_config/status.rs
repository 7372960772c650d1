//! The status of a service config in etcd.

use std::fmt;

use tonic_balance::channel::ServiceConfig;

use crate::keyspace::Revision;

/// The status of the service config of a service: which one is in force, and the last error.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ServiceConfigStatus {
    /// The key in etcd. Control characters are escaped.
    pub key: String,
    /// The service config in force: the last good value of the key. `None` if the key does not exist, or never had a good value; the options
    /// of the program then apply alone.
    pub config: Option<ServiceConfig>,
    /// The revision of the write of this value.
    pub revision: Option<Revision>,
    /// Whether the service config in force is from the [cache](crate::resolver::ResolverBuilder::cache_dir). This ends when etcd reports
    /// a value that can be used, or that the key does not exist.
    pub stale: bool,
    /// Why the newest value is not in force, or why the key cannot be read. In both cases, the last good value stays in force. `None` if the
    /// newest value is in force.
    pub last_error: Option<String>,
    /// Number of writes since the start whose value cannot be used.
    pub rejected: u64,
}

impl ServiceConfigStatus {
    pub(super) fn new(key: String) -> Self {
        Self {
            key,
            config: None,
            revision: None,
            stale: false,
            last_error: None,
            rejected: 0,
        }
    }
}

/// One line for people, for example `revision 4711, last error: revision 4712: retryThrottling: ...`.
impl fmt::Display for ServiceConfigStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.revision {
            Some(revision) => write!(f, "revision {revision}")?,
            None => f.write_str("none")?,
        }
        if self.stale {
            f.write_str(" (from the cache)")?;
        }
        match &self.last_error {
            Some(error) => write!(f, ", last error: {error}"),
            None => Ok(()),
        }
    }
}
