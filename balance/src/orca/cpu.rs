//! The CPU time of the process, as the operating system reports it.

use std::time::Duration;

/// Returns the CPU time that the process has used. `None` if the system does not have the file `/proc/self/stat` of Linux.
pub(super) fn process_time() -> Option<Duration> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    parse(&stat)
}

/// Returns the number of CPUs that the process can use.
pub(super) fn cpus() -> f64 {
    let cpus = std::thread::available_parallelism();
    let cpus = cpus.ok().and_then(|cpus| u32::try_from(cpus.get()).ok());
    f64::from(cpus.unwrap_or(1))
}

/// Returns the sum of the fields `utime` and `stime`.
fn parse(stat: &str) -> Option<Duration> {
    // The second field is the name of the program in parentheses, which may contain spaces and parentheses.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace().skip(UTIME);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    let ticks = ticks()?.checked_add(ticks()?)?;
    Some(Duration::from_millis(ticks.checked_mul(MILLIS_PER_TICK)?))
}

/// The number of fields between the name of the program and `utime`.
const UTIME: usize = 11;
/// The unit of the file is `USER_HZ`, which is 100 per second on all architectures that tokio supports.
const MILLIS_PER_TICK: u64 = 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_in_user_mode_and_in_the_kernel_is_added() {
        let stat = "4242 (a) (b c) S 1 4242 4242 0 -1 4194560 1 2 3 4 150 50 7 8 20 0 9 0 1 2 3\n";
        assert_eq!(parse(stat), Some(Duration::from_secs(2)));
        for garbage in ["", "1 (a", "1 (a) S 1", "1 (a) S 1 1 1 1 1 1 1 1 1 1 x y"] {
            assert_eq!(parse(garbage), None);
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_cpu_time_of_this_process_is_known_and_grows() {
        let before = process_time().expect("a time");
        let mut number = 1_u64;
        while process_time().expect("a time") == before {
            number = number.wrapping_mul(3);
        }
        assert!(cpus() >= 1.0 && number > 0);
    }
}
