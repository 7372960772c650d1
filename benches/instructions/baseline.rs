//! The checked-in counts, and the comparison with them.

use std::collections::BTreeMap;
use std::process::Command;

use serde::{Deserialize, Serialize};

/// The counts of one run.
#[derive(Serialize, Deserialize)]
pub struct Baseline {
    pub environment: Environment,
    /// Instructions by case.
    pub instructions: BTreeMap<String, u64>,
}

/// The programs on which the counts depend. The processor is given for information: a C library can choose its functions by the processor,
/// but valgrind shows all programs nearly the same processor.
#[derive(Serialize, Deserialize)]
pub struct Environment {
    rustc: String,
    valgrind: String,
    libc: String,
    processor: String,
}

impl Environment {
    pub fn current(valgrind: String) -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo.lines().find(|line| line.starts_with("model name"));
        let model = model.and_then(|line| line.split_once(": "));
        Self {
            rustc: output("rustc", "--version"),
            valgrind,
            libc: output("getconf", "GNU_LIBC_VERSION"),
            processor: format!(
                "{}, {}",
                std::env::consts::ARCH,
                model.map_or("unknown", |(_, model)| model)
            ),
        }
    }

    /// Returns whether the counts of two environments can be compared.
    fn is_comparable(&self, other: &Self) -> bool {
        self.rustc == other.rustc && self.valgrind == other.valgrind && self.libc == other.libc
    }
}

fn output(program: &str, argument: &str) -> String {
    let output = Command::new(program).arg(argument).output().unwrap();
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

impl Baseline {
    pub fn read() -> Self {
        let text = std::fs::read_to_string(PATH).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    pub fn write(&self) {
        let text = serde_json::to_string_pretty(self).unwrap();
        std::fs::write(PATH, text + "\n").unwrap();
    }

    /// Prints the counts beside those of the baseline. Returns false if a case has become more expensive than the tolerance, if a case is
    /// not in the baseline, or if the two cannot be compared.
    pub fn compare(&self, baseline: &Self) -> bool {
        println!("\n| case | baseline | now | difference |\n|---|---|---|---|");
        let mut failed = Vec::new();
        for (case, now) in &self.instructions {
            let Some(before) = baseline.instructions.get(case) else {
                println!("| {case} | - | {now} | not in the baseline |");
                failed.push(case.as_str());
                continue;
            };
            let difference = *now as f64 / *before as f64 - 1.0;
            println!(
                "| {case} | {before} | {now} | {:+.2} % |",
                difference * 100.0
            );
            if difference > TOLERANCE {
                failed.push(case);
            }
        }
        println!();
        if !self.environment.is_comparable(&baseline.environment) {
            println!(
                "not comparable: the baseline is of {}, {} and {}, this run of {}, {} and {}. Write a baseline for these programs with the code before your change: INSTRUCTIONS_UPDATE=1 make instructions",
                baseline.environment.rustc,
                baseline.environment.valgrind,
                baseline.environment.libc,
                self.environment.rustc,
                self.environment.valgrind,
                self.environment.libc,
            );
            return false;
        }
        for case in &failed {
            println!(
                "more expensive than the baseline by more than {} %, or not in it: {case}",
                TOLERANCE * 100.0
            );
        }
        failed.is_empty()
    }
}

const PATH: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/benches/instructions/baseline.json"
);
/// The tolerated growth of a count. Two runs of the same program differ by less than a tenth of this.
const TOLERANCE: f64 = 0.02;
