//! Counts the instructions of a case with callgrind.

use std::process::Command;

/// Returns the version of valgrind, if it is installed.
pub fn version() -> Option<String> {
    let output = Command::new("valgrind").arg("--version").output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Returns the instructions that [`measured`](super::measured) executes in a run of the case.
///
/// Each `--toggle-collect` inverts the collection at the entry of the function and at its return. So `without_peers` leaves out the
/// peers, which `measured` calls indirectly, but adds their answers before `measured`. It is for cases with few of those.
pub fn instructions(case: &str, without_peers: bool) -> f64 {
    let mut toggles = vec!["--toggle-collect=instructions::measured*"];
    if without_peers {
        toggles.push("--toggle-collect=instructions::peer::Peer::answer*");
    }
    let output = Command::new("valgrind")
        .arg("--tool=callgrind")
        .args(toggles)
        .arg(format!(
            "--callgrind-out-file={}",
            std::env::var("INSTRUCTIONS_PROFILE").map_or_else(
                |_| "/dev/null".to_owned(),
                |folder| format!("{folder}/{}.callgrind", case.replace(['/', ' '], "-"))
            )
        ))
        .arg(std::env::current_exe().unwrap())
        .args(["count", case])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    let collected = text
        .lines()
        .find_map(|line| line.split_once("Collected : "))
        .and_then(|(_, figure)| figure.trim().parse().ok());
    match collected {
        Some(collected) if output.status.success() => collected,
        _ => panic!("callgrind has not counted {case}:\n{text}"),
    }
}
