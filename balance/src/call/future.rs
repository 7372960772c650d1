//! The future of one call. In the common case, an endpoint is ready, and the first attempt gets a final response. This case, the common
//! path, runs here, without a task, a lock or a box. All other cases continue in `retry_loop` or `hedging`.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::{Request, Response};
use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep};
use tonic::Status;
use tonic::body::Body;

use super::answer::answer;
use super::attempt::{Attempt, Try};
use super::body::ResponseBody;
use super::core::Core;
use super::counted_body::count;
use super::extension::WaitForReady;
use super::hedging::hedge;
use super::history::History;
use super::live_config::LiveConfig;
use super::message_limits::MessageLimits;
use super::observation::CallObservation;
use super::prepare::{TRUSTED_METADATA, needs_no_check};
use super::request::{Call, KeptBody};
use super::request_headers::{self, Headers};
use super::retry_loop::{self, Retrying};
use super::routing::Routing;
use super::status;
use crate::balance::{Pick, SplitDraw};
use crate::deadline::inherited_timeout;
use crate::traces::CallTrace;
use crate::transport::deadline::{self, Deadline};
use crate::transport::request_body::Outgoing;

pin_project! {
    /// The future of a call's response. Dropping it cancels the call on the server.
    #[must_use = "a call is not made before its future is polled"]
    pub struct ResponseFuture {
        // `core` and `call` are `Some` until the call leaves the common path or ends.
        core: Option<Arc<Core>>,
        call: Option<Call>,
        state: State,
        // Set at the first poll, or at the creation of a routed call, unless it is inherited from a call that is being served.
        deadline: Option<Deadline>,
        #[pin]
        timer: Option<Sleep>,
        // The metrics and the span of the call, if either is enabled.
        observation: Option<Box<CallObservation>>,
    }
}

/// The state of a call.
enum State {
    /// The call was not sent.
    New(Body),
    /// The first attempt was sent.
    Sent(Attempt),
    /// The call has left the common path.
    Retry(Arc<Core>, Retrying),
    Done,
}

impl ResponseFuture {
    pub(crate) fn new(core: Arc<Core>, request: Request<Body>) -> Self {
        let (mut head, body) = request.into_parts();
        let pick_key = core.pick_key(&head);
        request_headers::set_user_agent(&core.user_agent, &mut head.headers);
        let mut headers = Headers::new(head.headers, &core.user_agent);
        let live = core.live_config.as_ref();
        let method_config = live.and_then(LiveConfig::current);
        let settings = method_config
            .as_deref()
            .or(core.method_config.as_deref())
            .and_then(|method_config| method_config.of_call(head.uri.path()));
        let (timeout, wait_for_ready, limits) = match settings {
            None => (&core.timeout, core.wait_for_ready, MessageLimits::NONE),
            Some(settings) => (
                &settings.timeout,
                settings.wait_for_ready.unwrap_or(false),
                MessageLimits::of(settings),
            ),
        };
        if let Some(timeout) = timeout
            && timeout.replaces(headers.timeout())
        {
            headers.set_timeout(timeout.duration, &timeout.field);
        }
        // Any other deadline starts when the call is made, at the first poll, which reads the clock anyway.
        let deadline = match inherited_timeout(&head.extensions) {
            Some((inherited, now)) if headers.timeout().is_none_or(|own| inherited < own) => {
                headers.set_timeout(inherited, &deadline::format(inherited));
                Deadline::after(inherited, now).map(Deadline::inherited)
            }
            _ => None,
        };
        let traces = core.traces.as_ref();
        let (span, trace) = traces
            .and_then(|traces| CallTrace::start(traces, head.uri.path()))
            .unzip();
        let observation = span.map(CallObservation::traced);
        let wait = head.extensions.get::<WaitForReady>();
        let wait_for_ready = wait.map_or(wait_for_ready, |wait| wait.0);
        let call = Call {
            method: head.method,
            uri: head.uri,
            headers,
            extensions: head.extensions,
            wait_for_ready,
            limits,
            method_config,
            pick_key,
            metrics: None,
            trace,
        };
        Self {
            core: Some(core),
            call: Some(call),
            state: State::New(body),
            deadline,
            timer: None,
            observation,
        }
    }
}

