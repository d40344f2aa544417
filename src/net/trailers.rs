//! Trailers: the fields that may pass to the next hop after a body.
//!
//! Applied to request and response trailers. Fields that frame, route, authorise or describe the body have no meaning or a
//! dangerous one after it (RFC 9110, 6.5.1); hop-by-hop fields end with their connection (RFC 9110, 7.6.1). In the trailers
//! of a gRPC response, fields that route or authorise are metadata, on which HTTP does not act.

use http::header::{self, HeaderMap, HeaderName};

/// Fields that frame or describe the body, or end with their connection: they never pass in trailers.
const FRAMING: [HeaderName; 11] = [
    header::CONNECTION,
    header::CONTENT_ENCODING,
    header::CONTENT_LENGTH,
    header::CONTENT_TYPE,
    HeaderName::from_static("keep-alive"),
    header::PROXY_AUTHENTICATE,
    HeaderName::from_static("proxy-connection"),
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// Fields that HTTP acts on and that must precede the body: to gRPC they are names of metadata like others.
const OF_THE_HEAD: [HeaderName; 9] = [
    header::AUTHORIZATION,
    header::CACHE_CONTROL,
    header::CONTENT_RANGE,
    header::EXPECT,
    header::HOST,
    header::MAX_FORWARDS,
    header::PROXY_AUTHORIZATION,
    header::SET_COOKIE,
    header::WWW_AUTHENTICATE,
];

/// Removes the forbidden fields, and those in `named`: the names that the message's `Connection` field lists.
pub fn sanitize(trailers: &mut HeaderMap, named: &[HeaderName]) {
    sanitize_grpc(trailers, named);
    for name in &OF_THE_HEAD {
        trailers.remove(name);
    }
}

/// The same for a gRPC response, whose trailers are metadata with names of the app's choice (grpc/grpc
/// doc/PROTOCOL-HTTP2.md, Custom-Metadata).
pub fn sanitize_grpc(trailers: &mut HeaderMap, named: &[HeaderName]) {
    for name in FRAMING.iter().chain(named) {
        trailers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn left(sanitize: fn(&mut HeaderMap, &[HeaderName])) -> String {
        let mut trailers = HeaderMap::new();
        for name in ["grpc-status", "x-sum", "content-length", "authorization", "set-cookie", "host", "te", "x-hop"] {
            trailers.insert(HeaderName::from_static(name), "1".parse().unwrap());
        }
        sanitize(&mut trailers, &[HeaderName::from_static("x-hop")]);
        let mut left: Vec<_> = trailers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        left.join(" ")
    }

    #[test]
    fn forbidden_and_named_fields_are_removed_and_the_rest_stays() {
        assert_eq!(left(sanitize), "grpc-status x-sum");
    }

    #[test]
    fn metadata_of_grpc_stays_whatever_its_name() {
        assert_eq!(left(sanitize_grpc), "authorization grpc-status host set-cookie x-sum");
    }
}
