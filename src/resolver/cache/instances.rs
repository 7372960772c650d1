//! The cache: a file with the last known instances of a service, for a start while etcd does not answer.
//!
//! A new file is written under a temporary name, flushed to the disk, and renamed, so that a reader never sees an incomplete file. A file
//! that is corrupt, has another version, or was written for other prefixes is ignored, and a warning is logged.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use tonic_balance::{Address, AddressPolicy};

use crate::instance::Instance;

/// The file of one service.
#[derive(Clone, Debug)]
pub(super) struct Cache {
    file: PathBuf,
    /// The prefixes of the service. The file contains them as well. A file with other prefixes is not used.
    prefixes: Vec<String>,
}

/// The reason why the cache file is not used. In the texts, "it" is the file.
#[derive(Debug, thiserror::Error)]
pub(super) enum CacheError {
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
    #[error("it is not valid: {0}")]
    Json(#[from] serde_json::Error),
    #[error("it has version {0}, and this library writes version {VERSION}")]
    Version(u32),
    #[error("its checksum does not match its content")]
    Checksum,
    #[error("it was written for the prefixes {0:?}")]
    Foreign(Vec<String>),
}

#[derive(Serialize, Deserialize)]
struct File {
    version: u32,
    checksum: u64,
    /// The JSON of [`Content`], as text. The checksum is computed over exactly these bytes.
    content: String,
}

#[derive(Serialize, Deserialize)]
struct Content {
    prefixes: Vec<String>,
    instances: Vec<Cached>,
}

#[derive(Serialize, Deserialize)]
struct Cached {
    address: String,
    weight: u32,
    zone: Option<String>,
    version: Option<String>,
    metadata: BTreeMap<String, String>,
    tls: bool,
}

impl Cached {
    fn of(instance: &Instance) -> Self {
        Self {
            address: instance.address().to_string(),
            weight: instance.weight(),
            zone: instance.zone().map(str::to_owned),
            version: instance.version().map(str::to_owned),
            metadata: instance.metadata().clone(),
            tls: instance.is_tls(),
        }
    }

    fn into_instance(self) -> Option<Instance> {
        let address: Address = self.address.parse().ok()?;
        let mut instance = Instance::new(address)
            .with_weight(self.weight)
            .with_tls(self.tls);
        if let Some(zone) = self.zone {
            instance = instance.with_zone(zone);
        }
        if let Some(version) = self.version {
            instance = instance.with_version(version);
        }
        let pairs = self.metadata.into_iter();
        Some(pairs.fold(instance, |instance, (name, value)| {
            instance.with_metadata(name, value)
        }))
    }
}

impl Cache {
    /// Returns the cache of a service in a directory.
    pub(super) fn new(directory: &Path, service: &str, prefixes: Vec<String>) -> Self {
        // A service name or a prefix may contain characters that are not valid in a file name, so these characters are replaced. The
        // checksum of the prefixes distinguishes files whose names would otherwise be equal.
        let name: String = service
            .chars()
            .map(|letter| match letter {
                'a'..='z' | 'A'..='Z' | '0'..='9' | '.' | '-' | '_' => letter,
                _ => '_',
            })
            .take(100)
            .collect();
        let number = checksum(prefixes.join("\n").as_bytes());
        Self {
            file: directory.join(format!("{name}-{number:016x}.json")),
            prefixes,
        }
    }

    pub(super) fn file(&self) -> &Path {
        &self.file
    }

    /// Reads the instances. Returns `None` if there is no file. The result does not contain instances whose address is not valid or is
    /// rejected by the policy.
    pub(super) fn load(&self, policy: &AddressPolicy) -> Result<Option<Vec<Instance>>, CacheError> {
        let text = match fs::read(&self.file) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let file: File = serde_json::from_slice(&text)?;
        if file.version != VERSION {
            return Err(CacheError::Version(file.version));
        }
        if checksum(file.content.as_bytes()) != file.checksum {
            return Err(CacheError::Checksum);
        }
        let content: Content = serde_json::from_str(&file.content)?;
        if content.prefixes != self.prefixes {
            return Err(CacheError::Foreign(content.prefixes));
        }
        let instances = content.instances.into_iter();
        let instances = instances.filter_map(Cached::into_instance);
        let is_accepted = |instance: &Instance| policy.check(instance.address()).is_ok();
        Ok(Some(instances.filter(is_accepted).collect()))
    }

