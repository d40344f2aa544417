//! Real clients and servers of other projects, in processes of their own; `scripts/peers` installs them.
//!
//! - `deadline_python_go`: deadlines through aiohttp and `net/http` services
//! - `grpcio`: gRPC in Python, both sides
//! - `http_server`: Python's `http.server` under more callers than its listen backlog
//! - `process`: starts the peers and reads their reports
//! - `websocket_sse`: WebSocket and server-sent events

mod deadline_python_go;
mod grpcio;
mod http_server;
mod process;
mod websocket_sse;
