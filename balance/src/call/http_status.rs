//! Classifies the head of a response: whether it is gRPC, and which failure it carries.

use std::fmt;

use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use tonic::Code;

/// The kind of a response head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Head {
    /// The head of a gRPC response. The code is set if the head is the whole response.
    Grpc(Option<Code>),
    /// The head of a response that is not gRPC, with the gRPC code for its HTTP status.
    NotGrpc(Code),
}

impl Head {
    /// Classifies a response head. Without this function, the error page of a proxy would count as a fast success.
    pub(super) fn of<T>(response: &Response<T>) -> Self {
        let (mut code, mut is_grpc) = (None, false);
        // One pass over the few headers costs less than two look-ups, because each look-up hashes its name.
        for (name, value) in response.headers() {
            if *name == CONTENT_TYPE {
                let kind = value.as_bytes().get(..GRPC.len());
                is_grpc = kind.is_some_and(|kind| kind.eq_ignore_ascii_case(GRPC));
            } else if *name == GRPC_STATUS {
                code = Some(Code::from_bytes(value.as_bytes()));
            }
        }
        // A gRPC status is sufficient, because some servers send an error without a content-type.
        if code.is_some() || (is_grpc && response.status() == StatusCode::OK) {
            Self::Grpc(code)
        } else {
            Self::NotGrpc(from_http(response.status()))
        }
    }

    /// Returns the failure that the head carries, if any. A gRPC head that is followed by messages or trailers carries no failure.
    pub(super) fn failure(self) -> Option<Code> {
        match self {
            Self::Grpc(code) => code.filter(|code| *code != Code::Ok),
            Self::NotGrpc(code) => Some(code),
        }
    }
}

/// Returns the failure that a response's head carries, if any.
pub(super) fn failure<T>(response: &Response<T>) -> Option<Code> {
    Head::of(response).failure()
}

/// Maps an HTTP status to a gRPC code, as in gRPC's `http-grpc-status-mapping.md`.
fn from_http(status: StatusCode) -> Code {
    match status {
        StatusCode::BAD_REQUEST => Code::Internal,
        StatusCode::UNAUTHORIZED => Code::Unauthenticated,
        StatusCode::FORBIDDEN => Code::PermissionDenied,
        StatusCode::NOT_FOUND => Code::Unimplemented,
        StatusCode::TOO_MANY_REQUESTS
        | StatusCode::BAD_GATEWAY
        | StatusCode::SERVICE_UNAVAILABLE
        | StatusCode::GATEWAY_TIMEOUT => Code::Unavailable,
        _ => Code::Unknown,
    }
}

/// The description of a response that is not gRPC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NonGrpcResponse {
    http: StatusCode,
    content_type: Option<HeaderValue>,
}

impl NonGrpcResponse {
    #[cold]
    pub(super) fn of<T>(response: &Response<T>) -> Self {
        Self {
            http: response.status(),
            content_type: response.headers().get(CONTENT_TYPE).cloned(),
        }
    }

    pub(super) fn code(&self) -> Code {
        from_http(self.http)
    }

    pub(super) fn http(&self) -> StatusCode {
        self.http
    }
}

impl fmt::Display for NonGrpcResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let http = self.http.as_u16();
        write!(f, "the response is not gRPC: HTTP status {http}")?;
        match &self.content_type {
            // `Debug` escapes characters that a terminal would interpret.
            Some(content_type) => write!(f, ", content-type {content_type:?}"),
            None => f.write_str(" without a content-type"),
        }
    }
}

/// Returns the gRPC status in headers or trailers, if any.
pub(super) fn code(headers: &HeaderMap) -> Option<Code> {
    let code = headers.get(GRPC_STATUS)?;
    Some(Code::from_bytes(code.as_bytes()))
}

/// The header of the gRPC status. A response head contains it only if no trailers follow.
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
/// The common prefix of the content types in gRPC responses.
const GRPC: &[u8] = b"application/grpc";

#[cfg(test)]
mod tests {
    use super::*;

    fn response(http: u16, headers: &[(&'static str, &'static str)]) -> Response<()> {
        let mut response = Response::new(());
        *response.status_mut() = StatusCode::from_u16(http).expect("a status");
        for (name, value) in headers {
            let value = HeaderValue::from_static(value);
            response.headers_mut().append(*name, value);
        }
        response
    }

    #[test]
    fn a_head_is_grpc_with_a_grpc_status_or_with_http_200_and_a_grpc_content_type() {
        let grpc = ("content-type", "application/grpc+proto");
        let html = ("content-type", "text/html");
        let not_found = Head::Grpc(Some(Code::NotFound));
        assert_eq!(Head::of(&response(200, &[grpc])), Head::Grpc(None));
        let answered = response(200, &[grpc, ("grpc-status", "5")]);
        assert_eq!(Head::of(&answered), not_found);
        let unlabelled = response(503, &[html, ("grpc-status", "5")]);
        assert_eq!(Head::of(&unlabelled), not_found);
        for (not_grpc, code) in [
            (response(200, &[]), Code::Unknown),
            (response(200, &[html]), Code::Unknown),
            (response(204, &[grpc]), Code::Unknown),
            (response(503, &[grpc]), Code::Unavailable),
            (response(403, &[html]), Code::PermissionDenied),
        ] {
            assert_eq!(Head::of(&not_grpc), Head::NotGrpc(code), "{not_grpc:?}");
        }
    }

    #[test]
    fn only_a_response_head_with_an_error_is_a_failure() {
        let grpc = ("content-type", "application/grpc");
        let begun = response(200, &[grpc]);
        assert_eq!(
            failure(&begun),
            None,
            "a head without a status must not count as a failure"
        );
        assert_eq!(failure(&response(200, &[grpc, ("grpc-status", "0")])), None);
        for (http, code) in [
            (200, Code::Unknown),
            (400, Code::Internal),
            (401, Code::Unauthenticated),
            (403, Code::PermissionDenied),
            (404, Code::Unimplemented),
            (418, Code::Unknown),
            (429, Code::Unavailable),
            (502, Code::Unavailable),
            (503, Code::Unavailable),
            (504, Code::Unavailable),
        ] {
            assert_eq!(failure(&response(http, &[])), Some(code), "{http}");
        }
    }

    #[test]
    fn a_non_grpc_response_is_described_in_one_line() {
        let page = response(502, &[("content-type", "text/html")]);
        assert_eq!(
            NonGrpcResponse::of(&page).to_string(),
            "the response is not gRPC: HTTP status 502, content-type \"text/html\""
        );
        let bare = response(204, &[]);
        assert_eq!(
            NonGrpcResponse::of(&bare).to_string(),
            "the response is not gRPC: HTTP status 204 without a content-type"
        );
    }
}
