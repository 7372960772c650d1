//! Weights from load reports (gRFC A58).
//!
//! This module performs no I/O. Its input is the last load report of each endpoint. Its output is a factor for the weight of each endpoint.

mod config;
mod weight;

pub use config::LoadReports;
pub(super) use weight::{Series, factors, has_weight};
