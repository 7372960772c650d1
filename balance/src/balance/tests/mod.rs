//! Tests that involve several files of this folder.

mod simulation;
mod sparse_callers;
