//! HTTP/2 peers that take one DATA frame at a time and return credit for each: no run of tiny frames towards them, in either
//! direction, and the whole body even for a window that stays small.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use hyper::Request;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::http2::{ACK, END_HEADERS, END_STREAM, HEADERS, PREFACE, SETTINGS, WINDOW_UPDATE, frame};
use crate::support::http::{Caller, Speaks, full};
use crate::support::upstream::{Upstream, policy};
use crate::support::{Mesh, SOON};

const DATA: u8 = 0;
const SIZE: usize = 3_000_000;

/// One end of a connection: reads a message, and returns credit for each frame at once.
struct Taker {
    stream: TcpStream,
    sizes: Vec<usize>,
}

impl Taker {
    fn over(stream: TcpStream) -> Self {
        stream.set_nodelay(true).unwrap();
        Self { stream, sizes: Vec::new() }
    }

    /// Reads until a message is complete; keeps the sizes of its DATA frames. Returns its stream.
    async fn take(&mut self) -> u32 {
        loop {
            let (kind, flags, id, length) = timeout(SOON, self.next()).await.expect("nothing comes");
            if kind == SETTINGS && flags != ACK {
                self.stream.write_all(&frame(SETTINGS, ACK, 0, b"")).await.unwrap();
            }
            if kind == DATA && length > 0 {
                self.sizes.push(length);
                let credit = u32::try_from(length).unwrap().to_be_bytes();
                // One after the other, so that hopguard reads one after the other.
                self.stream.write_all(&frame(WINDOW_UPDATE, 0, 0, &credit)).await.unwrap();
                self.stream.write_all(&frame(WINDOW_UPDATE, 0, id, &credit)).await.unwrap();
            }
            if (kind == DATA || kind == HEADERS) && flags & END_STREAM != 0 {
                return id;
            }
        }
    }

    /// One frame: its type, flags, stream and length.
    async fn next(&mut self) -> (u8, u8, u32, usize) {
        let mut head = [0; 9];
        self.stream.read_exact(&mut head).await.unwrap();
        let [a, b, c, kind, flags, id @ ..] = head;
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        self.stream.read_exact(&mut vec![0; length]).await.unwrap();
        (kind, flags, u32::from_be_bytes(id), length)
    }
}

/// SETTINGS with an initial window.
fn settings(window: u32) -> Vec<u8> {
    frame(SETTINGS, 0, 0, &[&[0, 4][..], &window.to_be_bytes()].concat())
}

fn assert_few_are_tiny(sizes: &[usize], whole: usize) {
    assert_eq!(sizes.iter().sum::<usize>(), whole);
    let tiny = sizes.iter().filter(|size| **size < 64).count();
    assert!(tiny * 10 < sizes.len() && sizes.len() < 800, "{tiny} of {}: {sizes:?}", sizes.len());
}

#[tokio::test]
async fn a_caller_that_returns_credit_per_frame_gets_no_run_of_tiny_frames() {
    let upstream = Upstream::http1(|_| async { hyper::Response::new(full(vec![b'x'; SIZE])) }).await;
    let mesh = Mesh::start(&policy(upstream.addr, "    timeouts: { request: 60s }")).await;
    let mut caller = Taker::over(TcpStream::connect(mesh.addr("in")).await.unwrap());
    // GET http://shop/
    let get = frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\x82\x86\x84\x41\x04shop");
    caller.stream.write_all(&[PREFACE, &settings(65_535), &get].concat()).await.unwrap();
    caller.take().await;
    assert_few_are_tiny(&caller.sizes, SIZE);
    mesh.ended("ok", 1).await;
    mesh.stop().await;
}

/// An upstream with an initial window that answers each request when it is complete, and the sizes of the frames.
async fn taking_upstream(window: u32) -> (Upstream, Arc<Mutex<Vec<usize>>>) {
    let sizes = Arc::<Mutex<Vec<usize>>>::default();
    let seen = Arc::clone(&sizes);
    let upstream = Upstream::bytes(move |mut stream| {
        let seen = Arc::clone(&seen);
        async move {
            stream.read_exact(&mut [0; PREFACE.len()]).await.unwrap();
            stream.write_all(&settings(window)).await.unwrap();
            let mut taker = Taker::over(stream);
            let id = taker.take().await;
            *seen.lock().unwrap() = std::mem::take(&mut taker.sizes);
            taker.stream.write_all(&frame(HEADERS, END_HEADERS | END_STREAM, id, b"\x88")).await.unwrap();
            let _closed = taker.stream.read_to_end(&mut Vec::new()).await;
        }
    })
    .await;
    (upstream, sizes)
}

async fn upload(window: u32, size: usize) -> Vec<usize> {
    let (upstream, sizes) = taking_upstream(window).await;
    let mesh = Mesh::start(&policy(upstream.addr, "    protocol: http2\n    timeouts: { request: 60s }")).await;
    let mut caller = Caller::open(Speaks::Http1, mesh.addr("in")).await;
    let request = Request::post("/").body(full(Bytes::from(vec![b'x'; size]))).unwrap();
    assert_eq!(caller.ask(request).await.status, 200);
    mesh.ended("ok", 1).await;
    mesh.stop().await;
    std::mem::take(&mut *sizes.lock().unwrap())
}

#[tokio::test]
async fn an_upstream_that_returns_credit_per_frame_gets_no_run_of_tiny_frames() {
    assert_few_are_tiny(&upload(65_535, SIZE).await, SIZE);
}

#[tokio::test]
async fn a_window_that_stays_small_is_used_as_it_is() {
    for window in [1, 2, 100, 1000] {
        let sizes = upload(window, 3000).await;
        assert_eq!(sizes.iter().sum::<usize>(), 3000);
        assert!(sizes.iter().all(|size| *size <= window as usize), "{sizes:?}");
    }
}
