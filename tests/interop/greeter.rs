//! A greeter with the same answers as the greeter in `server.go`.

use prost::Message;
use tonic::metadata::MetadataValue;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::support::greeter::greeter_server::Greeter;
use crate::support::greeter::{HelloReply, HelloRequest, NamedGreeter};

pub const TEXT: &str = "some text";
pub const BINARY: &[u8] = b"\x00\xff";

/// `google.rpc.Status`.
#[derive(Clone, PartialEq, Message)]
pub struct RpcStatus {
    #[prost(int32, tag = "1")]
    pub code: i32,
    #[prost(string, tag = "2")]
    pub message: String,
    #[prost(message, repeated, tag = "3")]
    pub details: Vec<Any>,
}

/// `google.protobuf.Any`.
#[derive(Clone, PartialEq, Message)]
pub struct Any {
    #[prost(string, tag = "1")]
    pub type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    pub value: Vec<u8>,
}

/// `google.rpc.BadRequest`.
#[derive(Clone, PartialEq, Message)]
pub struct BadRequest {
    #[prost(message, repeated, tag = "1")]
    pub field_violations: Vec<FieldViolation>,
}

/// `google.rpc.BadRequest.FieldViolation`.
#[derive(Clone, PartialEq, Message)]
pub struct FieldViolation {
    #[prost(string, tag = "1")]
    pub field: String,
    #[prost(string, tag = "2")]
    pub description: String,
}

#[derive(Debug)]
pub struct InteropGreeter;

fn named() -> NamedGreeter {
    NamedGreeter("rust".to_owned())
}

#[tonic::async_trait]
impl Greeter for InteropGreeter {
    async fn say_hello(
        &self,
        request: Request<HelloRequest>,
    ) -> Result<Response<HelloReply>, Status> {
        let sent = request.metadata().clone();
        match request.get_ref().name.as_str() {
            "details" => Err(details()),
            "deadline" if sent.contains_key("grpc-timeout") => std::future::pending().await,
            "deadline" => Err(Status::failed_precondition("no deadline has arrived")),
            "metadata" => {
                let mut response = named().say_hello(request).await?;
                let text = sent.get("x-text").cloned();
                let text = text.ok_or(Status::invalid_argument("no text has arrived"))?;
                let binary = sent.get_bin("x-data-bin").cloned();
                let binary = binary.unwrap_or(MetadataValue::from_bytes(b""));
                let metadata = response.metadata_mut();
                metadata.insert("x-text", text);
                metadata.insert_bin("x-data-bin", binary);
                Ok(response)
            }
            _ => named().say_hello(request).await,
        }
    }

    type SayHellosStream = <NamedGreeter as Greeter>::SayHellosStream;

    async fn say_hellos(
        &self,
        request: Request<HelloRequest>,
    ) -> Result<Response<Self::SayHellosStream>, Status> {
        named().say_hellos(request).await
    }

    async fn greet_all(
        &self,
        request: Request<Streaming<HelloRequest>>,
    ) -> Result<Response<HelloReply>, Status> {
        named().greet_all(request).await
    }

    type ChatStream = <NamedGreeter as Greeter>::ChatStream;

    async fn chat(
        &self,
        request: Request<Streaming<HelloRequest>>,
    ) -> Result<Response<Self::ChatStream>, Status> {
        named().chat(request).await
    }
}

fn details() -> Status {
    let violation = FieldViolation {
        field: "name".to_owned(),
        description: "is details".to_owned(),
    };
    let bad_request = BadRequest {
        field_violations: vec![violation],
    };
    let any = Any {
        type_url: "type.googleapis.com/google.rpc.BadRequest".to_owned(),
        value: bad_request.encode_to_vec(),
    };
    let message = "no such name: \u{fc}%".to_owned();
    let details = RpcStatus {
        code: Code::InvalidArgument as i32,
        message: message.clone(),
        details: vec![any],
    };
    Status::with_details(
        Code::InvalidArgument,
        message,
        details.encode_to_vec().into(),
    )
}
