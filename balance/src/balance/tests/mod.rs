//! Tests that involve several files of this folder.

mod policies;
mod simulation;
mod sparse_callers;
