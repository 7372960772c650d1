//! Runs the command as a process, against a real etcd and real servers.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

#[path = "../../../tests/support/authority.rs"]
#[allow(
    dead_code,
    unreachable_pub,
    reason = "the file is shared with the tests of the library"
)]
mod authority;
mod call;
mod config;
mod control;
mod doctor;
mod generate;
mod list;
mod operate;
#[path = "../../../tests/support/pty.rs"]
#[allow(
    unreachable_pub,
    reason = "the file is shared with the tests of the library"
)]
mod pty;
mod register;
mod roles;
mod support;
mod usage;
mod watch;
