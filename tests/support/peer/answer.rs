//! Responses of a test server.

use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, Request, Response};
use prost::Message;
use tokio::time::{Instant, sleep, sleep_until};
use tonic::Code;

use super::{Counts, Shared};
use crate::support::greeter::{HelloReply, HelloRequest};

#[derive(Clone, Copy, Debug, Default)]
pub enum Answer {
    /// One reply, or as many as the request demands.
    #[default]
    Reply,
    /// A response of a web server or a proxy.
    Http {
        status: u16,
        content_type: Option<&'static str>,
        body: &'static str,
    },
    /// Headers with this grpc-status, and nothing else.
    Fail(Code),
    /// gRPC headers and a message, and then the end of the stream without trailers.
    NoTrailers,
    /// The stream is reset with `REFUSED_STREAM` before the call runs.
    Refuse,
    /// The stream is reset with CANCEL after this time.
    Cancel(Duration),
    /// No response until the client cancels the call.
    Hang,
    /// For streams: headers and one message at once, and then nothing until the client cancels the call.
    Quiet,
    /// The server ends the call when its own timer for the deadline fires. Until then, a unary call gets no response. A stream gets its
    /// headers and one message.
    Overrun(Enforce),
}

/// Reaction of a server whose timer for a deadline has fired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enforce {
    /// grpc-go, grpc-java: `RST_STREAM` with CANCEL, a moment before the client's own timer.
    Reset,
    /// tonic: headers with grpc-status CANCELLED.
    Status,
}

/// An HTML page like those of proxies.
pub const HTML: &str = "<html><body><h1>Not the page you are looking for</h1></body></html>";

impl Answer {
    pub const fn html(status: u16) -> Self {
        Self::Http {
            status,
            content_type: Some("text/html"),
            body: HTML,
        }
    }
}

pub(super) async fn run(
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    shared: Arc<Shared>,
) {
    let came = Instant::now();
    let manner = shared.manner();
    if let Answer::Refuse = manner.answer {
        return respond.send_reset(Reason::REFUSED_STREAM);
    }
    Counts::add(&shared.counts.executed);
    let (head, body) = request.into_parts();
    if head.headers.contains_key("x-kept") {
        Counts::add(&shared.counts.kept);
    }
    match manner.answer {
        Answer::Http {
            status,
            content_type,
            body,
        } => {
            sleep_unless_zero(manner.delay).await;
            html(&mut respond, status, content_type, body);
        }
        Answer::Fail(code) => {
            sleep_unless_zero(manner.delay).await;
            let _ = respond.send_response(failed(code, "as%20told"), true);
        }
        Answer::Cancel(after) => {
            sleep(after).await;
            respond.send_reset(Reason::CANCEL);
        }
        Answer::Hang => until_reset(&mut respond).await,
        Answer::Overrun(how) => {
            let unary = head.uri.path().ends_with("/SayHello");
            overrun(respond, how, unary, came + timeout(&head.headers)).await;
        }
        Answer::Refuse => {}
        Answer::Reply | Answer::NoTrailers | Answer::Quiet => {
            let wanted = read(body).await;
            sleep_unless_zero(manner.delay).await;
            let replies = match (manner.answer, head.uri.path().ends_with("/SayHellos")) {
                (Answer::Reply, true) => wanted.replies.max(1),
                _ => 1,
            };
            let text = match manner.reply {
                0 => wanted.name,
                bytes => "x".repeat(bytes),
            };
            let mut head = grpc();
            if let Some(content_type) = manner.content_type {
                head.headers_mut()
                    .insert("content-type", content_type.parse().unwrap());
            }
            let Ok(mut stream) = respond.send_response(head, false) else {
                return;
            };
            let frame = framed(&HelloReply { message: text });
            let last = matches!(manner.answer, Answer::NoTrailers);
            for _ in 0..replies {
                let _ = stream.send_data(frame.clone(), last);
            }
            match manner.answer {
                Answer::Reply => status(&mut stream, "0", ""),
                Answer::Quiet => {
                    let _ = std::future::poll_fn(|cx| stream.poll_reset(cx)).await;
                }
                _ => {}
            }
        }
    }
}

