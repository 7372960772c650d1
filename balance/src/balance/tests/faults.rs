//! What is wrong with the servers that the policies are compared with. The simulation in virtual time and the processes of
//! `benches/policies` both include this file, so the servers of both are the same. Times are in microseconds since the start of the
//! channels.

pub(super) const SECOND: u64 = 1_000_000;
/// The time of a call that fails at once.
pub(super) const FAILURE_TIME: u64 = 200;
/// Calls that a server works on at the same time. Other calls wait.
pub(super) const WORKERS: usize = 16;
/// The factor of the time of a call at a slow server.
const SLOWNESS: u8 = 50;
/// The time of a call at an idle server. Each call takes up to 20 % more or less.
const SERVICE_TIME: u64 = 5_000;
/// With servers of unequal capacity, calls take longer, so that few calls per second suffice to keep a server busy.
const LONG_SERVICE_TIME: u64 = 75_000;
/// The time for which a flapping server is slow, and then not slow.
const FLAPPING: u64 = 5 * SECOND;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// All servers are equal.
    None,
    /// One server takes fifty times as long.
    Slow,
    /// One server takes fifty times as long for five seconds, and is as fast as the others for the next five seconds.
    Flapping,
    /// In each second, each server takes ten times as long with a probability of one tenth.
    Antagonist,
    /// Every second server has half of the workers. The weights of the servers are equal.
    HalfCapacity,
    /// One server fails every call at once.
    Fails,
}

impl Fault {
    pub(super) const ALL: [Self; 6] = [
        Self::None,
        Self::Slow,
        Self::Flapping,
        Self::Antagonist,
        Self::HalfCapacity,
        Self::Fails,
    ];

    /// Returns whether a call that is sent to this server now has a disadvantage.
    pub(super) fn is_bad(self, server: usize, now: u64) -> bool {
        match self {
            Self::None => false,
            Self::Slow | Self::Fails => server == 0,
            Self::Flapping => server == 0 && (now / FLAPPING).is_multiple_of(2),
            Self::Antagonist => is_disturbed(server, now / SECOND),
            Self::HalfCapacity => server.is_multiple_of(2),
        }
    }

    /// Returns whether this server fails every call.
    pub(super) fn fails(self, server: usize) -> bool {
        self == Self::Fails && server == 0
    }

    pub(super) fn workers(self, server: usize) -> usize {
        match self {
            Self::HalfCapacity if self.is_bad(server, 0) => WORKERS / 2,
            // The server waits for something. Without more workers, calls would queue there for minutes.
            Self::Slow | Self::Flapping if self.is_bad(server, 0) => {
                WORKERS * usize::from(SLOWNESS)
            }
            _ => WORKERS,
        }
    }

    /// Returns the mean time of a call that a worker begins now.
    pub(super) fn service_time(self, server: usize, now: u64) -> u64 {
        match self {
            Self::Slow | Self::Flapping if self.is_bad(server, now) => {
                SERVICE_TIME * u64::from(SLOWNESS)
            }
            Self::Antagonist if self.is_bad(server, now) => SERVICE_TIME * 10,
            Self::HalfCapacity => LONG_SERVICE_TIME,
            _ => SERVICE_TIME,
        }
    }
}

/// Draws from a seed of its own for each second and server, so that all policies have the same disturbances.
fn is_disturbed(server: usize, second: u64) -> bool {
    let seed = second << 32 | server as u64;
    fastrand::Rng::with_seed(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)).u8(..10) == 0
}
