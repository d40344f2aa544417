//! Request bodies as hyper reads them from an HTTP/1.1 caller that writes into memory.

use std::cell::RefCell;
use std::convert::Infallible;
use std::future::{pending, poll_fn};

use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Empty};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncWriteExt, DuplexStream};
use tokio::sync::oneshot;
use tokio::task::LocalSet;

use super::*;

const CHUNKED: &str = "Transfer-Encoding: chunked";

/// A request in progress: the stream that the caller writes to, and the body that hyper reads.
async fn request(field: &str) -> (DuplexStream, Incoming) {
    let (mut caller, server) = tokio::io::duplex(1 << 20);
    let (sender, receiver) = oneshot::channel();
    let sender = RefCell::new(Some(sender));
    let service = service_fn(move |request: Request<Incoming>| {
        drop(sender.borrow_mut().take().map(|sender| sender.send(request.into_body())));
        pending::<Result<Response<Empty<Bytes>>, Infallible>>()
    });
    tokio::task::spawn_local(http1::Builder::new().serve_connection(TokioIo::new(server), service));
    caller.write_all(format!("PUT / HTTP/1.1\r\nHost: a\r\n{field}\r\n\r\n").as_bytes()).await.unwrap();
    (caller, receiver.await.unwrap())
}

async fn write_chunk(caller: &mut DuplexStream, data: &[u8]) {
    caller.write_all(format!("{:x}\r\n", data.len()).as_bytes()).await.unwrap();
    caller.write_all(data).await.unwrap();
    caller.write_all(b"\r\n").await.unwrap();
}

fn flow() -> Rc<Flow> {
    Rc::new(Flow::new(Instant::now()))
}

async fn data(body: &mut RequestBody, wanted: usize) -> Vec<u8> {
    let mut data = Vec::new();
    while data.len() < wanted {
        data.extend_from_slice(&body.frame().await.unwrap().unwrap().into_data().unwrap());
    }
    data
}

/// All data to the end, and the trailers.
async fn rest(body: &mut RequestBody) -> (Vec<u8>, Option<HeaderMap>) {
    let (mut data, mut trailers) = (Vec::new(), None);
    while let Some(frame) = body.frame().await {
        match frame.unwrap().into_data() {
            Ok(chunk) => data.extend_from_slice(&chunk),
            Err(frame) => trailers = frame.into_trailers().ok(),
        }
    }
    assert!(body.is_end_stream());
    (data, trailers)
}

async fn is_pending(body: &mut RequestBody) -> bool {
    // Lets hyper read the caller's connection.
    tokio::task::yield_now().await;
    poll_fn(|cx| Poll::Ready(Pin::new(&mut *body).poll_frame(cx).is_pending())).await
}

#[tokio::test]
async fn a_second_attempt_sends_the_kept_bytes_and_then_the_rest() {
    LocalSet::new()
        .run_until(async {
            let ((mut caller, incoming), flow) = (request("Content-Length: 5007").await, flow());
            let (mut first, replay) =
                RequestBody::replayable(incoming, Version::HTTP_11, Rc::clone(&flow), Vec::new(), 8192);
            assert_eq!(first.size_hint().exact(), Some(5007));
            caller.write_all(b"one").await.unwrap();
            assert_eq!(data(&mut first, 3).await, b"one");
            caller.write_all(b"two!").await.unwrap();
            assert_eq!(data(&mut first, 4).await, b"two!");
            assert!(is_pending(&mut first).await && flow.awaits_body());
            drop(first);

            let mut second = replay.next_body(&flow).unwrap();
            assert!(!flow.awaits_body(), "the second attempt has not polled yet");
            assert_eq!(second.size_hint().exact(), Some(5007));
            caller.write_all(&[b'x'; 5000]).await.unwrap();
            let sent = [b"onetwo!".to_vec(), vec![b'x'; 5000]].concat();
            assert_eq!(rest(&mut second).await.0, sent);

            let mut third = replay.next_body(&flow).unwrap();
            assert_eq!(third.size_hint().exact(), Some(5007));
            assert_eq!(rest(&mut third).await.0, sent);
            assert_eq!(flow.request.bytes(), 5007, "read from the caller once");
            assert!(flow.request.ended());
        })
        .await;
}

