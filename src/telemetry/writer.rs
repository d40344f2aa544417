//! Writes lines on a thread of its own, so that nobody who has something to say waits for whoever reads it.
//!
//! What waits is bounded, in lines and in bytes. Beyond that, because the reader is slow or reads nothing, lines are
//! thrown away and counted.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use tokio::time::Instant;

use super::instruments::Counter;

/// How many bytes wait to be written at most.
const WAITING: usize = 8 << 20;
/// The writer gathers lines for this long before it writes, so that a busy worker rarely has to wake it.
const GATHER: Duration = Duration::from_millis(5);
/// The writer writes at the latest when it has gathered this many bytes.
const BATCH: usize = 256 * 1024;

enum Message {
    Line(Box<[u8]>),
    Flush(SyncSender<()>),
}

/// The way to the thread. Cheap to clone; the thread ends when the last one is gone.
#[derive(Clone, Debug)]
pub(super) struct Writer {
    sender: SyncSender<Message>,
    /// Bytes that were handed over and are not written yet.
    waiting: Arc<AtomicUsize>,
    dropped: Counter,
}

impl Writer {
    /// Starts the thread, called `name`, for which at most so many `lines` wait. `dropped` counts lines that were thrown
    /// away, `failed` writes that the system refused. Where no thread can be had, all lines are thrown away.
    pub(super) fn start(
        name: &str,
        output: Box<dyn Write + Send>,
        lines: usize,
        dropped: Counter,
        failed: Counter,
    ) -> Self {
        let (sender, receiver) = sync_channel(lines);
        let waiting = Arc::new(AtomicUsize::new(0));
        let written = Arc::clone(&waiting);
        let thread = std::thread::Builder::new().name(name.to_owned());
        if let Err(error) = thread.spawn(move || write_lines(output, &receiver, &written, &failed)) {
            tracing::error!(%error, "no thread for the {name}: its lines are dropped");
        }
        Self { sender, waiting, dropped }
    }

    /// Hands a line, without its line end, to the thread; never waits.
    pub(super) fn put(&self, line: &[u8]) {
        let bytes = line.len() + 1;
        let has_room = self.waiting.fetch_add(bytes, Ordering::Relaxed) + bytes <= WAITING;
        if !has_room || self.sender.try_send(Message::Line(line.into())).is_err() {
            self.waiting.fetch_sub(bytes, Ordering::Relaxed);
            self.dropped.increment();
        }
    }

    /// Lines that were thrown away.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped.value()
    }

    /// Waits until everything handed over so far is written, at most `limit`; `false` when that was not enough. It
    /// blocks the thread: for the end of the process.
    pub(super) fn flush(&self, limit: Duration) -> bool {
        let (done, written) = sync_channel(1);
        let deadline = Instant::now() + limit;
        let mut message = Message::Flush(done);
        // The channel may be full behind a stuck reader, and a plain send would wait for it without a limit.
        while let Err(TrySendError::Full(back)) = self.sender.try_send(message) {
            if Instant::now() >= deadline {
                return false;
            }
            message = back;
            std::thread::sleep(GATHER);
        }
        written.recv_timeout(deadline.saturating_duration_since(Instant::now())).is_ok()
    }
}

/// Until the last sender is gone: gather what is there, write it, tell whoever waits for a flush.
fn write_lines(
    mut output: Box<dyn Write + Send>,
    receiver: &Receiver<Message>,
    written: &AtomicUsize,
    failed: &Counter,
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
            next = if batch.len() < BATCH { receiver.try_recv().ok() } else { None };
        }
        if output.write_all(&batch).and_then(|()| output.flush()).is_err() {
            failed.increment();
        }
        written.fetch_sub(batch.len(), Ordering::Relaxed);
        batch.clear();
        if flushes.is_empty() {
            std::thread::sleep(GATHER);
        }
        for done in flushes {
            // Whoever waited may have given up.
            let _ = done.try_send(());
        }
    }
}
