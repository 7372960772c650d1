//! The credentials, and the cell with the token that etcd issued for them.

use std::sync::Arc;

use arc_swap::ArcSwapOption;
use http::HeaderValue;

#[derive(Clone)]
pub(crate) struct Credentials {
    pub(crate) user: String,
    pub(crate) password: String,
}

/// A token as a header value. Two tokens are the same if they share one allocation.
pub(crate) type Token = Arc<HeaderValue>;

/// The cell with the token in use. Clones share the cell. The module `auth` writes the token, and every request reads it.
#[derive(Clone, Default)]
pub(super) struct TokenCell(Arc<ArcSwapOption<HeaderValue>>);

impl TokenCell {
    pub(super) fn get(&self) -> Option<Token> {
        self.0.load_full()
    }

    pub(super) fn set(&self, token: Option<Token>) {
        self.0.store(token);
    }
}
