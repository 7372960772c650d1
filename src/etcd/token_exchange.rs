//! The exchange of the credentials for a token. Clients get their tokens even if a whole fleet exchanges its credentials at the same time.
//!
//! For each exchange, etcd computes a password hash, which takes 50 to 130 ms. It also completes the hashes of callers that have timed out.
//! After a restart in which etcd loses its tokens, all clients exchange their credentials at the same time. If each client timed out after
//! 2 s and tried again, a server with a single core would compute hashes only for abandoned requests. So an exchange runs in a separate
//! task, which continues after the requests that wait for it have timed out. If the task sends a second request, the first one stays open,
//! and the first answer that is not a transient error is used.

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

/// The answer to a request, and the member that sent it.
type Answer = (Result<String, EtcdError>, Option<Address>);

impl Etcd {
    /// Replaces the token that etcd has rejected (`refused`), unless a concurrent request has already replaced it. Waits for at most
    /// `deadline`, or for 2 s if `deadline` is shorter. Returns whether the token has changed. Only then can a repeated request succeed.
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
        if let Source::External(client) = &self.0.source {
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
                    let sent = Instant::now();
                    let (answer, member) = etcd.exchange(&credentials).await;
                    let elapsed = Instant::now().saturating_duration_since(sent);
                    outcome.send_replace(Some(etcd.0.auth.on_exchanged(answer, member, elapsed)));
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

    /// Exchanges the credentials for a token. If no answer arrives for a while, or if a member fails, sends a further request, to another
    /// member if there is one. The earlier requests stay open.
    async fn exchange(&self, credentials: &Credentials) -> Answer {
        let end = Instant::now() + EXCHANGE_LIMIT;
        let mut requests = JoinSet::new();
        let mut sent: Option<(RequestService, Instant)> = None;
        let mut wait = if self.members() > 1 {
            DEADLINE
        } else {
            // A single member must compute all hashes, so it gets more time.
            SINGLE_MEMBER_WAIT
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
            let mut next = (now + wait).min(end);
            wait *= 8;
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
                // An answer has arrived, so no member is recorded as silent.
                sent = None;
                if failures < self.members() {
                    // A failure of one member shows nothing about the others, so another member is tried soon.
                    next = (Instant::now() + NEXT_MEMBER_DELAY).min(end);
                } else if requests.is_empty() {
                    return (answer, member);
                }
            }
            if Instant::now() >= end {
                let members = self.endpoints().join(", ");
                return (
                    Err(error::deadline("authenticate", &members, EXCHANGE_LIMIT)),
                    None,
                );
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
            return Err(EtcdError::without_endpoint(kind, "authenticate", reason));
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

    /// Handles a member that has not answered. If there are other members, the next request avoids this one. A PING checks its connection:
    /// a busy member responds to the PING, a frozen member does not.
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
        // Requests are cancelled only if the runtime shuts down. The runtime then also drops this future, so the future never needs to
        // complete.
        Err(_) => std::future::pending().await,
    }
}

/// Time between a failure and the request to another member.
const NEXT_MEMBER_DELAY: Duration = Duration::from_millis(150);

/// Time after which a second request is sent to the member, if there is only one. In this time, one core computes 100 hashes of 80 ms each.
const SINGLE_MEMBER_WAIT: Duration = Duration::from_secs(8);
/// Maximum duration of an exchange. In this time, one core computes 1 500 hashes of 80 ms each: two requests of each of 750 clients.
const EXCHANGE_LIMIT: Duration = Duration::from_secs(120);
