//! The phases of a server from its first connection to its last, and the order of its shutdown.

use std::convert::Infallible;
use std::future::{Future, pending};
use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::connection::Connections;
use crate::error::{RegisterError, ServeError};
use crate::registration::{
    Registration, RegistrationBuilder, RegistrationState, ServeOptions, ServerState,
};

/// A running server.
pub(super) struct Serving {
    task: tokio::task::JoinHandle<Result<(), tonic::transport::Error>>,
    connections: Connections,
    grace: Duration,
    drain: Duration,
    states: watch::Sender<ServerState>,
    connections_cut: usize,
}

impl Drop for Serving {
    fn drop(&mut self) {
        // After an abnormal end, for example if the future was dropped, connections may still be open. They are counted and cut here. The
        // cut also ends the accept loop. If the task were only aborted, the connections would continue to run.
        let connections_cut = self.connections_cut + self.connections.open();
        self.connections.cut();
        self.enter(ServerState::Stopped { connections_cut });
    }
}

impl Serving {
    pub(super) fn new(
        task: tokio::task::JoinHandle<Result<(), tonic::transport::Error>>,
        connections: Connections,
        options: &ServeOptions,
    ) -> Self {
        Self {
            task,
            connections,
            grace: options.grace_period(),
            drain: options.drain_timeout(),
            states: options.states.clone(),
            connections_cut: 0,
        }
    }

    /// Registers the server, and shuts it down gracefully when `stop` completes. The output of `stop` is a second future. If the second
    /// future completes, the server ends at once.
    pub(super) async fn run<N: Future<Output = ()>>(
        mut self,
        bound: Option<SocketAddr>,
        registration: RegistrationBuilder,
        stop: impl Future<Output = N>,
    ) -> Result<(), ServeError> {
        let shown = bound.map(tracing::field::display);
        tracing::info!(bound = shown, "serving");
        self.enter(ServerState::Serving);
        let mut stop = std::pin::pin!(stop);
        let startup_timeout = registration.startup_timeout;
        let registration = tokio::select! {
            biased;
            started = registration.start(bound) => match started {
                Ok(registration) => registration,
                Err(error) => return Err(self.stop(error).await),
            },
            // The registration has not started yet, so the shutdown begins with the drain.
            now = &mut stop => return tokio::select! {
                outcome = self.drain() => outcome,
                () = now => self.cut().await,
            },
        };
        let registered = async {
            registration.registered(startup_timeout).await?;
            tracing::info!(bound = bound.map(tracing::field::display), key = registration.key(), address = %registration.address(), "registered");
            pending::<Result<Infallible, RegisterError>>().await
        };
        tokio::select! {
            outcome = self.ended() => {
                deregister(registration).await;
                outcome
            }
            // `registered` either fails or never completes.
            Err(error) = registered => {
                deregister(registration).await;
                Err(self.stop(error).await)
            }
            now = stop => self.shut_down(registration, now).await,
        }
    }

    fn enter(&self, state: ServerState) {
        self.states.send_replace(state);
    }

    /// Waits until the server ends by itself.
    async fn ended(&mut self) -> Result<(), ServeError> {
        match (&mut self.task).await {
            Ok(outcome) => outcome.map_err(ServeError::from),
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            // At this point, only the shutdown of the runtime can have cancelled the task.
            Err(_) => pending().await,
        }
    }

    /// Ends the server because its registration failed. Hardly any client has received its address, so no drain is needed.
    async fn stop(mut self, error: RegisterError) -> ServeError {
        match self.cut().await {
            Ok(()) => error.into(),
            Err(failed) => failed,
        }
    }

    /// Shuts the server down gracefully. If `now` completes, the server ends at once, but a deregistration in progress still gets a short
    /// time to finish.
    async fn shut_down(
        &mut self,
        registration: Registration,
        now: impl Future<Output = ()>,
    ) -> Result<(), ServeError> {
        // The health status changes first. Clients that watch it then select other servers while this server is still fully functional.
        self.enter(ServerState::LameDuck);
        let mut left = registration.watch_state();
        let gracefully = async |server: &mut Self| {
            tracing::info!("shutdown started: deregistering");
            deregister(registration).await;
            tracing::info!(grace = ?server.grace, "grace period: still accepting connections");
            tokio::select! {
                () = sleep(server.grace) => {}
                outcome = server.ended() => return outcome,
            }
            server.drain().await
        };
        tokio::select! {
            biased;
            outcome = gracefully(self) => return outcome,
            () = now => {}
        }
        tracing::warn!("second signal: ending at once");
        // The task of the registration continues the deregistration although its result is no longer awaited.
        let left = async {
            let gone = |state: &RegistrationState| {
                matches!(
                    state,
                    RegistrationState::Deregistered | RegistrationState::Aborted
                )
            };
            left.wait_for(gone).await.is_ok()
        };
        let (outcome, left) = tokio::join!(self.cut(), timeout(FINAL_DEREGISTER_TIMEOUT, left));
        if left.is_err() {
            tracing::warn!(
                "could not deregister in time; the entry is removed when its lease expires"
            );
        }
        outcome
    }

