//! Level 0: bytes on sockets. Knows nothing of HTTP routes, policies or metrics.
//!
//! `socket` opens listeners and connections, `io` is the byte stream of a connection, `certificates` reads PEM files into
//! TLS settings, `http2` holds the limits of an HTTP/2 connection. Per exchange: `flow` counts what has passed in both
//! directions, `body` is the request body on its way to the upstream, `trailers` are what may follow a body. `tunnel` copies
//! bytes both ways after CONNECT or an upgrade. `window_updates` joins small credit of HTTP/2 peers.

pub mod body;
pub mod certificates;
pub mod flow;
pub mod http2;
pub mod io;
pub mod socket;
pub mod trailers;
pub mod tunnel;
pub mod window_updates;
