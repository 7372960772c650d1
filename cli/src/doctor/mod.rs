//! `doctor`: gathers facts about etcd, the keys and the servers, and derives findings from them. The derivation is free of I/O.

mod clock;
mod command;
mod etcd_facts;
mod facts;
mod findings;
mod report;
mod service_facts;

pub(crate) use command::run;
