//! The cache: files with the last known instances and the last service config of a service, for a start while etcd does not answer.

mod config;
mod file;
mod instances;
mod times;

pub(super) use config::{CachedConfig, ConfigCache};
pub(super) use instances::Cache;
pub(super) use times::{CACHE_DELAY, READ_TIMEOUT, WRITE_AGAIN, WRITE_DELAY};
