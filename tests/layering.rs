//! Checks the imports in both packages: each folder imports only the layers below it, and no files import each other in a cycle. Files of
//! pure logic use neither tokio nor tonic, except for `tokio::time::Instant` and `tonic::Code`.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// A package and its rules.
struct Package {
    name: &'static str,
    sources: &'static str,
    /// Modules that every other module may import. They import only each other.
    vocabulary: &'static [&'static str],
    /// The top-level modules, each with the other top-level modules that it may import.
    allowed: &'static [(&'static str, &'static [&'static str])],
    /// The files and folders of pure logic. The vocabulary is pure too, except for `error` and `causes`.
    pure: &'static [&'static str],
}

const PACKAGES: &[Package] = &[
    Package {
        name: "tonic-balance",
        sources: concat!(env!("CARGO_MANIFEST_DIR"), "/balance/src"),
        vocabulary: &[
            "address",
            "attributes",
            "causes",
            "load_report",
            "metrics",
            "traces",
        ],
        allowed: &[
            ("transport", &[]),
            ("balance", &["transport"]),
            ("deadline", &["transport"]),
            ("orca", &[]),
            ("call", &["balance", "deadline", "transport"]),
            ("service_config", &["call", "balance"]),
            (
                "channel",
                &["service_config", "call", "balance", "transport"],
            ),
        ],
        pure: &[
            "call/retry",
            "call/method_config",
            "service_config",
            "balance/driver/pushbacks",
            "balance/driver/subset/endpoint_subset",
            "balance/estimate",
            "balance/hash_ring",
            "balance/latencies",
            "balance/load_weights",
            "balance/outlier",
            "balance/peer_index",
            "balance/server_load",
            "balance/zone",
            "channel/dns/srv_records",
            "orca/cpu",
            "orca/traffic",
        ],
    },
    Package {
        name: "tonic-etcd",
        sources: concat!(env!("CARGO_MANIFEST_DIR"), "/src"),
        vocabulary: &[
            "backoff", "error", "format", "instance", "keyspace", "metrics", "slots",
        ],
        allowed: &[
            ("etcd", &[]),
            ("resolver", &["etcd"]),
            ("registration", &["etcd"]),
            ("registry", &["etcd", "registration", "resolver"]),
            ("server", &["registration"]),
            ("limit", &[]),
            ("testing", &[]),
        ],
        pure: &[
            "limit/gradient",
            "limit/window",
            "resolver/watcher",
            "resolver/instances",
            "resolver/hold",
            "resolver/service_config/state",
            "resolver/service_config/status",
            "registration/lease",
            "registration/control/instruction",
            "registration/control/keys",
            "registration/control/status",
        ],
    },
];

/// The code of each file of a package, keyed by a module path such as `balance/driver/mod`.
type Files = BTreeMap<String, String>;

fn sources(root: &Path, folder: &Path, found: &mut Files) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(root, &path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let name = path.strip_prefix(root).unwrap().with_extension("");
            let name = name.to_string_lossy().into_owned();
            // Tests may import anything.
            if name != "lib" && !name.split('/').any(|part| part == "tests") {
                found.insert(name, code(&fs::read_to_string(&path).unwrap()));
            }
        }
    }
}

/// Returns the text without comments, without imports that only the docs use, and without the unit tests at the end of the file.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod ").next().unwrap();
    let mut lines = Vec::new();
    let mut for_docs = false;
    for line in text.lines().map(str::trim) {
        if !for_docs && !line.starts_with("//") {
            // A visibility is not an import.
            let line = match line.split_once("pub(in ") {
                Some((before, after)) => {
                    let after = after.split_once(')').map_or("", |(_, after)| after);
                    format!("{before}pub{after}")
                }
                None => line.to_owned(),
            };
            lines.push(line);
        }
        for_docs = line == "#[cfg(doc)]";
    }
    lines.join("\n")
}

/// Returns all paths that begin with `crate`, `super` or `self`. Groups of `use` are expanded.
fn paths(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for start in ["crate::", "super::", "self::"] {
        for (at, _) in text.match_indices(start) {
            let before = text[..at].chars().next_back();
            if !before.is_some_and(|before| before.is_alphanumeric() || "_:".contains(before)) {
                expand("", &text[at..], &mut found);
            }
        }
    }
    found
}

