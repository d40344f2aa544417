//! Limits of one HTTP/2 connection, downstream and upstream alike.
//!
//! `proxy::serve` sets them on the server, `upstream::http2` on the client.

/// Concurrent streams on one connection: upstream always, downstream unless `maxStreams` of the listener differs.
pub const MAX_STREAMS: u32 = 256;

/// Flow-control window of a stream, in bytes: how much of it may wait to be read.
pub const STREAM_WINDOW: u32 = 256 * 1024;

/// Flow-control window of a connection with [`MAX_STREAMS`], in bytes.
pub const CONNECTION_WINDOW: u32 = connection_window(MAX_STREAMS);

/// Flow-control window of a connection with so many streams (at most 1,024), in bytes: four times the windows of all its streams, so that a stream that is not
/// read blocks no other. h2 ends a connection on which too many small frames wait (ENHANCE_YOUR_CALM); its limit follows
/// from half of this window, half a million frames. Those take 130 MiB, streams full of large frames 84 MiB.
pub const fn connection_window(streams: u32) -> u32 {
    4 * STREAM_WINDOW * if streams > MAX_STREAMS { streams } else { MAX_STREAMS }
}

/// Frames in the life of a connection for streams that were reset so long ago that h2 has forgotten them; one more ends
/// the connection. A peer with much in flight when a hundred calls are cancelled at once behaves correctly, so this is far
/// beyond h2's default of 1,024.
pub const MAX_LATE_FRAMES: usize = 65_536;
