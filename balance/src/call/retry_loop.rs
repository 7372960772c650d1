//! Makes the attempts of a call, one after the other.

use std::pin::Pin;
use std::sync::Arc;

use http::Response;
use tokio::time::Instant;
use tonic::{Code, Status};

use super::answer::{answer, failed, record_head};
use super::attempt::{Attempt, PREVIOUS_ATTEMPTS, PREVIOUS_ATTEMPTS_KEY, Try};
use super::attempt_log::AttemptLog;
use super::body::ResponseBody;
use super::core::Core;
use super::history::History;
use super::http_status::{Head, failure};
use super::request::Call;
use super::retry::decision::{Decision, Progress, Pushback};
use super::transparent_retry::{Answered, Failed, Sending, recover, send};
use crate::balance::Permit;
use crate::transport::deadline::Deadline;
use crate::transport::request_body::Outgoing;
use crate::transport::response_body::Incoming;

pub(super) type Retrying =
    Pin<Box<dyn Future<Output = Result<Response<ResponseBody>, Status>> + Send>>;

/// Continues a call whose first attempt has produced no response that can be passed to the caller. If `outcome` is an error, the attempt
/// failed before the response head was received. Otherwise the head carries a failure, the beginning of the response is still being
/// buffered, or the response broke while it was buffered.
pub(super) fn after_first(
    core: Arc<Core>,
    call: Call,
    attempt: Attempt,
    outcome: Result<Response<Incoming>, h2::Error>,
    deadline: Option<Deadline>,
) -> Retrying {
    Box::pin(async move {
        let mut history = History::default();
        let outcome = match outcome {
            Ok(head) => {
                Answered { attempt, head }
                    .settle(&core, &call, &mut history, deadline)
                    .await
            }
            Err(error) => match recover(&core, &call, attempt, error, &mut history, deadline).await
            {
                Ok(body) => {
                    call.on_idle();
                    return run(core, call, body, None, history, deadline).await;
                }
                Err(failed) => Err(failed),
            },
        };
        let attempts = Attempts::new(core, call, history, deadline);
        attempts.run_attempts(outcome).await
    })
}

/// Runs a call that was not sent, or that was sent but certainly not processed. `permit` is a permit that the call already has, if any.
pub(super) async fn run(
    core: Arc<Core>,
    call: Call,
    body: Outgoing,
    permit: Option<Permit>,
    history: History,
    deadline: Option<Deadline>,
) -> Result<Response<ResponseBody>, Status> {
    let mut attempts = Attempts::new(core, call, history, deadline);
    let outcome = attempts.attempt(body, permit).await;
    attempts.run_attempts(outcome).await
}

/// The result of one attempt.
pub(super) type Outcome = Result<Answered, Failed>;

/// A call that may take several attempts.
struct Attempts {
    conclusion: Conclusion,
    history: History,
    progress: Progress,
}

impl Attempts {
    fn new(core: Arc<Core>, call: Call, history: History, deadline: Option<Deadline>) -> Self {
        Self {
            conclusion: Conclusion::new(core, call, deadline),
            history,
            progress: Progress::new(),
        }
    }

    /// Makes further attempts until the policy or the deadline ends the call.
    async fn run_attempts(
        mut self,
        mut outcome: Outcome,
    ) -> Result<Response<ResponseBody>, Status> {
        loop {
            let wait = match self.decide(&outcome) {
                Decision::Again(wait) => wait,
                Decision::GiveUp(why) => return self.finish(outcome, why),
            };
            let resume = Instant::now().checked_add(wait);
            let Some(resume) = resume.filter(|at| !self.conclusion.is_late(*at)) else {
                return self.finish(
                    outcome,
                    Some("the deadline leaves no time for another attempt"),
                );
            };
            let Some(body) = take_body(&mut outcome).await? else {
                return self.finish(
                    outcome,
                    Some(
                        "the request cannot be sent again, because too much of it was already sent",
                    ),
                );
            };
            self.end_attempt(outcome);
            self.conclusion.call.on_idle();
            tokio::time::sleep_until(resume).await;
            self.progress.advance();
            outcome = self.attempt(body, None).await;
        }
    }

    async fn attempt(&mut self, body: Outgoing, permit: Option<Permit>) -> Outcome {
        let which = Try::Later {
            previous: self.progress.previous(),
        };
        let Conclusion {
            core,
            call,
            deadline,
            ..
        } = &mut self.conclusion;
        let sending = Sending {
            body,
            permit,
            which,
            deadline: *deadline,
        };
        send(core, call, sending, &mut self.history).await
    }