    /// Replaces the contents of the file with these instances.
    pub(super) fn store(&self, instances: &[Instance]) -> io::Result<()> {
        let content = Content {
            prefixes: self.prefixes.clone(),
            instances: instances.iter().map(Cached::of).collect(),
        };
        let content = serde_json::to_string(&content)?;
        let file = File {
            version: VERSION,
            checksum: checksum(content.as_bytes()),
            content,
        };
        if let Some(directory) = self.file.parent() {
            create_private(directory)?;
        }
        // The temporary name is unique, because several processes, and several resolvers of one process, may share the directory.
        let number = STORED.fetch_add(1, Ordering::Relaxed);
        let extension = format!("{}-{number}.tmp", std::process::id());
        let beside = self.file.with_extension(extension);
        let mut options = fs::OpenOptions::new();
        options.write(true).create(true).truncate(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut written = options.open(&beside)?;
        let text = serde_json::to_vec(&file)?;
        let installed = written
            .write_all(&text)
            .and_then(|()| written.sync_all())
            .and_then(|()| fs::rename(&beside, &self.file));
        if installed.is_err() {
            let _ = fs::remove_file(&beside);
        }
        installed
    }
}

/// Number of files that this process has begun to write. Each temporary name contains this number.
static STORED: AtomicU64 = AtomicU64::new(0);

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

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(address: &str) -> Instance {
        Instance::new(address.parse().expect("the text is an address"))
    }

    #[test]
    fn a_stored_set_is_loaded() {
        let directory = tempfile::tempdir().expect("a directory is created");
        let folder = directory.path().join("new");
        let cache = Cache::new(&folder, "a/b", vec!["/gRPC/a/b/".to_owned()]);
        let policy = AddressPolicy::default();
        assert!(
            cache
                .load(&policy)
                .expect("a missing file is not an error")
                .is_none()
        );
        let one = instance("10.0.0.1:80")
            .with_weight(3)
            .with_zone("a")
            .with_version("1.2")
            .with_metadata("rack", "7")
            .with_tls(true);
        let two = instance("10.0.0.2:80");
        for set in [vec![one.clone(), two.clone()], vec![two], Vec::new()] {
            cache.store(&set).expect("the set is stored");
            assert_eq!(cache.load(&policy).expect("the set is loaded"), Some(set));
        }
        cache.store(&[one]).expect("the set is stored");
        let forbidden =
            AddressPolicy::default().allow("192.168.0.0/16".parse().expect("a network"));
        assert_eq!(
            cache.load(&forbidden).expect("the file is loaded"),
            Some(Vec::new())
        );
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode =
                |path: &Path| fs::metadata(path).expect("it exists").permissions().mode() & 0o777;
            assert_eq!((mode(cache.file()), mode(&folder)), (0o600, 0o700));
        }
        let files = fs::read_dir(&folder)
            .expect("the directory is readable")
            .count();
        assert_eq!(files, 1, "no temporary file must be left");
    }

    #[test]
    fn a_file_that_is_damaged_or_has_another_version_or_other_prefixes_is_rejected() {
        let directory = tempfile::tempdir().expect("a directory is created");
        let cache = Cache::new(directory.path(), "a", vec!["/gRPC/a/".to_owned()]);
        let policy = AddressPolicy::default();
        cache
            .store(&[instance("10.0.0.1:80")])
            .expect("the set is stored");
        let good = fs::read_to_string(cache.file()).expect("the file is readable");
        for (bad, reason) in [
            (String::new(), "not valid"),
            (good[..good.len() / 2].to_owned(), "not valid"),
            (good.replace("10.0.0.1", "10.0.0.9"), "checksum"),
            (
                good.replace("\"version\":1,\"ch", "\"version\":2,\"ch"),
                "version 2",
            ),
        ] {
            fs::write(cache.file(), bad).expect("the file is written");
            let error = cache.load(&policy).expect_err(reason).to_string();
            assert!(error.contains(reason), "{error}");
        }
        let other = Cache {
            prefixes: vec!["/gRPC/b/".to_owned()],
            ..cache.clone()
        };
        fs::write(cache.file(), good).expect("the file is written");
        let error = other
            .load(&policy)
            .expect_err("a file for other prefixes must be rejected")
            .to_string();
        assert!(error.contains("/gRPC/a/"), "{error}");
    }
}
