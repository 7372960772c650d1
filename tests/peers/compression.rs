//! gRPC's interop cases with compression, without their probes. A probe is an uncompressed request that announces compression. The cases
//! expect that a server rejects the probe, but none of the tested servers rejects it.

use tokio_stream::iter;
use tonic::codec::CompressionEncoding;
use tonic::{Code, Status};
use tonic_etcd::BalancedChannel;

use crate::Client;
use crate::cases::{Case, LARGE_RESPONSE, RESPONSES, assert_zeros, cases, large_request};
use crate::proto::{
    BoolValue, ResponseParameters, SimpleRequest, StreamingInputCallRequest,
    StreamingOutputCallRequest, payload,
};

/// Cases with requests in gzip.
pub const REQUESTS: [Case; 2] = cases![client_compressed_unary, client_compressed_streaming];
/// Cases with responses in gzip.
pub const RESPONSES_IN_GZIP: [Case; 2] =
    cases![server_compressed_unary, server_compressed_streaming];

fn sending(channel: BalancedChannel) -> Client {
    Client::new(channel).send_compressed(CompressionEncoding::Gzip)
}

#[expect(
    clippy::unnecessary_wraps,
    reason = "the fields of the messages have this type"
)]
fn flag(value: bool) -> Option<BoolValue> {
    Some(BoolValue { value })
}

async fn client_compressed_unary(channel: BalancedChannel) {
    for (compressed, mut client) in [
        (true, sending(channel.clone())),
        (false, Client::new(channel)),
    ] {
        let request = SimpleRequest {
            expect_compressed: flag(compressed),
            ..large_request()
        };
        let answer = client.unary_call(request).await.unwrap().into_inner();
        assert_zeros(&answer.payload.unwrap().body, LARGE_RESPONSE);
    }
}

async fn client_compressed_streaming(channel: BalancedChannel) {
    let requests = [27_182, 45_904].map(|size| StreamingInputCallRequest {
        payload: Some(payload(size)),
        expect_compressed: flag(true),
    });
    let mut client = sending(channel);
    let answer = client.streaming_input_call(iter(requests)).await;
    let answer = answer.unwrap().into_inner();
    assert_eq!(answer.aggregated_payload_size, 73_086);
}

/// Sends a compressed request to a server that does not support compression. Returns the status.
pub async fn refused(channel: BalancedChannel) -> Status {
    let outcome = sending(channel).unary_call(large_request()).await;
    let status = outcome.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented, "{status:?}");
    status
}

fn accepting(channel: BalancedChannel) -> Client {
    Client::new(channel).accept_compressed(CompressionEncoding::Gzip)
}

async fn server_compressed_unary(channel: BalancedChannel) {
    for compressed in [true, false] {
        let request = SimpleRequest {
            response_compressed: flag(compressed),
            ..large_request()
        };
        let answer = accepting(channel.clone()).unary_call(request).await;
        let answer = answer.unwrap();
        if compressed {
            assert_eq!(answer.metadata().get("grpc-encoding").unwrap(), "gzip");
        }
        assert_zeros(&answer.into_inner().payload.unwrap().body, LARGE_RESPONSE);
    }
}

async fn server_compressed_streaming(channel: BalancedChannel) {
    let sizes = [RESPONSES[0], RESPONSES[3]];
    let parameters = |(size, compressed): (i32, bool)| ResponseParameters {
        size,
        interval_us: 0,
        compressed: flag(compressed),
    };
    let request = StreamingOutputCallRequest {
        response_parameters: sizes
            .into_iter()
            .zip([true, false])
            .map(parameters)
            .collect(),
        ..StreamingOutputCallRequest::default()
    };
    let answer = accepting(channel).streaming_output_call(request).await;
    let answer = answer.unwrap();
    assert_eq!(answer.metadata().get("grpc-encoding").unwrap(), "gzip");
    let mut answer = answer.into_inner();
    for size in sizes {
        let response = answer
            .message()
            .await
            .unwrap()
            .expect("the stream must have one more response");
        assert_zeros(&response.payload.unwrap().body, size);
    }
    assert_eq!(answer.message().await.unwrap(), None);
}
