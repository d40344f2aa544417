//! The closed list of local replies: what each kind looks like to callers, metrics and log, in one table.
//!
//! A new kind is one row; its outcome is one line in `telemetry/outcome.rs`.

use http::StatusCode;
use sfv::{TokenRef, token_ref};

use crate::proxy::grpc::GrpcStatus;
use crate::telemetry::{ClosedBy, Outcome};

/// What one kind looks like from outside.
pub(super) struct Face {
    /// The stable name: metric label, log field, `Proxy-Status` detail.
    pub(super) outcome: Outcome,
    /// To a caller that speaks HTTP.
    pub(super) status: StatusCode,
    /// To a gRPC caller.
    pub(super) grpc: GrpcStatus,
    /// The error type of RFC 9209, 2.3.
    pub(super) error: &'static TokenRef,
    /// The title of the problem document (RFC 9457).
    pub(super) title: &'static str,
    /// Who ended the exchange: hopguard, except where the upstream left nothing to end.
    pub(super) closed_by: ClosedBy,
    is_of_the_callee: bool,
    is_before_the_app: bool,
    /// What follows on the downstream connection cannot be trusted to be the next request (RFC 9112, 11.2).
    pub(super) ends_connection: bool,
}

impl Face {
    const fn by_upstream(self) -> Self {
        Self { closed_by: ClosedBy::Upstream, ..self }
    }

    const fn of_the_callee(self) -> Self {
        Self { is_of_the_callee: true, ..self }
    }

    const fn before_the_app(self) -> Self {
        Self { is_before_the_app: true, ..self }
    }

    const fn ends_connection(self) -> Self {
        Self { ends_connection: true, ..self }
    }
}

