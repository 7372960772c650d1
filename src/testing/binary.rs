//! The etcd binary: its path, its version and its command line.

use std::{
    env,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use tokio::task::spawn_blocking;

use super::error::ProcessError;

/// Returns the path in `ETCD_BIN`, or else the `etcd` on `PATH`.
pub(super) fn find() -> Result<PathBuf, ProcessError> {
    let named = env::var_os("ETCD_BIN").filter(|path| !path.is_empty());
    let found = named.map(PathBuf::from).or_else(on_path);
    found.ok_or(ProcessError::NoBinary)
}

/// Returns the first executable file named `etcd` on `PATH`.
fn on_path() -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    let mut candidates = env::split_paths(&path).map(|folder| folder.join("etcd"));
    candidates.find(|candidate| is_executable(candidate))
}

/// Returns whether the path is a file that is executable for at least one user.
fn is_executable(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

/// Returns a command that runs the binary without the `ETCD_*` variables of this process.
///
/// etcd also reads each flag from an `ETCD_*` variable, so these variables would change its
/// settings. `ETCD_UNSUPPORTED_ARCH` is kept: it is not a flag, and some releases require it on an
/// architecture that they do not support.
pub(super) fn command(binary: &Path) -> Command {
    let mut command = Command::new(binary);
    command.stdin(Stdio::null());
    for (name, _) in env::vars_os() {
        if name.as_encoded_bytes().starts_with(b"ETCD_") && name != "ETCD_UNSUPPORTED_ARCH" {
            command.env_remove(name);
        }
    }
    command
}

/// Runs the binary to read its version, such as `3.4.23`.
pub(super) async fn version(binary: &Path) -> Result<String, ProcessError> {
    let mut ask = command(binary);
    ask.arg("--version");
    let output = spawn_blocking(move || ask.output()).await;
    match output.unwrap_or_else(|error| Err(error.into())) {
        Ok(output) => Ok(parse_version(&String::from_utf8_lossy(&output.stdout))),
        Err(cause) => Err(ProcessError::Spawn {
            program: binary.to_owned(),
            cause,
        }),
    }
}

/// Parses the version from the output of `etcd --version`.
fn parse_version(printed: &str) -> String {
    let mut lines = printed.lines();
    let version = lines.find_map(|line| line.strip_prefix("etcd Version:"));
    version.map_or("unknown", str::trim).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_parsed_from_its_line() {
        let printed = "etcd Version: 3.4.23\nGit SHA: Not provided\nGo Version: go1.19.8\n";
        assert_eq!(parse_version(printed), "3.4.23");
        assert_eq!(parse_version("usage: something else"), "unknown");
    }

    #[test]
    fn a_folder_or_a_plain_file_is_not_a_binary() {
        assert!(is_executable(Path::new("/bin/sh")));
        assert!(!is_executable(Path::new("/bin")));
        assert!(!is_executable(Path::new(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/Cargo.toml"
        ))));
    }
}
