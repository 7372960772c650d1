//! Errors as the one line that people log.

use tonic::Status;

/// Returns an error and all its causes in one line.
///
/// A cause whose text is already part of the line is not repeated.
#[must_use]
pub fn causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = one(error);
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = one(cause);
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// Returns the text of one error of a chain. The `Display` of a status contains the `Debug` form of its source, which the chain has anyway.
fn one(error: &(dyn std::error::Error + 'static)) -> String {
    match error.downcast_ref::<Status>() {
        Some(status) => format!("{:?}: {}", status.code(), status.message()),
        None => error.to_string(),
    }
}
