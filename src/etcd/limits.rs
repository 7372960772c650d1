//! Limits that all requests share.

use std::time::Duration;

/// Deadline of one attempt of a request. A healthy member responds in milliseconds, and a frozen member never responds.
pub(crate) const DEADLINE: Duration = Duration::from_secs(2);
/// Maximum size of one received message: 16 MiB. Without the limit, a hostile writer of keys could fill the memory of the client. A page of
/// 500 values of usual size fits, and so does a watch backlog of a thousand revisions with one key each. If a message is too large, the
/// keys are listed in pages, and the number of keys per page is halved until a page fits.
pub(super) const MAX_MESSAGE: usize = 16 << 20;
