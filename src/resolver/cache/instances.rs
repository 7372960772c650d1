//! The cache file with the instances of a service.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};
use tonic_balance::{Address, AddressPolicy};

use super::file::{CacheError, CacheFile};
use crate::instance::Instance;

/// The file with the instances of one service.
#[derive(Clone, Debug)]
pub(in crate::resolver) struct Cache {
    file: CacheFile,
    /// The prefixes of the service. The file contains them as well. A file with other prefixes is not used.
    prefixes: Vec<String>,
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
    pub(in crate::resolver) fn new(directory: &Path, service: &str, prefixes: Vec<String>) -> Self {
        Self {
            file: CacheFile::new(directory, service, &prefixes.join("\n"), "json"),
            prefixes,
        }
    }

    pub(in crate::resolver) fn path(&self) -> &Path {
        self.file.path()
    }

    /// Reads the instances. Returns `None` if there is no file. The result does not contain instances whose address is not valid or is
    /// rejected by the policy.
    pub(in crate::resolver) fn load(
        &self,
        policy: &AddressPolicy,
    ) -> Result<Option<Vec<Instance>>, CacheError> {
        let Some(content) = self.file.load()? else {
            return Ok(None);
        };
        let content: Content = serde_json::from_str(&content)?;
        if content.prefixes != self.prefixes {
            return Err(CacheError::ForeignPrefixes(content.prefixes));
        }
        let instances = content.instances.into_iter();
        let instances = instances.filter_map(Cached::into_instance);
        let is_accepted = |instance: &Instance| policy.check(instance.address()).is_ok();
        Ok(Some(instances.filter(is_accepted).collect()))
    }

    /// Replaces the contents of the file with these instances.
    pub(in crate::resolver) fn store(&self, instances: &[Instance]) -> io::Result<()> {
        let content = Content {
            prefixes: self.prefixes.clone(),
            instances: instances.iter().map(Cached::of).collect(),
        };
        self.file.store(serde_json::to_string(&content)?)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

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
            assert_eq!((mode(cache.path()), mode(&folder)), (0o600, 0o700));
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
        let good = fs::read_to_string(cache.path()).expect("the file is readable");
        for (bad, reason) in [
            (String::new(), "not valid"),
            (good[..good.len() / 2].to_owned(), "not valid"),
            (good.replace("10.0.0.1", "10.0.0.9"), "checksum"),
            (
                good.replace("\"version\":1,\"ch", "\"version\":2,\"ch"),
                "version 2",
            ),
        ] {
            fs::write(cache.path(), bad).expect("the file is written");
            let error = cache.load(&policy).expect_err(reason).to_string();
            assert!(error.contains(reason), "{error}");
        }
        let other = Cache {
            prefixes: vec!["/gRPC/b/".to_owned()],
            ..cache.clone()
        };
        fs::write(cache.path(), good).expect("the file is written");
        let error = other
            .load(&policy)
            .expect_err("a file for other prefixes must be rejected")
            .to_string();
        assert!(error.contains("/gRPC/a/"), "{error}");
    }
}
