//! `register`: runs a command, and registers its address while it responds.

mod arguments;
mod child;
mod health;
mod readiness;
mod sidecar;
mod signals;

pub(crate) use arguments::RegisterArguments;
pub(crate) use sidecar::run;
