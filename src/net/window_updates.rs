//! Joins small WINDOW_UPDATE frames of an HTTP/2 peer before h2 reads them, so that h2 sends no run of tiny DATA frames.
//!
//! h2 sends as much as the window allows, however little that is. Each chunk of a body ends in a smaller frame; a peer that
//! returns credit per frame returns that little credit too, and it never grows again: in the end most frames have one byte
//! (the silly window syndrome of RFC 1122, 4.2.3.4). So credit for a stream, or for the connection, is withheld until it is
//! 8 KiB, or half of the stream's initial window if that is less, and for 10 ms at most: a peer that waits for the last bytes
//! of its window gets them. Credit of half a window at once passes unchanged, as nearly all libraries return it.
//!
//! All other bytes pass unchanged. The frames are only measured; h2 checks them.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

/// Credit that is always large enough, in bytes.
const ENOUGH: u32 = 8 * 1024;

/// The initial window of RFC 9113, 6.9.2, in bytes.
const DEFAULT_WINDOW: u32 = 65_535;

/// Longest time for which credit is withheld.
const WITHHELD_FOR: Duration = Duration::from_millis(10);

/// Streams whose credit is withheld at a time; that of others passes at once.
const MAX_STREAMS: usize = 32;

/// The connection preface of a client (RFC 9113, 3.4), in bytes.
const PREFACE: usize = 24;

/// Bytes of a frame's header, and of a whole WINDOW_UPDATE frame.
const HEADER: usize = 9;
const WINDOW_UPDATE: usize = HEADER + 4;

/// A SETTINGS frame that is longer is not read here, in bytes.
const MAX_SETTINGS: usize = 1024;

/// Least room in a read buffer to read into it directly, in bytes.
const MIN_ROOM: usize = 2 * MAX_SETTINGS;

const SETTINGS_TYPE: u8 = 4;
const WINDOW_UPDATE_TYPE: u8 = 8;
const INITIAL_WINDOW_SIZE: [u8; 2] = [0, 4];

/// A stream that speaks HTTP/2, with joined WINDOW_UPDATE frames.
pub struct JoinedWindowUpdates<S> {
    inner: S,
    frames: FrameScanner,
    /// Bytes that are read next.
    ready: Vec<u8>,
    /// Fires when withheld credit is due; made when credit is withheld for the first time.
    timer: Option<Pin<Box<Sleep>>>,
}

impl<S> JoinedWindowUpdates<S> {
    /// The bytes of a client, which begin with its preface.
    pub fn of_client(inner: S) -> Self {
        Self::new(inner, PREFACE)
    }

    /// The bytes of a server.
    pub fn of_server(inner: S) -> Self {
        Self::new(inner, 0)
    }

    fn new(inner: S, preface: usize) -> Self {
        let frames = FrameScanner { payload: preface, held: Vec::new(), credit: WithheldCredit::default() };
        Self { inner, frames, ready: Vec::new(), timer: None }
    }

    /// Queues withheld credit that is due.
    fn poll_due(&mut self, cx: &mut Context<'_>) {
        if self.frames.payload > 0 {
            return;
        }
        while let Some(due) = self.frames.credit.due() {
            let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(due)));
            if timer.deadline() != due {
                timer.as_mut().reset(due);
            }
            if timer.as_mut().poll(cx).is_pending() {
                return;
            }
            self.frames.credit.release(Instant::now(), &mut self.ready);
        }
    }

    /// Passes on queued bytes.
    fn take_ready(&mut self, buf: &mut ReadBuf<'_>) {
        let count = self.ready.len().min(buf.remaining());
        buf.put_slice(&self.ready[..count]);
        self.ready.drain(..count);
    }
}

