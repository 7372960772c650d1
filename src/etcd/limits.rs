//! Limits that all requests share.

use std::time::Duration;

/// The deadline of one attempt of a call. A healthy member responds in milliseconds; a frozen member never does.
pub(crate) const DEADLINE: Duration = Duration::from_secs(2);
/// Maximum size of one message. A page of 500 values fits, and so does a watch backlog of a thousand revisions with one key each. The limit
/// bounds the memory that a hostile prefix can use. Larger content is listed in pages, which are halved until they fit.
pub(super) const MAX_MESSAGE: usize = 16 << 20;
