//! Hedging: copies of a call at several endpoints at once, and the first answer that is worth having.

use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use http::Response;
use tokio::time::Instant;
use tonic::{Code, Status};

use super::answer::record_head;
use super::attempt::{Attempt, Try};
use super::body::ResponseBody;
use super::core::Core;
use super::history::History;
use super::pick::sleep_until;
use super::prepare::is_harmless;
use super::request::{Call, KeptBody};
use super::retry::HedgingPolicy;
use super::retry::decision::Pushback;
use super::retry_loop::{Conclusion, Outcome, Retrying};
use super::status;
use super::transparent_retry::{Answered, Failed, PickError, place, recover, unless_late};
use crate::balance::{Permit, Pick, SCAN_LIMIT};
use crate::transport::deadline::Deadline;
use crate::transport::request_body::Outgoing;
use crate::transport::response_body::Incoming;

/// Makes a call that is hedged: its body is one message, or none.
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
        flights: Vec::new(),
        sent: 0,
        next: None,
        is_called_off: false,
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
    /// Copies that wait for their answer. Dropping them resets their streams and gives up their places.
    flights: Vec<Attempt>,
    /// Copies sent; those that were refused do not count.
    sent: u32,
    /// When another copy is due, if there is to be one.
    next: Option<Instant>,
    /// A server has asked for no more copies.
    is_called_off: bool,
    /// The failure to end with if nothing better comes.
    last: Option<Outcome>,
}

impl Hedging {
    async fn run(mut self) -> Result<Response<ResponseBody>, Status> {
        loop {
            if self.flights.is_empty() && self.next.is_none() {
                if let Some(last) = self.last.take() {
                    return self.finish(last);
                }
                let permit = match self.first_place().await {
                    Ok(permit) => permit?,
                    Err(late) => return self.overdue(late, "waiting for an endpoint"),
                };
                if self.send(permit)? {
                    self.schedule(self.policy.delay());
                }
                continue;
            }
            let event = event(&mut self.flights, self.next);
            match unless_late(self.conclusion.deadline, event).await {
                Err(late) => return self.overdue(late, "waiting for the response"),
                Ok(None) => self.send_another()?,
                Ok(Some(landed)) => {
                    if let Some(outcome) = self.land(landed).await {
                        return self.finish(outcome);
                    }
                }
            }
        }
    }

    /// A place for the only copy, which waits for an endpoint as any call does.
    async fn first_place(&mut self) -> Result<Result<Permit, Status>, Deadline> {
        let Conclusion { core, call, .. } = &self.conclusion;
        let placed = place(core, call, None, &mut self.history);
        let placed = unless_late(self.conclusion.deadline, placed).await?;
        Ok(placed.map_err(PickError::into_status))
    }

