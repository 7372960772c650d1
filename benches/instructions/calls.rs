//! Unary calls with requests and responses of 300 bytes, to four in-memory peers.

use std::time::Duration;

use tokio::runtime::Runtime;
use tonic::Request;
use tonic::body::Body;
use tonic::client::GrpcService;
use tonic_etcd::channel::{ChannelBuilder, Select};
use tonic_etcd::traces::Traces;
use tonic_etcd::{BalancedChannel, LbPolicy};

use super::bare_h2::H2;
use super::greeter::HelloRequest;
use super::greeter::greeter_client::GreeterClient;
use super::measured;
use super::metrics;
use super::peer::{Peer, in_memory, ready};

const ENDPOINTS: usize = 4;
/// Calls before the first counted call. They fill the tables of HPACK and let buffers grow.
const WARM_UP: usize = 64;
/// A value of the usual length of a trace id.
const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
const METADATA: [(&str, &str); 3] = [
    ("x-request-id", TRACE),
    ("traceparent", TRACE),
    ("x-tenant", "tenant-17"),
];

/// The channel that makes the calls.
#[derive(Clone, Copy)]
pub enum Channel {
    Balanced,
    /// Balanced, with metrics and the SDK of OpenTelemetry.
    Measured,
    /// Balanced, with metrics whose values are discarded: the part of the library in the cost of metrics.
    Discarded,
    /// Balanced, with traces that no subscriber receives.
    Traced,
    BareH2,
}

#[derive(Clone, Copy)]
pub struct Options {
    pub deadline: bool,
    /// The number of metadata entries.
    pub metadata: usize,
    /// Whether the program has created a `Select`, so that each call looks for one.
    pub selects: bool,
}

impl Options {
    pub const fn with_metadata(mut self, entries: usize) -> Self {
        self.metadata = entries;
        self
    }

    fn request(self) -> Request<HelloRequest> {
        let mut request = Request::new(HelloRequest {
            name: "x".repeat(300),
            replies: 0,
        });
        if self.deadline {
            request.set_timeout(Duration::from_secs(5));
        }
        for (name, value) in &METADATA[..self.metadata] {
            request.metadata_mut().insert(*name, value.parse().unwrap());
        }
        request
    }
}

/// Makes this many calls, spread over this many callers.
///
/// The time is virtual, and stands still as long as a task can run. Otherwise timers of the channel would fire during some runs and not
/// during others, and under valgrind the connections would be silent for so long between two calls that the calls check them.
pub fn run(channel: Channel, callers: usize, options: Options, calls: usize) {
    if options.selects {
        drop(Select::version("1.2"));
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap();
    match channel {
        Channel::BareH2 => {
            let sockets = (0..ENDPOINTS).map(|_| Peer::default()).collect();
            let channel = runtime.block_on(H2::over(sockets));
            call_all(&runtime, &channel, callers, options, calls);
        }
        _ => {
            let builder = BalancedChannel::builder();
            // The provider ends its instruments when it is dropped, at the end. It starts a thread, and in a process with several threads the
            // allocator takes about 200 instructions more for a call. So the other cases have none.
            let provider = matches!(channel, Channel::Measured).then(metrics::provider);
            let builder = match (channel, &provider) {
                (_, Some(provider)) => builder.metrics(metrics::recorder(provider)),
                (Channel::Discarded, _) => builder.metrics(metrics::Discard),
                (Channel::Traced, _) => builder.traces(Traces::new()),
                _ => builder,
            };
            let channel = runtime.block_on(balanced(builder));
            call_all(&runtime, &channel, callers, options, calls);
        }
    }
}

async fn balanced(builder: ChannelBuilder) -> BalancedChannel {
    let addresses = (1..=ENDPOINTS).map(|index| format!("10.0.0.{index}:1"));
    let channel = in_memory(builder, LbPolicy::default())
        .addresses(addresses)
        .connect_lazy();
    ready(&channel, ENDPOINTS).await;
    channel
}

fn call_all<S>(runtime: &Runtime, channel: &S, callers: usize, options: Options, calls: usize)
where
    S: GrpcService<Body, Future: Send, Error: Send> + Clone + Send + 'static,
    S::ResponseBody:
        http_body::Body<Data = bytes::Bytes, Error: Into<BoxError> + Send> + Send + 'static,
{
    let round = |calls: usize| {
        runtime.block_on(async {
            let callers: Vec<_> = (0..callers)
                .map(|_| tokio::spawn(call(channel.clone(), options, calls / callers)))
                .collect();
            for caller in callers {
                caller.await.unwrap();
            }
        });
    };
    round(WARM_UP);
    measured(|| round(calls));
}

async fn call<S>(channel: S, options: Options, calls: usize)
where
    S: GrpcService<Body>,
    S::ResponseBody:
        http_body::Body<Data = bytes::Bytes, Error: Into<BoxError> + Send> + Send + 'static,
{
    let mut client = GreeterClient::new(channel);
    for _ in 0..calls {
        let response = client.say_hello(options.request()).await.unwrap();
        assert_eq!(response.get_ref().message.len(), 300);
    }
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;
