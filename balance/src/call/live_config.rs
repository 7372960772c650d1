//! The settings of methods under the current service config of the source, which can change while the channel runs.

use std::sync::Arc;

use arc_swap::ArcSwapOption;

use super::method_config::MethodConfig;
use crate::balance::StopOnDrop;

/// The settings under the current service config, combined with the options of the program. Empty while the source has no service config:
/// the settings that the channel was built with then apply.
#[derive(Debug)]
pub(crate) struct LiveConfig {
    pub(crate) current: Arc<ArcSwapOption<MethodConfig>>,
    /// The task that replaces the settings. It ends with the channel.
    pub(crate) _task: StopOnDrop,
}

impl LiveConfig {
    /// Returns the settings for a new call. The call keeps them to its end, so that all its attempts follow the same settings.
    pub(super) fn current(&self) -> Option<Arc<MethodConfig>> {
        self.current.load_full()
    }

    /// Records a successful call in the retry budget of the current service config. Returns false if there is no service config.
    pub(super) fn on_success(&self) -> bool {
        let current = self.current.load();
        if let Some(current) = &*current {
            current.on_success();
        }
        current.is_some()
    }
}
