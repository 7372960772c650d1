//! The compared clients and the cases.

use std::time::Duration;

use super::faults::Fault;

/// How the callers of each client make calls.
#[derive(Clone, Copy)]
pub enum Callers {
    /// A call starts after a random time since the start of the previous one. The value is the mean time.
    EachAfter(Duration),
    /// One caller starts a call when its previous call has ended.
    Closed,
}

impl Callers {
    pub fn name(self) -> String {
        match self {
            Self::EachAfter(period) => format!("{}/s", 1_000 / period.as_millis()),
            Self::Closed => "closed".to_owned(),
        }
    }
}

const EACH_SECOND: Callers = Callers::EachAfter(Duration::from_secs(1));
const TEN_PER_SECOND: Callers = Callers::EachAfter(Duration::from_millis(100));

#[derive(Clone, Copy)]
pub struct Case {
    pub fault: Fault,
    pub servers: usize,
    pub clients: usize,
    pub callers: Callers,
}

impl Case {
    /// Returns the first columns of a line of the output, after the source.
    pub fn name(&self) -> String {
        let Self {
            fault,
            servers,
            clients,
            callers,
        } = self;
        format!("{fault:?},{servers},{clients},{}", callers.name())
    }
}

/// The cases with their servers and callers, in batches. The cases of one batch run at the same time. A batch makes at most 6 000 calls per
/// second, which two cores serve with time to spare.
const BATCHES: [(&[Fault], usize, usize, Callers); 15] = [
    (&QUICK, 4, 40, EACH_SECOND),
    (&QUICK, 4, 4, TEN_PER_SECOND),
    (&[Fault::None], 4, 40, TEN_PER_SECOND),
    (&[Fault::Slow], 4, 40, TEN_PER_SECOND),
    (&[Fault::Flapping], 4, 40, TEN_PER_SECOND),
    (&[Fault::Antagonist], 4, 40, TEN_PER_SECOND),
    (&[Fault::HalfCapacity], 4, 40, TEN_PER_SECOND),
    (&[Fault::Fails], 4, 40, TEN_PER_SECOND),
    (&[Fault::None, Fault::Slow], 4, 1, Callers::Closed),
    (&[Fault::Flapping, Fault::Antagonist], 4, 1, Callers::Closed),
    (&[Fault::Fails], 4, 1, Callers::Closed),
    (&[Fault::Slow], 4, 4, Callers::Closed),
    (&[Fault::Antagonist], 4, 4, Callers::Closed),
    (&[Fault::Slow], 50, 4, Callers::Closed),
    (&[Fault::Antagonist], 50, 4, Callers::Closed),
];

/// The faults that show with few calls. Unequal capacity shows only if the servers are busy.
const QUICK: [Fault; 5] = [
    Fault::None,
    Fault::Slow,
    Fault::Flapping,
    Fault::Antagonist,
    Fault::Fails,
];

/// Returns the cases whose name contains one of the arguments, in batches.
pub fn batches(wanted: &[String]) -> Vec<Vec<Case>> {
    let is_wanted = |case: &Case| {
        let name = case.name();
        wanted.is_empty() || wanted.iter().any(|wanted| name.contains(wanted.as_str()))
    };
    let cases = BATCHES.map(|(faults, servers, clients, callers)| {
        let case = |fault: &Fault| Case {
            fault: *fault,
            servers,
            clients,
            callers,
        };
        faults.iter().map(case).filter(is_wanted).collect()
    });
    let mut batches = Vec::from(cases);
    batches.retain(|batch: &Vec<Case>| !batch.is_empty());
    batches
}
