//! `watch`: the instances of a service, and their changes.

mod changes;
mod command;
mod live;
mod view;

pub(crate) use command::run;
