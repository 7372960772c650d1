//! CPU time of a thread, as the operating system accounts it.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Returns the CPU time of the calling thread.
pub fn of_this_thread() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .unwrap()
        .into()
}
