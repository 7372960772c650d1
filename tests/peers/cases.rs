//! The cases of gRPC's interop-test-descriptions.md, run by a client over a channel.

use std::pin::Pin;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{interval, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{iter, once, pending};
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Code, Request, Status};
use tonic_etcd::{BalancedChannel, channel::EndpointStatus};

use crate::echo::{INITIAL, TRAILING};
use crate::proto::unimplemented_service_client::UnimplementedServiceClient;
use crate::proto::{
    EchoStatus, Empty, SimpleRequest, StreamingInputCallRequest, StreamingOutputCallRequest,
    payload, wanting,
};
use crate::support::SOON;
use crate::{Client, ms};

pub type Running = Pin<Box<dyn Future<Output = ()> + Send>>;
pub type Case = (&'static str, fn(BalancedChannel) -> Running);

macro_rules! cases {
    ($($case:ident),* $(,)?) => {
        [$((stringify!($case), |channel| Box::pin($case(channel)))),*]
    };
}
pub(crate) use cases;

pub const CASES: [Case; 14] = cases![
    empty_unary,
    large_unary,
    client_streaming,
    server_streaming,
    ping_pong,
    empty_stream,
    custom_metadata,
    status_code_and_message,
    special_status_message,
    unimplemented_method,
    unimplemented_service,
    timeout_on_sleeping_server,
    cancel_after_begin,
    cancel_after_first_response,
];

pub const REQUESTS: [i32; 4] = [27_182, 8, 1_828, 45_904];
pub const RESPONSES: [i32; 4] = [31_415, 9, 2_653, 58_979];
const LARGE_REQUEST: i32 = 271_828;
pub const LARGE_RESPONSE: i32 = 314_159;

async fn empty_unary(channel: BalancedChannel) {
    let answer = Client::new(channel).empty_call(Empty {}).await.unwrap();
    assert_eq!(answer.into_inner(), Empty {});
}

pub async fn large_unary(channel: BalancedChannel) {
    large(channel).await.unwrap();
}

/// Sends the call of gRPC's case `large_unary`. Several tests use this call.
pub async fn large(channel: BalancedChannel) -> Result<(), Status> {
    let mut request = Request::new(large_request());
    request.set_timeout(SOON);
    let answer = Client::new(channel).unary_call(request).await?;
    let body = answer.into_inner().payload.unwrap_or_default().body;
    assert_zeros(&body, LARGE_RESPONSE);
    Ok(())
}

pub fn large_request() -> SimpleRequest {
    SimpleRequest {
        response_size: LARGE_RESPONSE,
        payload: Some(payload(LARGE_REQUEST)),
        ..SimpleRequest::default()
    }
}

pub fn assert_zeros(body: &[u8], size: i32) {
    assert_eq!(body.len(), usize::try_from(size).unwrap());
    assert!(body.iter().all(|byte| *byte == 0), "all bytes must be zero");
}

async fn client_streaming(channel: BalancedChannel) {
    let requests = REQUESTS.map(|size| StreamingInputCallRequest {
        payload: Some(payload(size)),
        expect_compressed: None,
    });
    let mut client = Client::new(channel);
    let answer = client.streaming_input_call(iter(requests)).await;
    let answer = answer.unwrap().into_inner();
    assert_eq!(answer.aggregated_payload_size, 74_922);
}

async fn server_streaming(channel: BalancedChannel) {
    let request = wanting(RESPONSES.map(|size| (size, Duration::ZERO)));
    let answer = Client::new(channel).streaming_output_call(request).await;
    let mut answer = answer.unwrap().into_inner();
    for size in RESPONSES {
        let response = answer
            .message()
            .await
            .unwrap()
            .expect("the stream must have one more response");
        assert_zeros(&response.payload.unwrap().body, size);
    }
    assert_eq!(answer.message().await.unwrap(), None);
}

async fn ping_pong(channel: BalancedChannel) {
    let pairs = REQUESTS.into_iter().zip(RESPONSES);
    let mut pings = pairs.map(|(request, response)| StreamingOutputCallRequest {
        payload: Some(payload(request)),
        ..wanting([(response, Duration::ZERO)])
    });
    let (requests, sent) = mpsc::channel(1);
    // The first request is queued before the call. Some servers send no headers before the first response, and tonic's client waits for the
    // headers, so the call would not return.
    requests.send(pings.next().unwrap()).await.unwrap();
    let mut client = Client::new(channel);
    let answer = client.full_duplex_call(ReceiverStream::new(sent)).await;
    let mut answer = answer.unwrap().into_inner();
    for size in RESPONSES {
        let response = answer
            .message()
            .await
            .unwrap()
            .expect("the stream must have one more response");
        assert_zeros(&response.payload.unwrap().body, size);
        if let Some(request) = pings.next() {
            requests.send(request).await.unwrap();
        }
    }
    drop(requests);
    assert_eq!(answer.message().await.unwrap(), None);
}

async fn empty_stream(channel: BalancedChannel) {
    let nothing = iter(std::iter::empty());
    let answer = Client::new(channel).full_duplex_call(nothing).await;
    let mut answer = answer.unwrap().into_inner();
    assert_eq!(answer.message().await.unwrap(), None);
}

const INITIAL_VALUE: &str = "test_initial_metadata_value";
const TRAILING_VALUE: &[u8] = b"\xab\xab\xab";

fn marked<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    let metadata = request.metadata_mut();
    metadata.insert(INITIAL, MetadataValue::from_static(INITIAL_VALUE));
    metadata.insert_bin(TRAILING, MetadataValue::from_bytes(TRAILING_VALUE));
    request
}

