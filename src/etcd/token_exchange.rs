//! The exchange of the credentials for a token, which converges for a fleet.
//!
//! An exchange costs etcd a password hash of 50 to 130 ms, and etcd continues to hash for callers that have timed out. After a restart that
//! loses its tokens, all clients exchange at once: if each of them timed out after 2 s and tried again, a single core would hash for
//! abandoned requests only. So an exchange runs in a task of its own, which outlives the requests that wait for it. It is not abandoned
//! while another one is tried: the first answer wins.

use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tonic_balance::Address;
use tracing::Instrument;

use super::auth::Replacement;
use super::cluster::{Etcd, Source};
use super::limits::DEADLINE;
use super::member_health::{Failure, Traffic};
use super::request_channel::RequestService;
use super::retry::with_deadline;
use super::token_cell::{Credentials, Token};
use super::{error, rpc};
use crate::error::EtcdError;

/// An answer, and the member that gave it.
type Answer = (Result<String, EtcdError>, Option<Address>);

impl Etcd {
    /// Replaces the `refused` token by a new one, unless a concurrent request has done so. Waits for `deadline` at most, and for 2 s at
    /// least. Returns whether the token has changed, so that a repeated request may succeed.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future does not stop the exchange.
    pub(super) async fn renew_token(
        &self,
        refused: Option<&Token>,
        deadline: Duration,
    ) -> Result<bool, EtcdError> {
        let deadline = deadline.max(DEADLINE);
        if let Source::Given(client) = &self.0.source {
            let channel = self.channel(Traffic::Keys, deadline).await?;
            let endpoint = channel.endpoint();
            let renewal = Box::pin(self.0.auth.refresh_client(client, &endpoint));
            return with_deadline("authenticate", deadline, &channel, renewal).await;
        }
        let running = match self.0.auth.replacement(refused, Instant::now()) {
            Replacement::Done(outcome) => return outcome,
            Replacement::Running(running) => running,
            Replacement::Begin {
                credentials,
                spread,
                outcome,
                running,
            } => {
                let etcd = self.clone();
                let exchange = async move {
                    tokio::time::sleep(spread).await;
                    let (answer, member) = etcd.exchange(&credentials).await;
                    outcome.send_replace(Some(etcd.0.auth.on_exchanged(answer, member)));
                };
                tokio::spawn(exchange.in_current_span());
                running
            }
        };
        tokio::time::timeout(deadline, running.outcome())
            .await
            .unwrap_or_else(|_| {
                let members = self.endpoints().join(", ");
                Err(error::deadline("authenticate", &members, deadline))
            })
    }

    /// Exchanges the credentials. If there is no answer, sends another request beside the first, to another member if there is one.
    async fn exchange(&self, credentials: &Credentials) -> Answer {
        let end = Instant::now() + LIMIT;
        let mut requests = JoinSet::new();
        let mut sent: Option<(RequestService, Instant)> = None;
        let mut patience = if self.members() > 1 {
            DEADLINE
        } else {
            // A single member has all the hashes to compute.
            LONE
        };
        let mut failures = 0;
        loop {
            if let Some((service, at)) = sent.take() {
                self.on_silence(&service, at);
            }
            let now = Instant::now();
            match self.request(credentials, end, &mut requests).await {
                Ok(service) => sent = Some((service, now)),
                Err(error) if requests.is_empty() => return (Err(error), None),
                Err(_) => {}
            }
            let mut next = (now + patience).min(end);
            patience *= 8;
            loop {
                let (answer, member) = tokio::select! {
                    biased;
                    Some(answer) = answer(&mut requests) => answer,
                    () = sleep_until(next) => break,
                };
                match &answer {
                    Err(error) if error.kind().is_transient() => failures += 1,
                    _ => return (answer, member),
                }
                // The member that answered is not the silent one.
                sent = None;
                if failures < self.members() {
                    // A failure of one member shows nothing about the others, and the exchange does not wait for a silent one.
                    next = (Instant::now() + RETRY).min(end);
                } else if requests.is_empty() {
                    return (answer, member);
                }
            }
            if Instant::now() >= end {
                let members = self.endpoints().join(", ");
                return (Err(error::deadline("authenticate", &members, LIMIT)), None);
            }
        }
    }

    async fn request(
        &self,
        credentials: &Credentials,
        end: Instant,
        requests: &mut JoinSet<Answer>,
    ) -> Result<RequestService, EtcdError> {
        let left = end.saturating_duration_since(Instant::now());
        let channel = self.channel(Traffic::Keys, left).await?;
        let Some(service) = channel.service.clone() else {
            let reason = "an external client has its own credentials";
            let kind = crate::error::EtcdErrorKind::InvalidRequest;
            return Err(EtcdError::new(kind, "authenticate", "(none)", reason));
        };
        let (etcd, credentials, sent) = (self.clone(), credentials.clone(), service.clone());
        let request = async move {
            let answer = rpc::authenticate(&sent, &credentials, left).await;
            etcd.record_outcome(&channel, Traffic::Keys, answer.as_ref().err());
            (answer, sent.routing.address())
        };
        requests.spawn(request.in_current_span());
        Ok(service)
    }

    /// The next request avoids the member, and the connection is checked: a busy member answers a PING, a frozen one does not.
    fn on_silence(&self, service: &RequestService, since: Instant) {
        if let Source::Members(members) = &self.0.source
            && members.addresses.len() > 1
        {
            members.on_failure(service, Traffic::Keys, Failure::Timeout);
        }
        service.routing.report_failure(Instant::now(), Some(since));
    }
}

/// Returns the next answer.
async fn answer(requests: &mut JoinSet<Answer>) -> Option<Answer> {
    match requests.join_next().await? {
        Ok(answer) => Some(answer),
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        // Only a runtime that shuts down cancels it.
        Err(_) => std::future::pending().await,
    }
}

/// The wait before another member is tried after a failure.
const RETRY: Duration = Duration::from_millis(150);

/// The time after which a single member gets a second request. Within it, one core computes about 100 hashes.
const LONE: Duration = Duration::from_secs(8);
/// The limit on an exchange. Within it, one core computes the hashes of about 1 000 clients, with one repeat for each.
const LIMIT: Duration = Duration::from_secs(120);
