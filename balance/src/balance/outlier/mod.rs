//! Outlier detection (gRFC A50): ejects endpoints that fail far more calls than the others.
//!
//! This module performs no I/O. Its input is the number of successful and failed calls of each endpoint within an interval. Its output is
//! the set of ejected endpoints.

mod config;
mod sweep;

pub use config::{FailurePercentageEjection, OutlierDetection, SuccessRateEjection};
pub(super) use sweep::{Counts, Ejection, Ejections, sweep};
