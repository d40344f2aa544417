//! What one HTTP/2 connection may hold and live through, with callers and with upstreams alike.

/// Streams on one connection.
pub const STREAMS: u32 = 256;

/// How much one stream may hold that nobody has read yet, in bytes.
pub const STREAM: u32 = 256 * 1024;

/// The window of a connection, in bytes: four times what its streams may hold together, so that one that is not read holds
/// up no other. h2 ends a connection on which too many small frames wait (ENHANCE_YOUR_CALM), and goes by half of this
/// window: it lets half a million wait. These take 130 MiB, where streams that are full of large frames take 84.
pub const CONNECTION: u32 = 4 * STREAM * STREAMS;

/// Frames in the whole life of a connection for streams that were reset so long ago that h2 has forgotten them; one more
/// ends the connection. Whoever had much on the way when a hundred calls were given up at once has done nothing wrong, so
/// this is far beyond h2's 1,024.
pub const LATE_FRAMES: usize = 65_536;