/// Expands one path and returns the text after it.
fn expand<'a>(prefix: &str, text: &'a str, found: &mut Vec<String>) -> &'a str {
    let end = text
        .find(|letter: char| !letter.is_alphanumeric() && letter != '_' && letter != ':')
        .unwrap_or(text.len());
    let (path, mut rest) = text.split_at(end);
    let whole = format!("{prefix}{path}");
    if path.ends_with("::") && rest.starts_with('{') {
        rest = &rest[1..];
        loop {
            rest = rest.trim_start();
            let before = rest.len();
            if rest.is_empty() || rest.starts_with('}') {
                return rest.strip_prefix('}').unwrap_or(rest);
            }
            let after = expand(&whole, rest, found).trim_start();
            // Skips a rename (`as`).
            let after = after.strip_prefix("as ").map_or(after, |named| {
                named.trim_start_matches(|letter: char| letter.is_alphanumeric() || letter == '_')
            });
            rest = after.trim_start().strip_prefix(',').unwrap_or(after);
            assert!(rest.len() < before, "cannot read the group {text:?}");
        }
    }
    found.push(whole);
    rest
}

/// Returns the module path of a file as segments.
fn module(file: &str) -> Vec<&str> {
    let mut parts: Vec<_> = file.split('/').collect();
    if parts.last() == Some(&"mod") {
        parts.pop();
    }
    parts
}

/// Returns the file that contains the item at `path`, as seen from `file`. Follows the re-exports of `mod.rs` files.
fn target(files: &Files, file: &str, path: &str) -> Option<String> {
    let mut at: Vec<String> = Vec::new();
    let mut segments = path.split("::").filter(|part| !part.is_empty()).peekable();
    match segments.peek()? {
        &"crate" => {
            segments.next();
        }
        _ => at = module(file).iter().map(ToString::to_string).collect(),
    }
    while let Some(segment @ ("super" | "self")) = segments.peek().copied() {
        if segment == "super" {
            at.pop();
        }
        segments.next();
    }
    for segment in segments {
        let deeper = [at.clone(), vec![segment.to_owned()]].concat().join("/");
        if files.contains_key(&deeper) {
            return Some(deeper);
        }
        if files.contains_key(&format!("{deeper}/mod")) {
            at.push(segment.to_owned());
            continue;
        }
        let here = if at.is_empty() {
            return None;
        } else {
            format!("{}/mod", at.join("/"))
        };
        let text = files.get(&here)?;
        // The segment is a re-export, or an item of this file.
        let exported = paths_of_exports(text)
            .into_iter()
            .find(|path| path.rsplit("::").next() == Some(segment));
        return match exported {
            Some(export) if export != path => {
                let export = export.strip_prefix("self::").unwrap_or(&export);
                let whole = format!("crate::{}::{export}", at.join("::"));
                target(files, file, &whole)
            }
            _ => Some(here),
        };
    }
    let here = format!("{}/mod", at.join("/"));
    files.contains_key(&here).then_some(here)
}

fn paths_of_exports(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (at, _) in text.match_indices("use ") {
        let rest = &text[at + 4..];
        if !rest.starts_with("crate::") && !rest.starts_with("super::") {
            expand("", rest, &mut found);
        }
    }
    found
}

/// Returns, for each file, the files of the same package that it imports.
fn imports(files: &Files) -> BTreeMap<&str, BTreeSet<String>> {
    let of = |(file, text): (&_, &String)| -> BTreeSet<String> {
        let paths = paths(text);
        let targets = paths.iter().filter_map(|path| target(files, file, path));
        targets.filter(|target| target != file).collect()
    };
    files
        .iter()
        .map(|(file, text)| (file.as_str(), of((file, text))))
        .collect()
}

fn load(package: &Package) -> Files {
    let (mut files, root) = (Files::new(), Path::new(package.sources));
    sources(root, root, &mut files);
    assert!(
        files.len() > 20,
        "too few source files of {} are found",
        package.name
    );
    files
}

/// Returns the top-level module of a file.
fn top(file: &str) -> &str {
    file.split('/').next().unwrap()
}

