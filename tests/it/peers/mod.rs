//! Real clients and servers of other projects, in processes of their own; `scripts/peers` installs them.
//!
//! - `deadline_python_go`: deadlines through aiohttp and `net/http` services
//! - `early_answers`: uploads that are answered before their end, by clients and servers in five languages
//! - `grpc_connection_age`: gRPC servers in Python, Go, Java, JavaScript: the age of connections, and the count of pings
//! - `grpcio`: gRPC in Python, both sides
//! - `process`: starts the peers and reads their reports
//! - `websocket_sse`: WebSocket and server-sent events

mod deadline_python_go;
mod early_answers;
mod grpc_connection_age;
mod grpcio;
mod process;
mod websocket_sse;
