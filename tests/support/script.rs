//! A bare `h2` server that answers each call according to a script.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::{HeaderMap, Request, Response};
use tokio::net::TcpListener;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep};
use tonic::Code;

/// Reaction of the server to a call.
#[derive(Clone, Debug)]
pub enum Act {
    /// Reads the request and answers with an empty message.
    Reply,
    /// Like `Reply`, after a delay.
    Slow(Duration),
    /// Reads the request and answers with headers only: the status and these additional headers.
    Fail(Code, &'static [(&'static str, &'static str)]),
    /// Like `Fail`, after the first frame of the request. The stream stays open for the rest of the request.
    FailEarly(Code),
    /// Answers with this HTTP status, without gRPC headers.
    Http(u16),
    /// Sends headers and a message, and then this status.
    FailLate(Code),
    /// Sends headers, and resets the stream after a delay.
    HeadThenReset(Duration),
    /// Resets the stream before any response.
    Reset(Reason),
    /// Sends no response. Calls that the client cancels are counted.
    Hang,
}

/// Record of a call that the server received.
#[derive(Clone, Debug)]
pub struct Seen {
    pub at: Instant,
    pub previous: Option<String>,
    pub timeout: Option<String>,
    pub body: Vec<u8>,
}

pub struct Server {
    pub address: String,
    calls: Arc<Mutex<Vec<Seen>>>,
    cancelled: Arc<AtomicUsize>,
    task: AbortHandle,
}

impl Server {
    /// Starts a server. `script` gets the number of a call, counted from zero, and returns the reaction of the server.
    pub async fn start(script: impl Fn(usize) -> Act + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let calls = Arc::<Mutex<Vec<Seen>>>::default();
        let cancelled = Arc::<AtomicUsize>::default();
        let shared = (Arc::clone(&calls), Arc::clone(&cancelled), Arc::new(script));
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                let (calls, cancelled, script) = shared.clone();
                connections.spawn(async move {
                    let Ok(mut connection) = h2::server::handshake(socket).await else {
                        return;
                    };
                    let mut answers = JoinSet::new();
                    while let Some(Ok((request, respond))) = connection.accept().await {
                        let (index, act) = {
                            let mut calls = calls.lock().unwrap();
                            calls.push(Seen::new(&request));
                            (calls.len() - 1, script(calls.len() - 1))
                        };
                        let record = Record(Arc::clone(&calls), index);
                        let answer = answer(act, request, respond, record, Arc::clone(&cancelled));
                        answers.spawn(answer);
                    }
                });
            }
        });
        Self {
            address,
            calls,
            cancelled,
            task: task.abort_handle(),
        }
    }

    pub async fn always(act: Act) -> Self {
        Self::start(move |_| act.clone()).await
    }

    pub fn calls(&self) -> Vec<Seen> {
        self.calls.lock().unwrap().clone()
    }

    pub fn count(&self) -> usize {
        self.calls.lock().unwrap().len()
    }

    /// Returns the number of calls that the client has cancelled.
    pub fn cancelled(&self) -> usize {
        self.cancelled.load(Ordering::SeqCst)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Seen {
    fn new(request: &Request<RecvStream>) -> Self {
        let header = |name: &str| {
            let value = request.headers().get(name)?;
            value.to_str().ok().map(str::to_owned)
        };
        Self {
            at: Instant::now(),
            previous: header("grpc-previous-rpc-attempts"),
            timeout: header("grpc-timeout"),
            body: Vec::new(),
        }
    }
}

/// The record of a call: the list of received calls, and the index of the call in this list.
struct Record(Arc<Mutex<Vec<Seen>>>, usize);

impl Record {
    /// Reads a frame of a request and appends it to the record. Returns false at the end of the request.
    async fn read(&self, body: &mut RecvStream) -> bool {
        let Some(Ok(data)) = body.data().await else {
            return false;
        };
        let _ = body.flow_control().release_capacity(data.len());
        self.0.lock().unwrap()[self.1].body.extend_from_slice(&data);
        true
    }
}

async fn answer(
    act: Act,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    record: Record,
    cancelled: Arc<AtomicUsize>,
) {
    let mut body = request.into_body();
    match act {
        Act::Reset(reason) => return respond.send_reset(reason),
        Act::FailEarly(code) => {
            record.read(&mut body).await;
            let _ = respond.send_response(failed(code, &[]), true);
            // Reads the rest of the request, which the client still sends.
            while record.read(&mut body).await {}
            return;
        }
        Act::Hang => {
            let reset = std::future::poll_fn(|cx| respond.poll_reset(cx)).await;
            if matches!(reset, Ok(Reason::CANCEL)) {
                cancelled.fetch_add(1, Ordering::SeqCst);
            }
            return;
        }
        _ => while record.read(&mut body).await {},
    }
    match act {
        Act::Fail(code, headers) => {
            let _ = respond.send_response(failed(code, headers), true);
        }
        Act::Http(status) => {
            let head = Response::builder().status(status).body(()).unwrap();
            let _ = respond.send_response(head, true);
        }
        Act::HeadThenReset(delay) => {
            let mut stream = respond.send_response(head(), false).unwrap();
            // The headers must be sent before the reset, which would otherwise discard them.
            sleep(delay).await;
            stream.send_reset(Reason::INTERNAL_ERROR);
        }
        Act::FailLate(code) => reply(&mut respond, code),
        Act::Slow(delay) => {
            sleep(delay).await;
            reply(&mut respond, Code::Ok);
        }
        _ => reply(&mut respond, Code::Ok),
    }
}

fn reply(respond: &mut SendResponse<Bytes>, code: Code) {
    let Ok(mut stream) = respond.send_response(head(), false) else {
        return;
    };
    let _ = stream.send_data(Bytes::from_static(&[0, 0, 0, 0, 0]), false);
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", i32::from(code).into());
    let _ = stream.send_trailers(trailers);
}

fn head() -> Response<()> {
    let head = Response::builder().header("content-type", "application/grpc");
    head.body(()).unwrap()
}

fn failed(code: Code, headers: &[(&'static str, &'static str)]) -> Response<()> {
    let mut head = head();
    head.headers_mut()
        .insert("grpc-status", i32::from(code).into());
    head.headers_mut()
        .insert("grpc-message", "as%20told".parse().unwrap());
    for (name, value) in headers {
        head.headers_mut().insert(*name, value.parse().unwrap());
    }
    head
}
