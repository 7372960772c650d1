//! One call: from the request to the response or its error.
//!
//! ```text
//!   future: the first attempt, without a task, a lock or a box
//!      │ not ready, refused, lost, or an error that a policy may cover                 │ hedged
//!      ▼                                                                               ▼
//!   retry_loop ── one attempt ──▶ transparent_retry ──▶ wait_for_endpoint ──▶ prepare ◀── hedging
//!      │ failed                                                                        │
//!      └───▶ retry::decision (policy, progress, budget, pushback) ◀────────────────────┘
//! ```

mod answer;
mod attempt;
mod attempt_log;
mod body;
mod core;
mod counted_body;
mod extension;
mod future;
mod hedging;
mod history;
mod http_status;
mod kept_fields;
mod live_config;
mod load_report;
mod message_limits;
pub(crate) mod method_config;
mod observation;
mod prepare;
mod pushback;
mod request;
mod request_headers;
pub(crate) mod retry;
mod retry_loop;
mod routing;
mod status;
mod transparent_retry;
mod wait_for_endpoint;

pub use body::ResponseBody;
pub use extension::{ServedBy, WaitForReady};
pub use future::ResponseFuture;
pub use routing::Routing;
pub use status::CallError;

pub(crate) use self::core::Core;
pub(crate) use live_config::LiveConfig;
pub(crate) use wait_for_endpoint::ready;
