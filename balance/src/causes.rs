//! Formats an error and its causes as one line for logs.

use tonic::Status;

/// Returns an error and all its causes in one line.
///
/// Skips a cause whose text is already part of the line.
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

/// Returns the text of one error in a chain. The `Display` of a [`Status`] also prints its source, in `Debug` form. The source is the next
/// error of the chain anyway, so only the code and the message are used.
fn one(error: &(dyn std::error::Error + 'static)) -> String {
    match error.downcast_ref::<Status>() {
        Some(status) => format!("{:?}: {}", status.code(), status.message()),
        None => error.to_string(),
    }
}
