//! A handle of a server's registration, for code outside the server.

use tokio::sync::watch;
use tonic_balance::Address;

use super::registration::{Registration, Started};
use crate::error::RegisterError;

/// A handle of a registration, returned by [`RegistrationBuilder::handle`](crate::registration::RegistrationBuilder::handle). The handle
/// does not keep the server registered.
///
/// Clones refer to the same registration. The methods of a handle wait until the registration has started.
#[derive(Clone, Debug)]
pub struct RegistrationHandle {
    started: watch::Receiver<Option<Started>>,
    stop: watch::Sender<bool>,
}

impl RegistrationHandle {
    pub(crate) fn new(
        started: watch::Receiver<Option<Started>>,
        stop: watch::Sender<bool>,
    ) -> Self {
        Self { started, stop }
    }

    /// Waits until the registration has started, which is after the server has bound its socket. Returns the address that the server
    /// advertises, or `None` if the server ends before its registration starts.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future changes nothing.
    pub async fn address(&self) -> Option<Address> {
        let started = self.started().await?;
        Some(started.parts.entry.instance.address().clone())
    }

    /// Waits until the registration has started, which is after the server has bound its socket. Returns the keys in etcd, one for each
    /// service, or `None` if the server ends before its registration starts.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future changes nothing.
    pub async fn keys(&self) -> Option<Vec<String>> {
        let keys = |started: Started| {
            let keys = started.parts.keys.iter();
            keys.map(|(key, _)| key.clone()).collect()
        };
        self.started().await.map(keys)
    }

    /// Removes the entry until [`resume`](Self::resume) is called. The server still serves the calls that it receives.
    ///
    /// # Errors
    ///
    /// Fails as [`Registration::pause`] does, and also if the server has ended.
    ///
    /// # Cancel safety
    ///
    /// After the request is sent, it is carried out even if the future is dropped.
    pub async fn pause(&self) -> Result<(), RegisterError> {
        self.registration().await?.pause().await
    }

    /// Restores the entry after a [`pause`](Self::pause).
    ///
    /// # Errors
    ///
    /// Fails as [`Registration::resume`] does, and also if the server has ended.
    ///
    /// # Cancel safety
    ///
    /// After the request is sent, it is carried out even if the future is dropped.
    pub async fn resume(&self) -> Result<(), RegisterError> {
        self.registration().await?.resume().await
    }

    /// Changes the weight, 1 to 1 000 000, without a new registration.
    ///
    /// # Errors
    ///
    /// Fails as [`Registration::set_weight`] does, and also if the server has ended.
    ///
    /// # Cancel safety
    ///
    /// After the request is sent, it is carried out even if the future is dropped.
    pub async fn set_weight(&self, weight: u32) -> Result<(), RegisterError> {
        self.registration().await?.set_weight(weight).await
    }

    /// Begins the graceful shutdown of the server, as its stop signal does, and returns at once. A server that has not started yet stops
    /// when it starts. To wait for the end, await the future of the server, or use
    /// [`watch_server_state`](crate::registration::RegistrationBuilder::watch_server_state).
    pub fn stop(&self) {
        self.stop.send_replace(true);
    }

    async fn started(&self) -> Option<Started> {
        let mut started = self.started.clone();
        let started = started.wait_for(Option::is_some).await;
        started.ok()?.clone()
    }

    /// Returns a `Registration` for one request. Dropping it does not deregister the server while the server has its own `Registration`.
    pub(super) async fn registration(&self) -> Result<Registration, RegisterError> {
        let started = self.started().await;
        let Started { parts, requests } = started.ok_or(RegisterError::Ended { key: None })?;
        let Some(requests) = requests.upgrade() else {
            let key = parts.keys.first().map(|(key, _)| key.clone());
            return Err(RegisterError::Ended { key });
        };
        Ok(Registration { parts, requests })
    }
}
