//! Outlier detection (gRFC A50): ejects endpoints that fail far more calls than the others.
//!
//! Performs no I/O. The input is the counts of each endpoint within an interval. The output is which endpoints are ejected.

mod config;
mod sweep;

pub use config::{FailurePercentageEjection, OutlierDetection, SuccessRateEjection};
pub(super) use sweep::{Counts, Ejection, sweep};
