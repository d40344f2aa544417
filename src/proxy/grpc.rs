//! What differs for a gRPC call: status codes, and responses that consist of trailers only.
//!
//! Sources: grpc/grpc doc/PROTOCOL-HTTP2.md, doc/http-grpc-status-mapping.md, doc/statuscodes.md.

use std::fmt::Write;

use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::{Response, StatusCode, header};

/// `grpc-status`
pub const STATUS: HeaderName = HeaderName::from_static("grpc-status");
/// `grpc-retry-pushback-ms`: when to retry; negative for never (gRFC A6).
pub const PUSHBACK: HeaderName = HeaderName::from_static("grpc-retry-pushback-ms");
/// `grpc-message`
pub const MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// The status codes of hopguard's own responses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum GrpcStatus {
    /// 2
    Unknown = 2,
    /// 4
    DeadlineExceeded = 4,
    /// 7
    PermissionDenied = 7,
    /// 8
    ResourceExhausted = 8,
    /// 12
    Unimplemented = 12,
    /// 13
    Internal = 13,
    /// 14
    Unavailable = 14,
    /// 16
    Unauthenticated = 16,
}

impl GrpcStatus {
    /// The status that an HTTP status stands for, where a response has no `grpc-status`.
    pub fn of_http(status: StatusCode) -> Self {
        match status.as_u16() {
            400 | 431 => Self::Internal,
            401 => Self::Unauthenticated,
            403 => Self::PermissionDenied,
            404 => Self::Unimplemented,
            429 | 502..=504 => Self::Unavailable,
            _ => Self::Unknown,
        }
    }
}

impl From<GrpcStatus> for u32 {
    fn from(code: GrpcStatus) -> Self {
        code as Self
    }
}

/// The HTTP status that says the same as a code, for a caller that does not speak gRPC (googleapis, google/rpc/code.proto).
pub fn as_http(code: u32) -> StatusCode {
    match code {
        0 => StatusCode::OK,
        3 | 9 | 11 => StatusCode::BAD_REQUEST,
        4 => StatusCode::GATEWAY_TIMEOUT,
        5 => StatusCode::NOT_FOUND,
        6 | 10 => StatusCode::CONFLICT,
        7 => StatusCode::FORBIDDEN,
        8 => StatusCode::TOO_MANY_REQUESTS,
        12 => StatusCode::NOT_IMPLEMENTED,
        14 => StatusCode::SERVICE_UNAVAILABLE,
        16 => StatusCode::UNAUTHORIZED,
        // CANCELLED has only 499, which no standard knows.
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// The fields of a response head or of trailers that carry a status.
pub fn status_fields(code: impl Into<u32>, message: &str) -> HeaderMap {
    let mut fields = HeaderMap::with_capacity(4);
    fields.insert(STATUS, HeaderValue::from(code.into()));
    if let Ok(message) = HeaderValue::from_str(&percent_encode(message)) {
        fields.insert(MESSAGE, message);
    }
    fields
}

/// A response that consists of its trailers alone.
pub fn trailers_only<B>(code: impl Into<u32>, message: &str, body: B) -> Response<B> {
    let mut answer = Response::new(body);
    *answer.headers_mut() = status_fields(code, message);
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    answer
}

/// The status that the fields carry, with the undecoded message.
pub fn read_status(fields: &HeaderMap) -> Option<(u32, Option<HeaderValue>)> {
    let code = fields.get(STATUS)?.to_str().ok()?.parse().ok()?;
    Some((code, fields.get(MESSAGE).cloned()))
}

fn percent_encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b' '..=b'$' | b'&'..=b'~' => encoded.push(char::from(byte)),
            _ => {
                // Writing into a String cannot fail.
                let _infallible = write!(encoded, "%{byte:02X}");
            }
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_percent_encoded_as_the_protocol_says() {
        assert_eq!(percent_encode("50% off\ncafé"), "50%25 off%0Acaf%C3%A9");
    }

    #[test]
    fn http_statuses_map_as_grpc_has_it() {
        for (status, code) in [(400, 13), (401, 16), (403, 7), (404, 12), (429, 14), (503, 14), (200, 2), (418, 2)] {
            assert_eq!(GrpcStatus::of_http(StatusCode::from_u16(status).unwrap()) as u32, code, "{status}");
        }
    }

    #[test]
    fn a_status_is_read_from_fields() {
        let fields = status_fields(GrpcStatus::Unavailable, "gone");
        assert_eq!(read_status(&fields), Some((14, Some(HeaderValue::from_static("gone")))));
        assert_eq!(read_status(&HeaderMap::new()), None);
    }
}
