//! The signals that `register` receives.

use nix::sys::signal::Signal;
use tokio::signal::unix::{self, SignalKind};

use crate::error::Failure;

/// A received signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// The command has to stop.
    Stop(Signal),
    /// The signal has a meaning for the command only.
    Forward(Signal),
}

/// The receivers of all handled signals.
#[derive(Debug)]
pub(super) struct Signals {
    terminate: unix::Signal,
    interrupt: unix::Signal,
    quit: unix::Signal,
    hangup: unix::Signal,
    user1: unix::Signal,
    user2: unix::Signal,
}

impl Signals {
    pub(super) fn new() -> Result<Self, Failure> {
        let listen = |kind| {
            unix::signal(kind)
                .map_err(|error| Failure::local(format!("cannot handle signals: {error}")))
        };
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            quit: listen(SignalKind::quit())?,
            hangup: listen(SignalKind::hangup())?,
            user1: listen(SignalKind::user_defined1())?,
            user2: listen(SignalKind::user_defined2())?,
        })
    }

    /// Waits for the next signal.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, no signal is lost.
    pub(super) async fn next(&mut self) -> Received {
        tokio::select! {
            _ = self.terminate.recv() => Received::Stop(Signal::SIGTERM),
            _ = self.interrupt.recv() => Received::Stop(Signal::SIGINT),
            _ = self.quit.recv() => Received::Stop(Signal::SIGQUIT),
            _ = self.hangup.recv() => Received::Forward(Signal::SIGHUP),
            _ = self.user1.recv() => Received::Forward(Signal::SIGUSR1),
            _ = self.user2.recv() => Received::Forward(Signal::SIGUSR2),
        }
    }
}
