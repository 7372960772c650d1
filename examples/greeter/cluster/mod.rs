//! The parts of the example `greeter_cluster`.

pub mod display;
pub mod server_process;
pub mod tally;
// The command `tonic-etcd` shows its pictures in the same way.
#[path = "../../../cli/src/terminal/mod.rs"]
mod terminal;
mod view;