#[tokio::test]
async fn trailers_are_sanitized_once_and_sent_by_each_attempt() {
    LocalSet::new()
        .run_until(async {
            let ((mut caller, incoming), flow) = (request(CHUNKED).await, flow());
            let named = vec![HeaderName::from_static("x-hop")];
            let (mut first, replay) =
                RequestBody::replayable(incoming, Version::HTTP_11, Rc::clone(&flow), named, 8192);
            write_chunk(&mut caller, b"abc").await;
            caller.write_all(b"0\r\nx-sum: 1\r\nx-hop: 2\r\n\r\n").await.unwrap();
            let wanted = HeaderMap::from_iter([(HeaderName::from_static("x-sum"), "1".parse().unwrap())]);
            assert_eq!(rest(&mut first).await, (b"abc".to_vec(), Some(wanted.clone())));
            for _ in 0..2 {
                let mut body = replay.next_body(&flow).unwrap();
                assert_eq!(body.size_hint().exact(), None, "or HTTP/1.1 would send no trailers");
                assert_eq!(rest(&mut body).await, (b"abc".to_vec(), Some(wanted.clone())));
            }
        })
        .await;
}

#[tokio::test]
async fn beyond_the_limit_the_body_streams_on_and_cannot_be_sent_again() {
    LocalSet::new()
        .run_until(async {
            for (limit, is_replayable) in [(2000, true), (1999, false), (0, false)] {
                let ((mut caller, incoming), flow) = (request("Content-Length: 2000").await, flow());
                let (mut first, replay) =
                    RequestBody::replayable(incoming, Version::HTTP_11, Rc::clone(&flow), Vec::new(), limit);
                assert!(replay.is_replayable(), "nothing was read");
                caller.write_all(&[b'x'; 1000]).await.unwrap();
                assert_eq!(data(&mut first, 1000).await.len(), 1000);
                assert_eq!(replay.is_replayable(), limit > 0, "limit {limit}");
                caller.write_all(&[b'x'; 1000]).await.unwrap();
                assert_eq!(rest(&mut first).await.0.len(), 1000);
                assert_eq!(replay.is_replayable(), is_replayable, "limit {limit}");
                assert_eq!(replay.next_body(&flow).is_some(), is_replayable);
                assert_eq!(flow.request.bytes(), 2000);
            }
        })
        .await;
}

#[tokio::test]
async fn a_second_attempt_may_exceed_the_limit() {
    LocalSet::new()
        .run_until(async {
            let ((mut caller, incoming), flow) = (request("Content-Length: 20").await, flow());
            let (mut first, replay) =
                RequestBody::replayable(incoming, Version::HTTP_11, Rc::clone(&flow), Vec::new(), 10);
            caller.write_all(&[b'a'; 10]).await.unwrap();
            data(&mut first, 10).await;
            let mut second = replay.next_body(&flow).unwrap();
            caller.write_all(&[b'b'; 10]).await.unwrap();
            assert_eq!(rest(&mut second).await.0, [[b'a'; 10], [b'b'; 10]].concat());
            assert!(!replay.is_replayable());
        })
        .await;
}

#[tokio::test]
async fn a_superseded_attempt_gets_no_more_bytes() {
    LocalSet::new()
        .run_until(async {
            let ((mut caller, incoming), flow) = (request("Content-Length: 6").await, flow());
            let (mut first, replay) =
                RequestBody::replayable(incoming, Version::HTTP_11, Rc::clone(&flow), Vec::new(), 100);
            caller.write_all(b"abc").await.unwrap();
            data(&mut first, 3).await;
            let waits = tokio::task::spawn_local(async move { first.frame().await });
            tokio::task::yield_now().await;
            let mut second = replay.next_body(&flow).unwrap();
            let frame = waits.await.unwrap();
            assert!(
                matches!(frame, Some(Err(CallerBodyError::Superseded))),
                "it is woken and sees that it is superseded"
            );
            caller.write_all(b"def").await.unwrap();
            assert_eq!(rest(&mut second).await.0, b"abcdef");
        })
        .await;
}

#[tokio::test]
async fn once_the_replay_is_dropped_nothing_is_kept() {
    LocalSet::new()
        .run_until(async {
            let ((mut caller, incoming), flow) = (request("Content-Length: 6").await, flow());
            let (mut first, replay) =
                RequestBody::replayable(incoming, Version::HTTP_11, Rc::clone(&flow), Vec::new(), 100);
            caller.write_all(b"abc").await.unwrap();
            data(&mut first, 3).await;
            drop(replay);
            let Source::Attempt(body) = &first.source else { panic!("the body has ended") };
            assert!(body.shared.borrow().kept.is_none());
            caller.write_all(b"def").await.unwrap();
            assert_eq!(rest(&mut first).await.0, b"def");
        })
        .await;
}

