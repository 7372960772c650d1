//! The error of a service config that cannot be used.

/// The reason why a service config cannot be used. It names the field in the JSON, what is expected there, and what was found.
///
/// Text from the config is escaped and shortened, so the message is safe for logs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{reason}", Prefix(.path))]
pub struct ServiceConfigError {
    /// The path of the field, such as `methodConfig[0].retryPolicy`. Empty if the text is not JSON.
    path: String,
    reason: String,
}

impl ServiceConfigError {
    pub(super) fn new(path: &str, reason: impl Into<String>) -> Self {
        // Nested policies can make the path long.
        let path = match path.char_indices().nth_back(PATH_MAX) {
            Some((start, _)) => format!("...{}", path.get(start..).unwrap_or_default()),
            None => path.to_owned(),
        };
        Self {
            path,
            reason: reason.into(),
        }
    }

    /// Returns the path of the field in the JSON, such as `methodConfig[0].retryPolicy.maxAttempts`. Empty if the text is not JSON, or not
    /// an object.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }
}

/// Limit on the characters of a path. Of a longer path, the end is kept.
const PATH_MAX: usize = 300;

/// Displays the path before the reason.
struct Prefix<'a>(&'a str);

impl std::fmt::Display for Prefix<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            "" => Ok(()),
            path => write!(f, "{path}: "),
        }
    }
}