impl ResponseFuture {
    /// Creates the future of a call with a [`Routing`]. Such a call always runs in the retry loop, which keeps the call's history.
    pub(crate) fn with_routing(core: Arc<Core>, request: Request<Body>, routing: Routing) -> Self {
        let mut this = Self::new(core, request);
        let state = std::mem::replace(&mut this.state, State::Done);
        if let (State::New(body), Some(core), Some(mut call)) =
            (state, this.core.take(), this.call.take())
        {
            let now = Instant::now();
            this.deadline = this.deadline.or_else(|| call.deadline(now));
            if let Some(metrics) = &core.metrics {
                CallObservation::measure(&mut this.observation, call.handles(metrics), now);
            }
            call.count_sends(this.observation.as_deref_mut(), false, None);
            let history = History::with_routing(routing, core.shared().given_up());
            let deadline = this.deadline;
            let shared = Arc::clone(&core);
            let retrying = async move {
                let mut body = Some(body);
                // This `poll_fn` is never pending. If a part of the body is not available yet, a task sends that part later.
                let gathered = std::future::poll_fn(|cx| {
                    Poll::Ready(Outgoing::gather(body.take().unwrap_or_default(), cx))
                });
                let body = call.limits.check(gathered.await?, &shared.service)?;
                retry_loop::run(shared, call, body, None, history, deadline).await
            };
            this.state = State::Retry(core, Box::pin(retrying));
        }
        this
    }
}

impl Future for ResponseFuture {
    type Output = Result<Response<ResponseBody>, Status>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let mut polled = this
            .state
            .poll(this.core, this.call, this.observation, this.deadline, cx);
        if let Poll::Ready(outcome) = &mut polled {
            *this.state = State::Done;
            if let Some(observation) = this.observation.take() {
                pass_on(observation, outcome);
            }
            return polled;
        }
        let Some(deadline) = *this.deadline else {
            return Poll::Pending;
        };
        if this.timer.is_none() {
            let timer = tokio::time::sleep_until(deadline.at());
            this.timer.set(Some(timer));
        }
        let timer = this.timer.as_mut().as_pin_mut();
        if timer.is_none_or(|timer| timer.poll(cx).is_pending()) {
            return Poll::Pending;
        }
        // Replacing the state drops the attempt, and this resets its stream.
        let status = match (std::mem::replace(this.state, State::Done), this.core.take()) {
            (State::Retry(core, _), _) => {
                status::deadline_exceeded(&core, deadline, "waiting for an endpoint")
            }
            (State::Sent(mut attempt), Some(core)) => {
                attempt.permit.on_deadline_exceeded(Instant::now());
                let endpoint = attempt.permit.endpoint();
                status::deadline_exceeded_at(&core, deadline, "waiting for the response", endpoint)
            }
            _ => return Poll::Pending,
        };
        if let Some(observation) = this.observation.take() {
            observation.end(status.code(), Instant::now());
        }
        Poll::Ready(Err(status))
    }
}

/// Passes the metrics and the span of the call to the body of the response, or ends them if the call has failed.
fn pass_on(
    observation: Box<CallObservation>,
    outcome: &mut Result<Response<ResponseBody>, Status>,
) {
    match outcome {
        Ok(response) => response.body_mut().observe(observation),
        Err(status) => observation.end(status.code(), Instant::now()),
    }
}