fn assert_echoed(initial: &MetadataMap, trailing: &MetadataMap) {
    assert_eq!(initial.get(INITIAL).unwrap(), INITIAL_VALUE);
    let trailing = trailing.get_bin(TRAILING).unwrap();
    assert_eq!(trailing.to_bytes().unwrap(), TRAILING_VALUE);
}

async fn custom_metadata(channel: BalancedChannel) {
    let mut client = Client::new(channel);
    let answer = client.unary_call(marked(large_request())).await.unwrap();
    // tonic merges the trailing metadata of a unary call into the initial metadata.
    assert_echoed(answer.metadata(), answer.metadata());

    let request = StreamingOutputCallRequest {
        payload: Some(payload(LARGE_REQUEST)),
        ..wanting([(LARGE_RESPONSE, Duration::ZERO)])
    };
    let answer = client.full_duplex_call(marked(once(request))).await;
    let (initial, mut answer, _) = answer.unwrap().into_parts();
    while answer.message().await.unwrap().is_some() {}
    let trailing = answer
        .trailers()
        .await
        .unwrap()
        .expect("the response must have trailers");
    assert_echoed(&initial, &trailing);
}

/// Sends a unary call and a streaming call that request a status with this message. Returns the statuses of both calls.
async fn ended_with(channel: BalancedChannel, message: &str) -> [Status; 2] {
    let wanted = Some(EchoStatus {
        code: Code::Unknown.into(),
        message: message.to_owned(),
    });
    let mut client = Client::new(channel);
    let request = SimpleRequest {
        response_status: wanted.clone(),
        ..SimpleRequest::default()
    };
    let unary = client.unary_call(request).await.unwrap_err();
    let request = StreamingOutputCallRequest {
        response_status: wanted,
        ..StreamingOutputCallRequest::default()
    };
    let streaming = match client.full_duplex_call(once(request)).await {
        Ok(answer) => answer.into_inner().message().await.unwrap_err(),
        Err(status) => status,
    };
    [unary, streaming]
}

async fn status_code_and_message(channel: BalancedChannel) {
    for status in ended_with(channel, "test status message").await {
        assert_eq!(status.code(), Code::Unknown);
        assert_eq!(status.message(), "test status message");
    }
}

async fn special_status_message(channel: BalancedChannel) {
    let message = "\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈\t\n";
    let [unary, _] = ended_with(channel, message).await;
    assert_eq!(unary.code(), Code::Unknown);
    assert_eq!(unary.message(), message);
}

async fn unimplemented_method(channel: BalancedChannel) {
    let outcome = Client::new(channel).unimplemented_call(Empty {}).await;
    assert_eq!(outcome.unwrap_err().code(), Code::Unimplemented);
}

async fn unimplemented_service(channel: BalancedChannel) {
    let mut client = UnimplementedServiceClient::new(channel);
    let outcome = client.unimplemented_call(Empty {}).await;
    assert_eq!(outcome.unwrap_err().code(), Code::Unimplemented);
}

async fn timeout_on_sleeping_server(channel: BalancedChannel) {
    let request = StreamingOutputCallRequest {
        payload: Some(payload(27_182)),
        ..StreamingOutputCallRequest::default()
    };
    let mut request = Request::new(tokio_stream::StreamExt::chain(once(request), pending()));
    request.set_timeout(ms(1));
    let outcome = match Client::new(channel).full_duplex_call(request).await {
        Ok(answer) => answer.into_inner().message().await.map(drop),
        Err(status) => Err(status),
    };
    assert_eq!(outcome.unwrap_err().code(), Code::DeadlineExceeded);
}

/// Waits until no call is in flight, and then checks that the channel serves a call. tonic reports no status for a dropped call, so only
/// the channel shows the end of the call.
async fn none_in_flight(channel: &BalancedChannel) {
    let gone = async {
        let mut every = interval(ms(5));
        let is_open = |endpoint: EndpointStatus| endpoint.in_flight > 0;
        while channel.endpoints().into_iter().any(is_open) {
            every.tick().await;
        }
    };
    timeout(SOON, gone).await.expect("the call must end");
    empty_unary(channel.clone()).await;
}

async fn cancel_after_begin(channel: BalancedChannel) {
    let mut client = Client::new(channel.clone());
    let request = marked(pending::<StreamingInputCallRequest>());
    let outcome = timeout(ms(50), client.streaming_input_call(request)).await;
    assert!(
        outcome.is_err(),
        "the call must not end while the server waits for requests"
    );
    none_in_flight(&channel).await;
}

async fn cancel_after_first_response(channel: BalancedChannel) {
    let request = StreamingOutputCallRequest {
        payload: Some(payload(REQUESTS[0])),
        ..wanting([(RESPONSES[0], Duration::ZERO)])
    };
    let requests = tokio_stream::StreamExt::chain(once(request), pending());
    let mut client = Client::new(channel.clone());
    let answer = client.full_duplex_call(requests).await.unwrap();
    let mut answer = answer.into_inner();
    let response = answer
        .message()
        .await
        .unwrap()
        .expect("the stream must have one more response");
    assert_zeros(&response.payload.unwrap().body, RESPONSES[0]);
    drop(answer);
    none_in_flight(&channel).await;
}
