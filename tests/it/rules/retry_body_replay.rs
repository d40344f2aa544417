//! The request body in a retry: replayed from its first byte, with its framing and trailers, up to the replay limit.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use hyper::Request;

use crate::support::bank::{Bank, Say, behind_a_caller};
use crate::support::http::{Caller, Speaks, ask, feed, full, request, with_trailers};
use crate::support::upstream::Upstream;
use crate::support::wire::Wire;
use crate::support::{Mesh, eventually};

const TWICE: &[Say] = &[Say::Status(503), Say::Reset, Say::Status(200)];

#[tokio::test]
async fn a_body_is_sent_again_whole_and_framed_as_it_was() {
    for (rules, tries) in [("", 3), ("retry: off", 1)] {
        let bank = Bank::http1(TWICE).await;
        let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], rules, "")).await;
        let body: String = (0..5000).map(|number| format!("{number} ")).collect();
        let fixed = request("PUT", "/fixed").body(full(body.clone())).unwrap();
        let answer = ask(mesh.addr("in"), fixed).await;
        assert_eq!(answer.status, if tries == 3 { 200 } else { 503 }, "{answer:?}");
        assert_eq!(bank.tries(), tries);
        for seen in bank.seen() {
            assert_eq!(seen.body, body);
            assert_eq!(seen.header("content-length"), body.len().to_string(), "{seen:?}");
        }
        let line = mesh.only(if tries == 3 { "ok" } else { "server_error" }).await;
        assert_eq!((&line["attempt"], &line["bytes_in"]), (&tries.into(), &body.len().into()), "{line}");
        assert_eq!(mesh.metric("hopguard_retries_total", &["app"]), tries as f64 - 1.0);
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_body_without_a_length_is_sent_again_with_its_trailers() {
    for speaks in [Speaks::Http1, Speaks::Http2] {
        let (bank, protocol) = match speaks {
            Speaks::Http1 => (Bank::http1(TWICE).await, "http1"),
            Speaks::Http2 => (Bank::http2(TWICE).await, "http2"),
        };
        let more = format!("    protocol: {protocol}");
        let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], "", &more)).await;
        let body = with_trailers("in pieces", &[("x-sum", "42")]);
        let sent = Request::put("/pieces").header("trailer", "x-sum").header("te", "trailers").body(body).unwrap();
        let answer = Caller::open(speaks, mesh.addr("in")).await.ask(sent).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        assert_eq!(bank.tries(), 3);
        for seen in bank.seen() {
            assert_eq!((&seen.body[..], seen.header("content-length")), (&b"in pieces"[..], ""), "{seen:?}");
            let trailers = seen.trailers.unwrap_or_else(|| panic!("{speaks:?}: the trailers are lost"));
            assert_eq!(trailers["x-sum"], "42");
        }
        assert_eq!(mesh.only("ok").await["attempt"], 3);
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_body_that_is_still_coming_goes_on_in_the_next_try() {
    // The first try is refused when half of the body has come.
    let tries = Arc::new(AtomicUsize::new(0));
    let number = Arc::clone(&tries);
    let upstream = Upstream::bytes(move |stream| {
        let first = number.fetch_add(1, SeqCst) == 0;
        async move {
            let mut wire = Wire::over(stream);
            wire.head().await;
            wire.until("first").await;
            if first {
                wire.send("HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n").await;
            } else {
                wire.until("second").await;
                wire.until("0\r\n\r\n").await;
                wire.send("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
            }
            wire.rest().await;
        }
    })
    .await;
    let mesh = Mesh::start(&behind_a_caller(&[upstream.addr], "", "")).await;
    let (pieces, body) = feed();
    let to = mesh.addr("in");
    let asked = tokio::spawn(async move { ask(to, request("PUT", "/").body(body).unwrap()).await });
    assert!(pieces.send("first").await);
    eventually(|| (tries.load(SeqCst) == 2).then_some(())).await;
    assert!(pieces.send("second").await);
    drop(pieces);
    assert_eq!(asked.await.unwrap().status, 200);
    let line = mesh.only("ok").await;
    assert_eq!((&line["attempt"], &line["bytes_in"]), (&2.into(), &11.into()), "{line}");
    mesh.stop().await;
}

#[tokio::test]
async fn a_body_beyond_the_replay_limit_is_not_sent_again() {
    let table = [
        (60, "", 2),
        (100, "", 1),
        (100, "    retry: { replayLimit: 128KiB }", 2),
        (1, "    retry: { replayLimit: 0 }", 1),
    ];
    for (kib, more, tries) in table {
        let bank = Bank::http1(&[Say::Status(503), Say::Status(200)]).await;
        let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], "", more)).await;
        let sent = request("PUT", "/").body(full(vec![b'x'; kib << 10])).unwrap();
        let answer = ask(mesh.addr("in"), sent).await;
        assert_eq!(bank.tries(), tries, "{kib} KiB, {more}: {answer:?}");
        assert!(bank.seen().iter().all(|seen| seen.body.len() == kib << 10), "a body was cut");
        if tries == 2 {
            assert_eq!(answer.status, 200);
            assert!(mesh.only("ok").await["retry_withheld"].is_null());
        } else {
            assert_eq!(answer.status, 503);
            let line = mesh.only("server_error").await;
            assert_eq!(line["retry_withheld"], "body_too_long", "{line}");
        }
        let withheld = mesh.metric("hopguard_retries_withheld_total", &["reason=\"body_too_long\""]);
        assert_eq!(withheld, f64::from(2 - i32::try_from(tries).unwrap()));
        mesh.stop().await;
    }
}
