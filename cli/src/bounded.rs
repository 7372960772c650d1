//! Runs many requests with a limit on the number of requests at once.

use futures_util::StreamExt;
use futures_util::stream;

/// The number of requests at once. A service with thousands of servers must cause no burst of connections.
const LIMIT: usize = 32;

/// Runs the futures, at most [`LIMIT`] at once, and returns their results in the order of the futures.
pub(crate) async fn run_all<F: Future>(futures: impl IntoIterator<Item = F>) -> Vec<F::Output> {
    stream::iter(futures).buffered(LIMIT).collect().await
}
