//! Holds the direction of imports: façades, tasks, transport and pure machines, vocabulary; and keeps what must not know each other
//! apart.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// What a module may import of the crate besides the vocabulary. Pure machines are listed by file.
const ALLOWED: &[(&str, &[&str])] = &[
    (
        "registry",
        &["channel", "etcd", "registration", "resolver", "transport"],
    ),
    ("server", &["registration"]),
    ("channel", &["balance", "transport"]),
    ("channel/resolved", &["balance", "resolver", "transport"]),
    ("channel/stock", &["resolver"]),
    ("resolver", &["etcd"]),
    ("resolver/state", &[]),
    ("resolver/snapshot", &[]),
    ("resolver/hold", &[]),
    ("registration", &["etcd"]),
    ("registration/lease", &[]),
    ("balance", &["transport"]),
    ("transport", &[]),
    // Its client runs on a channel.
    ("etcd", &["channel", "transport"]),
    ("format", &[]),
    ("testing", &[]),
];

const VOCABULARY: &[&str] = &[
    "address", "backoff", "error", "format", "instance", "keyspace",
];

/// Machines, by file or folder.
const PURE: &[&str] = &[
    "resolver/state",
    "resolver/snapshot",
    "resolver/hold",
    "registration/lease",
];

fn sources(folder: &Path, found: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let name = path
                .strip_prefix(concat!(env!("CARGO_MANIFEST_DIR"), "/src"))
                .unwrap();
            let name = name.with_extension("").to_string_lossy().into_owned();
            found.insert(name.trim_end_matches("/mod").to_owned(), text);
        }
    }
}

/// The rule for a file: that of its own path, or of the folder it is in.
fn allowed(file: &str) -> Option<&'static [&'static str]> {
    let rule = |path: &str| {
        ALLOWED
            .iter()
            .find(|(name, _)| *name == path)
            .map(|(_, allowed)| *allowed)
    };
    let mut path = file;
    loop {
        match (rule(path), path.rsplit_once('/')) {
            (Some(allowed), _) => return Some(allowed),
            (None, Some((folder, _))) => path = folder,
            (None, None) => return None,
        }
    }
}

#[test]
fn imports_go_one_way() {
    let mut files = BTreeMap::new();
    sources(
        Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src")),
        &mut files,
    );
    assert!(files.len() > 20, "the sources are found");
    let mut wrong = Vec::new();
    for (file, text) in &files {
        // Tests may look at anything.
        if file == "lib" || file.split('/').any(|part| part == "tests") {
            continue;
        }
        let vocabulary = VOCABULARY
            .iter()
            .any(|word| file == word || file.starts_with(&format!("{word}/")));
        let allowed = allowed(file).unwrap_or_default();
        let own = file.split('/').next().unwrap_or(file);
        for line in text
            .lines()
            .map(str::trim)
            .filter(|line| !line.starts_with("//"))
        {
            for import in line.split("crate::").skip(1) {
                let module = import
                    .split(|letter: char| !letter.is_alphanumeric() && letter != '_')
                    .next()
                    .unwrap_or_default();
                let fine =
                    module == own || VOCABULARY.contains(&module) || allowed.contains(&module);
                // Types are re-exported at the root and named there by the docs alone.
                if !fine && !module.starts_with(char::is_uppercase) {
                    wrong.push(format!("src/{file}.rs imports {module}"));
                }
            }
            if line.contains("super::super::super") {
                wrong.push(format!("src/{file}.rs climbs: {line}"));
            }
        }
        if text.contains("etcd_client") && own != "etcd" && own != "registry" {
            wrong.push(format!("src/{file}.rs names etcd_client"));
        }
        let pure = vocabulary
            || PURE
                .iter()
                .any(|pure| file == pure || file.starts_with(&format!("{pure}/")));
        let names_runtime = |line: &str| {
            (line.contains("tokio::") && !line.contains("tokio::time::Instant"))
                || line.contains("tonic::")
        };
        if pure
            && file != "error"
            && text
                .lines()
                .any(|line| !line.trim().starts_with("//") && names_runtime(line))
        {
            wrong.push(format!("src/{file}.rs is pure and names a runtime"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
