//! Endpoints from the DNS.

mod lookups;

pub use lookups::Dns;

#[cfg(test)]
mod tests;
