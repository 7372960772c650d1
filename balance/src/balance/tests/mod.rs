//! Tests of the pick together with the load estimates and the wait queue.

mod simulation;
