//! One file of the cache.
//!
//! A new file is written under a temporary name, flushed to the disk, and renamed, so that a reader never sees an incomplete file. A file
//! that is corrupt, has another version, or was written for other keys is ignored, and a warning is logged.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The reason why a cache file is not used. In the texts, "it" is the file.
#[derive(Debug, thiserror::Error)]
pub(in crate::resolver) enum CacheError {
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
    #[error("it is not valid: {0}")]
    Json(#[from] serde_json::Error),
    #[error("it has version {0}, and this library writes version {VERSION}")]
    Version(u32),
    #[error("its checksum does not match its content")]
    Checksum,
    #[error("it was written for the prefixes {0:?}")]
    ForeignPrefixes(Vec<String>),
    #[error("it was written for the key {0:?}")]
    ForeignKey(String),
}

#[derive(Serialize, Deserialize)]
struct Envelope {
    version: u32,
    checksum: u64,
    /// The JSON of the content, as text. The checksum is computed over exactly these bytes.
    content: String,
}

/// A file with a version and a checksum.
#[derive(Clone, Debug)]
pub(super) struct CacheFile(PathBuf);

impl CacheFile {
    /// Returns the file of a service in a directory. `identity` names the keys that the content is about.
    pub(super) fn new(directory: &Path, service: &str, identity: &str, extension: &str) -> Self {
        // A service name or a key may contain characters that are not valid in a file name, so these characters are replaced. The
        // checksum of the identity distinguishes files whose names would otherwise be equal.
        let name: String = service
            .chars()
            .map(|letter| match letter {
                'a'..='z' | 'A'..='Z' | '0'..='9' | '.' | '-' | '_' => letter,
                _ => '_',
            })
            .take(100)
            .collect();
        let number = checksum(identity.as_bytes());
        Self(directory.join(format!("{name}-{number:016x}.{extension}")))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// Reads the content. Returns `None` if there is no file.
    pub(super) fn load(&self) -> Result<Option<String>, CacheError> {
        let text = match fs::read(&self.0) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let envelope: Envelope = serde_json::from_slice(&text)?;
        if envelope.version != VERSION {
            return Err(CacheError::Version(envelope.version));
        }
        if checksum(envelope.content.as_bytes()) != envelope.checksum {
            return Err(CacheError::Checksum);
        }
        Ok(Some(envelope.content))
    }

    /// Replaces the content of the file. On Unix, only the owner can read it.
    pub(super) fn store(&self, content: String) -> io::Result<()> {
        let envelope = Envelope {
            version: VERSION,
            checksum: checksum(content.as_bytes()),
            content,
        };
        if let Some(directory) = self.0.parent() {
            create_private(directory)?;
        }
        // The temporary name is unique, because several processes, and several resolvers of one process, may share the directory. Processes
        // in different containers can have the same number, so the name also contains a random number.
        let number = fastrand::u64(..);
        let extension = format!("{}-{number:016x}.tmp", std::process::id());
        let beside = self.0.with_extension(extension);
        let mut options = fs::OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut written = options.open(&beside)?;
        let text = serde_json::to_vec(&envelope)?;
        let installed = written
            .write_all(&text)
            .and_then(|()| written.sync_all())
            .and_then(|()| fs::rename(&beside, &self.0));
        if installed.is_err() {
            let _ = fs::remove_file(&beside);
        }
        installed
    }

    /// Removes the file, if there is one.
    pub(super) fn remove(&self) -> io::Result<()> {
        match fs::remove_file(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// Creates a directory if it is missing. On Unix, only the owner can read the new directory. An existing directory keeps its permissions.
fn create_private(directory: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(directory)
}

/// Returns the 64-bit FNV-1a hash. It detects damage, but not forgery. Only the permissions of the directory can prevent forgery.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

const VERSION: u32 = 1;