    /// Records a failure and decides what follows.
    fn decide(&mut self, outcome: &Outcome) -> Decision {
        let Some((code, pushback)) = self.conclusion.record_failure(outcome) else {
            return Decision::GiveUp(None);
        };
        if outcome.as_ref().is_err_and(|failed| failed.is_limited) {
            return Decision::GiveUp(None);
        }
        let Conclusion { core, call, .. } = &self.conclusion;
        let policy = core
            .method_config(call)
            .and_then(|method_config| Some((method_config, method_config.retry(call.path())?)));
        let Some((method_config, policy)) = policy else {
            return Decision::GiveUp(None);
        };
        if self.history.is_to_blame() {
            return Decision::GiveUp(Some(
                "connections were lost while they carried this call, so it may be the cause",
            ));
        }
        let random = fastrand::f64();
        let tokens = method_config.tokens();
        let decision = self.progress.next(policy, code, pushback, tokens, random);
        tracing::debug!(?code, ?decision, "an attempt has failed");
        decision
    }

    /// Ends an attempt that is not the last: records its outcome, releases its permit, and makes later attempts avoid its endpoint.
    fn end_attempt(&mut self, outcome: Outcome) {
        let endpoint = match outcome {
            Ok(Answered { attempt, head }) => {
                let mut permit = attempt.permit;
                record_head(&self.conclusion.core, &head, &mut permit, Instant::now());
                Some(Arc::clone(permit.endpoint()))
            }
            Err(failed) => failed.endpoint,
        };
        self.history.next_attempt(endpoint.as_ref());
    }

    fn finish(self, outcome: Outcome, why: Option<&str>) -> Result<Response<ResponseBody>, Status> {
        self.conclusion
            .finish(outcome, self.progress.previous(), why)
    }
}

/// Returns the body for another attempt, if the body was kept.
async fn take_body(outcome: &mut Outcome) -> Result<Option<Outgoing>, Status> {
    match outcome {
        Ok(answered) => answered.take_body().await,
        Err(failed) => Ok(failed.body.take()),
    }
}

/// The data from which the result of a retried or hedged call is built.
pub(super) struct Conclusion {
    pub(super) core: Arc<Core>,
    pub(super) call: Call,
    pub(super) deadline: Option<Deadline>,
    pub(super) attempt_log: AttemptLog,
}

impl Conclusion {
    pub(super) fn new(core: Arc<Core>, call: Call, deadline: Option<Deadline>) -> Self {
        Self {
            core,
            call,
            deadline,
            attempt_log: AttemptLog::default(),
        }
    }

    /// Records a failed attempt. Returns its code and the server's pushback; `None` if the attempt did not fail.
    pub(super) fn record_failure(&mut self, outcome: &Outcome) -> Option<(Code, Pushback)> {
        let (code, endpoint, pushback) = match outcome {
            Ok(answered) => {
                let code = failure(&answered.head)?;
                let pushback = Pushback::of(answered.head.headers());
                (code, Some(answered.attempt.permit.endpoint()), pushback)
            }
            Err(failed) => {
                let endpoint = failed.endpoint.as_ref();
                (failed.status.code(), endpoint, Pushback::None)
            }
        };
        let address = endpoint.map(|endpoint| endpoint.address().clone());
        self.attempt_log.add(address, code);
        Some((code, pushback))
    }

    /// Converts the outcome of the last attempt to the result of the call.
    pub(super) fn finish(
        mut self,
        outcome: Outcome,
        previous: u32,
        why: Option<&str>,
    ) -> Result<Response<ResponseBody>, Status> {
        let Answered { attempt, mut head } = match outcome {
            Ok(answered) if failure(&answered.head).is_none() => answered,
            outcome => {
                let Failed {
                    mut status,
                    is_answer,
                    ..
                } = self.release(outcome);
                if is_answer && previous > 0 {
                    status
                        .metadata_mut()
                        .insert(PREVIOUS_ATTEMPTS_KEY, previous.into());
                }
                return Err(self.attempt_log.into_status(status, why));
            }
        };
        if previous > 0 {
            head.headers_mut()
                .insert(PREVIOUS_ATTEMPTS, previous.into());
        }
        answer(
            self.core,
            &mut self.call,
            head,
            attempt.permit,
            self.deadline,
        )
    }

    /// Records a failed attempt at its endpoint, and releases its permit.
    pub(super) fn release(&self, outcome: Outcome) -> Failed {
        let Answered { attempt, head } = match outcome {
            Ok(answered) => answered,
            Err(failed) => return failed,
        };
        let (kind, mut permit) = (Head::of(&head), attempt.permit);
        let now = Instant::now();
        let status = failed(&self.core, &head, kind, &mut permit, self.deadline, now);
        permit.end_attempt(status.code());
        Failed::answered(&permit, status)
    }

    /// Returns true if the call has a deadline and the deadline is not after `at`.
    fn is_late(&self, at: Instant) -> bool {
        self.deadline.is_some_and(|deadline| at >= deadline.at())
    }
}