#[test]
fn folders_import_only_lower_layers() {
    let mut wrong = Vec::new();
    for package in PACKAGES {
        let files = load(package);
        for (file, imports) in imports(&files) {
            let own = top(file);
            let rule = package.allowed.iter().find(|(name, _)| *name == own);
            let allowed = rule.map_or(&[][..], |(_, allowed)| allowed);
            for import in imports {
                let module = top(&import);
                if module != own
                    && !package.vocabulary.contains(&module)
                    && !allowed.contains(&module)
                {
                    wrong.push(format!("{}: {file} imports {import}", package.name));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn no_files_import_each_other_in_a_cycle() {
    let mut circles = BTreeSet::new();
    for package in PACKAGES {
        let files = load(package);
        let imports = imports(&files);
        for start in imports.keys() {
            if let Some(circle) = circle(&imports, start) {
                circles.insert(format!("{}: {}", package.name, circle.join(" -> ")));
            }
        }
    }
    assert!(circles.is_empty(), "{circles:#?}");
}

/// Returns the shortest import cycle through a file.
fn circle(imports: &BTreeMap<&str, BTreeSet<String>>, start: &str) -> Option<Vec<String>> {
    let mut ways = vec![vec![start.to_owned()]];
    let mut seen = BTreeSet::new();
    while !ways.is_empty() {
        let mut longer = Vec::new();
        for way in ways {
            for next in &imports[way.last().unwrap().as_str()] {
                if next == start {
                    return Some(way);
                }
                if seen.insert(next.clone()) {
                    longer.push([way.clone(), vec![next.clone()]].concat());
                }
            }
        }
        ways = longer;
    }
    None
}

#[test]
fn pure_files_use_no_runtime() {
    let names_runtime = |line: &&str| {
        (line.contains("tokio::") && !line.contains("tokio::time::Instant"))
            || (line.contains("tonic::") && !line.contains("tonic::Code"))
    };
    let mut wrong = Vec::new();
    for package in PACKAGES {
        for (file, text) in load(package) {
            let is_in = |folder: &&str| file == *folder || file.starts_with(&format!("{folder}/"));
            let is_pure = package.pure.iter().any(is_in)
                || (package.vocabulary.iter().any(is_in) && !["error", "causes"].contains(&&*file));
            if is_pure && let Some(line) = text.lines().find(names_runtime) {
                wrong.push(format!("{}: {file}: {line}", package.name));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// The picture in ARCHITECTURE.md has an arrow for every import between folders, and no other arrow. The vocabulary is left out.
#[test]
fn the_picture_of_the_architecture_shows_the_imports() {
    let page = include_str!("../ARCHITECTURE.md");
    let mut drawn = BTreeSet::new();
    let mut package = "";
    for line in page.lines().map(str::trim) {
        if line.starts_with("subgraph") {
            let is_channel = line.contains("tonic-balance");
            package = if is_channel {
                "tonic-balance"
            } else {
                "tonic-etcd"
            };
        } else if let Some((from, to)) = line.split_once(" --> F_") {
            let from = from.trim_start_matches("F_");
            let name = |text: &str| text.split('[').next().unwrap().to_owned();
            drawn.insert((package, name(from), name(to)));
        }
    }
    let mut real = BTreeSet::new();
    for package in PACKAGES {
        let files = load(package);
        for (file, imports) in imports(&files) {
            for import in imports {
                let (from, to) = (top(file), top(&import));
                let is_vocabulary = |name| package.vocabulary.contains(&name);
                if from != to && !is_vocabulary(from) && !is_vocabulary(to) {
                    real.insert((package.name, from.to_owned(), to.to_owned()));
                }
            }
        }
    }
    assert_eq!(drawn, real, "left: the picture; right: the imports");
}

/// A `mod.rs` outside `testing` contains only docs, modules and re-exports. If it contained a type, the files that it declares would import
/// the type, and the imports would form a cycle.
#[test]
fn a_mod_file_has_no_logic() {
    let mut wrong = Vec::new();
    for package in PACKAGES {
        for (file, text) in load(package) {
            let is_mod = file.ends_with("/mod") && top(&file) != "testing";
            let mut text = text.as_str();
            while is_mod && !text.trim().is_empty() {
                let item = text.trim_start();
                let declared = match item.strip_prefix("pub(") {
                    Some(rest) => rest.split_once(") ").map_or("", |(_, declared)| declared),
                    None => item.strip_prefix("pub ").unwrap_or(item),
                };
                let is_allowed = ["mod ", "use ", "#["];
                if !is_allowed.iter().any(|start| declared.starts_with(start)) {
                    let line = item.lines().next().unwrap_or_default();
                    wrong.push(format!("{}: {file}: {line}", package.name));
                    break;
                }
                let end = if item.starts_with("#[") { "]" } else { ";" };
                text = item.split_once(end).map_or("", |(_, rest)| rest);
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn only_the_folders_etcd_and_registry_use_etcd_client() {
    let files = load(&PACKAGES[1]);
    let named = files
        .iter()
        .filter(|(_, text)| text.contains("etcd_client"));
    let outside: Vec<_> = named
        .map(|(file, _)| file)
        .filter(|file| top(file) != "etcd" && top(file) != "registry")
        .collect();
    assert!(outside.is_empty(), "{outside:?}");
}
