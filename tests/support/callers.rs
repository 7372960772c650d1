//! Callers that count their calls and record failed calls.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tonic::{Request, Status};
use tonic_etcd::BalancedChannel;

use super::greeter::greeter_client::GreeterClient;
use super::{SOON, hello};

pub type Client = GreeterClient<BalancedChannel>;

/// A failed call.
#[derive(Debug)]
pub struct Failed {
    pub began: Instant,
    pub ended: Instant,
    pub status: Status,
}

/// Callers that send one call after the other. After a failed call, a caller pauses for 1 ms. Without this pause, calls that fail at once
/// would produce millions of failures.
pub struct Callers {
    stop: watch::Sender<bool>,
    calls: Arc<AtomicU64>,
    failed: mpsc::UnboundedReceiver<Failed>,
    tasks: Vec<JoinHandle<()>>,
}

impl Callers {
    /// Starts callers that send unary calls with a deadline of five seconds.
    pub fn start(channel: &BalancedChannel, callers: usize) -> Self {
        Self::making(channel, callers, async |mut client: Client| {
            client.say_hello(with_deadline(hello())).await.map(drop)
        })
    }

    /// Starts callers that send calls of any kind.
    pub fn making<F, Fut>(channel: &BalancedChannel, callers: usize, call: F) -> Self
    where
        F: Fn(Client) -> Fut + Clone + Send + 'static,
        Fut: Future<Output = Result<(), Status>> + Send,
    {
        let (stop, stopped) = watch::channel(false);
        let (fails, failed) = mpsc::unbounded_channel();
        let calls = Arc::new(AtomicU64::new(0));
        let caller = |_| {
            let client = GreeterClient::new(channel.clone());
            let (call, calls) = (call.clone(), Arc::clone(&calls));
            let (stopped, fails) = (stopped.clone(), fails.clone());
            tokio::spawn(async move {
                while !*stopped.borrow() {
                    calls.fetch_add(1, Ordering::Relaxed);
                    let began = Instant::now();
                    if let Err(status) = call(client.clone()).await {
                        let ended = Instant::now();
                        let failed = Failed {
                            began,
                            ended,
                            status,
                        };
                        assert!(
                            fails.send(failed).is_ok(),
                            "the receiver of failed calls must be alive"
                        );
                        sleep(Duration::from_millis(1)).await;
                    }
                }
            })
        };
        Self {
            tasks: (0..callers).map(caller).collect(),
            stop,
            calls,
            failed,
        }
    }

    /// Returns the number of calls that have begun.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// Returns the calls that have failed since the last call of this function.
    pub fn failed(&mut self) -> Vec<Failed> {
        std::iter::from_fn(|| self.failed.try_recv().ok()).collect()
    }

    /// Stops the callers. Returns the number of calls, and the failed calls that [`failed`](Self::failed) has not returned yet, in the
    /// order in which they ended.
    pub async fn stopped(mut self) -> (u64, Vec<Failed>) {
        self.stop.send_replace(true);
        for task in self.tasks.drain(..) {
            timeout(SOON, task).await.unwrap().unwrap();
        }
        (self.calls(), self.failed())
    }

    /// Stops the callers. Panics if a call has failed, and returns the number of calls otherwise.
    pub async fn none_failed(self) -> u64 {
        let (calls, failed) = self.stopped().await;
        assert!(
            failed.is_empty(),
            "{} of {calls} calls failed: {:?}",
            failed.len(),
            &failed[..failed.len().min(5)]
        );
        calls
    }
}

pub fn with_deadline<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(Duration::from_secs(5));
    request
}
