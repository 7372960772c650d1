//! The controller with simulated servers in virtual time, and the layer with scripted services.

mod controller;
mod layer;
mod simulation;
