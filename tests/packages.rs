//! Checks the dependencies, the licences and the files of the published packages.
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

/// Returns the names of a package and of all its direct and transitive dependencies.
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
        ("dns-srv", "domain"),
        ("health", "tonic-health"),
        ("testing", "nix"),
    ] {
        assert!(
            !names.contains(dependency),
            "{dependency} is a dependency although the feature {feature} is off"
        );
        let with = dependencies("tonic-etcd", &["--features", feature]);
        assert!(
            with.contains(dependency),
            "the feature {feature} does not add {dependency}"
        );
    }
}

#[test]
fn companion_packages_are_no_dependency_of_the_library() {
    let names = dependencies("tonic-etcd", &["--all-features"]);
    for companion in ["tonic-balance-channelz", "opentelemetry", "clap"] {
        assert!(!names.contains(companion), "{companion} is a dependency");
    }
}

#[test]
fn only_the_package_for_opentelemetry_depends_on_opentelemetry() {
    for package in ["tonic-balance", "tonic-etcd"] {
        let names = dependencies(package, &["--all-features"]);
        let found = names.iter().find(|name| name.contains("opentelemetry"));
        assert_eq!(found, None, "a dependency of {package}");
    }
    let names = dependencies("tonic-etcd-opentelemetry", &["--no-default-features"]);
    for unwanted in [
        "opentelemetry_sdk",
        "etcd-client",
        "prometheus-client",
        "tracing-opentelemetry",
    ] {
        assert!(!names.contains(unwanted), "{unwanted} is a dependency");
    }
    // The default feature only enables a feature of the SDK, which the program has anyway.
    let with_default = dependencies("tonic-etcd-opentelemetry", &[]);
    let mut added = with_default.difference(&names);
    let is_of_sdk = |name: &String| name == "opentelemetry_sdk" || name.starts_with("futures-");
    let unwanted = added.find(|name| !is_of_sdk(name));
    assert_eq!(unwanted, None, "a dependency of the default feature");
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
        // `LLVM-exception` only adds rights to its licence, so it is ignored. Other exceptions fail the test.
        let licence = licence
            .replace(" (*)", "")
            .replace(" WITH LLVM-exception", "");
        let expression = licence.replace('/', " OR ");
        assert!(
            is_permitted(&expression, &ALLOWED),
            "{package} is licensed under {licence:?}"
        );
    }
}

/// Evaluates an SPDX expression: `A OR B` permits either licence, and `A AND B` requires both. `AND` binds more tightly than `OR`.
fn is_permitted(expression: &str, allowed: &[&str]) -> bool {
    let parts = |separator: &str| {
        let (mut parts, mut depth, mut start) = (Vec::new(), 0, 0);
        for (index, byte) in expression.bytes().enumerate() {
            match byte {
                b'(' => depth += 1,
                b')' => depth -= 1,
                _ if depth == 0 && expression[index..].starts_with(separator) => {
                    parts.push(&expression[start..index]);
                    start = index + separator.len();
                }
                _ => {}
            }
        }
        parts.push(&expression[start..]);
        parts
    };
    let permitted = |part: &&str| is_permitted(part.trim(), allowed);
    let (choices, terms) = (parts(" OR "), parts(" AND "));
    if choices.len() > 1 {
        return choices.iter().any(permitted);
    }
    if terms.len() > 1 {
        return terms.iter().all(permitted);
    }
    let inner = expression.strip_prefix('(');
    match inner.and_then(|inner| inner.strip_suffix(')')) {
        Some(inner) => is_permitted(inner.trim(), allowed),
        None => allowed.contains(&expression.trim()),
    }
}

#[test]
fn licences_in_parentheses_are_evaluated_as_one_term() {
    let allowed = ["MIT", "Unicode-3.0"];
    for (expression, permitted) in [
        ("MIT", true),
        ("MIT OR GPL-3.0", true),
        ("MIT AND GPL-3.0", false),
        ("(MIT OR Apache-2.0) AND Unicode-3.0", true),
        ("(MIT OR Apache-2.0) AND GPL-3.0", false),
        ("GPL-3.0 OR (MIT AND Unicode-3.0)", true),
    ] {
        assert_eq!(
            is_permitted(expression, &allowed),
            permitted,
            "{expression}"
        );
    }
}

#[test]
fn only_known_crates_are_linked_in_two_versions() {
    // ring and tempfile need different versions of getrandom. tempfile is linked only with the feature `testing`. The procedural macros
    // need different versions of syn, which is not linked.
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
    for package in ["tonic-balance", "tonic-etcd", "tonic-etcd-opentelemetry"] {
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
