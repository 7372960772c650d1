"""The interop test service with grpcio on a loopback port, with the defaults of its server."""

import argparse
import time
from concurrent import futures

import grpc

import interop_pb2 as pb
import interop_pb2_grpc

INITIAL = "x-grpc-test-echo-initial"
TRAILING = "x-grpc-test-echo-trailing-bin"
# Calls at once: each occupies a thread.
THREADS = 256
# grpcio does not show a server whether a request was compressed, so it cannot refuse one that was not. It accepts only POST, and
# a cacheable call is a GET.
UNSUPPORTED = ["cacheable_unary", "client_compressed_unary", "client_compressed_streaming"]
CODES = {code.value[0]: code for code in grpc.StatusCode}


def echo_metadata(context):
    """Returns the request's metadata to the client. The caller of a compressed response sets its compression before."""
    metadata = dict(context.invocation_metadata())
    if INITIAL in metadata:
        context.send_initial_metadata([(INITIAL, metadata[INITIAL])])
    if TRAILING in metadata:
        context.set_trailing_metadata([(TRAILING, metadata[TRAILING])])


def echo_status(request, context):
    """Ends the call with the status that the request asks for, if any."""
    status = request.response_status
    if status.code:
        context.abort(CODES.get(status.code, grpc.StatusCode.UNKNOWN), status.message)


def payload(size, context):
    if size < 0:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"negative size: {size}")
    return pb.Payload(body=bytes(size))


def responses(request, context):
    for parameters in request.response_parameters:
        time.sleep(parameters.interval_us / 1e6)
        yield pb.StreamingOutputCallResponse(payload=payload(parameters.size, context))


class TestService(interop_pb2_grpc.TestServiceServicer):
    def EmptyCall(self, request, context):
        return pb.Empty()

    def UnaryCall(self, request, context):
        if request.response_compressed.value:
            context.set_compression(grpc.Compression.Gzip)
        echo_metadata(context)
        echo_status(request, context)
        return pb.SimpleResponse(payload=payload(request.response_size, context))

    def CacheableUnaryCall(self, request, context):
        context.send_initial_metadata([("cache-control", "max-age=60, public")])
        return pb.SimpleResponse(payload=payload(request.response_size, context))

    def StreamingOutputCall(self, request, context):
        # The headers name the compression of a call, so it is chosen before the first response.
        if any(parameters.compressed.value for parameters in request.response_parameters):
            context.set_compression(grpc.Compression.Gzip)
        echo_status(request, context)
        for parameters, response in zip(request.response_parameters, responses(request, context)):
            if not parameters.compressed.value:
                context.disable_next_message_compression()
            yield response

    def StreamingInputCall(self, requests, context):
        size = sum(len(request.payload.body) for request in requests)
        return pb.StreamingInputCallResponse(aggregated_payload_size=size)

    # No case asks for compression here.
    def FullDuplexCall(self, requests, context):
        echo_metadata(context)
        for request in requests:
            echo_status(request, context)
            yield from responses(request, context)

    def HalfDuplexCall(self, requests, context):
        for request in list(requests):
            yield from responses(request, context)

    def UnimplementedCall(self, request, context):
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "not implemented")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--tls-cert")
    parser.add_argument("--tls-key")
    parser.add_argument("--max-age-ms", type=int)
    parser.add_argument("--max-metadata", type=int)
    parser.add_argument("--list-unsupported", action="store_true")
    arguments = parser.parse_args()
    if arguments.list_unsupported:
        print("\n".join(UNSUPPORTED))
        return

    options = []
    if arguments.max_age_ms:
        options.append(("grpc.max_connection_age_ms", arguments.max_age_ms))
    if arguments.max_metadata:
        options.append(("grpc.max_metadata_size", arguments.max_metadata))
    server = grpc.server(futures.ThreadPoolExecutor(THREADS), options=options)
    interop_pb2_grpc.add_TestServiceServicer_to_server(TestService(), server)
    address = f"127.0.0.1:{arguments.port}"
    if arguments.tls_cert:
        with open(arguments.tls_cert, "rb") as cert, open(arguments.tls_key, "rb") as key:
            credentials = grpc.ssl_server_credentials([(key.read(), cert.read())])
        port = server.add_secure_port(address, credentials)
    else:
        port = server.add_insecure_port(address)
    server.start()
    print(f"listening on {port}", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
