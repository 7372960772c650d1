//! The descriptors of the instruments.

/// The name and the value of a label.
pub type Label<'a> = (&'static str, &'a str);

/// The kind of an instrument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// A sum that only increases.
    Counter,
    /// A sum that increases and decreases.
    UpDownCounter,
    /// A distribution of values.
    Histogram,
    /// A current value, which is read when the metrics are exported.
    Gauge,
}

/// The descriptor of an instrument.
#[derive(Debug)]
pub struct Instrument {
    name: &'static str,
    kind: Kind,
    unit: &'static str,
    description: &'static str,
    labels: &'static [&'static str],
    optional_labels: &'static [&'static str],
    is_default: bool,
}

impl Instrument {
    /// Creates the descriptor of an instrument that is enabled by default and has no optional labels. For sources of endpoints that have
    /// instruments of their own.
    #[must_use]
    pub const fn new(
        kind: Kind,
        name: &'static str,
        unit: &'static str,
        description: &'static str,
        labels: &'static [&'static str],
    ) -> Self {
        Self {
            name,
            kind,
            unit,
            description,
            labels,
            optional_labels: &[],
            is_default: true,
        }
    }

    const fn optional(mut self, labels: &'static [&'static str]) -> Self {
        self.optional_labels = labels;
        self
    }

    const fn experimental(mut self) -> Self {
        self.is_default = false;
        self
    }

    /// Returns the name, such as `grpc.client.attempt.started`.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// Returns the kind.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// Returns the unit in the notation of UCUM (the Unified Code for Units of Measure), as OpenTelemetry uses it: `s`, `By`, or a noun in
    /// braces.
    #[must_use]
    pub const fn unit(&self) -> &'static str {
        self.unit
    }

    /// Returns the description.
    #[must_use]
    pub const fn description(&self) -> &'static str {
        self.description
    }

    /// Returns the labels that every value has.
    #[must_use]
    pub const fn labels(&self) -> &'static [&'static str] {
        self.labels
    }

    /// Returns the labels that [`Metrics::with_label`](super::Metrics::with_label) adds.
    #[must_use]
    pub const fn optional_labels(&self) -> &'static [&'static str] {
        self.optional_labels
    }

    /// Returns whether the instrument is enabled by default. [`Metrics::enable`](super::Metrics::enable) enables the others.
    #[must_use]
    pub const fn is_default(&self) -> bool {
        self.is_default
    }

    /// Returns the upper bounds of the histogram's buckets: those of gRFC A66 for latencies, sizes and counts.
    #[must_use]
    pub fn boundaries(&self) -> &'static [f64] {
        match self.unit {
            "s" => &LATENCY,
            "By" => &SIZE,
            _ => &COUNT,
        }
    }
}

pub(crate) const METHOD: &str = "grpc.method";
pub(crate) const TARGET: &str = "grpc.target";
pub(crate) const STATUS: &str = "grpc.status";
pub(crate) const LOCALITY: &str = "grpc.lb.locality";
pub(crate) const BACKEND_SERVICE: &str = "grpc.lb.backend_service";
pub(crate) const DISCONNECT_ERROR: &str = "grpc.disconnect_error";
pub(crate) const SECURITY_LEVEL: &str = "grpc.security_level";
pub(crate) const DETECTION_METHOD: &str = "grpc.lb.outlier_detection.detection_method";
pub(crate) const UNENFORCED_REASON: &str = "grpc.lb.outlier_detection.unenforced_reason";
pub(crate) const STATE: &str = "tonic_etcd.state";

const PER_ATTEMPT: &[&str] = &[METHOD, TARGET, STATUS];
const PER_METHOD: &[&str] = &[METHOD, TARGET];
const PER_CHANNEL: &[&str] = &[TARGET];
const WHERE: &[&str] = &[LOCALITY, BACKEND_SERVICE];

