//! Level 0: bytes on sockets. Knows nothing of HTTP routes, policies or metrics.
//!
//! `socket` opens listeners and connections, `io` is the byte stream of a connection, `shared` lets hyper and the connection's
//! task use one stream, `closed_peer` asks the kernel for a caller's end, `certificates` reads PEM files into TLS settings,
//! `http1` and `http2` hold the limits of a connection. Per exchange: `flow` counts what has passed in both
//! directions, `body` is the request body on its way to the upstream, `trailers` are what may follow a body. `tunnel` copies
//! bytes both ways after CONNECT or an upgrade; `http2_tunnel` is the caller's side of a CONNECT over HTTP/2. `window_updates`
//! joins small credit of HTTP/2 peers.

pub mod body;
pub mod certificates;
pub mod closed_peer;
pub mod flow;
pub mod http1;
pub mod http2;
pub mod http2_tunnel;
pub mod io;
pub mod shared;
pub mod socket;
pub mod trailers;
pub mod tunnel;
pub mod window_updates;