impl<S: AsyncRead + Unpin> JoinedWindowUpdates<S> {
    /// One read of the stream into `buf`, without what is withheld. Ready with true at the end of the stream.
    fn poll_filtered(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<bool>> {
        let before = buf.filled().len();
        let held = self.frames.held.len();
        buf.put_slice(&self.frames.held);
        match Pin::new(&mut self.inner).poll_read(cx, buf) {
            Poll::Ready(Ok(())) if buf.filled().len() > before + held => {}
            Poll::Ready(Ok(())) => {
                // At the end of the stream the rest of a frame passes as it is.
                self.frames.held.clear();
                return Poll::Ready(Ok(true));
            }
            other => {
                buf.set_filled(before);
                return other.map_ok(|()| false);
            }
        }
        self.frames.held.clear();
        let kept = self.frames.scan(&mut buf.filled_mut()[before..]);
        buf.set_filled(before + kept);
        Poll::Ready(Ok(false))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for JoinedWindowUpdates<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buf.filled().len();
        loop {
            this.poll_due(cx);
            if !this.ready.is_empty() {
                this.take_ready(buf);
                return Poll::Ready(Ok(()));
            }
            let polled = if buf.remaining() >= MIN_ROOM {
                this.poll_filtered(cx, buf)
            } else {
                let mut room = [0; 2 * MIN_ROOM];
                let mut own = ReadBuf::new(&mut room);
                let polled = this.poll_filtered(cx, &mut own);
                this.ready.extend_from_slice(own.filled());
                this.take_ready(buf);
                polled
            };
            match polled {
                Poll::Ready(Ok(is_end)) if is_end || buf.filled().len() > before => return Poll::Ready(Ok(())),
                // All of it was credit, and is withheld.
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    // Registers the timer for credit that was withheld just now.
                    this.poll_due(cx);
                    if this.ready.is_empty() {
                        return Poll::Pending;
                    }
                }
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for JoinedWindowUpdates<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// Finds the frames in a stream of bytes.
struct FrameScanner {
    /// Bytes of the current payload that are still to come.
    payload: usize,
    /// The beginning of a frame that cannot be judged yet; shorter than a SETTINGS frame that is read.
    held: Vec<u8>,
    credit: WithheldCredit,
}

impl FrameScanner {
    /// Removes withheld WINDOW_UPDATE frames, and an incomplete frame at the end, from `bytes`. Returns how many are left.
    fn scan(&mut self, bytes: &mut [u8]) -> usize {
        let (mut from, mut to) = (0, 0);
        while from < bytes.len() {
            let left = bytes.len() - from;
            if self.payload == 0 {
                let Some(frame) = FrameHead::read(&bytes[from..]) else {
                    self.held.extend_from_slice(&bytes[from..]);
                    break;
                };
                if self.is_withheld(&frame, &mut bytes[from..]) {
                    from += WINDOW_UPDATE;
                    continue;
                }
                self.payload = frame.length + HEADER;
            }
            let count = self.payload.min(left);
            if from != to {
                bytes.copy_within(from..from + count, to);
            }
            self.payload -= count;
            (from, to) = (from + count, to + count);
        }
        to
    }

    /// Looks at a frame, `bytes` begin with it. A WINDOW_UPDATE that is not withheld gets the joined credit.
    fn is_withheld(&mut self, frame: &FrameHead, bytes: &mut [u8]) -> bool {
        let payload = bytes.get(HEADER..HEADER + frame.length).unwrap_or_default();
        match frame.kind {
            SETTINGS_TYPE => self.credit.read_settings(payload),
            WINDOW_UPDATE_TYPE if frame.length == 4 => {
                let increment = number(payload) & (u32::MAX >> 1);
                let Some(released) = self.credit.add(frame.stream, increment) else { return true };
                bytes[HEADER..WINDOW_UPDATE].copy_from_slice(&released.to_be_bytes());
            }
            _ => {}
        }
        false
    }
}

/// The header of a frame (RFC 9113, 4.1).
struct FrameHead {
    length: usize,
    kind: u8,
    stream: u32,
}

impl FrameHead {
    /// The header at the beginning of `bytes`; `None` if more bytes are needed to judge the frame.
    fn read(bytes: &[u8]) -> Option<Self> {
        let [a, b, c, kind, _flags, stream @ ..] = bytes.first_chunk::<HEADER>()?;
        let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
        let is_read = match *kind {
            SETTINGS_TYPE => length <= MAX_SETTINGS - HEADER,
            kind => kind == WINDOW_UPDATE_TYPE && length == 4,
        };
        let is_complete = !is_read || bytes.len() >= HEADER + length;
        is_complete.then(|| Self { length, kind: *kind, stream: u32::from_be_bytes(*stream) & (u32::MAX >> 1) })
    }
}

fn number(bytes: &[u8]) -> u32 {
    bytes.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes))
}

/// Credit that h2 has not seen yet.
struct WithheldCredit {
    /// The peer's SETTINGS_INITIAL_WINDOW_SIZE, in bytes.
    initial_window: u32,
    streams: Vec<StreamCredit>,
}

struct StreamCredit {
    /// 0 for the connection.
    stream: u32,
    withheld: u32,
    /// When credit was released last; at first, when it was withheld.
    since: Instant,
    /// Credit has been released before.
    is_later: bool,
}

impl Default for WithheldCredit {
    fn default() -> Self {
        Self { initial_window: DEFAULT_WINDOW, streams: Vec::new() }
    }
}

impl WithheldCredit {
    fn read_settings(&mut self, payload: &[u8]) {
        for setting in payload.chunks_exact(6).filter(|setting| setting.starts_with(&INITIAL_WINDOW_SIZE)) {
            self.initial_window = number(&setting[2..]);
        }
    }

    /// Adds credit; returns how much is passed on now, or `None`.
    fn add(&mut self, stream: u32, increment: u32) -> Option<u32> {
        let window = if stream == 0 { DEFAULT_WINDOW } else { self.initial_window };
        let known = self.streams.iter().position(|credit| credit.stream == stream);
        if increment == 0 || increment >= window / 2 || (known.is_none() && self.streams.len() == MAX_STREAMS) {
            let withheld = known.map_or(0, |known| self.streams.swap_remove(known).withheld);
            return Some(increment.saturating_add(withheld));
        }
        let position = known.unwrap_or_else(|| {
            self.streams.push(StreamCredit { stream, withheld: 0, since: Instant::now(), is_later: false });
            self.streams.len() - 1
        });
        self.streams[position].add(increment, ENOUGH.min(window / 2))
    }

    /// When the first withheld credit is to be passed on; `None` if none is withheld.
    fn due(&self) -> Option<Instant> {
        self.streams.iter().map(|credit| credit.since + WITHHELD_FOR).min()
    }

    /// Writes the frames of the credit that is due at `now`.
    fn release(&mut self, now: Instant, out: &mut Vec<u8>) {
        for credit in self.streams.extract_if(.., |credit| credit.since + WITHHELD_FOR <= now) {
            if credit.withheld > 0 {
                out.extend_from_slice(&[0, 0, 4, WINDOW_UPDATE_TYPE, 0]);
                out.extend_from_slice(&credit.stream.to_be_bytes());
                out.extend_from_slice(&credit.withheld.to_be_bytes());
            }
        }
    }
}

impl StreamCredit {
    /// Adds credit; returns how much is passed on now. Whole multiples of `enough`, so that full frames stay full; but first
    /// half of it more: otherwise the windows that end where chunks end would leave a byte of each chunk over.
    fn add(&mut self, increment: u32, enough: u32) -> Option<u32> {
        self.withheld += increment;
        let released = if self.is_later { self.withheld - self.withheld % enough } else { enough + enough / 2 };
        if released == 0 || released > self.withheld {
            return None;
        }
        self.withheld -= released;
        (self.is_later, self.since) = (true, Instant::now());
        Some(released)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn frame(kind: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, 0], &stream.to_be_bytes(), payload].concat()
    }

    fn credit(stream: u32, increment: u32) -> Vec<u8> {
        frame(WINDOW_UPDATE_TYPE, stream, &increment.to_be_bytes())
    }

    /// What is read of `sent`, which comes in pieces of `piece` bytes, until 50 ms pass without a byte.
    async fn read(sent: &[u8], piece: usize, room: usize) -> Vec<u8> {
        let (mut theirs, ours) = tokio::io::duplex(1 << 20);
        let mut reader = JoinedWindowUpdates::of_server(ours);
        for piece in sent.chunks(piece) {
            theirs.write_all(piece).await.unwrap();
        }
        let (mut all, mut buffer) = (Vec::new(), vec![0; room]);
        while let Ok(count) = tokio::time::timeout(Duration::from_millis(50), reader.read(&mut buffer)).await {
            all.extend_from_slice(&buffer[..count.unwrap()]);
        }
        all
    }

    /// The frames in `bytes`, without those of credit, and the credit of each stream.
    fn sorted(mut bytes: &[u8]) -> (Vec<Vec<u8>>, std::collections::BTreeMap<u32, u64>) {
        let (mut frames, mut sums) = (Vec::new(), std::collections::BTreeMap::new());
        while !bytes.is_empty() {
            let head = FrameHead::read(bytes).unwrap();
            let (frame, rest) = bytes.split_at(HEADER + head.length);
            match head.kind {
                WINDOW_UPDATE_TYPE => *sums.entry(head.stream).or_insert(0) += u64::from(number(&frame[HEADER..])),
                _ => frames.push(frame.to_vec()),
            }
            bytes = rest;
        }
        (frames, sums)
    }

    #[tokio::test(start_paused = true)]
    async fn small_credit_is_joined_and_passed_on_after_ten_milliseconds_at_the_latest() {
        let sent = [credit(1, 8000), credit(1, 8000), credit(1, 384), credit(3, 1), credit(1, 40_000)].concat();
        let read = read(&sent, sent.len(), 4096).await;
        let wanted = [credit(1, 12_288), credit(1, 40_000 + 16_384 - 12_288), credit(3, 1)].concat();
        assert_eq!(read, wanted);
    }

    #[tokio::test(start_paused = true)]
    async fn the_initial_window_decides_what_is_small() {
        let settings = frame(SETTINGS_TYPE, 0, &[0, 4, 0, 0, 0, 100]);
        let sent = [settings.clone(), credit(1, 49), credit(1, 50), credit(5, 26), credit(5, 49)].concat();
        assert_eq!(read(&sent, 5, 4096).await, [settings, credit(1, 99), credit(5, 75)].concat());
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_ends_within_a_frame_is_passed_on_to_its_end() {
        let (mut theirs, ours) = tokio::io::duplex(1024);
        let mut reader = JoinedWindowUpdates::of_client(ours);
        theirs.write_all(&[b'p'; PREFACE]).await.unwrap();
        theirs.write_all(&credit(1, 5)[..7]).await.unwrap();
        drop(theirs);
        let mut all = Vec::new();
        reader.read_to_end(&mut all).await.unwrap();
        assert_eq!(all.len(), PREFACE + 7);
    }

    fn any_frame() -> impl Strategy<Value = Vec<u8>> {
        let other = (0..10u8, 0..5u32, proptest::collection::vec(any::<u8>(), 0..60));
        let other = other.prop_filter("credit has four bytes", |(kind, _, _)| *kind != WINDOW_UPDATE_TYPE);
        prop_oneof![
            other.prop_map(|(kind, stream, payload)| frame(kind, stream, &payload)),
            (0..5u32, 1..20_000u32).prop_map(|(stream, increment)| credit(stream, increment)),
        ]
    }

    proptest! {
        #[test]
        fn no_credit_is_lost_and_all_other_frames_pass_in_their_order(
            frames in proptest::collection::vec(any_frame(), 0..40),
            piece in 1..200usize,
            room in prop_oneof![1..40usize, Just(8192)],
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
            let sent = frames.concat();
            let read = runtime.block_on(read(&sent, piece, room));
            prop_assert_eq!(sorted(&read), sorted(&sent));
        }
    }
}
