//! Tests of the cache files of a resolver.

use std::fs;
use std::path::Path;
use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::fake::Fake;
use crate::Resolver;
use crate::keyspace::Keyspace;
use crate::resolver::ResolverBuilder;
use tonic_balance::AddressPolicy;

const CONFIG: &[u8] = b"/gRPC.control/greeter/config";

/// Starts a resolver with a cache and a service config.
fn start(fake: &Fake, folder: &Path) -> Resolver {
    let (etcd, keyspace) = (fake.etcd(1), Keyspace::new("/gRPC/"));
    let policy = AddressPolicy::default();
    ResolverBuilder::service(etcd, &keyspace, "greeter", policy)
        .watch_service_config("/gRPC.control/")
        .cache_dir(folder)
        .start()
}

/// Changes a key. Without a value, deletes it.
fn set(fake: &Fake, key: &[u8], value: Option<&str>) {
    let value = value.map(|value| (value.as_bytes().to_vec(), 0));
    fake.store().apply(vec![(key.to_vec(), value)]);
    fake.tell();
}

/// Returns the number of files whose names have this end.
fn files(folder: &Path, end: &str) -> usize {
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    let names = files.map(|file| file.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.ends_with(end)).count()
}

async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let holds = async {
        while !condition() {
            sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(Duration::from_secs(90), holds).await.expect(what);
}

#[tokio::test(start_paused = true)]
async fn a_write_of_a_cache_file_that_fails_is_repeated_after_a_minute() {
    let directory = tempfile::tempdir().expect("a directory");
    // A file has the name of the folder.
    let folder = directory.path().join("cache");
    fs::write(&folder, "").expect("a file");
    let fake = Fake::new(1, 0);
    set(&fake, CONFIG, Some("{}"));
    set(&fake, b"/gRPC/greeter/a", Some("127.0.0.1:1"));
    let _resolver = start(&fake, &folder);
    // The writes follow a second after the first answers of etcd.
    sleep(Duration::from_secs(10)).await;
    fs::remove_file(&folder).expect("the file is removed");
    eventually("both files are written", || files(&folder, ".json") == 2).await;
}

#[tokio::test(start_paused = true)]
async fn the_file_of_a_service_config_is_removed_with_its_key_also_after_an_unusable_value() {
    let directory = tempfile::tempdir().expect("a directory");
    let folder = directory.path();
    let fake = Fake::new(1, 0);
    set(&fake, CONFIG, Some("{}"));
    let resolver = start(&fake, folder);
    eventually("the file is written", || files(folder, ".config.json") == 1).await;
    drop(resolver);
    set(&fake, CONFIG, Some("not JSON"));
    let resolver = start(&fake, folder);
    let status = || resolver.service_config().expect("it is watched");
    eventually("the value is rejected", || status().rejected == 1).await;
    assert_eq!(files(folder, ".config.json"), 1);
    set(&fake, CONFIG, None);
    eventually("the file is removed", || files(folder, ".config.json") == 0).await;
}
