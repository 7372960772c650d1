//! The cache file with the service config of a service.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::file::{CacheError, CacheFile};
use crate::keyspace::{Key, Revision};

/// The file with the service config of one service.
#[derive(Clone, Debug)]
pub(in crate::resolver) struct ConfigCache {
    file: CacheFile,
    /// The key of the service config. The file contains it as well. A file with another key is not used.
    key: String,
}

/// A service config, and the revision of its write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::resolver) struct CachedConfig {
    pub(in crate::resolver) revision: Revision,
    pub(in crate::resolver) json: String,
}

#[derive(Serialize, Deserialize)]
struct Content {
    key: String,
    revision: i64,
    service_config: String,
}

impl ConfigCache {
    /// Returns the cache of the service config in a key.
    pub(in crate::resolver) fn new(directory: &Path, service: &str, key: &Key) -> Self {
        let key = key.escaped();
        Self {
            file: CacheFile::new(directory, service, &key, "config.json"),
            key,
        }
    }

    pub(in crate::resolver) fn path(&self) -> &Path {
        self.file.path()
    }

    /// Reads the service config. Returns `None` if there is no file. The service config is not parsed.
    pub(in crate::resolver) fn load(&self) -> Result<Option<CachedConfig>, CacheError> {
        let Some(content) = self.file.load()? else {
            return Ok(None);
        };
        let content: Content = serde_json::from_str(&content)?;
        if content.key != self.key {
            return Err(CacheError::ForeignKey(content.key));
        }
        Ok(Some(CachedConfig {
            revision: Revision::new(content.revision),
            json: content.service_config,
        }))
    }

    /// Replaces the service config in the file. Without a service config, removes the file, so that the next start uses none.
    pub(in crate::resolver) fn store(&self, config: Option<CachedConfig>) -> io::Result<()> {
        let Some(CachedConfig { revision, json }) = config else {
            return self.file.remove();
        };
        let content = Content {
            key: self.key.clone(),
            revision: revision.get(),
            service_config: json,
        };
        self.file.store(serde_json::to_string(&content)?)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn config() -> CachedConfig {
        CachedConfig {
            revision: Revision::new(7),
            json: r#"{"methodConfig":[{"name":[{}],"timeout":"1s"}]}"#.to_owned(),
        }
    }

    fn cache(directory: &Path) -> ConfigCache {
        ConfigCache::new(directory, "a/b", &Key::from("/gRPC.control/a/b/config"))
    }

    #[test]
    fn a_stored_service_config_is_loaded_until_it_is_removed() {
        let directory = tempfile::tempdir().expect("a directory is created");
        let folder = directory.path().join("new");
        let cache = cache(&folder);
        let load = || cache.load().expect("the file is not invalid");
        assert_eq!(load(), None);
        cache.store(None).expect("a missing file is not an error");
        cache.store(Some(config())).expect("it is stored");
        assert_eq!(load(), Some(config()));
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode =
                |path: &Path| fs::metadata(path).expect("it exists").permissions().mode() & 0o777;
            assert_eq!((mode(cache.path()), mode(&folder)), (0o600, 0o700));
        }
        let files = || {
            let files = fs::read_dir(&folder);
            files.expect("the directory is readable").count()
        };
        assert_eq!(files(), 1, "no temporary file must be left");
        cache.store(None).expect("the file is removed");
        assert_eq!((load(), files()), (None, 0));
    }

    #[test]
    fn a_file_that_is_damaged_or_has_another_version_or_another_key_is_rejected() {
        let directory = tempfile::tempdir().expect("a directory is created");
        let cache = cache(directory.path());
        cache.store(Some(config())).expect("it is stored");
        let good = fs::read_to_string(cache.path()).expect("the file is readable");
        for (bad, reason) in [
            (String::new(), "not valid"),
            (good[..good.len() / 2].to_owned(), "not valid"),
            (good.replace("1s", "9s"), "checksum"),
            (
                good.replace("\"version\":1,\"ch", "\"version\":2,\"ch"),
                "version 2",
            ),
        ] {
            fs::write(cache.path(), bad).expect("the file is written");
            let error = cache.load().expect_err(reason).to_string();
            assert!(error.contains(reason), "{error}");
        }
        let other = ConfigCache {
            key: "/other/config".to_owned(),
            ..cache.clone()
        };
        fs::write(cache.path(), good).expect("the file is written");
        let error = other
            .load()
            .expect_err("a file for another key must be rejected")
            .to_string();
        assert!(error.contains("/gRPC.control/a/b/config"), "{error}");
    }
}
