//! Servers that limit the age of connections.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::time::timeout;
use tonic::{Request, Status};
use tonic_etcd::BalancedChannel;

use crate::proto::wanting;
use crate::raw::{Connection, DATA, END_STREAM, GOAWAY, HEADERS, PING, Raw};
use crate::servers::{Kind, Options, Server};
use crate::support::{SOON, all_ready};
use crate::tap::Tap;
use crate::{Client, calling, empty, ms, shown, stream};

/// Runs unary calls and streams over connections that the server closes at a maximum age. The long streams last for 0.5 s, so they are
/// longer than a maximum age of 300 ms.
async fn closed_at(kind: Kind, age: Duration, period: Duration) {
    let options = Options {
        max_age: Some(age),
        ..Options::default()
    };
    let Some(server) = Server::start(kind, options).await else {
        return;
    };
    let link = Tap::start(server.address.clone()).await;
    let channel = BalancedChannel::builder()
        .addresses([link.address.to_string()])
        .connect_lazy();
    all_ready(&channel, 1).await;
    let unary = calling(&channel, 4, empty);
    let short = calling(&channel, 4, |client| streamed(client, 20, Duration::ZERO));
    let long = calling(&channel, 4, |client| streamed(client, 10, ms(50)));
    tokio::time::sleep(period).await;
    let mut wrong = Vec::new();
    for (callers, what) in [
        (unary, "unary"),
        (short, "short streams"),
        (long, "long streams"),
    ] {
        let (calls, failed) = callers.stopped().await;
        let what = format!(
            "{kind:?}, {age:?}, {what}: {calls} calls, {}",
            shown(&failed)
        );
        println!("{what}");
        if !failed.is_empty() {
            wrong.push(what);
        }
    }
    println!("{kind:?}, {age:?}: {} connections", link.connections());
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(
        link.connections() > 1,
        "{kind:?}: the server must have closed connections"
    );
}

async fn streamed(client: Client, responses: usize, interval: Duration) -> Result<(), Status> {
    let request = Request::new(wanting(vec![(1_000, interval); responses]));
    let received = stream(client, request).await?;
    assert_eq!(received, responses, "a finished stream must be complete");
    Ok(())
}

for_each_server!(an_age_of_1_s_fails_no_call);
async fn an_age_of_1_s_fails_no_call(kind: Kind) {
    closed_at(kind, ms(1_000), ms(6_000)).await;
}

for_each_server!(an_age_of_300_ms_fails_no_call);
async fn an_age_of_300_ms_fails_no_call(kind: Kind) {
    closed_at(kind, ms(300), ms(6_000)).await;
}

/// The grace period of the server is unlimited, so a stream may last longer than the maximum age of its connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_longer_than_the_maximum_age_finish_with_grpc_java() {
    let options = Options {
        max_age: Some(ms(3_000)),
        ..Options::default()
    };
    let Some(server) = Server::start(Kind::Java, options).await else {
        return;
    };
    // The test uses six channels, because a single channel loses its connection only a few times during the test.
    let mut callers = Vec::new();
    for _ in 0..6 {
        let channel = BalancedChannel::builder()
            .addresses([&server.address])
            .connect_lazy();
        all_ready(&channel, 1).await;
        callers.push(calling(&channel, 2, |client| streamed(client, 50, ms(100))));
        callers.push(calling(&channel, 4, |client| streamed(client, 5, ms(10))));
        callers.push(calling(&channel, 4, empty));
    }
    tokio::time::sleep(ms(10_000)).await;
    let (mut all, mut failures) = (0, Vec::new());
    for caller in callers {
        let (calls, failed) = timeout(SOON, caller.stopped()).await.unwrap();
        all += calls;
        failures.extend(failed);
    }
    let log = server.logged();
    let errors = log.matches("does not exist for inbound frame").count();
    let what = format!(
        "grpc-java, age 3 s: {all} calls, {}; connection errors of the server: {errors}",
        shown(&failures)
    );
    println!("{what}");
    assert!(failures.is_empty() && errors == 0, "{what}");
}

/// RFC 9113, section 6.8: the receiver of a GOAWAY opens no more streams on the connection. The response to a PING that is sent after the
/// GOAWAY shows that the client has received the GOAWAY. grpc-java treats DATA of a stream that was opened later as a connection error and
/// ends all calls of the connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_stream_is_opened_after_the_answer_to_the_ping_that_follows_a_goaway() {
    let late = Arc::<AtomicUsize>::default();
    let noted = Arc::clone(&late);
    let server = Raw::start(&[], move |connection| {
        graceful(connection, Arc::clone(&noted))
    })
    .await;
    let channel = BalancedChannel::builder()
        .addresses([server.address.to_string()])
        .connect_lazy();
    all_ready(&channel, 1).await;
    let callers = calling(&channel, 16, empty);
    tokio::time::sleep(ms(3_000)).await;
    let (calls, failed) = callers.stopped().await;
    let (late, connections) = (late.load(Ordering::SeqCst), server.connections());
    let what = format!(
        "{calls} calls over {connections} connections: {late} streams opened late, {}",
        shown(&failed)
    );
    println!("{what}");
    assert!(connections > 5, "{what}");
    assert!(late == 0 && failed.is_empty(), "{what}");
}

/// Serves 50 calls, and then sends a GOAWAY and a PING. Counts the streams that are opened after the PING response.
async fn graceful(mut connection: Connection, late: Arc<AtomicUsize>) -> io::Result<()> {
    let (mut served, mut answered) = (0, usize::MAX);
    loop {
        let frame = connection.next().await?;
        if frame.kind == HEADERS && connection.answered.len() > answered {
            late.fetch_add(1, Ordering::SeqCst);
        }
        if !matches!(frame.kind, HEADERS | DATA) || frame.flags & END_STREAM == 0 {
            continue;
        }
        connection.headers(frame.stream);
        // An empty message.
        connection.data(frame.stream, &[0; 5]).await?;
        connection.trailers(frame.stream);
        served += 1;
        if served == 50 {
            answered = connection.answered.len();
            connection.put(GOAWAY, 0, 0, &[0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
            connection.put(PING, 0, 0, b"graceful");
        }
    }
}
