//! Reads the descriptor of a method from the reflection service of a server.

use std::collections::BTreeMap;

use http::uri::PathAndQuery;
use prost::Message;
use prost_reflect::prost_types::FileDescriptorProto;
use prost_reflect::{DescriptorPool, MethodDescriptor};
use tonic::client::Grpc;
use tonic::{Code, Request, Status};
use tonic_etcd::BalancedChannel;
use tonic_prost::ProstCodec;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1::{ServerReflectionRequest, ServerReflectionResponse};

use crate::error::{Failure, code};
use crate::escape::escaped;

/// The paths of both versions of the reflection service. Their messages are equal on the wire. Older servers have only the second one.
const PATHS: [&str; 2] = [
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
];
/// Limit on the number of requests for the files of one service.
const MAX_FILES: usize = 1_000;

/// Returns the descriptor of a method.
pub(super) async fn method(
    channel: &BalancedChannel,
    service: &str,
    method: &str,
) -> Result<MethodDescriptor, Failure> {
    let mut files = BTreeMap::new();
    let symbol = MessageRequest::FileContainingSymbol(service.to_owned());
    let received = request(channel, symbol).await;
    insert(
        &mut files,
        received.map_err(|status| failure(service, &status))?,
    )?;
    // Some servers return a file without its dependencies.
    while let Some(missing) = missing(&files) {
        if files.len() >= MAX_FILES {
            return Err(invalid("it returns too many files"));
        }
        let received = request(channel, MessageRequest::FileByFilename(missing.clone())).await;
        insert(
            &mut files,
            received.map_err(|status| failure(&missing, &status))?,
        )?;
        if !files.contains_key(&missing) {
            return Err(invalid(&format!("it does not return the file {missing}")));
        }
    }
    let mut pool = DescriptorPool::new();
    pool.add_file_descriptor_protos(files.into_values())
        .map_err(|error| invalid(&error.to_string()))?;
    let descriptor = pool
        .get_service_by_name(service)
        .ok_or_else(|| invalid(&format!("it does not describe {service}")))?;
    let found = descriptor.methods().find(|known| known.name() == method);
    found.ok_or_else(|| {
        let names: Vec<_> = descriptor
            .methods()
            .map(|it| it.name().to_owned())
            .collect();
        Failure::negative(format!(
            "{service} has no method {method}; its methods are {}",
            names.join(", ")
        ))
    })
}

fn insert(
    files: &mut BTreeMap<String, FileDescriptorProto>,
    received: Vec<Vec<u8>>,
) -> Result<(), Failure> {
    for bytes in received {
        let file = FileDescriptorProto::decode(bytes.as_slice());
        let file = file.map_err(|error| invalid(&error.to_string()))?;
        files.insert(file.name().to_owned(), file);
    }
    Ok(())
}

fn missing(files: &BTreeMap<String, FileDescriptorProto>) -> Option<String> {
    let dependencies = files.values().flat_map(|file| &file.dependency);
    dependencies
        .into_iter()
        .find(|name| !files.contains_key(*name))
        .cloned()
}

/// Sends one request. Each request has its own stream, because the channel may send each stream to another server.
async fn request(
    channel: &BalancedChannel,
    message: MessageRequest,
) -> Result<Vec<Vec<u8>>, Status> {
    let mut last = Status::internal("no path");
    for path in PATHS {
        match request_at(channel, path, message.clone()).await {
            Err(status) if status.code() == Code::Unimplemented => last = status,
            outcome => return outcome,
        }
    }
    Err(last)
}

async fn request_at(
    channel: &BalancedChannel,
    path: &'static str,
    message: MessageRequest,
) -> Result<Vec<Vec<u8>>, Status> {
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(message),
    };
    let mut grpc = Grpc::new(channel.clone());
    let codec = ProstCodec::<ServerReflectionRequest, ServerReflectionResponse>::default();
    let stream = Request::new(tokio_stream::once(request));
    let path = PathAndQuery::from_static(path);
    let response = grpc.streaming(stream, path, codec).await?;
    let received = response.into_inner().message().await?;
    match received.and_then(|response| response.message_response) {
        Some(MessageResponse::FileDescriptorResponse(files)) => Ok(files.file_descriptor_proto),
        Some(MessageResponse::ErrorResponse(error)) => Err(Status::new(
            Code::from_i32(error.error_code),
            error.error_message,
        )),
        _ => Err(Status::internal("the reflection service did not respond")),
    }
}

fn failure(symbol: &str, status: &Status) -> Failure {
    let symbol = escaped(symbol);
    match status.code() {
        Code::Unimplemented => Failure::negative(
            "the server has no reflection service; add tonic-reflection to it, or use another client",
        ),
        Code::NotFound => Failure::negative(format!(
            "the reflection service does not have {symbol}; pass the method as package.Service/Method"
        )),
        _ => Failure::new(
            code::TIMED_OUT,
            format!(
                "cannot read the descriptor of {symbol}: {}",
                escaped(status.message())
            ),
        ),
    }
}

fn invalid(reason: &str) -> Failure {
    Failure::negative(format!(
        "the reflection service is not usable: {}",
        escaped(reason)
    ))
}
