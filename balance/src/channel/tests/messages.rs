//! Features of generated clients that use the channel: compression, metadata, large messages, errors.

use tonic::codec::CompressionEncoding;
use tonic::metadata::{BinaryMetadataValue, MetadataValue};
use tonic::{Response as GrpcResponse, Status, Streaming};

use super::greeter::HelloReply;
use super::greeter::greeter_server::{self, GreeterServer};
use super::*;

/// A service that echoes requests, and returns an error for the name `fail`.
struct Mirror;

impl Mirror {
    fn reply<T>(request: &Request<T>, name: &str) -> Result<GrpcResponse<HelloReply>, Status> {
        if name == "fail" {
            let mut status =
                Status::with_details(Code::FailedPrecondition, "näh", "\0\u{1}".into());
            let value = MetadataValue::from_bytes(b"\xff\x00");
            status.metadata_mut().insert_bin("why-bin", value);
            return Err(status);
        }
        let header = |name| {
            request
                .metadata()
                .get(name)
                .and_then(|value| value.to_str().ok())
        };
        let message = format!(
            "{name} {} {}",
            header("grpc-encoding").unwrap_or("plain"),
            header("intercepted").unwrap_or("-")
        );
        let mut response = GrpcResponse::new(HelloReply { message });
        if let Some(value) = request.metadata().get_bin("trace-bin") {
            response
                .metadata_mut()
                .insert_bin("trace-bin", value.clone());
        }
        Ok(response)
    }
}

#[tonic::async_trait]
impl greeter_server::Greeter for Mirror {
    async fn say_hello(
        &self,
        request: Request<HelloRequest>,
    ) -> Result<GrpcResponse<HelloReply>, Status> {
        Self::reply(&request, &request.get_ref().name)
    }

    type SayHellosStream = tokio_stream::Empty<Result<HelloReply, Status>>;

    async fn say_hellos(
        &self,
        _: Request<HelloRequest>,
    ) -> Result<GrpcResponse<Self::SayHellosStream>, Status> {
        Err(Status::unimplemented("not here"))
    }

    async fn greet_all(
        &self,
        request: Request<Streaming<HelloRequest>>,
    ) -> Result<GrpcResponse<HelloReply>, Status> {
        let (metadata, extensions, mut requests) = request.into_parts();
        let mut bytes = 0;
        while let Some(request) = requests.message().await? {
            bytes += request.name.len();
        }
        let request = Request::from_parts(metadata, extensions, ());
        Self::reply(&request, &bytes.to_string())
    }

    type ChatStream = tokio_stream::Empty<Result<HelloReply, Status>>;

    async fn chat(
        &self,
        _: Request<Streaming<HelloRequest>>,
    ) -> Result<GrpcResponse<Self::ChatStream>, Status> {
        Err(Status::unimplemented("not here"))
    }
}

/// Starts a [`Mirror`] with compression on a loopback address, and returns a channel to it.
fn mirror() -> BalancedChannel {
    let listener = support::listen(0);
    let address = listener.local_addr().expect("an address");
    let service = GreeterServer::new(Mirror)
        .accept_compressed(CompressionEncoding::Gzip)
        .send_compressed(CompressionEncoding::Gzip)
        .max_decoding_message_size(32 << 20)
        .max_encoding_message_size(32 << 20);
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    let serving = tonic::transport::Server::builder()
        .add_service(service)
        .serve_with_incoming(incoming);
    tokio::spawn(async move { serving.await.expect("a server") });
    over([address.to_string()])
}

#[tokio::test]
async fn messages_are_compressed_in_both_directions() {
    let channel = mirror();
    let mut client = GreeterClient::new(channel.clone())
        .send_compressed(CompressionEncoding::Gzip)
        .accept_compressed(CompressionEncoding::Gzip)
        .max_decoding_message_size(32 << 20);
    let name = "squeeze ".repeat(1 << 17);
    let reply = in_time("a call", client.say_hello(hello(&name)))
        .await
        .expect("an answer");
    let encoding = reply.metadata().get("grpc-encoding");
    assert_eq!(encoding.expect("a compressed response"), "gzip");
    let message = reply.into_inner().message;
    assert!(
        message.starts_with(&name) && message.ends_with("gzip -"),
        "the request must be compressed"
    );

    let requests = tokio_stream::iter((0..10).map({
        let name = name.clone();
        move |_| hello(&name)
    }));
    let reply = in_time("a stream", client.greet_all(requests)).await;
    let message = reply.expect("an answer").into_inner().message;
    assert!(message.starts_with(&(10 << 20).to_string()), "{message}");
    idle(&channel).await;
}

