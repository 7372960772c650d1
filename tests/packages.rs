//! Properties of the packages that their users depend on: dependencies, licences and files.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

/// Runs cargo and returns the lines of its output.
fn cargo(args: &[&str]) -> Vec<String> {
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(env!("CARGO_MANIFEST_DIR")).args(args);
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cargo {args:?}: {errors}");
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(str::to_owned).collect()
}

/// Returns the names of a package's dependencies.
fn dependencies(package: &str, features: &[&str]) -> BTreeSet<String> {
    let tree = ["tree", "--locked", "-p", package, "-e", "normal,build"];
    let format = ["--prefix", "none", "-f", "{p}"];
    cargo(&[&tree[..], &format, features].concat())
        .iter()
        .filter_map(|line| line.split(' ').next().map(str::to_owned))
        .collect()
}

#[test]
fn the_channel_needs_neither_etcd_client_nor_protoc() {
    let names = dependencies("tonic-balance", &["--all-features"]);
    assert!(names.contains("h2"), "{names:?}");
    for unwanted in ["etcd-client", "tonic-prost-build", "prost-build", "protox"] {
        assert!(!names.contains(unwanted), "{unwanted} is a dependency");
    }
}

#[test]
fn disabled_features_add_no_dependency() {
    let names = dependencies("tonic-etcd", &["--no-default-features"]);
    for (feature, dependency) in [
        ("tls", "rustls"),
        ("health", "tonic-health"),
        ("testing", "nix"),
    ] {
        assert!(
            !names.contains(dependency),
            "{dependency} without {feature}"
        );
        let with = dependencies("tonic-etcd", &["--features", feature]);
        assert!(with.contains(dependency), "{feature} has no {dependency}");
    }
}

#[test]
fn every_dependency_has_a_compatible_licence() {
    const ALLOWED: [&str; 9] = [
        "Apache-2.0",
        "MIT",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "ISC",
        "Unicode-3.0",
        "Unlicense",
        "Zlib",
        "CDLA-Permissive-2.0",
    ];
    let tree = ["tree", "--locked", "--workspace", "--all-features"];
    let format = ["-e", "normal,build", "--prefix", "none", "-f", "{p}|{l}"];
    for line in cargo(&[&tree[..], &format].concat()) {
        let Some((package, licence)) = line.split_once('|') else {
            continue;
        };
        // `A OR B` permits either licence, `A AND B` requires both. An exception only adds rights.
        let licence = licence
            .replace(" (*)", "")
            .replace(" WITH LLVM-exception", "");
        let is_allowed = |term: &str| ALLOWED.contains(&term.trim_matches(['(', ')', ' ']));
        let all = |choice: &str| choice.split(" AND ").all(is_allowed);
        let choices = licence.replace('/', " OR ");
        assert!(
            choices.split(" OR ").any(all),
            "{package} is licensed under {licence:?}"
        );
    }
}

#[test]
fn only_known_crates_are_linked_in_two_versions() {
    // Crates that ring, procedural macros and the testing feature require in different versions.
    const KNOWN: [&str; 2] = ["getrandom", "syn"];
    let tree = ["tree", "--locked", "--workspace", "--all-features"];
    let format = ["-e", "normal", "--prefix", "none", "-f", "{p}"];
    let mut versions = BTreeMap::<String, BTreeSet<String>>::new();
    for line in cargo(&[&tree[..], &format].concat()) {
        let mut words = line.split(' ');
        if let (Some(name), Some(version)) = (words.next(), words.next()) {
            let versions = versions.entry(name.to_owned()).or_default();
            versions.insert(version.to_owned());
        }
    }
    let twice = versions.iter().filter(|(_, versions)| versions.len() > 1);
    let unknown: Vec<_> = twice
        .filter(|(name, _)| !KNOWN.contains(&name.as_str()))
        .collect();
    assert!(unknown.is_empty(), "{unknown:?}");
}

#[test]
fn each_package_contains_its_sources_its_readme_and_its_licences() {
    for package in ["tonic-balance", "tonic-etcd"] {
        let files = cargo(&[
            "package",
            "--locked",
            "--allow-dirty",
            "--list",
            "-p",
            package,
        ]);
        for wanted in ["src/lib.rs", "README.md", "LICENSE-MIT", "LICENSE-APACHE"] {
            let is_there = files.iter().any(|file| file == wanted);
            assert!(is_there, "{package} lacks {wanted}");
        }
        let stray = files.iter().find(|file| file.starts_with("tests/"));
        assert_eq!(stray, None, "{package} contains its tests");
    }
}