/// Makes the enum and the table from one row for each kind: outcome, HTTP status, gRPC status, error type of RFC 9209,
/// title, flags.
macro_rules! local_replies {
    ($($(#[$doc:meta])+ $kind:ident => $outcome:ident, $status:ident, $grpc:ident, $error:literal,
        $title:literal, [$($flag:ident),*];)+) => {
        /// Which local reply.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum LocalReplyKind {
            $($(#[$doc])+ $kind,)+
        }

        impl LocalReplyKind {
            /// The row of the table.
            pub(super) const fn face(self) -> Face {
                match self {
                    $(Self::$kind => Face {
                        outcome: Outcome::$outcome,
                        status: StatusCode::$status,
                        grpc: GrpcStatus::$grpc,
                        error: const { token_ref($error) },
                        title: $title,
                        closed_by: ClosedBy::Hopguard,
                        is_of_the_callee: false,
                        is_before_the_app: false,
                        ends_connection: false,
                    }$(.$flag())*,)+
                }
            }
        }
    };
}

local_replies! {
    /// The whole call took longer than `timeouts.request`.
    RequestTimeout => RequestTimeout, GATEWAY_TIMEOUT, DeadlineExceeded, "http_response_timeout",
        "The call took too long", [of_the_callee];
    /// One attempt took longer than `timeouts.perTry`.
    PerTryTimeout => PerTryTimeout, GATEWAY_TIMEOUT, DeadlineExceeded, "http_response_timeout",
        "One attempt took too long", [of_the_callee];
    /// No connection within `timeouts.connect`.
    ConnectTimeout => ConnectTimeout, GATEWAY_TIMEOUT, DeadlineExceeded, "connection_timeout",
        "No connection in time", [of_the_callee, before_the_app];
    /// No byte for `timeouts.idle`.
    IdleTimeout => IdleTimeout, GATEWAY_TIMEOUT, DeadlineExceeded, "connection_read_timeout",
        "No byte moved for too long", [of_the_callee];
    /// A stream lasted longer than `timeouts.maxDuration`.
    MaxDuration => MaxDuration, GATEWAY_TIMEOUT, DeadlineExceeded, "connection_read_timeout",
        "The stream lasted too long", [];
    /// `limits.inFlight` is reached and the queue is full.
    QueueFull => QueueFull, SERVICE_UNAVAILABLE, ResourceExhausted, "connection_limit_reached",
        "Too many calls at once", [of_the_callee, before_the_app];
    /// No permit within `limits.queueTimeout`.
    QueueTimeout => QueueTimeout, SERVICE_UNAVAILABLE, ResourceExhausted, "connection_limit_reached",
        "Too many calls at once", [of_the_callee, before_the_app];
    /// No destination has the host.
    NoDestination => NoDestination, NOT_FOUND, Unimplemented, "destination_not_found",
        "No destination has this host", [];
    /// The destination has no endpoint, and the request names no host.
    NoRoute => NoRoute, NOT_FOUND, Unimplemented, "destination_not_found",
        "The destination has no address to go to", [];
    /// The endpoint refused the connection or could not be reached.
    ConnectFailed => ConnectFailed, BAD_GATEWAY, Unavailable, "connection_refused",
        "The upstream cannot be reached", [by_upstream, of_the_callee, before_the_app];
    /// The name has no address.
    DnsFailed => DnsFailed, BAD_GATEWAY, Unavailable, "dns_error",
        "The upstream's name cannot be resolved", [of_the_callee, before_the_app];
    /// The TLS handshake with the upstream failed.
    TlsFailed => TlsFailed, BAD_GATEWAY, Unavailable, "tls_protocol_error",
        "TLS with the upstream failed", [by_upstream, of_the_callee];
    /// The upstream broke off before its response.
    UpstreamReset => UpstreamReset, BAD_GATEWAY, Unavailable, "connection_terminated",
        "The upstream broke off", [by_upstream, of_the_callee];
    /// The upstream's response is not HTTP.
    UpstreamProtocol => UpstreamProtocol, BAD_GATEWAY, Internal, "http_protocol_error",
        "The upstream's response is malformed", [of_the_callee];
    /// The request is not HTTP, or ambiguous.
    BadRequest => BadRequest, BAD_REQUEST, Internal, "http_request_error",
        "The request is malformed", [ends_connection];
    /// The transfer coding is not `chunked`.
    UnknownCoding => BadRequest, NOT_IMPLEMENTED, Internal, "http_request_error",
        "The transfer coding is unknown", [ends_connection];
    /// The method is longer than any registered one.
    UnknownMethod => BadRequest, NOT_IMPLEMENTED, Internal, "http_request_error",
        "The method is unknown", [ends_connection];
    /// The expectation is not `100-continue`.
    UnknownExpectation => BadRequest, EXPECTATION_FAILED, Internal, "http_request_error",
        "The expectation is unknown", [];
    /// The request's header section is longer than `maxHeaderSize`, or has more fields than `maxHeaderCount`.
    HeaderTooLarge => HeaderTooLarge, REQUEST_HEADER_FIELDS_TOO_LARGE, ResourceExhausted, "http_request_error",
        "The header section is too long", [ends_connection];
    /// The caller is too slow.
    CallerTimeout => CallerTimeout, REQUEST_TIMEOUT, DeadlineExceeded, "http_request_error",
        "The caller is too slow", [ends_connection];
    /// The request has passed this listener too often.
    LoopDetected => LoopDetected, BAD_GATEWAY, Internal, "proxy_loop_detected",
        "The request is in a forwarding loop", [];
    /// CONNECT where the listener does not allow it.
    ConnectDenied => ConnectDenied, FORBIDDEN, PermissionDenied, "http_request_denied",
        "CONNECT is not allowed here", [];
    /// hopguard is shutting down, or the listener is gone.
    Draining => Draining, SERVICE_UNAVAILABLE, Unavailable, "destination_unavailable",
        "This listener is closing", [before_the_app, ends_connection];
    /// The deadline passed before the response.
    DeadlineExceeded => DeadlineExceeded, GATEWAY_TIMEOUT, DeadlineExceeded, "http_response_timeout",
        "The deadline has passed", [of_the_callee];
    /// The deadline had passed when the call came.
    DeadlineSpent => DeadlineSpent, GATEWAY_TIMEOUT, DeadlineExceeded, "http_response_timeout",
        "The deadline had passed already", [];
    /// The circuit breaker is open.
    CircuitOpen => CircuitOpen, SERVICE_UNAVAILABLE, Unavailable, "destination_unavailable",
        "The destination is failing", [of_the_callee, before_the_app];
    /// `rateLimit` is used up.
    RateLimited => RateLimited, TOO_MANY_REQUESTS, ResourceExhausted, "http_request_denied",
        "The rate limit is used up", [of_the_callee];
    /// The request body is longer than `maxBodySize`.
    BodyTooLarge => BodyTooLarge, PAYLOAD_TOO_LARGE, ResourceExhausted, "http_request_error",
        "The request body is too long", [ends_connection];
}

impl LocalReplyKind {
    /// True if it stands for an upstream that failed or is protected: this hop has dealt with it.
    pub const fn is_of_the_callee(self) -> bool {
        self.face().is_of_the_callee
    }

    /// True if the upstream did not send what was waited for in time.
    pub const fn is_upstream_silence(self) -> bool {
        matches!(self, Self::PerTryTimeout | Self::RequestTimeout | Self::DeadlineExceeded | Self::IdleTimeout)
    }

    /// True if the app cannot have seen the request.
    pub const fn is_before_the_app(self) -> bool {
        self.face().is_before_the_app
    }
}