    /// Sends a copy. False if the connection did not take it.
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
                self.flights.push(attempt);
                self.sent += 1;
                Ok(true)
            }
            Err(unsent) => {
                unsent.into_retry(core, &mut self.history)?;
                Ok(false)
            }
        }
    }

    /// Sends a copy to an endpoint that has had none, if there is one. If there is none, nobody waits for it.
    fn send_another(&mut self) -> Result<(), Status> {
        self.next = None;
        while self.may_send() {
            let snapshot = self.conclusion.core.shared().snapshot(SCAN_LIMIT);
            let Pick::Taken(permit) = self.history.pick_new(&snapshot) else {
                break;
            };
            drop(snapshot);
            // A copy is not worth a connection of its own. A silent connection is not checked either: the copy is the check, the others are in
            // flight beside it, and a channel that calls seldom has no other connections.
            if !is_harmless(&self.conclusion.call, &permit) {
                break;
            }
            if self.send(permit)? {
                self.schedule(self.policy.delay());
                break;
            }
        }
        Ok(())
    }

    fn may_send(&self) -> bool {
        let method_config = self.conclusion.core.method_config.as_deref();
        let suffices = method_config.is_some_and(|method_config| method_config.tokens().suffices());
        // Copies of a call that its connections are lost for would be lost as well, with the calls beside them.
        let is_innocent = !self.history.has_lost();
        suffices && is_innocent && !self.is_called_off && self.sent < self.policy.attempt_limit()
    }

    /// Another copy is due after this wait, if there is to be one.
    fn schedule(&mut self, wait: Duration) {
        let next = Instant::now().checked_add(wait);
        self.next = next.filter(|_| self.may_send());
    }

    /// A copy is over, or its response begins: the call's outcome, if that is what it is.
    async fn land(&mut self, (attempt, head): Landed) -> Option<Outcome> {
        let outcome = match head {
            Ok(head) => Ok(Answered { attempt, head }),
            Err(error) => match self.recover(attempt, error).await {
                Ok(_) if self.history.is_suspect() => {
                    // Copies of a call that its peers end connections for would cost one connection each.
                    self.is_called_off = true;
                    let status = Status::unavailable("the call may be what ended its connection");
                    Err(Failed::for_good(status))
                }
                Ok(_) => {
                    // Certainly not processed, so it goes elsewhere at once and does not count.
                    self.sent -= 1;
                    self.schedule(Duration::ZERO);
                    return None;
                }
                Err(failed) => Err(failed),
            },
        };
        self.weigh(outcome)
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

    /// Ends with this outcome, or keeps it in case that nothing better comes.
    fn weigh(&mut self, mut outcome: Outcome) -> Option<Outcome> {
        let Some((code, pushback)) = self.conclusion.note(&outcome) else {
            return Some(outcome);
        };
        if let Ok(answered) = &mut outcome {
            let permit = &mut answered.attempt.permit;
            record_head(
                &self.conclusion.core,
                &answered.head,
                permit,
                Instant::now(),
            );
        }
        let is_fatal = self.policy.is_fatal(code);
        if let Some(method_config) = self.conclusion.core.method_config.as_deref()
            && (!is_fatal || pushback == Pushback::Never)
        {
            method_config.tokens().on_failure();
        }
        if is_fatal {
            return Some(outcome);
        }
        self.last = Some(outcome);
        match pushback {
            Pushback::None => self.schedule(Duration::ZERO),
            Pushback::After(wait) => self.schedule(wait),
            Pushback::Never => {
                self.is_called_off = true;
                self.next = None;
            }
        }
        None
    }

    fn finish(self, outcome: Outcome) -> Result<Response<ResponseBody>, Status> {
        let previous = self.sent.saturating_sub(1);
        self.conclusion.finish(outcome, previous, None)
    }

    /// The deadline has passed. Whatever has not answered is named, and asked whether it is there at all.
    fn overdue(mut self, late: Deadline, doing: &str) -> Result<Response<ResponseBody>, Status> {
        for attempt in &mut self.flights {
            attempt.permit.on_overdue(Instant::now());
            let address = attempt.permit.endpoint().address().clone();
            self.conclusion
                .attempt_log
                .add(Some(address), Code::DeadlineExceeded);
        }
        let status = status::overdue(&self.conclusion.core, late, doing);
        self.finish(Err(Failed::for_good(status)))
    }
}

/// How a copy has ended, or how its response begins.
type Landed = (Attempt, Result<Response<Incoming>, h2::Error>);

/// Waits for a copy to land. None if another one is due before that.
async fn event(flights: &mut Vec<Attempt>, next: Option<Instant>) -> Option<Landed> {
    let head = std::future::poll_fn(|cx| {
        for (index, attempt) in flights.iter_mut().enumerate() {
            if let Poll::Ready(head) = attempt.exchange.poll_head(cx) {
                return Poll::Ready((index, head));
            }
        }
        Poll::Pending
    });
    tokio::select! {
        biased;
        (index, head) = head => Some((flights.swap_remove(index), head)),
        () = sleep_until(next) => None,
    }
}
