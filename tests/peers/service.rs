//! The test service on tonic.

use std::net::SocketAddr;
use std::pin::Pin;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::sleep;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codec::CompressionEncoding;
use tonic::transport::Server;
use tonic::transport::server::{Router, TcpIncoming};
use tonic::{Code, Request, Response, Status, Streaming};
use tower::layer::util::{Identity, Stack};

use crate::echo::{EchoTrailers, INITIAL};
use crate::proto::test_service_server::{TestService, TestServiceServer};
use crate::proto::{
    EchoStatus, Empty, SimpleRequest, SimpleResponse, StreamingInputCallRequest,
    StreamingInputCallResponse, StreamingOutputCallRequest, StreamingOutputCallResponse, payload,
};
use crate::servers::Options;

/// Returns a server with only the test service.
pub fn router(options: Options<'_>) -> Router<Stack<EchoTrailers, Identity>> {
    let mut server = Server::builder()
        .http2_max_header_list_size(options.max_metadata)
        // On a busy machine, more than 20 calls may be cancelled before they are accepted. With the default limit of 20, the server would
        // then close the connection.
        .http2_max_pending_accept_reset_streams(Some(1_000));
    if let Some(localhost) = options.tls {
        server = server.tls_config(localhost.server()).unwrap();
    }
    if let Some(age) = options.max_age {
        server = server.max_connection_age(age);
    }
    let service = TestServiceServer::new(OnTonic)
        .accept_compressed(CompressionEncoding::Gzip)
        .send_compressed(CompressionEncoding::Gzip);
    server.layer(EchoTrailers).add_service(service)
}

/// A server in this process that runs until it is dropped.
pub struct InProcess {
    pub address: SocketAddr,
    task: AbortHandle,
}

impl InProcess {
    pub async fn start(router: Router<Stack<EchoTrailers, Identity>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let task = tokio::spawn(async move { router.serve_with_incoming(incoming).await.unwrap() });
        Self {
            address,
            task: task.abort_handle(),
        }
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct OnTonic;

type Outputs = Pin<Box<dyn Stream<Item = Result<StreamingOutputCallResponse, Status>> + Send>>;

#[tonic::async_trait]
impl TestService for OnTonic {
    async fn empty_call(&self, _: Request<Empty>) -> Result<Response<Empty>, Status> {
        Ok(Response::new(Empty {}))
    }

    async fn unary_call(
        &self,
        request: Request<SimpleRequest>,
    ) -> Result<Response<SimpleResponse>, Status> {
        let response = echoing(&request, ());
        let request = request.into_inner();
        wanted_status(request.response_status)?;
        let payload = Some(payload(request.response_size));
        let mut response = response.map(|()| SimpleResponse { payload });
        if !request
            .response_compressed
            .is_some_and(|wanted| wanted.value)
        {
            response.disable_compression();
        }
        Ok(response)
    }

    async fn cacheable_unary_call(
        &self,
        _: Request<SimpleRequest>,
    ) -> Result<Response<SimpleResponse>, Status> {
        Err(Status::unimplemented("a cacheable call is a GET"))
    }

    type StreamingOutputCallStream = Outputs;

    async fn streaming_output_call(
        &self,
        request: Request<StreamingOutputCallRequest>,
    ) -> Result<Response<Outputs>, Status> {
        let request = request.into_inner();
        let compressed = request.response_parameters.iter();
        let compressed = compressed
            .filter_map(|parameters| parameters.compressed.as_ref())
            .any(|wanted| wanted.value);
        let outputs = outputs(|to| async move { respond(request, &to).await });
        let mut response = Response::new(outputs);
        if !compressed {
            response.disable_compression();
        }
        Ok(response)
    }

    async fn streaming_input_call(
        &self,
        request: Request<Streaming<StreamingInputCallRequest>>,
    ) -> Result<Response<StreamingInputCallResponse>, Status> {
        let mut requests = request.into_inner();
        let mut size = 0;
        while let Some(request) = requests.message().await? {
            size += request.payload.map_or(0, |payload| payload.body.len());
        }
        Ok(Response::new(StreamingInputCallResponse {
            aggregated_payload_size: i32::try_from(size).unwrap(),
        }))
    }

    type FullDuplexCallStream = Outputs;

    async fn full_duplex_call(
        &self,
        request: Request<Streaming<StreamingOutputCallRequest>>,
    ) -> Result<Response<Outputs>, Status> {
        let mut response = echoing(&request, ());
        response.disable_compression();
        let mut requests = request.into_inner();
        let outputs = outputs(|to| async move {
            while let Some(request) = requests.message().await? {
                respond(request, &to).await?;
            }
            Ok(())
        });
        Ok(response.map(|()| outputs))
    }

    type HalfDuplexCallStream = Outputs;

    async fn half_duplex_call(
        &self,
        _: Request<Streaming<StreamingOutputCallRequest>>,
    ) -> Result<Response<Outputs>, Status> {
        Err(Status::unimplemented("no case calls it"))
    }

    async fn unimplemented_call(&self, _: Request<Empty>) -> Result<Response<Empty>, Status> {
        Err(Status::unimplemented("by definition"))
    }
}

type Sender = mpsc::Sender<Result<StreamingOutputCallResponse, Status>>;

/// Returns a stream of the messages that a task sends. The task ends with the stream.
fn outputs<Fut>(produce: impl FnOnce(Sender) -> Fut) -> Outputs
where
    Fut: Future<Output = Result<(), Status>> + Send + 'static,
{
    let (to, outputs) = mpsc::channel(1);
    let producing = produce(to.clone());
    tokio::spawn(async move {
        tokio::select! {
            outcome = producing => if let Err(status) = outcome {
                let _ = to.send(Err(status)).await;
            },
            () = to.closed() => {}
        }
    });
    Box::pin(ReceiverStream::new(outputs))
}

/// Sends the responses to one request.
async fn respond(request: StreamingOutputCallRequest, to: &Sender) -> Result<(), Status> {
    wanted_status(request.response_status)?;
    for parameters in request.response_parameters {
        let interval = u64::try_from(parameters.interval_us).unwrap_or(0);
        if interval > 0 {
            sleep(Duration::from_micros(interval)).await;
        }
        let payload = Some(payload(parameters.size));
        // The send fails once the call has ended. Then the outcome is no longer needed.
        let _ = to.send(Ok(StreamingOutputCallResponse { payload })).await;
    }
    Ok(())
}

fn wanted_status(wanted: Option<EchoStatus>) -> Result<(), Status> {
    match wanted {
        Some(EchoStatus { code, message }) if code != 0 => {
            Err(Status::new(Code::from_i32(code), message))
        }
        _ => Ok(()),
    }
}

/// Returns a response with the initial metadata that the request demands.
fn echoing<T, M>(request: &Request<T>, message: M) -> Response<M> {
    let mut response = Response::new(message);
    if let Some(value) = request.metadata().get(INITIAL) {
        response.metadata_mut().insert(INITIAL, value.clone());
    }
    response
}