    /// Closes the listener, sends GOAWAY to the clients, and waits for calls in flight. Connections that are open at the drain timeout are
    /// cut.
    async fn drain(&mut self) -> Result<(), ServeError> {
        self.enter(ServerState::Draining);
        self.connections.drain();
        let connections = self.connections.open();
        tracing::info!(connections, timeout = ?self.drain, "closed the listener; draining");
        let opening = OPENING_TIMEOUT.min(self.drain);
        if let Ok(outcome) = timeout(opening, self.ended()).await {
            return outcome;
        }
        self.connections.cut_unopened();
        if let Ok(outcome) = timeout(self.drain.saturating_sub(opening), self.ended()).await {
            return outcome;
        }
        tracing::warn!(timeout = ?self.drain, "the drain timeout has passed");
        self.cut().await
    }

    /// Closes every connection.
    async fn cut(&mut self) -> Result<(), ServeError> {
        let connections = self.connections.open();
        self.connections.cut();
        let outcome = timeout(CUT_TIMEOUT, self.ended()).await;
        self.connections_cut = connections.saturating_sub(self.connections.open());
        if connections > 0 {
            tracing::warn!(connections, "cut the remaining connections");
        }
        outcome.unwrap_or_else(|_| {
            // Some connections do not end, because code in their tasks blocks the thread. The server does not wait for them.
            let connections = self.connections.open();
            tracing::warn!(connections, bound = ?CUT_TIMEOUT, "connections are still open after the cut");
            self.task.abort();
            Ok(())
        })
    }
}

async fn deregister(registration: Registration) {
    let key = registration.key().to_owned();
    match registration.deregister().await {
        Ok(()) => tracing::info!(key, "deregistered"),
        Err(error) => {
            tracing::warn!(key, %error, "could not deregister; the entry is removed when its lease expires");
        }
    }
}

/// Time for a connected client to start HTTP after the drain has begun. It covers many round trips, and is short compared with the default
/// drain timeout.
const OPENING_TIMEOUT: Duration = Duration::from_millis(200);
/// Time for connections to end after the cut. Each connection ends at its next poll, and only code that blocks a thread can delay this
/// poll.
const CUT_TIMEOUT: Duration = Duration::from_secs(1);
/// Time for a deregistration in progress if the server must end at once. It is many times the response time of a healthy etcd.
const FINAL_DEREGISTER_TIMEOUT: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn connections_that_do_not_end_when_cut_are_abandoned() {
        let options = ServeOptions {
            drain_timeout: Some(Duration::from_secs(5)),
            ..ServeOptions::default()
        };
        let task = tokio::spawn(pending());
        let mut server = Serving::new(task, Connections::default(), &options);
        let start = Instant::now();
        let drain = timeout(Duration::from_secs(3_600), server.drain());
        drain
            .await
            .expect("the drain must end")
            .expect("an abandoned connection must not be an error");
        let took = Instant::now().saturating_duration_since(start);
        let bound = options.drain_timeout() + CUT_TIMEOUT;
        assert!(took >= bound && took < bound + CUT_TIMEOUT, "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_with_a_zero_timeout_cuts_connections_at_once() {
        let options = ServeOptions {
            drain_timeout: Some(Duration::ZERO),
            ..ServeOptions::default()
        };
        let task = tokio::spawn(pending());
        let mut server = Serving::new(task, Connections::default(), &options);
        let start = Instant::now();
        let drain = timeout(Duration::from_secs(3_600), server.drain());
        drain
            .await
            .expect("the drain must end")
            .expect("an abandoned connection must not be an error");
        let took = Instant::now().saturating_duration_since(start);
        assert!(took < CUT_TIMEOUT + OPENING_TIMEOUT, "{took:?}");
    }
}
