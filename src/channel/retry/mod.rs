//! A call off the usual way: waiting for an endpoint, and sending again what was certainly not processed.

mod replay;
mod tried;
mod wait;

pub(super) use replay::{after_failure, run};
pub(super) use tried::Tried;
pub(super) use wait::ready;
