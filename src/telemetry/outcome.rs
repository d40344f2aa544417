//! How an exchange ended, and what it spoke: two closed sets, so that the label sets of the metrics are bounded.
//!
//! The names are part of the interface: dashboards and alerts are written against them.

/// Declares a closed enum whose variants have a stable name.
macro_rules! named {
    ($(#[$outer:meta])* $name:ident { $($(#[$inner:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$outer])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum $name { $($(#[$inner])* $variant,)+ }

        impl $name {
            /// Every value, in declaration order.
            pub const ALL: &'static [$name] = &[$($name::$variant,)+];

            /// The stable name: label value, log value, name of the refusal.
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
    /// What the caller spoke with us.
    Protocol {
        /// HTTP/1.0 and HTTP/1.1.
        Http1 = "http1",
        /// HTTP/2 that is not gRPC.
        Http2 = "http2",
        /// gRPC, told by its content type.
        Grpc = "grpc",
        /// An upgraded HTTP/1.1 connection, whatever it was upgraded to.
        WebSocket = "websocket",
        /// A CONNECT tunnel.
        Tunnel = "tunnel",
    }
}

named! {
    /// How an exchange ended. Everything from `request_timeout` on is a refusal: we answered, or cut, in the
    /// upstream's place.
    Outcome {
        /// A status from 100 to 399, or gRPC status OK, and a complete body.
        Ok = "ok",
        /// A 4xx from the upstream.
        ClientError = "client_error",
        /// A 5xx from the upstream.
        ServerError = "server_error",
        /// A gRPC status other than OK from the upstream, or none at all.
        GrpcError = "grpc_error",
        /// The caller went away before the exchange was complete.
        CallerGone = "caller_gone",
        /// The upstream's body broke off after its head had been passed on.
        UpstreamCut = "upstream_cut",
        /// The whole request took longer than `timeouts.request`.
        RequestTimeout = "request_timeout",
        /// One try took longer than `timeouts.perTry`.
        PerTryTimeout = "per_try_timeout",
        /// No connection within `timeouts.connect`.
        ConnectTimeout = "connect_timeout",
        /// No byte in either direction for `timeouts.idle`.
        IdleTimeout = "idle_timeout",
        /// A stream lived longer than `timeouts.maxDuration`.
        MaxDuration = "max_duration",
        /// `limits.inFlight` reached and `limits.queue` full.
        QueueFull = "queue_full",
        /// Waited longer than `limits.queueTimeout`.
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
        /// The upstream sent something that is not HTTP.
        UpstreamProtocol = "upstream_protocol",
        /// The caller sent something that is not HTTP, or is ambiguous.
        BadRequest = "bad_request",
        /// The caller's header section is longer than `maxHeaderSize`.
        HeaderTooLarge = "header_too_large",
        /// The caller's head or body came too slowly.
        CallerTimeout = "caller_timeout",
        /// The request has been here before.
        LoopDetected = "loop_detected",
        /// A CONNECT that the policy does not allow.
        ConnectDenied = "connect_denied",
        /// We are shutting down.
        Draining = "draining",
        /// The caller's deadline, or that of the request that caused the call, was over before the answer was.
        DeadlineExceeded = "deadline_exceeded",
        /// The deadline was over, or as good as over, when the call came.
        DeadlineSpent = "deadline_spent",
        /// The destination's circuit breaker is open.
        CircuitOpen = "circuit_open",
        /// More calls than `rateLimit` allows.
        RateLimited = "rate_limited",
    }
}

impl Outcome {
    /// Whether it counts against the success rate: every refusal, 5xx, gRPC error and cut body. A 4xx is an answer, and
    /// a caller that went away is not a failure of the hop.
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