pub(crate) static ATTEMPT_STARTED: Instrument = Instrument::new(
    Kind::Counter,
    "grpc.client.attempt.started",
    "{attempt}",
    "Attempts that were started, including those that have not ended.",
    PER_METHOD,
);
pub(crate) static ATTEMPT_DURATION: Instrument = Instrument::new(
    Kind::Histogram,
    "grpc.client.attempt.duration",
    "s",
    "Time from the start of an attempt to its end.",
    PER_ATTEMPT,
)
.optional(WHERE);
pub(crate) static ATTEMPT_SENT: Instrument = Instrument::new(
    Kind::Histogram,
    "grpc.client.attempt.sent_total_compressed_message_size",
    "By",
    "Compressed size of all request messages of an attempt.",
    PER_ATTEMPT,
)
.optional(WHERE);
pub(crate) static ATTEMPT_RECEIVED: Instrument = Instrument::new(
    Kind::Histogram,
    "grpc.client.attempt.rcvd_total_compressed_message_size",
    "By",
    "Compressed size of all response messages of an attempt.",
    PER_ATTEMPT,
)
.optional(WHERE);
pub(crate) static CALL_DURATION: Instrument = Instrument::new(
    Kind::Histogram,
    "grpc.client.call.duration",
    "s",
    "Time from the start of a call to its end, as the caller sees it.",
    PER_ATTEMPT,
);
pub(crate) static CALL_RETRIES: Instrument = Instrument::new(
    Kind::Histogram,
    "grpc.client.call.retries",
    "{retry}",
    "Retries of a call under a retry policy. Calls without a retry are not recorded.",
    PER_METHOD,
)
.experimental();
pub(crate) static CALL_TRANSPARENT_RETRIES: Instrument = Instrument::new(
    Kind::Histogram,
    "grpc.client.call.transparent_retries",
    "{transparent_retry}",
    "Transparent retries of a call. Calls without a transparent retry are not recorded.",
    PER_METHOD,
)
.experimental();
pub(crate) static CALL_HEDGES: Instrument = Instrument::new(
    Kind::Histogram,
    "grpc.client.call.hedges",
    "{hedge}",
    "Hedges of a call under a hedging policy. Calls without a hedge are not recorded.",
    PER_METHOD,
)
.experimental();
pub(crate) static CALL_RETRY_DELAY: Instrument = Instrument::new(
    Kind::Histogram,
    "grpc.client.call.retry_delay",
    "s",
    "Time between the attempts of a call in which no attempt was active. Calls without such a time are not recorded.",
    PER_METHOD,
)
.experimental();
pub(crate) static CONNECTIONS_SUCCEEDED: Instrument = Instrument::new(
    Kind::Counter,
    "grpc.subchannel.connection_attempts_succeeded",
    "{attempt}",
    "Connection attempts that succeeded.",
    PER_CHANNEL,
)
.optional(&[BACKEND_SERVICE, LOCALITY])
.experimental();
pub(crate) static CONNECTIONS_FAILED: Instrument = Instrument::new(
    Kind::Counter,
    "grpc.subchannel.connection_attempts_failed",
    "{attempt}",
    "Connection attempts that failed.",
    PER_CHANNEL,
)
.optional(&[BACKEND_SERVICE, LOCALITY])
.experimental();
pub(crate) static DISCONNECTIONS: Instrument = Instrument::new(
    Kind::Counter,
    "grpc.subchannel.disconnections",
    "{disconnection}",
    "Connections that have ended.",
    PER_CHANNEL,
)
.optional(&[BACKEND_SERVICE, LOCALITY, DISCONNECT_ERROR])
.experimental();
pub(crate) static OPEN_CONNECTIONS: Instrument = Instrument::new(
    Kind::UpDownCounter,
    "grpc.subchannel.open_connections",
    "{connection}",
    "Open connections.",
    PER_CHANNEL,
)
.optional(&[SECURITY_LEVEL, BACKEND_SERVICE, LOCALITY])
.experimental();
pub(crate) static EJECTIONS_ENFORCED: Instrument = Instrument::new(
    Kind::Counter,
    "grpc.lb.outlier_detection.ejections_enforced",
    "{ejection}",
    "Endpoints that outlier detection has ejected.",
    &[TARGET, DETECTION_METHOD],
)
.optional(&[BACKEND_SERVICE])
.experimental();
pub(crate) static EJECTIONS_UNENFORCED: Instrument = Instrument::new(
    Kind::Counter,
    "grpc.lb.outlier_detection.ejections_unenforced",
    "{ejection}",
    "Outliers that were not ejected, because too many endpoints were ejected already.",
    &[TARGET, DETECTION_METHOD, UNENFORCED_REASON],
)
.optional(&[BACKEND_SERVICE])
.experimental();
pub(crate) static LB_ENDPOINTS: Instrument = Instrument::new(
    Kind::Gauge,
    "tonic_etcd.lb.endpoints",
    "{endpoint}",
    "Endpoints of the channel, by state.",
    &[TARGET, STATE],
);
pub(crate) static LB_WAITING_CALLS: Instrument = Instrument::new(
    Kind::Gauge,
    "tonic_etcd.lb.waiting_calls",
    "{call}",
    "Calls that wait for an endpoint, for a free stream, or for a place below a limit on requests.",
    PER_CHANNEL,
);
pub(crate) static LB_DROPPED_CALLS: Instrument = Instrument::new(
    Kind::Counter,
    "tonic_etcd.lb.dropped_calls",
    "{call}",
    "Calls that failed because a limit on requests was reached.",
    PER_CHANNEL,
);

/// Returns all instruments of this crate.
#[must_use]
pub fn instruments() -> &'static [&'static Instrument] {
    &ALL
}

static ALL: [&Instrument; 18] = [
    &ATTEMPT_STARTED,
    &ATTEMPT_DURATION,
    &ATTEMPT_SENT,
    &ATTEMPT_RECEIVED,
    &CALL_DURATION,
    &CALL_RETRIES,
    &CALL_TRANSPARENT_RETRIES,
    &CALL_HEDGES,
    &CALL_RETRY_DELAY,
    &CONNECTIONS_SUCCEEDED,
    &CONNECTIONS_FAILED,
    &DISCONNECTIONS,
    &OPEN_CONNECTIONS,
    &EJECTIONS_ENFORCED,
    &EJECTIONS_UNENFORCED,
    &LB_ENDPOINTS,
    &LB_WAITING_CALLS,
    &LB_DROPPED_CALLS,
];

static LATENCY: [f64; 41] = [
    0.0, 0.00001, 0.00005, 0.0001, 0.0003, 0.0006, 0.0008, 0.001, 0.002, 0.003, 0.004, 0.005,
    0.006, 0.008, 0.01, 0.013, 0.016, 0.02, 0.025, 0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.13, 0.16,
    0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0,
];
static SIZE: [f64; 14] = [
    0.0,
    1024.0,
    2048.0,
    4096.0,
    16384.0,
    65536.0,
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
    67_108_864.0,
    268_435_456.0,
    1_073_741_824.0,
    4_294_967_296.0,
];
static COUNT: [f64; 18] = [
    0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0,
    16384.0, 32768.0, 65536.0,
];
