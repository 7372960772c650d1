//! Sends a request, and sends it again after a failure, to another member if there is one.

use std::time::Duration;

use tokio::time::Instant;

use super::cluster::Etcd;
use super::error;
use super::limits::DEADLINE;
use super::member_health::Traffic;
use super::request_channel::RequestChannel;
use crate::error::{EtcdError, EtcdErrorKind};

impl Etcd {
    /// Makes up to five attempts of a request, on different members if possible. The deadline of each sent request is 2 s.
    pub(super) async fn call<T, Fut>(
        &self,
        operation: &'static str,
        request: impl Fn(RequestChannel) -> Fut,
    ) -> Result<T, EtcdError>
    where
        Fut: Future<Output = Result<T, EtcdError>>,
    {
        let attempt = || self.attempt(Traffic::Keys, operation, DEADLINE, &request);
        self.retry(operation, attempt).await
    }

    /// Runs `attempt` up to five times, until it succeeds or fails with an error that a further attempt cannot resolve.
    pub(super) async fn retry<T, Fut>(
        &self,
        operation: &'static str,
        attempt: impl Fn() -> Fut,
    ) -> Result<T, EtcdError>
    where
        Fut: Future<Output = Result<T, EtcdError>>,
    {
        let mut attempts = 1;
        loop {
            match attempt().await {
                Err(error) if self.may_succeed(&error) && attempts < MAX_ATTEMPTS => {
                    tracing::debug!(%error, operation, attempts, "etcd call failed, trying again");
                    let step = match error.kind() {
                        EtcdErrorKind::NoLeader => ELECTION_STEP,
                        // Until every member has had one attempt, the next attempt starts without a wait.
                        _ if (attempts as usize) < self.members() => Duration::ZERO,
                        _ => RETRY_STEP,
                    };
                    let wait = crate::backoff::jittered(
                        step * 2u32.pow(attempts - 1),
                        &mut fastrand::Rng::new(),
                    );
                    tokio::time::sleep(wait).await;
                    attempts += 1;
                }
                outcome => return outcome,
            }
        }
    }

    /// Makes one attempt of a request, if possible on a member without recent failures. If etcd rejects the token, the attempt repeats the
    /// request with a new token. If the server is not an etcd, the attempt repeats the request on the other members, one after another.
    pub(super) async fn attempt<T, Fut>(
        &self,
        traffic: Traffic,
        operation: &'static str,
        deadline: Duration,
        request: impl Fn(RequestChannel) -> Fut,
    ) -> Result<T, EtcdError>
    where
        Fut: Future<Output = Result<T, EtcdError>>,
    {
        let mut left = self.members();
        loop {
            let outcome = self.try_once(traffic, operation, deadline, &request).await;
            left = left.saturating_sub(1);
            match outcome {
                // A single endpoint that is not an etcd must not make the request fail. The repetition is safe, because the server has not
                // executed the request.
                Err(error) if error.kind() == EtcdErrorKind::Unimplemented && left > 0 => {
                    tracing::debug!(%error, "repeating the request on another member");
                }
                outcome => return outcome,
            }
        }
    }

    async fn try_once<T, Fut>(
        &self,
        traffic: Traffic,
        operation: &'static str,
        deadline: Duration,
        request: impl Fn(RequestChannel) -> Fut,
    ) -> Result<T, EtcdError>
    where
        Fut: Future<Output = Result<T, EtcdError>>,
    {
        let mut channel = self.channel(traffic, deadline).await?;
        let token = self.0.auth.token();
        // Boxed, because a future of `etcd-client` takes 20 KiB, which would otherwise be part of every task.
        let mut outcome = self
            .send(
                operation,
                deadline,
                &channel,
                Box::pin(request(channel.clone())),
            )
            .await;
        if let Err(error) = &outcome
            && error.kind().is_refusal()
            && !(error.kind() == EtcdErrorKind::PermissionDenied && self.0.auth.cannot_be_expired())
        {
            match self.renew_token(token.as_ref(), deadline).await {
                Ok(true) => {
                    tracing::debug!(%error, "etcd refused the token, trying again with a fresh one");
                    channel = self.channel(traffic, deadline).await?;
                    outcome = self
                        .send(
                            operation,
                            deadline,
                            &channel,
                            Box::pin(request(channel.clone())),
                        )
                        .await;
                }
                Ok(false) => {}
                // No new token could be obtained. The exchange has already recorded this failure for its member.
                Err(error) => return Err(error),
            }
        }
        self.record_outcome(&channel, traffic, outcome.as_ref().err());
        outcome
    }

    /// Sends the request once, and records its duration if metrics are enabled.
    async fn send<T>(
        &self,
        operation: &'static str,
        deadline: Duration,
        channel: &RequestChannel,
        request: impl Future<Output = Result<T, EtcdError>>,
    ) -> Result<T, EtcdError> {
        let sent = Instant::now();
        let outcome = with_deadline(operation, deadline, channel, request).await;
        if let Some(metrics) = self.0.metrics.get() {
            let error = outcome.as_ref().err().map(EtcdError::kind);
            let duration = Instant::now().saturating_duration_since(sent);
            metrics.record(operation, error, duration);
        }
        outcome
    }
}

pub(super) async fn with_deadline<T>(
    operation: &'static str,
    deadline: Duration,
    channel: &RequestChannel,
    request: impl Future<Output = Result<T, EtcdError>>,
) -> Result<T, EtcdError> {
    tokio::time::timeout(deadline, request)
        .await
        .unwrap_or_else(|_| Err(error::deadline(operation, &channel.endpoint(), deadline)))
}

/// Maximum number of attempts. If one of three members is dead and another one is frozen, five attempts still reach the third member twice.
const MAX_ATTEMPTS: u32 = 5;
/// Wait after the first attempt, if there is a single member. It doubles after each further attempt and is jittered, so the four waits
/// between five attempts take 1.1 to 2.2 s in total. With several members, the waits before every member has had an attempt are omitted.
const RETRY_STEP: Duration = Duration::from_millis(150);
/// Wait after the first attempt if the cluster has no leader. It doubles after each further attempt and is jittered, so the four waits take
/// 3 to 6 s in total. Within that time, a cluster with the default election timeout of 1 s elects a leader even if the first vote is split.
const ELECTION_STEP: Duration = Duration::from_millis(400);
