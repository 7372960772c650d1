//! Compares the public interface of both packages with a checked-in list, so that every change of the interface is visible in review.
//!
//! `make api` runs the comparison. `API_UPDATE=1 make api` rewrites the list.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod render;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::{env, fs};

use render::Crate;
use serde_json::Value;

/// Returns rustdoc's JSON description of a package. The option for JSON is unstable. `RUSTC_BOOTSTRAP` permits it on a stable compiler.
fn describe(package: &str) -> Value {
    let target = concat!(env!("CARGO_MANIFEST_DIR"), "/target/api");
    let status = Command::new(env!("CARGO"))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env("RUSTC_BOOTSTRAP", "1")
        .args(["rustdoc", "--locked", "--lib", "-p", package])
        .args(["--features", features(package), "--target-dir", target])
        .args(["--", "-Z", "unstable-options", "--output-format", "json"])
        .status();
    assert!(status.unwrap().success(), "rustdoc failed for {package}");
    let file = format!("{target}/doc/{}.json", package.replace('-', "_"));
    serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap()
}

/// Returns the features that a user of the package may enable.
fn features(package: &str) -> &'static str {
    match package {
        "tonic-balance" => "tls,orca",
        _ => "tls,health,orca,testing",
    }
}

fn check(package: &str) {
    let description = describe(package);
    let items = Crate::new(&description).items();
    let file = format!("{}/docs/api/{package}.txt", env!("CARGO_MANIFEST_DIR"));
    let lines: Vec<_> = items.iter().map(String::as_str).collect();
    let text = lines.join("\n") + "\n";
    if env::var_os("API_UPDATE").is_some() {
        fs::create_dir_all(Path::new(&file).parent().unwrap()).unwrap();
        fs::write(&file, text).unwrap();
        return;
    }
    let before = fs::read_to_string(&file).unwrap_or_default();
    let before: BTreeSet<_> = before.lines().map(str::to_owned).collect();
    let removed: Vec<_> = before.difference(&items).collect();
    let added: Vec<_> = items.difference(&before).collect();
    assert!(
        removed.is_empty() && added.is_empty(),
        "the public interface of {package} has changed; run `API_UPDATE=1 make api` if that is intended.\n\
         removed: {removed:#?}\nadded: {added:#?}"
    );
}

#[test]
fn the_public_api_of_tonic_balance_matches_the_checked_in_list() {
    check("tonic-balance");
}

#[test]
fn the_public_api_of_tonic_etcd_matches_the_checked_in_list() {
    check("tonic-etcd");
}
