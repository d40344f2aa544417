//! Level 0: bytes on sockets. Knows nothing of HTTP routes, policies or metrics.
//!
//! `socket` opens listeners and connections, `io` is the byte stream that everything else reads and writes,
//! `flow` is what has passed through one exchange so far, `body` the caller's body on its way to the upstream,
//! `trailers` is what may come behind it, `http2` what one connection of HTTP/2 may hold, `certificates` reads PEM files,
//! `tunnel` copies bytes both ways.

pub mod body;
pub mod certificates;
pub mod flow;
pub mod http2;
pub mod io;
pub mod socket;
pub mod trailers;
pub mod tunnel;
