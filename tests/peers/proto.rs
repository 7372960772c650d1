//! The test service of gRPC's interoperability tests.
#![allow(
    missing_docs,
    clippy::pedantic,
    unused_qualifications,
    unnameable_types,
    clippy::allow_attributes_without_reason,
    reason = "most of the module is generated"
)]

tonic::include_proto!("grpc.testing");

/// Returns a payload of zeros.
pub fn payload(size: i32) -> Payload {
    Payload {
        body: vec![0; usize::try_from(size).unwrap_or(0)],
        ..Payload::default()
    }
}

/// Returns a request for responses of these sizes, each after an interval.
pub fn wanting(
    responses: impl IntoIterator<Item = (i32, std::time::Duration)>,
) -> StreamingOutputCallRequest {
    let parameters = |(size, interval): (i32, std::time::Duration)| ResponseParameters {
        size,
        interval_us: i32::try_from(interval.as_micros()).unwrap(),
        compressed: None,
    };
    StreamingOutputCallRequest {
        response_parameters: responses.into_iter().map(parameters).collect(),
        ..StreamingOutputCallRequest::default()
    }
}
