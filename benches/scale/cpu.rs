//! The operating system's account of the time that a thread runs.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Of the calling thread.
pub fn of_this_thread() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .unwrap()
        .into()
}
