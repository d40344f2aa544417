//! Level 6: the doors through which callers come.
//!
//! `accept` takes connections, `detect` finds out by the first bytes whether a caller speaks HTTP/1 or HTTP/2, `tls`
//! holds a listener's certificates. Every worker has a listener of its own on the same address.

pub mod accept;
pub mod detect;
pub mod tls;
