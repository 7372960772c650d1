//! A real etcd for the fleet. If the machine has several cores, etcd runs on one of its own.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use etcd_client::{Client, ConnectOptions};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};
use tonic_etcd::testing::Etcd;

use super::Result;
use super::roles;

/// The etcd of a fleet. An operator, which is not part of the fleet, writes keys to it.
#[derive(Debug)]
pub struct World {
    pub etcd: Etcd,
    /// Whether etcd requires passwords.
    pub protected: bool,
    _wrapper: Option<TempDir>,
}

impl World {
    pub async fn start(members: usize, protected: bool) -> Result<Self> {
        let wrapper = pinned()?;
        let builder = Etcd::builder().members(members);
        let builder = match &wrapper {
            Some(wrapper) => builder.binary(wrapper.path().join("etcd")),
            None => builder,
        };
        let etcd = builder.start().await;
        let etcd = etcd.map_err(|error| format!("start an etcd of {members} members: {error}"))?;
        if protected {
            roles::protect(&etcd).await;
        }
        Ok(Self {
            etcd,
            protected,
            _wrapper: wrapper,
        })
    }

    /// Returns a client of the operator that is connected to one member.
    pub async fn operator(&self, member: usize) -> Result<Client> {
        let endpoint = self.etcd.endpoint(member).ok_or("no such member")?;
        let options = self.protected.then(|| {
            let options = ConnectOptions::new().with_user("root", "root-password");
            options.with_auto_token_refresh(true)
        });
        let start = Instant::now();
        loop {
            let error = match Client::connect([&endpoint], options.clone()).await {
                Ok(client) => return Ok(client),
                Err(error) => error,
            };
            if Instant::now().saturating_duration_since(start) > PATIENCE {
                return Err(format!(
                    "connect the operator to {endpoint} in {PATIENCE:?}: {error}"
                ));
            }
            sleep(RETRY).await;
        }
    }
}

/// Puts a key. Repeats the put until it succeeds.
pub async fn put(operator: &Client, key: &str, value: &str) -> Result<()> {
    let mut kv = operator.kv_client();
    let start = Instant::now();
    while let Err(error) = kv.put(key, value, None).await {
        if Instant::now().saturating_duration_since(start) > PATIENCE {
            return Err(format!("put {key} in {PATIENCE:?}: {error}"));
        }
        sleep(RETRY).await;
    }
    Ok(())
}

/// Creates a shell script that runs etcd on the first core. Returns `None` if there is only one core, or if `taskset` is not installed.
fn pinned() -> Result<Option<TempDir>> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let taskset = Command::new("taskset").arg("--version").output();
    if cores < 2 || !taskset.is_ok_and(|output| output.status.success()) {
        return Ok(None);
    }
    let failed = |error| format!("write the program that runs etcd on one core: {error}");
    let binary = std::env::var_os("ETCD_BIN").map_or_else(|| PathBuf::from("etcd"), PathBuf::from);
    let folder = tempfile::tempdir().map_err(failed)?;
    let program = folder.path().join("etcd");
    write_program(&program, &binary).map_err(failed)?;
    Ok(Some(folder))
}

fn write_program(program: &Path, binary: &Path) -> std::io::Result<()> {
    let binary = binary.display();
    fs::write(
        program,
        format!("#!/bin/sh\nexec taskset -c 0 '{binary}' \"$@\"\n"),
    )?;
    fs::set_permissions(program, fs::Permissions::from_mode(0o755))
}

const PATIENCE: Duration = Duration::from_secs(60);
const RETRY: Duration = Duration::from_millis(20);
