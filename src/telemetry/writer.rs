//! Writes log lines on a separate thread, so that a slow reader never blocks the thread that logs.
//!
//! The buffer is bounded in lines and in bytes. While it is full, because the reader is slow or stuck, lines are
//! dropped and counted.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use tokio::time::Instant;

use super::instruments::Counter;

/// Most bytes that wait to be written.
const MAX_PENDING_BYTES: usize = 8 << 20;
/// Time in which the writer collects lines before it writes, so that a busy worker rarely has to wake it.
const BATCH_DELAY: Duration = Duration::from_millis(5);
/// Size in bytes at which a batch is written.
const BATCH_BYTES: usize = 256 * 1024;

enum Message {
    Line(Box<[u8]>),
    Flush(SyncSender<()>),
}

/// Handle of the writer thread. Cheap to clone; the thread ends when the last clone is dropped.
#[derive(Clone, Debug)]
pub(super) struct Writer {
    sender: SyncSender<Message>,
    /// Bytes that are enqueued and not written yet.
    pending_bytes: Arc<AtomicUsize>,
    dropped: Counter,
}

impl Writer {
    /// Starts a thread called `name` with a buffer of `max_lines`. `dropped` counts dropped lines, `write_errors`
    /// writes that failed. If the thread cannot be started, logs an error; all lines are then dropped.
    pub(super) fn start(
        name: &str,
        output: Box<dyn Write + Send>,
        max_lines: usize,
        dropped: Counter,
        write_errors: Counter,
    ) -> Self {
        let (sender, receiver) = sync_channel(max_lines);
        let pending_bytes = Arc::new(AtomicUsize::new(0));
        let pending = Arc::clone(&pending_bytes);
        let thread = std::thread::Builder::new().name(name.to_owned());
        if let Err(error) = thread.spawn(move || write_lines(output, &receiver, &pending, &write_errors)) {
            tracing::error!(%error, "cannot start the thread of the {name}: all its lines are dropped");
        }
        Self { sender, pending_bytes, dropped }
    }

    /// Passes a line without line end to the thread. Never blocks; drops and counts the line if the buffer is full.
    pub(super) fn enqueue(&self, line: &[u8]) {
        let bytes = line.len() + 1;
        let has_room = self.pending_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes <= MAX_PENDING_BYTES;
        if !has_room || self.sender.try_send(Message::Line(line.into())).is_err() {
            self.pending_bytes.fetch_sub(bytes, Ordering::Relaxed);
            self.dropped.increment();
        }
    }

    /// Lines dropped so far.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped.value()
    }

    /// Waits up to `limit` until all lines so far are written; returns `false` if they are not. Blocks the thread: for
    /// the end of the process.
    pub(super) fn flush(&self, limit: Duration) -> bool {
        let (done, written) = sync_channel(1);
        let deadline = Instant::now() + limit;
        let mut message = Message::Flush(done);
        // With a stuck reader the channel may be full, and `send` would then block without a limit.
        while let Err(TrySendError::Full(back)) = self.sender.try_send(message) {
            if Instant::now() >= deadline {
                return false;
            }
            message = back;
            std::thread::sleep(BATCH_DELAY);
        }
        written.recv_timeout(deadline.saturating_duration_since(Instant::now())).is_ok()
    }
}

/// Collects pending lines, writes them and confirms flushes, until the last sender is dropped.
fn write_lines(
    mut output: Box<dyn Write + Send>,
    receiver: &Receiver<Message>,
    pending_bytes: &AtomicUsize,
    write_errors: &Counter,
) {
    let mut batch = Vec::with_capacity(16 * 1024);
    while let Ok(first) = receiver.recv() {
        let mut flushes = Vec::new();
        let mut next = Some(first);
        while let Some(message) = next {
            match message {
                Message::Line(line) => {
                    batch.extend_from_slice(&line);
                    batch.push(b'\n');
                }
                Message::Flush(done) => flushes.push(done),
            }
            next = if batch.len() < BATCH_BYTES { receiver.try_recv().ok() } else { None };
        }
        if output.write_all(&batch).and_then(|()| output.flush()).is_err() {
            write_errors.increment();
        }
        pending_bytes.fetch_sub(batch.len(), Ordering::Relaxed);
        batch.clear();
        if flushes.is_empty() {
            std::thread::sleep(BATCH_DELAY);
        }
        for done in flushes {
            // The caller of the flush may have timed out.
            let _ = done.try_send(());
        }
    }
}
