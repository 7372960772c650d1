//! Hedging: several attempts of a call at once, on different endpoints. The first usable response ends the call.

use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use http::Response;
use tokio::time::Instant;
use tonic::{Code, Status};

use super::attempt::{Attempt, Try};
use super::body::ResponseBody;
use super::core::Core;
use super::history::History;
use super::prepare::has_small_metadata;
use super::request::{Call, KeptBody};
use super::retry::HedgingPolicy;
use super::retry::decision::Pushback;
use super::retry_loop::{Conclusion, Outcome, Retrying};
use super::status;
use super::transparent_retry::{
    Answered, Failed, PickError, before_deadline, pick_prepared, recover,
};
use super::wait_for_endpoint::sleep_until;
use crate::balance::{Permit, Pick, SCAN_LIMIT};
use crate::transport::deadline::Deadline;
use crate::transport::request_body::Outgoing;
use crate::transport::response_body::Incoming;

/// Starts a hedged call. `body` is one message or empty.
pub(super) fn hedge(
    core: Arc<Core>,
    call: Call,
    body: KeptBody,
    policy: HedgingPolicy,
    deadline: Option<Deadline>,
) -> Retrying {
    let hedging = Hedging {
        conclusion: Conclusion::new(core, call, deadline),
        body,
        policy,
        history: History::default(),
        open_attempts: Vec::new(),
        sent: 0,
        next: None,
        is_stopped: false,
        last: None,
    };
    Box::pin(hedging.run())
}

/// A call that is hedged.
struct Hedging {
    conclusion: Conclusion,
    body: KeptBody,
    policy: HedgingPolicy,
    history: History,
    /// Attempts whose response head was not received yet. Dropping an attempt resets its stream and releases its permit.
    open_attempts: Vec<Attempt>,
    /// The number of attempts that were sent and not refused.
    sent: u32,
    /// When the next hedge is due, if any.
    next: Option<Instant>,
    /// Whether no further hedge is sent, because a server has forbidden hedges or because the call may have caused the end of a connection.
    is_stopped: bool,
    /// The failure that ends the call if no other attempt succeeds. It holds no permit, because the call may wait for the next hedge.
    last: Option<Failed>,
}

impl Hedging {
    async fn run(mut self) -> Result<Response<ResponseBody>, Status> {
        loop {
            if self.open_attempts.is_empty() && self.next.is_none() {
                if let Some(last) = self.last.take() {
                    return self.finish(Err(last));
                }
                let permit = match self.first_permit().await {
                    Ok(permit) => permit?,
                    Err(late) => return self.deadline_exceeded(late, "waiting for an endpoint"),
                };
                if self.send(permit)? {
                    self.schedule(self.policy.delay());
                }
                continue;
            }
            let event = event(&mut self.open_attempts, self.next);
            match before_deadline(self.conclusion.deadline, event).await {
                Err(late) => return self.deadline_exceeded(late, "waiting for the response"),
                Ok(None) => self.send_another()?,
                Ok(Some(ended)) => {
                    if let Some(outcome) = self.on_ended(ended).await {
                        return self.finish(outcome);
                    }
                }
            }
        }
    }

    /// Waits for a permit, in the same way as a call without hedging. Used only while no attempt is in flight.
    async fn first_permit(&mut self) -> Result<Result<Permit, Status>, Deadline> {
        let Conclusion {
            core,
            call,
            deadline,
            ..
        } = &mut self.conclusion;
        call.start_span(self.sent);
        let picked = pick_prepared(core, call, None, &mut self.history);
        let picked = before_deadline(*deadline, picked).await;
        let picked = picked.map(|picked| picked.map_err(PickError::into_status));
        match &picked {
            Ok(Ok(_)) => {}
            Ok(Err(status)) => call.end_unsent_span(status.code()),
            Err(_) => call.end_unsent_span(Code::DeadlineExceeded),
        }
        picked
    }

    /// Sends one attempt. Returns true if it was sent, and false if the connection did not accept it.
    fn send(&mut self, permit: Permit) -> Result<bool, Status> {
        let body = self.body.body().unwrap_or(Outgoing::Empty);
        let which = Try::Later {
            previous: self.sent,
        };
        let now = Instant::now();
        let endpoint = Arc::clone(permit.endpoint());
        let Conclusion {
            core,
            call,
            deadline,
            ..
        } = &mut self.conclusion;
        match Attempt::start(core, call, permit, body, *deadline, which, now) {
            Ok(attempt) => {
                self.history.avoid(&endpoint);
                self.open_attempts.push(attempt);
                self.sent += 1;
                Ok(true)
            }
            Err(unsent) => {
                unsent.into_retry(core, &mut self.history)?;
                Ok(false)
            }
        }
    }

    /// Sends a hedge to an endpoint that the call has not used. Does nothing if no such endpoint is ready: a hedge does not wait.
    fn send_another(&mut self) -> Result<(), Status> {
        self.next = None;
        let sent = self.try_others();
        // If no connection has accepted the hedge, its span is still open. It must not become the span of a later attempt.
        self.conclusion.call.end_unsent_span(Code::Unavailable);
        sent
    }

