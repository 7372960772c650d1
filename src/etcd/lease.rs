//! Granting, renewing and revoking leases.

use std::time::Duration;

use etcd_client::LeaseGrantOptions;

use super::member_health::Traffic;
use super::request_channel::RequestChannel;
use super::{Etcd, error, header, raw};
use crate::error::{EtcdError, EtcdErrorKind};
use crate::keyspace::{Header, KeepAlive, LeaseId};

impl Etcd {
    /// Grants a lease under a chosen id, and says its time to live, which may be longer than asked. Tried once.
    pub(crate) async fn grant(
        &self,
        lease: LeaseId,
        ttl: Duration,
        deadline: Duration,
    ) -> Result<Duration, EtcdError> {
        const OPERATION: &str = "lease grant";
        let seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX);
        self.attempt(Traffic::Leases, OPERATION, deadline, |channel| async move {
            let options = LeaseGrantOptions::new().with_id(lease.get());
            let response = channel
                .client
                .lease_client()
                .grant(seconds, Some(options))
                .await;
            let response = response
                .map_err(|source| error::of_client(OPERATION, &channel.endpoint(), source))?;
            // A store that chooses its own ids would drop nothing of ours when this lease is revoked.
            if response.id() != lease.get() {
                let source = format!("lease {:x} was granted in place of {lease}", response.id());
                let kind = EtcdErrorKind::Unimplemented;
                return Err(EtcdError::new(kind, OPERATION, &channel.endpoint(), source));
            }
            Ok(u64::try_from(response.ttl()).map_or(ttl, Duration::from_secs))
        })
        .await
    }

    /// Renews a lease. An answer out of a raft term below `term` renews nothing: a leader that was frozen and thawed gives one for leases
    /// that the cluster has dropped. Tried once.
    pub(crate) async fn keep_alive(
        &self,
        lease: LeaseId,
        term: u64,
        deadline: Duration,
    ) -> Result<KeepAlive, EtcdError> {
        const OPERATION: &str = "lease keep-alive";
        self.attempt(Traffic::Leases, OPERATION, deadline, |channel| async move {
            let (header, ttl) = Self::keep_alive_over(&channel, lease).await?;
            let endpoint = channel.endpoint();
            // Whatever it says of the lease. Here and not by who asks, so that the next try goes to another member.
            if let Some(header) = header.filter(|header| header.raft_term < term) {
                let source = format!("raft term {} after {term}", header.raft_term);
                let kind = EtcdErrorKind::StaleTerm;
                return Err(EtcdError::new(kind, OPERATION, &endpoint, source));
            }
            // Etcd says that a lease is gone by a TTL that is not positive.
            match u64::try_from(ttl) {
                Ok(seconds) if seconds > 0 => Ok(KeepAlive {
                    header,
                    ttl: Duration::from_secs(seconds),
                }),
                _ => {
                    let source = format!("lease {lease} has no time left");
                    let kind = EtcdErrorKind::LeaseNotFound;
                    Err(EtcdError::new(kind, OPERATION, &endpoint, source))
                }
            }
        })
        .await
    }

    /// The header and the TTL of one answer.
    async fn keep_alive_over(
        channel: &RequestChannel,
        lease: LeaseId,
    ) -> Result<(Option<Header>, i64), EtcdError> {
        const OPERATION: &str = "lease keep-alive";
        if let Some(service) = &channel.service {
            return raw::keep_alive(service, lease).await;
        }
        let failed = |source| error::of_client(OPERATION, &channel.endpoint(), source);
        let (mut keeper, mut answers) = channel
            .client
            .lease_client()
            .keep_alive(lease.get())
            .await
            .map_err(failed)?;
        // etcd-client keeps the first answer's TTL and header to itself; the second one on the stream shows both.
        keeper.keep_alive().await.map_err(failed)?;
        let answer = answers.message().await.map_err(failed)?;
        let answer = answer.ok_or_else(|| raw::closed(OPERATION, &channel.endpoint()))?;
        let head = answer.0.header.as_ref();
        Ok((head.map(|head| header(Some(head))), answer.ttl()))
    }

    /// Revokes a lease, and with it every key that hangs on it. Tried once; a lease that is gone counts as revoked.
    pub(crate) async fn revoke(&self, lease: LeaseId, deadline: Duration) -> Result<(), EtcdError> {
        const OPERATION: &str = "lease revoke";
        let outcome = self
            .attempt(Traffic::Leases, OPERATION, deadline, |channel| async move {
                let response = channel.client.lease_client().revoke(lease.get()).await;
                response
                    .map(drop)
                    .map_err(|source| error::of_client(OPERATION, &channel.endpoint(), source))
            })
            .await;
        match outcome {
            Err(error) if error.kind() == EtcdErrorKind::LeaseNotFound => Ok(()),
            outcome => outcome,
        }
    }
}
