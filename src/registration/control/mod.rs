//! Control of a server from outside: an operator writes a control key in etcd, and the server pauses, resumes or changes its weight. The
//! server reports the result under a status key.
//!
//! For the instance `10.0.0.5:50051` of the service `greeter`, with the control prefix `/gRPC.control/`:
//!
//! ```text
//! /gRPC.control/greeter/instances/10.0.0.5:50051   written by the operator   {"state":"draining"}
//! /gRPC.control/greeter/status/10.0.0.5:50051      written by the server     {"state":"draining","applied":4711,"connections":3, ..}
//! ```
//!
//! The control prefix is not below the prefix of the instances, so that no client takes a control key for an instance.

mod instruction;
mod keys;
mod status;
mod task;

pub(super) use keys::ControlKeys;
pub(super) use task::Control;
