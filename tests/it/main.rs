//! hopguard as its users meet it: the whole proxy, real sockets, real peers.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]
#![allow(clippy::disallowed_methods, reason = "tests have no workers, and read what CI tells them")]
#![allow(clippy::print_stdout, reason = "a test that is not run says so")]
#![allow(missing_docs, reason = "the names of the tests say what they hold")]

mod access_log; // what is written, and what is not
mod admin; // probes, metrics, the policy in force
mod balancing; // which endpoint gets the next call
mod chain; // several hopguards and apps in a row
mod circuit_breaker; // a destination that fails, and its callers
mod coalescing; // fewer wakes under many streams
mod command_line; // the commands that a user types
mod deadline; // one budget of time for the whole chain
mod discovery; // several endpoints, and names
mod drain; // the end, and beginnings that fail
mod ejection; // an endpoint that fails among others
mod ends; // what counts as a whole answer, and whose fault it is when there is none
mod faults; // what goes wrong on purpose
mod fields; // header fields: which pass, which end here, which are ours
mod following; // what is followed beside the policy's own files
mod grpc_peers; // grpcio on both sides
mod h2spec; // the HTTP/2 conformance tests
mod http1; // old callers, pipelines, Expect, upstreams that hang up
mod http1_corpus; // malformed, ambiguous, and odd but legal messages
mod http2; // what one connection lives through
mod joined; // a deadline that passes through an app
mod labels; // metrics do not grow with what callers send
mod languages; // a deadline through services in Python and Go
mod limits; // places, the queue, who is sent away
mod marks; // what one hopguard tells the next about a failure
mod names; // names, as a real name server answers for them
mod places; // a destination that leads to where the caller was going
mod pools; // connections to upstreams
mod protocols; // every protocol with every other
mod rate_limit; // so many calls a time
mod recovery; // an upstream that dies and comes back
mod reload; // a policy that changes
mod resent; // the body of a request, and the connection it goes over, when it is sent again
mod retries; // which failed calls are sent again, when, how often
mod routing; // hosts, paths, methods, header fields, gRPC
mod rows; // a chain of services under retries, deadlines, races, hangs, restarts, changes: as it is measured
mod script; // running the Python peers
mod slow_callers; // what a slow caller holds is bounded
mod streams; // WebSocket and SSE libraries
mod support; // the proxy, callers, upstreams
mod timeouts; // every timeout, and what its victim hears
mod tls; // TLS on both sides, certificates that change
mod tunnels; // CONNECT and WebSocket