/// Waits until shortly before the deadline (see [`EARLY`]) and then ends the call.
async fn overrun(mut respond: SendResponse<Bytes>, how: Enforce, unary: bool, deadline: Instant) {
    let mut stream = None;
    if !unary {
        let Ok(mut opened) = respond.send_response(grpc(), false) else {
            return;
        };
        let _ = opened.send_data(framed(&HelloReply::default()), false);
        stream = Some(opened);
    }
    sleep_until(deadline.checked_sub(EARLY).unwrap_or(deadline)).await;
    match (how, &mut stream) {
        (Enforce::Reset, Some(stream)) => stream.send_reset(Reason::CANCEL),
        (Enforce::Reset, None) => respond.send_reset(Reason::CANCEL),
        (Enforce::Status, Some(stream)) => status(stream, "1", EXPIRED),
        (Enforce::Status, None) => {
            let _ = respond.send_response(failed(Code::Cancelled, EXPIRED), true);
        }
    }
}

async fn until_reset(respond: &mut SendResponse<Bytes>) {
    let _ = std::future::poll_fn(|cx| respond.poll_reset(cx)).await;
}

fn html(
    respond: &mut SendResponse<Bytes>,
    status: u16,
    content_type: Option<&'static str>,
    body: &'static str,
) {
    let mut head = Response::builder().status(status);
    if let Some(content_type) = content_type {
        head = head.header("content-type", content_type);
    }
    let Ok(mut stream) = respond.send_response(head.body(()).unwrap(), false) else {
        return;
    };
    let _ = stream.send_data(Bytes::from_static(body.as_bytes()), true);
}

fn status(stream: &mut SendStream<Bytes>, code: &str, message: &str) {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", code.parse().unwrap());
    if !message.is_empty() {
        trailers.insert("grpc-message", message.parse().unwrap());
    }
    let _ = stream.send_trailers(trailers);
}

/// Reads a request to its end.
async fn read(mut body: RecvStream) -> HelloRequest {
    let mut message = Vec::new();
    while let Some(Ok(data)) = body.data().await {
        let _ = body.flow_control().release_capacity(data.len());
        message.extend_from_slice(&data);
    }
    HelloRequest::decode(message.get(5..).unwrap_or_default()).unwrap_or_default()
}

async fn sleep_unless_zero(delay: Duration) {
    if !delay.is_zero() {
        sleep(delay).await;
    }
}

/// Returns the time until the client's deadline, from the `grpc-timeout` header.
fn timeout(headers: &HeaderMap) -> Duration {
    let value = headers
        .get("grpc-timeout")
        .expect("the call must have a deadline");
    let value = value.to_str().unwrap();
    let (digits, unit) = value.split_at(value.len() - 1);
    let number: u64 = digits.parse().unwrap();
    match unit {
        "n" => Duration::from_nanos(number),
        "u" => Duration::from_micros(number),
        "m" => Duration::from_millis(number),
        "S" => Duration::from_secs(number),
        _ => panic!("no test has a deadline of {value}"),
    }
}

fn grpc() -> Response<()> {
    let head = Response::builder().header("content-type", "application/grpc");
    head.body(()).unwrap()
}

fn failed(code: Code, message: &'static str) -> Response<()> {
    let mut head = grpc();
    let headers = head.headers_mut();
    headers.insert("grpc-status", i32::from(code).into());
    headers.insert("grpc-message", message.parse().unwrap());
    head
}

/// Returns a message with its gRPC length prefix.
fn framed(message: &impl Message) -> Bytes {
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.encoded_len()).unwrap());
    message.encode(&mut frame).unwrap();
    frame.freeze()
}

/// The server's timer fires this long before the deadline, so that it fires before the client's timer.
const EARLY: Duration = Duration::from_micros(1_500);
const EXPIRED: &str = "Timeout expired";
