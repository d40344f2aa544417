//! HTTP/1, HTTP/2, TLS, DNS and tunnels on the wire, with the connections that carry them.
//!
//! - `connection_ends`: upstreams that stop, bound a connection, or close without being asked
//! - `connection_lifetime`: maximum age and requests of upstream connections
//! - `connection_pool`: reuse, limits and expiry of upstream connections
//! - `cut`: messages and tunnels that one side breaks off
//! - `dns`: endpoints by name, with a real name server
//! - `early_answers`: responses that are complete before their request
//! - `h2spec`: the HTTP/2 conformance suite
//! - `heads`: spaces before colons, many fields, odd statuses
//! - `half_close`: half-closed connections, callers that leave, `close_notify`
//! - `headers`: end-to-end, hop-by-hop and own header fields
//! - `http1`: HTTP/1.0 clients, pipelining, `Expect`, connection close
//! - `http1_corpus`: malformed, ambiguous, and odd but legal HTTP/1 messages
//! - `http2`: backlogs and late frames on one HTTP/2 connection
//! - `http2_wakeup_coalescing`: fewer wakeups under many HTTP/2 streams
//! - `message_completeness`: complete and incomplete messages, and the side at fault
//! - `mute_connections`: upstream connections that fall silent while TCP still acknowledges
//! - `resolver_settings`: `/etc/resolv.conf` and `/etc/hosts`, their changes, and the comparison with glibc
//! - `slow_accept`: services that accept connections slowly, full listen backlogs, dead addresses
//! - `slow_clients`: slow request heads and bodies, unread responses, idle connections
//! - `small_windows`: HTTP/2 peers that return credit per frame, or have a small window
//! - `tls`: trust, ALPN, server names, certificate rotation
//! - `translation`: each downstream protocol with each upstream protocol
//! - `tunnels`: CONNECT and WebSocket upgrades

mod connection_ends;
mod connection_lifetime;
mod connection_pool;
mod cut;
mod dns;
mod early_answers;
mod h2spec;
mod half_close;
mod headers;
mod heads;
mod http1;
mod http1_corpus;
mod http2;
mod http2_wakeup_coalescing;
mod message_completeness;
mod mute_connections;
mod resolver_settings;
mod slow_accept;
mod slow_clients;
mod small_windows;
mod tls;
mod translation;
mod tunnels;
