//! Level 6: the listeners that accept downstream connections.
//!
//! `accept` takes connections, `tls` holds a listener's certificates, `detect` tells HTTP/1 from HTTP/2 by the first bytes.
//! Every worker has its own socket on the listener's address; the connection stays on the worker that accepted it.

pub mod accept;
pub mod detect;
pub mod tls;