#[tokio::test]
async fn a_failed_body_is_never_mistaken_for_a_complete_one() {
    LocalSet::new()
        .run_until(async {
            let ((mut caller, incoming), flow) = (request("Content-Length: 6").await, flow());
            let (mut first, replay) =
                RequestBody::replayable(incoming, Version::HTTP_11, Rc::clone(&flow), Vec::new(), 100);
            caller.write_all(b"abc").await.unwrap();
            data(&mut first, 3).await;
            drop(caller);
            assert!(matches!(first.frame().await, Some(Err(CallerBodyError::Broken(_)))));
            assert!(flow.request.failed() && !flow.request.ended());
            assert!(!replay.is_replayable() && replay.next_body(&flow).is_none());
        })
        .await;
}

#[tokio::test]
async fn a_held_body_is_held_for_each_attempt_and_none_outlives_the_exchange() {
    LocalSet::new()
        .run_until(async {
            let ((mut caller, incoming), flow) = (request("Content-Length: 6").await, flow());
            let (mut first, replay) =
                RequestBody::replayable(incoming, Version::HTTP_11, Rc::clone(&flow), Vec::new(), 100);
            flow.hold();
            caller.write_all(b"abc").await.unwrap();
            assert!(is_pending(&mut first).await);
            flow.release();
            data(&mut first, 3).await;
            flow.hold();
            let mut second = replay.next_body(&flow).unwrap();
            assert!(is_pending(&mut second).await);
            flow.release();
            assert_eq!(data(&mut second, 3).await, b"abc");
            flow.finish();
            assert!(matches!(second.frame().await, Some(Err(CallerBodyError::Over))));
        })
        .await;
}

#[tokio::test]
async fn a_request_without_a_body_can_always_be_sent_again() {
    LocalSet::new()
        .run_until(async {
            let ((_caller, incoming), flow) = (request("Content-Length: 0").await, flow());
            let (first, replay) = RequestBody::replayable(incoming, Version::HTTP_11, Rc::clone(&flow), Vec::new(), 0);
            assert!(first.is_end_stream() && matches!(first.source, Source::Empty));
            assert!(replay.is_replayable() && flow.request.ended());
            assert!(replay.next_body(&flow).is_some_and(|body| body.is_end_stream()));
        })
        .await;
}

#[tokio::test]
async fn a_body_in_tiny_chunks_is_kept_in_few_chunks() {
    LocalSet::new()
        .run_until(async {
            let ((mut caller, incoming), flow) = (request(CHUNKED).await, flow());
            let (mut first, replay) =
                RequestBody::replayable(incoming, Version::HTTP_11, Rc::clone(&flow), Vec::new(), 8192);
            for _ in 0..1000 {
                write_chunk(&mut caller, b"x").await;
            }
            write_chunk(&mut caller, &[b'y'; 2000]).await;
            write_chunk(&mut caller, b"z").await;
            caller.write_all(b"0\r\n\r\n").await.unwrap();
            let sent = rest(&mut first).await.0;
            let mut second = replay.next_body(&flow).unwrap();
            let mut pieces = 0;
            let mut again = Vec::new();
            while let Some(frame) = second.frame().await {
                pieces += 1;
                again.extend_from_slice(frame.unwrap().data_ref().unwrap());
            }
            assert_eq!(again, sent);
            assert!(pieces <= 4, "{pieces} pieces");
        })
        .await;
}

#[tokio::test]
async fn grpc_messages_are_counted_once() {
    LocalSet::new()
        .run_until(async {
            let ((mut caller, incoming), flow) = (request(CHUNKED).await, flow());
            flow.count_messages();
            let (mut first, replay) =
                RequestBody::replayable(incoming, Version::HTTP_11, Rc::clone(&flow), Vec::new(), 8192);
            write_chunk(&mut caller, &[0, 0, 0, 0, 2, 7]).await;
            data(&mut first, 6).await;
            write_chunk(&mut caller, &[7]).await;
            caller.write_all(b"0\r\n\r\n").await.unwrap();
            for _ in 0..2 {
                rest(&mut replay.next_body(&flow).unwrap()).await;
            }
            assert_eq!(flow.request.messages(), 1);
        })
        .await;
}

#[tokio::test]
async fn a_body_that_is_sent_once_is_streamed() {
    LocalSet::new()
        .run_until(async {
            let ((mut caller, incoming), flow) = (request("Content-Length: 6").await, flow());
            let mut body = RequestBody::streaming(incoming, Version::HTTP_11, Rc::clone(&flow), Vec::new());
            assert_eq!((body.size_hint().exact(), body.is_end_stream()), (Some(6), false));
            caller.write_all(b"abcdef").await.unwrap();
            assert_eq!(rest(&mut body).await.0, b"abcdef");
            assert_eq!((flow.request.bytes(), flow.request.ended()), (6, true));
        })
        .await;
}
