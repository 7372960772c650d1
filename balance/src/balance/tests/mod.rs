//! Tests of several files of this folder together.

mod simulation;
