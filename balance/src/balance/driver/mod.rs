//! The driver: the one task that dials connections, handles their loss, closes them, and publishes the ready set.

mod changes;
mod connecting;
mod driver;
mod ejection;
mod foreign;
mod health;
mod publish;
mod quarantine;
mod resting;
mod scaling;
mod slow_start;
mod spare;
mod zones;

pub(super) use driver::Driver;
