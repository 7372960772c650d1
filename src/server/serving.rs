//! A server's life, from its first connection to the last, and the order in which it ends.

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

/// A server that has been started.
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
        // What is open now, after an end out of order, is cut by it. The accept loop ends as well, and the connections, where the
        // task alone would leave those to themselves.
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
            grace: options.grace_period,
            drain: options.drain_timeout,
            states: options.states.clone(),
            connections_cut: 0,
        }
    }

    /// Registers the server, and ends it in order when `stop` completes. That gives what then ends it at once.
    pub(super) async fn run<N: Future<Output = ()>>(
        mut self,
        bound: SocketAddr,
        registration: RegistrationBuilder,
        stop: impl Future<Output = N>,
    ) -> Result<(), ServeError> {
        tracing::info!(%bound, "serving");
        self.enter(ServerState::Serving);
        let mut stop = std::pin::pin!(stop);
        let startup_timeout = registration.startup_timeout;
        let registration = tokio::select! {
            biased;
            started = registration.start(Some(bound)) => match started {
                Ok(registration) => registration,
                Err(error) => return Err(self.stop(error).await),
            },
            // Nobody has been told of it.
            now = &mut stop => return tokio::select! {
                outcome = self.drain() => outcome,
                () = now => self.cut().await,
            },
        };
        let registered = async {
            registration.registered(startup_timeout).await?;
            tracing::info!(%bound, key = registration.key(), address = %registration.address(), "registered");
            pending::<Result<Infallible, RegisterError>>().await
        };
        tokio::select! {
            outcome = self.ended() => {
                deregister(registration).await;
                outcome
            }
            // It has either failed or goes on for ever.
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

    /// Waits for a server that ends by itself.
    async fn ended(&mut self) -> Result<(), ServeError> {
        match (&mut self.task).await {
            Ok(outcome) => outcome.map_err(ServeError::from),
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            // Only a runtime that is shutting down cancels it.
            Err(_) => pending().await,
        }
    }

    /// Ends the server because it could not be registered. No client has been told of it, so nobody is waited for.
    async fn stop(mut self, error: RegisterError) -> ServeError {
        match self.cut().await {
            Ok(()) => error.into(),
            Err(failed) => failed,
        }
    }

    /// Ends the server in order, or at once when `now` completes: then the entry gets a last chance to leave etcd.
    async fn shut_down(
        &mut self,
        registration: Registration,
        now: impl Future<Output = ()>,
    ) -> Result<(), ServeError> {
        // First of all: whoever watches the health hears it from here on, and turns away while everything still works.
        self.enter(ServerState::LameDuck);
        let mut left = registration.watch_state();
        let in_order = async |server: &mut Self| {
            tracing::info!("told to stop: not serving any more for health checks; deregistering");
            deregister(registration).await;
            tracing::info!(grace = ?server.grace, "accepting on while clients learn");
            tokio::select! {
                () = sleep(server.grace) => {}
                outcome = server.ended() => return outcome,
            }
            server.drain().await
        };
        tokio::select! {
            biased;
            outcome = in_order(self) => return outcome,
            () = now => {}
        }
        tracing::warn!("told to stop once more: ending at once");
        // What was asked of the registration goes on although nobody waits for the answer any more.
        let left = async {
            let gone = |state: &RegistrationState| {
                matches!(
                    state,
                    RegistrationState::Deregistered | RegistrationState::Aborted
                )
            };
            left.wait_for(gone).await.is_ok()
        };
        let (outcome, left) = tokio::join!(self.cut(), timeout(LAST_CHANCE, left));
        if left.is_err() {
            tracing::warn!("could not deregister in time; the entry goes with its lease");
        }
        outcome
    }

    /// Closes the listener, has the clients told (GOAWAY), and waits for calls in flight; what is left at the deadline is cut.
    async fn drain(&mut self) -> Result<(), ServeError> {
        self.enter(ServerState::Draining);
        self.connections.drain();
        let connections = self.connections.open();
        tracing::info!(connections, timeout = ?self.drain, "closed the listener; draining");
        let opening = OPENING.min(self.drain);
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

    /// Ends every connection.
    async fn cut(&mut self) -> Result<(), ServeError> {
        let connections = self.connections.open();
        self.connections.cut();
        let outcome = timeout(CUT, self.ended()).await;
        self.connections_cut = connections.saturating_sub(self.connections.open());
        if connections > 0 {
            tracing::warn!(connections, "cut the connections that were left");
        }
        outcome.unwrap_or_else(|_| {
            // Their tasks are held by something that blocks; they are not waited for.
            let connections = self.connections.open();
            tracing::warn!(connections, bound = ?CUT, "connections do not end although they are cut");
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
            tracing::warn!(key, %error, "could not deregister; the entry goes with its lease");
        }
    }
}

/// How long a client that has connected may take to begin to speak once the server drains: many round trips, and nothing to a drain.
const OPENING: Duration = Duration::from_millis(200);
/// How long connections may take to notice that they are cut: their next poll. Only code that blocks a thread takes longer.
const CUT: Duration = Duration::from_secs(1);
/// How long a deregistration under way may still take when the server is to end at once: many times what it takes an etcd that answers.
const LAST_CHANCE: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn connections_that_do_not_even_end_when_cut_are_left_behind() {
        let options = ServeOptions {
            drain_timeout: Duration::from_secs(5),
            ..ServeOptions::default()
        };
        let task = tokio::spawn(pending());
        let mut server = Serving::new(task, Connections::default(), &options);
        let start = Instant::now();
        let drain = timeout(Duration::from_secs(3_600), server.drain());
        drain.await.expect("a bound").expect("that is no error");
        let took = Instant::now().saturating_duration_since(start);
        let bound = options.drain_timeout + CUT;
        assert!(took >= bound && took < bound + CUT, "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_that_has_no_time_takes_none() {
        let options = ServeOptions {
            drain_timeout: Duration::ZERO,
            ..ServeOptions::default()
        };
        let task = tokio::spawn(pending());
        let mut server = Serving::new(task, Connections::default(), &options);
        let start = Instant::now();
        let drain = timeout(Duration::from_secs(3_600), server.drain());
        drain.await.expect("a bound").expect("that is no error");
        let took = Instant::now().saturating_duration_since(start);
        assert!(took < CUT + OPENING, "{took:?}");
    }
}
