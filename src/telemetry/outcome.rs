//! Outcome and protocol of an exchange: two closed sets, so that the label sets of the metrics are bounded.
//!
//! The names are part of the public interface: dashboards and alerts use them.

/// Declares an enum whose variants have stable names.
macro_rules! named {
    ($(#[$outer:meta])* $name:ident { $($(#[$inner:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$outer])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum $name { $($(#[$inner])* $variant,)+ }

        impl $name {
            /// All values, in declaration order.
            pub const ALL: &'static [$name] = &[$($name::$variant,)+];

            /// The stable name, used as label value and in log lines.
            pub const fn as_str(self) -> &'static str {
                match self { $($name::$variant => $text,)+ }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

named! {
    /// The protocol that the caller used.
    Protocol {
        /// HTTP/1.0 and HTTP/1.1.
        Http1 = "http1",
        /// HTTP/2 that is not gRPC.
        Http2 = "http2",
        /// gRPC, recognised by its content type.
        Grpc = "grpc",
        /// An HTTP/1.1 connection after an upgrade to any protocol.
        WebSocket = "websocket",
        /// A CONNECT tunnel.
        Tunnel = "tunnel",
    }
}

named! {
    /// How an exchange ended. Every outcome from `request_timeout` on is a refusal: hopguard sent a local reply or cut
    /// the exchange.
    Outcome {
        /// A status from 100 to 399, or gRPC status OK, and a complete body.
        Ok = "ok",
        /// A 4xx from the upstream.
        ClientError = "client_error",
        /// A 5xx from the upstream.
        ServerError = "server_error",
        /// A gRPC status other than OK from the upstream, or no gRPC status.
        GrpcError = "grpc_error",
        /// The caller disconnected before the exchange was complete, or reset its side of a tunnel.
        CallerGone = "caller_gone",
        /// The upstream's body broke off after its head had been sent to the caller, or the upstream reset its side of a
        /// tunnel.
        UpstreamCut = "upstream_cut",
        /// The whole request took longer than `timeouts.request`.
        RequestTimeout = "request_timeout",
        /// One attempt took longer than `timeouts.perTry`.
        PerTryTimeout = "per_try_timeout",
        /// No connection within `timeouts.connect`.
        ConnectTimeout = "connect_timeout",
        /// No byte in either direction for `timeouts.idle`.
        IdleTimeout = "idle_timeout",
        /// A stream lived longer than `timeouts.maxDuration`.
        MaxDuration = "max_duration",
        /// `limits.inFlight` was reached and the queue (`limits.queue`) was full.
        QueueFull = "queue_full",
        /// The exchange was queued longer than `limits.queueTimeout`.
        QueueTimeout = "queue_timeout",
        /// No destination has this host.
        NoDestination = "no_destination",
        /// No route of the destination matches, or it has no endpoint.
        NoRoute = "no_route",
        /// The upstream refused the connection or could not be reached.
        ConnectFailed = "connect_failed",
        /// The upstream's name could not be resolved.
        DnsFailed = "dns_failed",
        /// The TLS handshake with the upstream failed.
        TlsFailed = "tls_failed",
        /// The upstream reset the connection or stream before its head was complete.
        UpstreamReset = "upstream_reset",
        /// The upstream sent bytes that are not valid HTTP.
        UpstreamProtocol = "upstream_protocol",
        /// The caller sent bytes that are not valid HTTP, or HTTP that is ambiguous.
        BadRequest = "bad_request",
        /// The caller's header section is longer than `maxHeaderSize`, or has more fields than `maxHeaderCount`.
        HeaderTooLarge = "header_too_large",
        /// The caller's head or body arrived too slowly.
        CallerTimeout = "caller_timeout",
        /// The request has passed this hopguard before.
        LoopDetected = "loop_detected",
        /// The policy does not allow this CONNECT.
        ConnectDenied = "connect_denied",
        /// Hopguard is shutting down.
        Draining = "draining",
        /// The deadline of the caller, or of the parent request, passed before the response was complete.
        DeadlineExceeded = "deadline_exceeded",
        /// The deadline had passed, or was too close, when the call arrived.
        DeadlineSpent = "deadline_spent",
        /// The destination's circuit breaker is open.
        CircuitOpen = "circuit_open",
        /// The call exceeds `rateLimit`.
        RateLimited = "rate_limited",
        /// The request body is longer than `maxBodySize`.
        BodyTooLarge = "body_too_large",
    }
}

impl Outcome {
    /// True if the outcome counts against the success rate: every refusal, 5xx, gRPC error and cut body. A 4xx is a
    /// valid response, and a caller that disconnects is not a failure of the hop.
    pub const fn is_failure(self) -> bool {
        !matches!(self, Outcome::Ok | Outcome::ClientError | Outcome::CallerGone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_snake_case_and_complete() {
        for (index, outcome) in Outcome::ALL.iter().enumerate() {
            assert_eq!(*outcome as usize, index);
            let name = outcome.as_str();
            assert!(name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'), "{name}");
            assert_eq!(Outcome::ALL.iter().filter(|other| other.as_str() == name).count(), 1);
        }
        assert!(Outcome::ALL.len() * Protocol::ALL.len() <= 256, "the series key is one byte");
    }
}
