//! `config`: reads, checks, writes and deletes the service config of a service.

mod arguments;
mod command;
mod diff;

pub(crate) use arguments::ConfigCommand;
pub(crate) use command::run;
