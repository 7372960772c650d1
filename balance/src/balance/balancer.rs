//! The handle of a balancer. It starts and stops the [`Driver`], the task that dials the endpoints and publishes the connections that calls
//! can pick.

use std::sync::Arc;

use tokio::task::AbortHandle;
use tokio_stream::Stream;
use tower::discover::Change;
use tracing::Instrument;

use super::driver::Driver;
use super::options::Options;
use super::shared::Shared;
use super::summary::Summary;
use super::updates::Updates;
use crate::address::Address;
use crate::attributes::Attributes;
use crate::transport::connect::Connector;

/// A handle to the task of the [`Driver`]. Dropping the handle stops the task. Calls in flight still finish.
#[derive(Debug)]
pub(crate) struct Balancer {
    shared: Arc<Shared>,
    driver: AbortHandle,
}

impl Balancer {
    /// Starts the driver.
    ///
    /// # Panics
    ///
    /// Panics if called outside a tokio runtime.
    pub(crate) fn start<S, E>(
        service: &str,
        changes: Updates<S>,
        connector: Connector,
        options: Options,
    ) -> Self
    where
        S: Stream<Item = Result<Change<Address, Attributes>, E>> + Send + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
    {
        let connector = Arc::new(connector);
        let shared = Arc::new(Shared::new(&options, Arc::clone(&connector)));
        let span = tracing::info_span!("balancer", service);
        let driver = Driver::new(Arc::clone(&shared), connector, options);
        let driver = tokio::spawn(driver.run(changes).instrument(span)).abort_handle();
        Self { shared, driver }
    }

    /// Stops the driver. Waiting calls and all later calls fail with the reason `why`.
    pub(crate) fn end(&self, why: &str) {
        self.shared.end(why, &Summary::default());
        self.driver.abort();
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        self.driver.abort();
    }
}
