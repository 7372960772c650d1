//! Checks that the tests named in the documentation of the behaviour exist.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

use std::fs;
use std::path::Path;

/// Collects all Rust code of the tests, unit tests included.
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
            assert!(tests.contains(&format!("fn {name}()")), "no test {name}");
            named += 1;
        }
    }
    assert!(named > 20, "{named} tests are listed");
}
