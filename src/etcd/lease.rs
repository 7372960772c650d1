//! Grants, renews and revokes leases.

use std::time::Duration;

use etcd_client::LeaseGrantOptions;

use super::cluster::Etcd;
use super::decode::header;
use super::member_health::Traffic;
use super::request_channel::RequestChannel;
use super::{error, rpc};
use crate::error::{EtcdError, EtcdErrorKind};
use crate::keyspace::{Header, KeepAlive, LeaseId};

impl Etcd {
    /// Grants a lease with the given id. Returns the time to live that etcd has granted, which may be longer than requested. Makes a single
    /// attempt.
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
            let header = header(response.0.header.as_ref());
            self.0.id.check(header, OPERATION, &channel.endpoint())?;
            // Some stores choose their own lease ids. Keys could then not be attached to the requested lease, because it does not exist.
            if response.id() != lease.get() {
                let source = format!("lease {:x} was granted in place of {lease}", response.id());
                let kind = EtcdErrorKind::Unimplemented;
                return Err(EtcdError::new(kind, OPERATION, &channel.endpoint(), source));
            }
            Ok(u64::try_from(response.ttl()).map_or(ttl, Duration::from_secs))
        })
        .await
    }

    /// Renews a lease. A response with a raft term below `term` (the term of the caller's last linearizable read, or of a later renewal) is
    /// an error, because it does not prove that the lease was renewed: a former leader that was frozen for a while sends such responses
    /// even for leases that the cluster has already removed. Makes a single attempt.
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
            if let Some(header) = header {
                self.0.id.check(header, OPERATION, &endpoint)?;
            }
            // A response from an old term is invalid, whatever its TTL. It is rejected here and not in the caller, so that the failure
            // counts against the member and the next attempt uses another member.
            if let Some(header) = header.filter(|header| header.raft_term < term) {
                let source = format!("raft term {} after {term}", header.raft_term);
                let kind = EtcdErrorKind::StaleTerm;
                return Err(EtcdError::new(kind, OPERATION, &endpoint, source));
            }
            // If the lease has expired or was revoked, the TTL of the response is not positive.
            match u64::try_from(ttl) {
                Ok(seconds) if seconds > 0 => Ok(KeepAlive {
                    header,
                    ttl: Duration::from_secs(seconds),
                }),
                _ => {
                    let source = format!("lease {lease} has expired or was revoked");
                    let kind = EtcdErrorKind::LeaseNotFound;
                    Err(EtcdError::new(kind, OPERATION, &endpoint, source))
                }
            }
        })
        .await
    }

    /// Renews a lease over `channel`. Returns the header and the TTL of the response.
    async fn keep_alive_over(
        channel: &RequestChannel,
        lease: LeaseId,
    ) -> Result<(Option<Header>, i64), EtcdError> {
        const OPERATION: &str = "lease keep-alive";
        if let Some(service) = &channel.service {
            return rpc::keep_alive(service, lease).await;
        }
        let failed = |source| error::of_client(OPERATION, &channel.endpoint(), source);
        let (mut keeper, mut answers) = channel
            .client
            .lease_client()
            .keep_alive(lease.get())
            .await
            .map_err(failed)?;
        // `etcd-client` does not expose the TTL and the header of the first response. So a second keep-alive is sent, whose response
        // contains both.
        keeper.keep_alive().await.map_err(failed)?;
        let answer = answers.message().await.map_err(failed)?;
        let answer = answer.ok_or_else(|| rpc::closed(OPERATION, &channel.endpoint()))?;
        let head = answer.0.header.as_ref();
        Ok((head.map(|head| header(Some(head))), answer.ttl()))
    }

    /// Revokes a lease, which deletes every key that is attached to it. A missing lease counts as revoked. Makes a single attempt.
    pub(crate) async fn revoke(&self, lease: LeaseId, deadline: Duration) -> Result<(), EtcdError> {
        const OPERATION: &str = "lease revoke";
        let outcome = self
            .attempt(Traffic::Leases, OPERATION, deadline, |channel| async move {
                let response = channel.client.lease_client().revoke(lease.get()).await;
                let response = response
                    .map_err(|source| error::of_client(OPERATION, &channel.endpoint(), source))?;
                let header = header(response.0.header.as_ref());
                self.0.id.check(header, OPERATION, &channel.endpoint())
            })
            .await;
        match outcome {
            Err(error) if error.kind() == EtcdErrorKind::LeaseNotFound => Ok(()),
            outcome => outcome,
        }
    }
}
