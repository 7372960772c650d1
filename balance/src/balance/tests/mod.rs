//! Tests that involve several files of this folder.

mod client;
mod faults;
mod policies;
mod simulation;
mod sparse_callers;
mod world;