impl State {
    fn poll(
        &mut self,
        core: &mut Option<Arc<Core>>,
        call: &mut Option<Call>,
        observation: &mut Option<Box<CallObservation>>,
        deadline: &mut Option<Deadline>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Response<ResponseBody>, Status>> {
        loop {
            *self = match self {
                Self::New(_) => {
                    let Self::New(body) = std::mem::replace(self, Self::Done) else {
                        return Poll::Pending;
                    };
                    let now = Instant::now();
                    let (Some(channel), Some(request)) = (core.as_ref(), call.as_ref()) else {
                        return Poll::Pending;
                    };
                    *deadline = deadline.or_else(|| request.deadline(now));
                    if let Some(metrics) = &channel.metrics {
                        CallObservation::measure(observation, request.handles(metrics), now);
                    }
                    let body = Outgoing::gather(body, cx)?;
                    let body = request.limits.check(body, &channel.service)?;
                    Self::send(core, call, observation, *deadline, body, now)?
                }
                Self::Sent(attempt) => {
                    let mut head = ready!(attempt.exchange.poll_head(cx));
                    let sent = std::mem::replace(self, Self::Done);
                    let (Self::Sent(mut attempt), Some(core), Some(mut call)) =
                        (sent, core.take(), call.take())
                    else {
                        return Poll::Pending;
                    };
                    let is_final = match &mut head {
                        Ok(head) => core.is_final(&call, &attempt.kept, head, cx),
                        Err(_) => false,
                    };
                    match head {
                        Ok(head) if is_final => {
                            let permit = attempt.permit;
                            let response = answer(core, &mut call, head, permit, *deadline);
                            return Poll::Ready(response);
                        }
                        outcome => {
                            let shared = Arc::clone(&core);
                            let observation = observation.as_deref_mut();
                            call.count_sends(observation, false, Some(&mut attempt.permit));
                            let retry =
                                retry_loop::after_first(core, call, attempt, outcome, *deadline);
                            Self::Retry(shared, retry)
                        }
                    }
                }
                Self::Retry(_, retrying) => return retrying.as_mut().poll(cx),
                Self::Done => return Poll::Pending,
            };
        }
    }

    /// Sends the first attempt if an endpoint is ready and its connection needs no [check](needs_no_check). In all other cases, the call
    /// leaves the common path.
    fn send(
        core: &mut Option<Arc<Core>>,
        call: &mut Option<Call>,
        observation: &mut Option<Box<CallObservation>>,
        deadline: Option<Deadline>,
        mut body: Outgoing,
        now: Instant,
    ) -> Result<Self, Status> {
        let (Some(channel), Some(request)) = (core.as_ref(), call.as_mut()) else {
            return Ok(Self::Done);
        };
        // No call is answered within a microsecond. A deadline that starts at this poll is never before `now`, however short it is.
        let too_late = now + Duration::from_micros(1);
        if let Some(deadline) = deadline.filter(|deadline| too_late >= deadline.at()) {
            return Err(status::deadline_exceeded(
                channel,
                deadline,
                "making the call",
            ));
        }
        if let Some(policy) = channel.hedging(request)
            && !matches!(body, Outgoing::Stream { .. })
            // A call with large metadata is not hedged: it may make the peer end the connection, and its hedges could end further
            // connections.
            && request.metadata_size() <= TRUSTED_METADATA
        {
            let policy = policy.clone();
            let (Some(channel), Some(mut request)) = (core.take(), call.take()) else {
                return Ok(Self::Done);
            };
            request.count_sends(observation.as_deref_mut(), true, None);
            let (shared, kept) = (Arc::clone(&channel), KeptBody::of(&body));
            let hedged = hedge(shared, request, kept, policy, deadline);
            return Ok(Self::Retry(channel, hedged));
        }
        let draw = SplitDraw::default();
        let picked = channel.shared().pick(&request.pick_key, &draw, |_| true);
        let mut history = History::with_draw(draw);
        let (body, permit) = match picked {
            // The permit is kept, because a second pick would take a second turn in round robin.
            Pick::Taken(permit) if !needs_no_check(channel, request, &permit, now) => {
                (body, Some(permit))
            }
            Pick::Taken(permit) => {
                let metrics = channel.metrics.as_ref();
                let measured = metrics.and(observation.as_deref_mut());
                let measured = measured.map(|observation| (observation, count(&mut body)));
                match Attempt::start(channel, request, permit, body, deadline, Try::First, now) {
                    Ok(attempt) => {
                        if let Some((observation, sent)) = measured {
                            observation.on_sent(sent, &attempt.permit);
                        }
                        return Ok(Self::Sent(attempt));
                    }
                    Err(unsent) => (unsent.into_retry(channel, &mut history)?, None),
                }
            }
            _ => (body, None),
        };
        let (Some(channel), Some(mut request)) = (core.take(), call.take()) else {
            return Ok(Self::Done);
        };
        request.count_sends(observation.as_deref_mut(), false, None);
        let retrying = retry_loop::run(
            Arc::clone(&channel),
            request,
            body,
            permit,
            history,
            deadline,
        );
        Ok(Self::Retry(channel, Box::pin(retrying)))
    }
}

impl fmt::Debug for ResponseFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture")
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}