    fn try_others(&mut self) -> Result<(), Status> {
        while self.may_send() {
            let Conclusion { core, call, .. } = &self.conclusion;
            let shared = core.shared();
            let Some(place) = shared.place() else {
                break;
            };
            let snapshot = shared.snapshot(&call.pick_key, self.history.draw(), SCAN_LIMIT);
            let Pick::Taken(permit) = self.history.pick_new(&snapshot) else {
                break;
            };
            place.keep();
            drop(snapshot);
            // With large metadata, a hedge would need a private connection, so none is sent.
            if !has_small_metadata(&self.conclusion.call, &permit) {
                break;
            }
            // A first attempt over a connection that was silent for a long time waits for the answer to a PING first. A hedge does not. It can
            // fail without harm, because usually other attempts are in flight. And on a channel with few calls, all connections may be
            // silent, so every hedge would come too late.
            if self.send(permit)? {
                self.schedule(self.policy.delay());
                break;
            }
        }
        Ok(())
    }

    /// Returns true if another hedge is allowed by the retry budget, the policy, the servers, and the history of lost connections.
    fn may_send(&self) -> bool {
        let Conclusion { core, call, .. } = &self.conclusion;
        let method_config = core.method_config(call);
        let allows_retry =
            method_config.is_some_and(|method_config| method_config.tokens().allows_retry());
        // If a connection was lost while this call was on it, the call may be the cause. A hedge could then end another connection,
        // together with the other calls on it.
        let may_lose_another = self.history.has_lost_connection();
        allows_retry
            && !may_lose_another
            && !self.is_stopped
            && self.sent < self.policy.attempt_limit()
    }

    /// Schedules the next hedge after `wait`, if another hedge is allowed.
    fn schedule(&mut self, wait: Duration) {
        let next = Instant::now().checked_add(wait);
        self.next = next.filter(|_| self.may_send());
    }

    /// Handles an attempt that failed or whose response head was received. Returns the outcome of the call if this attempt decides it.
    async fn on_ended(&mut self, (attempt, head): EndedAttempt) -> Option<Outcome> {
        let outcome = match head {
            Ok(head) => Ok(Answered { attempt, head }),
            Err(error) => match self.recover(attempt, error).await {
                Ok(_) if self.history.is_suspect() => {
                    // A peer ended a connection with an error while this call was on it. Each further hedge could end one more connection.
                    self.is_stopped = true;
                    let status = Status::unavailable("the call may have ended its connection");
                    Err(Failed::permanent(status))
                }
                Ok(_) => {
                    // The server certainly did not process the call. The call is sent to another endpoint at once, and the refused attempt
                    // does not count.
                    self.sent -= 1;
                    if self.open_attempts.is_empty() {
                        self.conclusion.call.on_idle();
                    }
                    self.schedule(Duration::ZERO);
                    return None;
                }
                Err(failed) => Err(failed),
            },
        };
        if self.open_attempts.is_empty() {
            self.conclusion.call.on_idle();
        }
        self.record(outcome)
    }

    async fn recover(&mut self, attempt: Attempt, error: h2::Error) -> Result<Outgoing, Failed> {
        let Conclusion {
            core,
            call,
            deadline,
            ..
        } = &self.conclusion;
        recover(core, call, attempt, error, &mut self.history, *deadline).await
    }

    /// Records the outcome of an attempt. Returns the outcome if it ends the call. Otherwise keeps the outcome, in case no other attempt
    /// succeeds.
    fn record(&mut self, outcome: Outcome) -> Option<Outcome> {
        let Some((code, pushback)) = self.conclusion.record_failure(&outcome) else {
            return Some(outcome);
        };
        let is_fatal = self.policy.is_fatal(code);
        let Conclusion { core, call, .. } = &self.conclusion;
        if let Some(method_config) = core.method_config(call)
            && (!is_fatal || pushback == Pushback::Never)
        {
            method_config.tokens().on_failure();
        }
        if is_fatal {
            return Some(outcome);
        }
        self.last = Some(self.conclusion.release(outcome));
        match pushback {
            Pushback::None => self.schedule(Duration::ZERO),
            Pushback::After(wait) => self.schedule(wait),
            Pushback::Never => {
                self.is_stopped = true;
                self.next = None;
            }
        }
        None
    }

    fn finish(self, outcome: Outcome) -> Result<Response<ResponseBody>, Status> {
        let previous = self.sent.saturating_sub(1);
        self.conclusion.finish(outcome, previous, None)
    }

    /// Ends the call after its deadline. Adds each open attempt to the attempt log, and requests a PING on its connection if nothing was
    /// read from the connection since the attempt was sent.
    fn deadline_exceeded(
        mut self,
        late: Deadline,
        doing: &str,
    ) -> Result<Response<ResponseBody>, Status> {
        for attempt in &mut self.open_attempts {
            attempt.permit.on_deadline_exceeded(Instant::now());
            let address = attempt.permit.endpoint().address().clone();
            self.conclusion
                .attempt_log
                .add(Some(address), Code::DeadlineExceeded);
        }
        let status = status::deadline_exceeded(&self.conclusion.core, late, doing);
        self.finish(Err(Failed::permanent(status)))
    }
}

/// An attempt with its response head, or with the error that ended it.
type EndedAttempt = (Attempt, Result<Response<Incoming>, h2::Error>);

/// Waits until an attempt fails or its response head is received. Returns `None` if the next hedge is due before that.
async fn event(open_attempts: &mut Vec<Attempt>, next: Option<Instant>) -> Option<EndedAttempt> {
    let head = std::future::poll_fn(|cx| {
        for (index, attempt) in open_attempts.iter_mut().enumerate() {
            if let Poll::Ready(head) = attempt.exchange.poll_head(cx) {
                return Poll::Ready((index, head));
            }
        }
        Poll::Pending
    });
    tokio::select! {
        biased;
        (index, head) = head => Some((open_attempts.swap_remove(index), head)),
        () = sleep_until(next) => None,
    }
}
