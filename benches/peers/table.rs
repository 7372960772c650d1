//! The results, and their tables.

use std::time::Duration;

use super::join::Join;
use super::process::Peer;

/// What a client has measured.
pub struct Sample {
    calls: f64,
    failed: f64,
    rate: f64,
    /// CPU time of a call, in microseconds: that of the client's own code, and that of the kernel.
    user: f64,
    system: f64,
    /// Percentiles of the latency, in milliseconds.
    p50: f64,
    p99: f64,
}

impl Sample {
    /// Parses the line that a client prints.
    pub fn parse(line: &str, duration: Duration) -> Self {
        let numbers: Vec<f64> = line
            .split_whitespace()
            .map(|number| number.parse().unwrap())
            .collect();
        let [calls, failed, user, system, p50, p99, _p999] = numbers[..] else {
            panic!("seven numbers are required: {line}");
        };
        Self {
            calls,
            failed,
            rate: calls / duration.as_secs_f64(),
            user: user / calls,
            system: system / calls,
            p50: p50 / 1e3,
            p99: p99 / 1e3,
        }
    }

    fn cpu(&self) -> f64 {
        self.user + self.system
    }
}

/// Prints medians, with the least and the greatest value in parentheses. The ratios are those of the first peer to the peer of the row.
pub fn print(title: &str, peers: &[Peer], samples: &[Vec<Sample>]) {
    println!(
        "\n{title}\n\n| client | calls/s | CPU per call | its own code | kernel | p50 | p99 | our CPU per call to this one | own code | our p99 to this one | failed |\n|---|---|---|---|---|---|---|---|---|---|---|"
    );
    for (peer, own) in peers.iter().zip(samples) {
        let spread = |figure: fn(&Sample) -> f64, digits: usize| {
            let figures: Vec<f64> = own.iter().map(figure).collect();
            let (least, greatest) = range(&figures);
            format!(
                "{:.digits$} ({least:.digits$}-{greatest:.digits$})",
                median(figures)
            )
        };
        let ratio = |figure: fn(&Sample) -> f64| {
            let pairs = samples[0].iter().zip(own);
            median(
                pairs
                    .map(|(ours, own)| figure(ours) / figure(own))
                    .collect(),
            )
        };
        println!(
            "| {} | {} | {} us | {} us | {} us | {} ms | {} ms | {:.2} | {:.2} | {:.2} | {} |",
            peer.name(),
            spread(|sample| sample.rate, 0),
            spread(Sample::cpu, 1),
            spread(|sample| sample.user, 1),
            spread(|sample| sample.system, 1),
            spread(|sample| sample.p50, 2),
            spread(|sample| sample.p99, 2),
            ratio(Sample::cpu),
            ratio(|sample| sample.user),
            ratio(|sample| sample.p99),
            own.iter().map(|sample| sample.failed).sum::<f64>(),
        );
    }
}

/// Prints the failed calls of each kill.
pub fn print_kills(peers: &[Peer], samples: &[Vec<Sample>], kills: usize) {
    println!(
        "\neach of {kills} servers is killed in turn and started again, 16 callers\n\n| client | kills | calls | failed calls per kill | in each round |\n|---|---|---|---|---|"
    );
    for (peer, own) in peers.iter().zip(samples) {
        let failed: Vec<_> = own
            .iter()
            .map(|sample| sample.failed / kills as f64)
            .collect();
        let rounds: Vec<_> = failed.iter().map(|failed| format!("{failed:.1}")).collect();
        println!(
            "| {} | {} | {} | {:.1} | {} |",
            peer.name(),
            kills * own.len(),
            own.iter().map(|sample| sample.calls).sum::<f64>(),
            failed.iter().sum::<f64>() / own.len() as f64,
            rounds.join(", "),
        );
    }
}

/// Prints the times from a `put` to the first call.
pub fn print_joins(title: &str, peers: &[Peer], joins: &[Vec<Join>]) {
    println!(
        "\n{title}\n\n| client | joins | first call, p50 | p99 | etcd's answer, p50 | first call after the answer, p50 | p99 |\n|---|---|---|---|---|---|---|"
    );
    for (peer, own) in peers.iter().zip(joins) {
        let millis = |time: fn(&Join) -> f64, share: f64| {
            let mut times: Vec<_> = own.iter().map(|join| time(join) * 1e3).collect();
            times.sort_unstable_by(f64::total_cmp);
            times[((times.len() as f64 * share) as usize).min(times.len() - 1)]
        };
        let first_call = |join: &Join| join.first_call.as_secs_f64();
        let acknowledged = |join: &Join| join.acknowledged.as_secs_f64();
        let after = |join: &Join| join.first_call.as_secs_f64() - join.acknowledged.as_secs_f64();
        println!(
            "| {} | {} | {:.2} ms | {:.2} ms | {:.2} ms | {:.2} ms | {:.2} ms |",
            peer.name(),
            own.len(),
            millis(first_call, 0.5),
            millis(first_call, 0.99),
            millis(acknowledged, 0.5),
            millis(after, 0.5),
            millis(after, 0.99),
        );
    }
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_unstable_by(f64::total_cmp);
    figures[figures.len() / 2]
}

fn range(figures: &[f64]) -> (f64, f64) {
    let least = figures.iter().copied().fold(f64::INFINITY, f64::min);
    let greatest = figures.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    (least, greatest)
}
