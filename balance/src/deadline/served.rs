//! The deadline of the call that the current task serves.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Extensions;
use pin_project_lite::pin_project;
use tokio::time::Instant;

tokio::task_local! {
    static SERVED: ServedDeadline;
}

/// The deadline of a call that is being served.
///
/// ```
/// use tonic_balance::deadline::ServedDeadline;
///
/// # async fn store() {}
/// async fn handler() {
///     // The spawned task makes its calls with the deadline of the served call.
///     match ServedDeadline::current() {
///         Some(deadline) => tokio::spawn(deadline.scope(store())),
///         None => tokio::spawn(store()),
///     };
/// }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServedDeadline {
    at: Instant,
    max_margin: Duration,
}

impl ServedDeadline {
    /// Returns the deadline of a call that has `timeout` left at `now`, or `None` if the clock cannot represent it.
    pub(super) fn after(timeout: Duration, now: Instant, max_margin: Duration) -> Option<Self> {
        let at = now.checked_add(timeout)?;
        Some(Self { at, max_margin })
    }

    /// Returns the deadline of the call that the current task serves. Returns `None` outside the [layer](super::PropagateDeadlineLayer) and
    /// [`scope`](Self::scope), and if the caller has set no deadline.
    #[must_use]
    pub fn current() -> Option<Self> {
        SERVED.try_with(|served| *served).ok()
    }

    /// Returns the time until the caller gives up, without a margin. The time is zero if the deadline has passed.
    #[must_use]
    pub fn remaining(self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }

    /// Runs a future in which calls inherit this deadline, for example a future that is spawned.
    pub fn scope<F>(self, future: F) -> Scope<F> {
        Scope {
            future,
            deadline: Some(self),
        }
    }

    pub(super) fn enter<T>(self, run: impl FnOnce() -> T) -> T {
        SERVED.sync_scope(self, run)
    }

    fn timeout_at(self, now: Instant) -> Duration {
        let left = self.at.saturating_duration_since(now);
        left.saturating_sub(self.max_margin.min(left / MARGIN_DIVISOR))
    }
}

/// Returns the timeout that a call inherits from the served call, and the time at which it starts, if there is one.
pub(crate) fn inherited_timeout(extensions: &Extensions) -> Option<(Duration, Instant)> {
    let served = ServedDeadline::current()?;
    if extensions.get::<IgnoreServedDeadline>().is_some() {
        return None;
    }
    let now = Instant::now();
    Some((served.timeout_at(now), now))
}

/// A request extension: the call does not inherit the deadline of the served call. It is for calls that must complete even if the caller
/// has given up, for example to release a lock.
///
/// ```
/// use tonic_balance::deadline::IgnoreServedDeadline;
///
/// let mut request = tonic::Request::new("release");
/// request.extensions_mut().insert(IgnoreServedDeadline::new());
/// ```
///
/// If the caller gives up, tonic drops the future of the handler. So a call that must complete also has to run in a task of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IgnoreServedDeadline(());

impl IgnoreServedDeadline {
    /// Creates the extension.
    #[must_use]
    pub const fn new() -> Self {
        Self(())
    }
}

pin_project! {
    /// The future of [`ServedDeadline::scope`].
    #[derive(Debug)]
    #[must_use = "futures do nothing unless polled"]
    pub struct Scope<F> {
        #[pin]
        future: F,
        deadline: Option<ServedDeadline>,
    }
}

impl<F> Scope<F> {
    pub(super) fn new(future: F, deadline: Option<ServedDeadline>) -> Self {
        Self { future, deadline }
    }
}

impl<F: Future> Future for Scope<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        match this.deadline {
            Some(deadline) => deadline.enter(|| this.future.poll(cx)),
            None => this.future.poll(cx),
        }
    }
}

/// The margin is at most this fraction of the remaining time, so that a short deadline keeps most of its time.
const MARGIN_DIVISOR: u32 = 20;

#[cfg(test)]
mod tests {
    use super::*;

    const MAX_MARGIN: Duration = Duration::from_millis(10);

    fn timeout(left: Duration) -> Duration {
        let now = Instant::now();
        let deadline = ServedDeadline::after(left, now, MAX_MARGIN).expect("a deadline");
        deadline.timeout_at(now)
    }

    #[test]
    fn the_margin_is_a_twentieth_of_the_remaining_time_and_at_most_the_maximum() {
        let ms = Duration::from_millis;
        assert_eq!(timeout(ms(1_000)), ms(990));
        assert_eq!(timeout(ms(200)), ms(190));
        assert_eq!(timeout(ms(20)), ms(19));
        assert_eq!(timeout(Duration::ZERO), Duration::ZERO);
    }

    #[test]
    fn a_passed_deadline_leaves_no_time() {
        let now = Instant::now();
        let deadline = ServedDeadline::after(Duration::ZERO, now, MAX_MARGIN).expect("a deadline");
        assert_eq!(
            deadline.timeout_at(now + Duration::from_secs(1)),
            Duration::ZERO
        );
    }

    #[tokio::test]
    async fn only_the_future_in_the_scope_has_the_deadline() {
        let now = Instant::now();
        let deadline =
            ServedDeadline::after(Duration::from_secs(5), now, MAX_MARGIN).expect("a deadline");
        let inside = deadline.scope(async {
            tokio::task::yield_now().await;
            let mut ignoring = Extensions::new();
            ignoring.insert(IgnoreServedDeadline::new());
            let inherited = inherited_timeout(&Extensions::new());
            (
                ServedDeadline::current(),
                inherited.is_some(),
                inherited_timeout(&ignoring),
            )
        });
        let (inside, outside) = tokio::join!(inside, async { ServedDeadline::current() });
        assert_eq!(inside, (Some(deadline), true, None));
        assert_eq!(outside, None);
    }
}
