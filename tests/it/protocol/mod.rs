//! HTTP/1, HTTP/2, TLS, DNS and tunnels on the wire, with the connections that carry them.
//!
//! - `connection_pool`: reuse, limits and expiry of upstream connections
//! - `dns`: endpoints by name, with a real name server
//! - `h2spec`: the HTTP/2 conformance suite
//! - `headers`: end-to-end, hop-by-hop and own header fields
//! - `http1`: HTTP/1.0 clients, pipelining, `Expect`, connection close
//! - `http1_corpus`: malformed, ambiguous, and odd but legal HTTP/1 messages
//! - `http2`: backlogs and late frames on one HTTP/2 connection
//! - `http2_wakeup_coalescing`: fewer wakeups under many HTTP/2 streams
//! - `message_completeness`: complete and incomplete messages, and the side at fault
//! - `slow_accept`: services that accept connections slowly, full listen backlogs, dead addresses
//! - `slow_clients`: slow request heads and bodies, unread responses, idle connections
//! - `tls`: trust, ALPN, server names, certificate rotation
//! - `translation`: each downstream protocol with each upstream protocol
//! - `tunnels`: CONNECT and WebSocket upgrades

mod connection_pool;
mod dns;
mod h2spec;
mod headers;
mod http1;
mod http1_corpus;
mod http2;
mod http2_wakeup_coalescing;
mod message_completeness;
mod slow_accept;
mod slow_clients;
mod tls;
mod translation;
mod tunnels;
