//! Real clients and servers of other projects, in processes of their own; `scripts/peers` installs them.
//!
//! - `callers`: rounds of requests with identities, and what became of each
//! - `connection_limits`: servers that end persistent connections by time or by number of requests
//! - `deadline_python_go`: deadlines through aiohttp and `net/http` services
//! - `early_answers`: uploads that are answered before their end, by clients and servers in five languages
//! - `graceful_stop`: servers that are stopped under load
//! - `grpc_connection_age`: gRPC servers in Python, Go, Java, JavaScript: the age of connections, and the count of pings
//! - `grpcio`: gRPC in Python, both sides
//! - `http_server`: Python's `http.server` under more callers than its listen backlog
//! - `process`: starts the peers and reads their reports
//! - `real_server`: starts the servers of `tests/servers`
//! - `replaced_workers`: servers that replace a worker process and keep their socket
//! - `websocket_sse`: WebSocket and server-sent events

mod callers;
mod connection_limits;
mod deadline_python_go;
mod early_answers;
mod graceful_stop;
mod grpc_connection_age;
mod grpcio;
mod http_server;
mod process;
mod real_server;
mod replaced_workers;
mod websocket_sse;