#[tokio::test]
async fn binary_metadata_passes_in_both_directions_and_interceptors_add_metadata() {
    let channel = mirror();
    let bytes: Vec<u8> = (0..=255).collect();
    let intercepting = {
        let bytes = bytes.clone();
        move |mut request: Request<()>| {
            let value = BinaryMetadataValue::from_bytes(&bytes);
            request.metadata_mut().insert_bin("trace-bin", value);
            request
                .metadata_mut()
                .insert("intercepted", MetadataValue::from_static("yes"));
            Ok(request)
        }
    };
    let mut client = GreeterClient::with_interceptor(channel.clone(), intercepting);
    let reply = client.say_hello(hello("it")).await.expect("an answer");
    let back = reply
        .metadata()
        .get_bin("trace-bin")
        .expect("metadata in the response");
    assert_eq!(back.to_bytes().expect("base64"), bytes);
    assert_eq!(reply.into_inner().message, "it plain yes");

    let refusing = |_: Request<()>| Err(Status::unauthenticated("no token"));
    let mut client = GreeterClient::with_interceptor(channel.clone(), refusing);
    let status = client.say_hello(hello("it")).await.expect_err("refused");
    assert_eq!(status.code(), Code::Unauthenticated);
    let calls: u64 = channel.endpoints().iter().map(|status| status.calls).sum();
    assert_eq!(
        calls, 1,
        "a call that an interceptor rejects must not be sent"
    );
}

#[tokio::test]
async fn an_error_keeps_its_message_details_and_metadata() {
    let channel = mirror();
    let status = GreeterClient::new(channel.clone())
        .say_hello(hello("fail"))
        .await
        .expect_err("the requested error");
    assert_eq!(
        (status.code(), status.message()),
        (Code::FailedPrecondition, "näh")
    );
    assert_eq!(status.details(), b"\0\x01");
    let why = status
        .metadata()
        .get_bin("why-bin")
        .expect("metadata in the error");
    assert_eq!(why.to_bytes().expect("base64")[..], b"\xff\0"[..]);
    assert_eq!(
        channel.endpoints()[0].failures,
        0,
        "FAILED_PRECONDITION must not count as a failure of the endpoint"
    );
    idle(&channel).await;
}

#[tokio::test]
async fn a_large_message_to_a_slow_reader_does_not_block_other_calls() {
    let mut raw = Raw::start(|_| ());
    let channel = over([raw.address()]);
    let mut client = GreeterClient::new(channel.clone());
    let large = tokio::spawn(async move {
        let name = "x".repeat(16 << 20);
        client.say_hello(hello(&name)).await.map(drop)
    });
    let (request, mut respond) = raw.accept().await;
    let mut body = request.into_body();
    let (mut received, mut passed) = (0, 0);
    let mut small = None;
    while let Some(data) = in_time("data", body.data()).await {
        let data = data.expect("no error");
        received += data.len();
        let _ = body.flow_control().release_capacity(data.len());
        // A small call must not wait for the end of the large one. The requests of both calls share the connection window, so the server
        // keeps reading the large request. Otherwise its unread data would fill the window.
        let (answered, call) = small.take().unwrap_or_else(|| {
            let channel = channel.clone();
            let call = tokio::spawn(async move { say(&channel).await });
            (None, call)
        });
        let answered = answered.or_else(|| raw.try_accept().map(|call| tokio::spawn(reply(call))));
        if call.is_finished() {
            call.await.expect("no panic").expect("an answer");
            passed += 1;
        } else {
            small = Some((answered, call));
            tokio::task::yield_now().await;
        }
    }
    assert!(
        passed > 3,
        "only {passed} small calls ended before the large one"
    );
    if let Some((_, call)) = small {
        call.abort();
    }
    assert!(received > 16 << 20, "{received}");
    let head = Response::builder().header("grpc-status", "5").body(());
    respond
        .send_response(head.expect("a head"), true)
        .expect("an open stream");
    let status = in_time("a call", large)
        .await
        .expect("no panic")
        .expect_err("the requested error");
    assert_eq!(status.code(), Code::NotFound);
    idle(&channel).await;
}
