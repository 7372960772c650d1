//! The cases of gRPC's negative-http2-test-descriptions.md.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use prost::Message;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::{Code, Request, Status};
use tonic_etcd::BalancedChannel;

use crate::Client;
use crate::cases::{LARGE_RESPONSE, assert_zeros, large, large_request};
use crate::proto::{SimpleResponse, payload, wanting};
use crate::raw::{Connection, GOAWAY, MAX_CONCURRENT_STREAMS, PING, RST_STREAM, Raw};
use crate::support::{SOON, all_ready};

async fn over(server: &Raw) -> BalancedChannel {
    let channel = BalancedChannel::builder()
        .addresses([server.address.to_string()])
        .connect_lazy();
    all_ready(&channel, 1).await;
    channel
}

/// Returns a response with its gRPC length prefix.
fn response(size: i32) -> Vec<u8> {
    let message = SimpleResponse {
        payload: Some(payload(size)),
    };
    let mut frame = vec![0];
    let length = u32::try_from(message.encoded_len()).unwrap();
    frame.extend_from_slice(&length.to_be_bytes());
    message.encode(&mut frame).unwrap();
    frame
}

async fn answer(connection: &mut Connection, stream: u32) -> io::Result<()> {
    connection.headers(stream);
    let message = response(LARGE_RESPONSE);
    connection.data(stream, &message).await?;
    connection.trailers(stream);
    connection.flush().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn goaway_makes_the_next_call_use_another_connection() {
    let server = Raw::start(&[], |mut connection| async move {
        let stream = connection.request().await?;
        answer(&mut connection, stream).await?;
        let mut goaway = stream.to_be_bytes().to_vec();
        goaway.extend_from_slice(&[0; 4]);
        connection.put(GOAWAY, 0, 0, &goaway);
        loop {
            connection.next().await?;
        }
    })
    .await;
    let channel = over(&server).await;
    for calls in 1..=3 {
        large(channel.clone()).await.unwrap();
        assert!(
            server.connections() >= calls,
            "each connection must serve only one call"
        );
    }
}

/// Resets each stream after a part of the response. Returns the statuses of a unary call and of a stream, and the number of messages of the
/// stream.
async fn reset_after(code: u32, part: fn(&[u8]) -> &[u8]) -> (Status, Status, usize) {
    let server = Raw::start(&[], move |mut connection| async move {
        loop {
            let stream = connection.request().await?;
            connection.headers(stream);
            connection
                .data(stream, part(&response(LARGE_RESPONSE)))
                .await?;
            connection.put(RST_STREAM, 0, stream, &code.to_be_bytes());
        }
    })
    .await;
    let channel = over(&server).await;
    let unary = large(channel.clone()).await.unwrap_err();
    let mut request = Request::new(wanting([(LARGE_RESPONSE, Duration::ZERO)]));
    request.set_timeout(SOON);
    let call = Client::new(channel).streaming_output_call(request).await;
    let mut messages = 0;
    let streaming = match call {
        Err(status) => status,
        Ok(answer) => {
            let mut answer = answer.into_inner();
            loop {
                match answer.message().await {
                    Ok(Some(_)) => messages += 1,
                    Ok(None) => panic!("the stream must end with an error"),
                    Err(status) => break status,
                }
            }
        }
    };
    assert_eq!(
        server.connections(),
        1,
        "a reset stream must not close the connection"
    );
    (unary, streaming, messages)
}

/// Error codes of `RST_STREAM`, each with the gRPC codes that are valid for it. The server of gRPC's own test sends only the first.
const RESETS: [(u32, &[Code]); 4] = [
    (0, &[Code::Internal, Code::Unknown]),
    (2, &[Code::Internal]),
    (8, &[Code::Cancelled]),
    (11, &[Code::ResourceExhausted]),
];

async fn resets(what: &str, part: fn(&[u8]) -> &[u8], whole: usize) {
    let mut wrong = Vec::new();
    for (code, expected) in RESETS {
        let outcome = timeout(SOON, reset_after(code, part)).await;
        let (unary, streaming, messages) = outcome.expect("the calls must end");
        println!("{what}, code {code}: {unary:?}; {streaming:?} after {messages}");
        for status in [unary, streaming] {
            if !expected.contains(&status.code()) {
                wrong.push(format!("{what}, code {code}: {status:?}"));
            }
        }
        if messages > whole {
            wrong.push(format!("{what}, code {code}: {messages} messages"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rst_after_header_fails_the_call() {
    resets("after the header", |_| &[], 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rst_during_data_fails_the_call_without_a_message() {
    resets("during data", |message| &message[..message.len() / 2], 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rst_after_data_fails_the_call() {
    resets("after data", |message| message, 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ping_is_answered_at_every_stage() {
    let server = Raw::start(&[], |mut connection| async move {
        ping(&mut connection, b"settings").await?;
        loop {
            let stream = connection.request().await?;
            ping(&mut connection, b"-request").await?;
            connection.headers(stream);
            ping(&mut connection, b"-headers").await?;
            let message = response(LARGE_RESPONSE);
            connection.data(stream, &message).await?;
            ping(&mut connection, b"----data").await?;
            connection.trailers(stream);
            ping(&mut connection, b"trailers").await?;
        }
    })
    .await;
    let channel = over(&server).await;
    for _ in 0..3 {
        large(channel.clone()).await.unwrap();
    }
    assert_eq!(server.connections(), 1);
}

/// Sends a PING and waits for its response.
async fn ping(connection: &mut Connection, payload: &'static [u8]) -> io::Result<()> {
    let before = connection.answered.len();
    connection.put(PING, 0, 0, payload);
    while connection.answered.len() == before {
        connection.next().await?;
    }
    assert_eq!(connection.answered[before], payload);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limit_of_one_stream_is_respected_and_every_call_is_served() {
    let most = Arc::<AtomicUsize>::default();
    let noted = Arc::clone(&most);
    let server = Raw::start(&[(MAX_CONCURRENT_STREAMS, 1)], move |mut connection| {
        let noted = Arc::clone(&noted);
        async move {
            loop {
                let stream = connection.request().await?;
                answer(&mut connection, stream).await?;
                noted.fetch_max(connection.most, Ordering::SeqCst);
            }
        }
    })
    .await;
    let channel = over(&server).await;
    large(channel.clone()).await.unwrap();
    let mut calls = JoinSet::new();
    for _ in 0..10 {
        calls.spawn(large(channel.clone()));
    }
    for outcome in calls.join_all().await {
        outcome.unwrap();
    }
    assert_eq!(
        most.load(Ordering::SeqCst),
        1,
        "at most one stream may be open at once"
    );
    println!("{} connections", server.connections());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn padding_of_data_frames_is_discarded_and_its_window_is_returned() {
    // The server sends each byte in a frame of its own with 255 bytes of padding. With the padding, the response is many times larger than
    // the window of a stream.
    const SIZE: i32 = 20_000;
    let server = Raw::start(&[], |mut connection| async move {
        loop {
            let stream = connection.request().await?;
            connection.headers(stream);
            connection.padded(stream, &response(SIZE), 255).await?;
            connection.trailers(stream);
        }
    })
    .await;
    let channel = over(&server).await;
    let mut client = Client::new(channel);
    let call = timeout(SOON, client.unary_call(large_request()));
    let answer = call.await.expect("the call must end").unwrap();
    assert_zeros(&answer.into_inner().payload.unwrap().body, SIZE);
}
