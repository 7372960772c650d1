//! Instructions: what a call, a pick and a change of the endpoints cost, counted by callgrind, and compared with `baseline.json`.
//!
//! ```sh
//! make instructions                         # fails if a case costs 2 % more than in the baseline
//! INSTRUCTIONS_UPDATE=1 make instructions   # writes the baseline
//! cargo bench --bench instructions -- call  # the cases whose name contains a word
//! ```
//!
//! An instruction count does not depend on the load of the machine, so it shows changes that a measurement of time does not. It depends on
//! the compiler and the C library, so the baseline names them. It contains no system calls and no cache misses: the bench `load` measures
//! those.
//!
//! Each case runs in a process of its own, with one thread and in-memory peers, whose instructions are not counted. The crate `gungraun`,
//! which also runs benches under callgrind, was rejected: it needs a second program in exactly its version, and its baseline is a file of
//! callgrind that names no toolchain and is not readable in a diff.
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::cast_precision_loss,
    clippy::pedantic,
    reason = "this is a benchmark, and a failed step ends it with a panic"
)]

#[path = "../load/bare_h2.rs"]
mod bare_h2;
mod baseline;
mod calls;
mod cases;
mod changes;
#[path = "../../examples/greeter/mod.rs"]
mod greeter;
mod metrics;
#[path = "../scale/peer.rs"]
mod peer;
mod picks;
mod valgrind;

use std::process::ExitCode;

use baseline::{Baseline, Environment};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [command, name] = &args[..]
        && command == "count"
    {
        cases::run(name);
        return ExitCode::SUCCESS;
    }
    let Some(valgrind) = valgrind::version() else {
        println!("LEFT OUT: the instruction counts, because valgrind is missing");
        return ExitCode::SUCCESS;
    };
    let word = args.iter().find(|arg| !arg.starts_with('-'));
    let cases: Vec<_> = cases::names()
        .filter(|name| word.is_none_or(|word| name.contains(word.as_str())))
        .collect();
    let counts = cases.iter().map(|name| {
        let counted =
            valgrind::instructions(name, cases::is_call(name)) / cases::repetitions(name) as f64;
        ((*name).to_owned(), counted.round() as u64)
    });
    let now = Baseline {
        environment: Environment::current(valgrind),
        instructions: counts.collect(),
    };
    if std::env::var_os("INSTRUCTIONS_UPDATE").is_some() {
        assert!(word.is_none(), "the baseline contains all cases");
        now.write();
        now.compare(&now);
        return ExitCode::SUCCESS;
    }
    if now.compare(&Baseline::read()) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Runs the code whose instructions are counted.
// Never inlined, because callgrind recognises it by its name.
#[inline(never)]
fn measured<T>(work: impl FnOnce() -> T) -> T {
    work()
}
