//! Trailers: the fields that may pass to the next hop after a body.
//!
//! Applied to request and response trailers. Fields that frame, route, authorise or describe the body have no meaning or a
//! dangerous one after it (RFC 9110, 6.5.1); hop-by-hop fields end with their connection (RFC 9110, 7.6.1).

use http::header::{self, HeaderMap, HeaderName};

/// Field names that never pass in trailers.
const FORBIDDEN: [HeaderName; 20] = [
    header::AUTHORIZATION,
    header::CACHE_CONTROL,
    header::CONNECTION,
    header::CONTENT_ENCODING,
    header::CONTENT_LENGTH,
    header::CONTENT_RANGE,
    header::CONTENT_TYPE,
    header::EXPECT,
    header::HOST,
    HeaderName::from_static("keep-alive"),
    header::MAX_FORWARDS,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    HeaderName::from_static("proxy-connection"),
    header::SET_COOKIE,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::WWW_AUTHENTICATE,
];

/// Removes the forbidden fields, and those in `named`: the names that the message's `Connection` field lists.
pub fn sanitize(trailers: &mut HeaderMap, named: &[HeaderName]) {
    for name in FORBIDDEN.iter().chain(named) {
        trailers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forbidden_and_named_fields_are_removed_and_the_rest_stays() {
        let mut trailers = HeaderMap::new();
        for name in ["grpc-status", "x-sum", "content-length", "host", "x-hop"] {
            trailers.insert(HeaderName::from_static(name), "1".parse().unwrap());
        }
        sanitize(&mut trailers, &[HeaderName::from_static("x-hop")]);
        let mut left: Vec<_> = trailers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["grpc-status", "x-sum"]);
    }
}
