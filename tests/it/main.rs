//! The whole proxy over real sockets, with scripted and real peers. One folder for each room; its `mod.rs` lists the files.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]
#![allow(clippy::disallowed_methods, reason = "tests have no workers, and read what CI tells them")]
#![allow(clippy::print_stdout, reason = "a test that is not run says so")]
#![allow(missing_docs, reason = "the names of the tests say what they hold")]

mod lifecycle; // command line, drain, exit codes
mod peers; // real clients and servers in Python and Go
mod policy; // routing and reload
mod protocol; // HTTP/1, HTTP/2, TLS, DNS, tunnels, connections
mod rules; // timeouts, deadlines, retries, breakers, limits, balancing, faults
mod support; // the proxy under test, scripted clients and upstreams
mod telemetry; // access log, metrics, admin pages
