//! Checks that the tests and the files named in the documentation exist.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

use std::fs;
use std::path::Path;

/// Appends the content of all Rust files in a folder and its subfolders to `found`.
fn code(folder: &Path, found: &mut String) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            code(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push_str(&fs::read_to_string(&path).unwrap());
        }
    }
}

#[test]
fn every_test_named_in_the_behaviour_page_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("docs/behaviour.md")).unwrap();
    let mut tests = String::new();
    code(&root.join("tests"), &mut tests);
    code(&root.join("src"), &mut tests);
    code(&root.join("balance/src"), &mut tests);
    let rows = page.lines().filter(|line| line.starts_with("| "));
    let mut named = 0;
    for row in rows.skip(1) {
        let cells: Vec<_> = row.trim_matches('|').split(" | ").collect();
        assert_eq!(cells.len(), 5, "{row}");
        for name in cells[4].split('`').skip(1).step_by(2) {
            assert!(
                tests.contains(&format!("fn {name}()")),
                "no test has the name {name}"
            );
            named += 1;
        }
    }
    assert!(named > 20, "only {named} tests are listed");
}

#[test]
fn every_file_named_in_the_documentation_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut pages = [
        "ARCHITECTURE.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "README.md",
    ]
    .map(|name| root.join(name))
    .to_vec();
    let docs = fs::read_dir(root.join("docs")).unwrap();
    pages.extend(docs.map(|entry| entry.unwrap().path()));
    let folders = [
        "balance/",
        "benches/",
        "docs/",
        "examples/",
        "scripts/",
        "src/",
        "tests/",
    ];
    let mut named = 0;
    let mut missing = Vec::new();
    for page in pages.iter().filter(|page| page.is_file()) {
        let text = fs::read_to_string(page).unwrap();
        for name in text.split('`').skip(1).step_by(2) {
            let is_path = folders.iter().any(|folder| name.starts_with(folder));
            let is_plain = |letter: char| letter.is_ascii_alphanumeric() || "/._-".contains(letter);
            if is_path && name.chars().all(is_plain) {
                named += 1;
                if !root.join(name).exists() {
                    missing.push(format!("{}: {name}", page.display()));
                }
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
    assert!(named > 50, "only {named} files are named");
}
