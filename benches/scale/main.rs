//! Scale: the cost of a pick (L3) and of a change (L4) in growing sets of endpoints, and the time until a change in etcd is effective (L5).
//!
//! ```sh
//! cargo bench --bench scale              # everything, about two minutes
//! cargo bench --bench scale -- L3 L4     # some of it
//! ```
//!
//! L3 and L4 use in-memory endpoints, to which no call is sent. L4 and L5 use a real etcd. The bench `instructions` counts the instructions
//! of a pick.
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

mod changes;
mod cpu;
mod discovery;
#[path = "../../examples/greeter/mod.rs"]
mod greeter;
mod peer;
mod picks;
#[path = "../load/server.rs"]
mod server;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let ["serve", delay, address] = args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        return server::serve(delay.parse().unwrap(), address);
    }
    let wanted: Vec<_> = args.iter().filter(|arg| arg.starts_with('L')).collect();
    let wants = |name: &str| wanted.is_empty() || wanted.iter().any(|wanted| *wanted == name);
    if wants("L3") {
        picks::run();
    }
    if wants("L4") {
        changes::run();
    }
    if wants("L5") {
        discovery::run();
    }
}

/// Returns the median.
fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_unstable_by(f64::total_cmp);
    figures[figures.len() / 2]
}

/// Returns a percentile of the figures; `share` is 0.9 for the 90th percentile.
fn percentile(mut figures: Vec<f64>, share: f64) -> f64 {
    figures.sort_unstable_by(f64::total_cmp);
    figures[((figures.len() as f64 * share) as usize).min(figures.len() - 1)]
}
