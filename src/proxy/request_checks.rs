//! What may not be passed on at all, checked on the request head before anything else (RFC 9112, 6; RFC 9110, 9.1 and 10.1.1).

use http::request::Parts;
use http::{HeaderValue, Method, Version, header};

use crate::policy::model::Listener;
use crate::proxy::downstream::DownstreamConnection;
use crate::proxy::headers::{self, HeaderScan};
use crate::proxy::local_reply::{LocalReply, LocalReplyKind};

/// Longer than any registered method, in characters; a longer one is no method.
const LONGEST_METHOD: usize = 64;

/// Checks a request head, and brings `Cookie` and `Content-Length` into one field each.
///
/// # Errors
/// The local reply to a head that is too long, ambiguous, or not HTTP.
pub(super) fn check(head: &mut Parts, scan: &HeaderScan, listener: &Listener) -> Result<(), LocalReply> {
    check_size(head, scan, listener)?;
    check_count(head, listener)?;
    check_method(&head.method)?;
    check_framing(head, scan)?;
    check_expectation(head, scan)?;
    // A route or a limit that reads the cookie gets all of it.
    headers::join_cookies(&mut head.headers, scan);
    headers::one_length(&mut head.headers, scan);
    Ok(())
}

/// Refuses a request that has passed this listener ten times.
///
/// # Errors
/// The local reply to such a request.
pub(super) fn check_loop(head: &Parts, scan: &HeaderScan, downstream: &DownstreamConnection) -> Result<(), LocalReply> {
    if scan.via && downstream.listener.via.is_loop(&head.headers) {
        let detail = "the request has passed this listener ten times";
        return Err(LocalReply::plain(LocalReplyKind::LoopDetected, detail));
    }
    Ok(())
}

fn check_size(head: &Parts, scan: &HeaderScan, listener: &Listener) -> Result<(), LocalReply> {
    let limit = &listener.max_header_size;
    if scan.size <= limit.value as usize {
        return Ok(());
    }
    let longest = HeaderScan::longest(&head.headers)
        .map_or_else(String::new, |(name, size)| format!("; the longest field is {name} with {size} bytes"));
    let detail = format!("the header section has {} bytes{longest}", scan.size);
    Err(LocalReply::counted(LocalReplyKind::HeaderTooLarge, "maxHeaderSize", limit, detail))
}

fn check_count(head: &Parts, listener: &Listener) -> Result<(), LocalReply> {
    let (limit, count) = (&listener.max_header_count, head.headers.len());
    if count <= limit.value as usize {
        return Ok(());
    }
    let detail = format!("the request has {count} header fields");
    Err(LocalReply::counted(LocalReplyKind::HeaderTooLarge, "maxHeaderCount", limit, detail))
}

fn check_method(method: &Method) -> Result<(), LocalReply> {
    if method.as_str().len() <= LONGEST_METHOD {
        return Ok(());
    }
    let detail = "the method is longer than 64 characters (RFC 9110, 9.1)";
    Err(LocalReply::plain(LocalReplyKind::UnknownMethod, detail))
}

/// hyper has refused what it cannot frame; this refuses what it could, but the next hop might read otherwise (RFC 9112, 6).
fn check_framing(head: &Parts, scan: &HeaderScan) -> Result<(), LocalReply> {
    let bad = |detail: &'static str| Err(LocalReply::plain(LocalReplyKind::BadRequest, detail));
    if scan.codings > 0 && scan.lengths > 0 {
        return bad("both Content-Length and Transfer-Encoding (RFC 9112, 6.1)");
    }
    if scan.codings > 1 {
        return bad("more than one Transfer-Encoding (RFC 9112, 6.1)");
    }
    if head.method == Method::CONNECT && !is_without_body(head, scan) {
        return bad("a CONNECT has no body (RFC 9110, 9.3.6)");
    }
    if !headers::only_chunked(&head.headers, scan) {
        let detail = "the transfer coding is not chunked (RFC 9112, 6.1)";
        return Err(LocalReply::plain(LocalReplyKind::UnknownCoding, detail));
    }
    Ok(())
}

/// True if the head announces no body: some clients send `Content-Length: 0` with each request that has none. Over HTTP/2 it
/// would be the length of all DATA frames of the tunnel (RFC 9113, 8.1.1).
fn is_without_body(head: &Parts, scan: &HeaderScan) -> bool {
    let mut lengths = head.headers.get_all(header::CONTENT_LENGTH).iter();
    let is_zero = |value: &HeaderValue| value.as_bytes().iter().all(|byte| b"0, \t".contains(byte));
    scan.codings == 0 && (scan.lengths == 0 || (head.version < Version::HTTP_2 && lengths.all(is_zero)))
}

fn check_expectation(head: &mut Parts, scan: &HeaderScan) -> Result<(), LocalReply> {
    if !scan.expect {
        return Ok(());
    }
    if head.version < Version::HTTP_11 {
        head.headers.remove(header::EXPECT);
        return Ok(());
    }
    let mut all = head.headers.get_all(header::EXPECT).iter();
    if all.all(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue")) {
        return Ok(());
    }
    let detail = "only 100-continue can be expected (RFC 9110, 10.1.1)";
    Err(LocalReply::plain(LocalReplyKind::UnknownExpectation, detail))
}
