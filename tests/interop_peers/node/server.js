// The interop test service with grpc-js on a loopback port, with the defaults of its server.
'use strict';

const { once } = require('node:events');
const fs = require('node:fs');
const path = require('node:path');
const { setTimeout: sleep } = require('node:timers/promises');
const { parseArgs } = require('node:util');
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const INITIAL = 'x-grpc-test-echo-initial';
const TRAILING = 'x-grpc-test-echo-trailing-bin';
// grpc-js compresses no responses. It does not show a server whether a request was compressed, so it cannot refuse one that was
// not. It accepts only POST, and a cacheable call is a GET.
const UNSUPPORTED = [
  'cacheable_unary',
  'client_compressed_unary',
  'client_compressed_streaming',
  'server_compressed_unary',
  'server_compressed_streaming',
];

// Sends the initial metadata that the request asks for, and returns the trailing metadata.
function echoMetadata(call) {
  const trailers = new grpc.Metadata();
  for (const value of call.metadata.get(INITIAL).slice(0, 1)) {
    const headers = new grpc.Metadata();
    headers.set(INITIAL, value);
    call.sendMetadata(headers);
  }
  for (const value of call.metadata.get(TRAILING).slice(0, 1)) {
    trailers.set(TRAILING, value);
  }
  return trailers;
}

// Throws the status that the request asks for, if any.
function echoStatus(request) {
  const status = request.response_status;
  if (status && status.code !== 0) {
    throw { code: status.code, details: status.message };
  }
}

function payload(size) {
  if (size < 0) {
    throw { code: grpc.status.INVALID_ARGUMENT, details: `negative size: ${size}` };
  }
  return { body: Buffer.alloc(size) };
}

// Runs the body of a streaming response. It passes on what the body throws, and the metadata that comes after everything.
async function stream(call, trailers, body) {
  const cancelled = new AbortController();
  call.on('cancelled', () => cancelled.abort());
  try {
    await body(cancelled.signal);
    call.end(trailers);
  } catch (error) {
    if (!cancelled.signal.aborted) {
      call.emit('error', { code: grpc.status.UNKNOWN, details: String(error), ...error, metadata: trailers });
    }
  }
}

async function respond(call, request, signal) {
  for (const { size, interval_us: interval } of request.response_parameters) {
    if (interval > 0) {
      await sleep(interval / 1000, undefined, { signal });
    }
    if (!call.write({ payload: payload(size) })) {
      await once(call, 'drain', { signal });
    }
  }
}

// UnimplementedCall is left out: grpc-js answers it with UNIMPLEMENTED.
const service = {
  EmptyCall(call, callback) {
    callback(null, {});
  },

  UnaryCall(call, callback) {
    const trailers = echoMetadata(call);
    try {
      echoStatus(call.request);
      callback(null, { payload: payload(call.request.response_size) }, trailers);
    } catch (error) {
      callback({ ...error, metadata: trailers });
    }
  },

  CacheableUnaryCall(call, callback) {
    const headers = new grpc.Metadata();
    headers.set('cache-control', 'max-age=60, public');
    call.sendMetadata(headers);
    try {
      callback(null, { payload: payload(call.request.response_size) });
    } catch (error) {
      callback(error);
    }
  },

  StreamingOutputCall(call) {
    stream(call, undefined, async (signal) => {
      echoStatus(call.request);
      await respond(call, call.request, signal);
    });
  },

  StreamingInputCall(call, callback) {
    let size = 0;
    call.on('data', (request) => {
      size += request.payload ? request.payload.body.length : 0;
    });
    call.on('end', () => callback(null, { aggregated_payload_size: size }));
  },

  FullDuplexCall(call) {
    stream(call, echoMetadata(call), async (signal) => {
      for await (const request of requests(call)) {
        echoStatus(request);
        await respond(call, request, signal);
      }
    });
  },

  HalfDuplexCall(call) {
    stream(call, undefined, async (signal) => {
      const all = [];
      for await (const request of requests(call)) {
        all.push(request);
      }
      for (const request of all) {
        await respond(call, request, signal);
      }
    });
  },
};

// The iterator leaves the call open at the end of the requests, for what is still to be sent.
function requests(call) {
  return call.iterator({ destroyOnReturn: false });
}

function main() {
  const { values } = parseArgs({
    options: {
      port: { type: 'string', default: '0' },
      'tls-cert': { type: 'string' },
      'tls-key': { type: 'string' },
      'max-age-ms': { type: 'string' },
      'list-unsupported': { type: 'boolean' },
    },
  });
  if (values['list-unsupported']) {
    console.log(UNSUPPORTED.join('\n'));
    return;
  }

  const options = {};
  if (values['max-age-ms']) {
    options['grpc.max_connection_age_ms'] = Number(values['max-age-ms']);
  }
  let credentials = grpc.ServerCredentials.createInsecure();
  if (values['tls-cert']) {
    const pair = { cert_chain: fs.readFileSync(values['tls-cert']), private_key: fs.readFileSync(values['tls-key']) };
    credentials = grpc.ServerCredentials.createSsl(null, [pair]);
  }
  const definition = loader.loadSync(path.join(__dirname, 'interop.proto'), { keepCase: true, defaults: true });
  const server = new grpc.Server(options);
  server.addService(grpc.loadPackageDefinition(definition).grpc.testing.TestService.service, service);
  server.bindAsync(`127.0.0.1:${values.port}`, credentials, (error, port) => {
    if (error) {
      throw error;
    }
    console.log(`listening on ${port}`);
  });
}

main();
