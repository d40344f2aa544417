//! HTTP/1 and HTTP/2, each downstream with each upstream: messages, trailers and streams arrive as they were sent.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::{Request, Response};
use tokio::time::timeout;

use crate::support::http::{Answer, Caller, Speaks, empty, feed, full, with_trailers};
use crate::support::upstream::{Upstream, policy};
use crate::support::{Mesh, SOON, eventually};

const ALL: [(Speaks, Speaks); 4] = [
    (Speaks::Http1, Speaks::Http1),
    (Speaks::Http1, Speaks::Http2),
    (Speaks::Http2, Speaks::Http1),
    (Speaks::Http2, Speaks::Http2),
];

/// An upstream that answers as the path says.
async fn answer(request: Request<Incoming>) -> Response<crate::support::http::Body> {
    let (head, body) = request.into_parts();
    let told = |name: &str| head.headers.get(name).map_or("", |value| value.to_str().unwrap()).to_owned();
    let answer = Response::builder()
        .header("x-method", head.method.as_str())
        .header("x-path", head.uri.path_and_query().unwrap().as_str());
    let host = head.uri.host().map_or_else(|| told("host"), str::to_owned);
    let answer =
        answer.header("x-host", host).header("x-cookie", told("cookie")).header("x-length", told("content-length"));
    match head.uri.path() {
        "/echo" => answer.body(body.map_err(|error| panic!("{error}")).boxed()).unwrap(),
        "/trailers" => {
            let whole = body.collect().await.unwrap();
            let sum =
                whole.trailers().and_then(|trailers| trailers.get("x-sum")).map_or("none", |sum| sum.to_str().unwrap());
            let answer = answer.header("trailer", "x-out").header("x-sum-seen", sum);
            answer.body(with_trailers(whole.to_bytes(), &[("x-out", "done")])).unwrap()
        }
        "/204" => answer.status(204).body(empty()).unwrap(),
        "/304" => answer.status(304).header("etag", "\"a\"").body(empty()).unwrap(),
        "/early" => answer.status(413).body(full("too much")).unwrap(),
        _ => {
            let whole = body.collect().await.unwrap().to_bytes();
            answer.body(full(whole)).unwrap()
        }
    }
}

struct Pair {
    mesh: Mesh,
    upstream: Upstream,
    caller: Caller,
    names: (Speaks, Speaks),
}

async fn pair(names: (Speaks, Speaks)) -> Pair {
    let (upstream, protocol) = match names.1 {
        Speaks::Http1 => (Upstream::http1(answer).await, "http1"),
        Speaks::Http2 => (Upstream::http2(answer).await, "http2"),
    };
    let mesh =
        Mesh::start(&policy(upstream.addr, &format!("    protocol: {protocol}\n    timeouts: {{ request: 20s }}")))
            .await;
    let caller = Caller::open(names.0, mesh.addr("in")).await;
    Pair { mesh, upstream, caller, names }
}

#[tokio::test]
async fn methods_paths_hosts_and_bodies_pass() {
    for names in ALL {
        let mut pair = pair(names).await;
        for method in ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND"] {
            let body = if method == "GET" { "" } else { "the body" };
            let asked = Request::builder().method(method).uri("/a%20b/%2e/c?d=e&f=%2F").body(full(body)).unwrap();
            let answer = pair.caller.ask(asked).await;
            assert_eq!((answer.status.as_u16(), &answer.body[..]), (200, body.as_bytes()), "{names:?} {method}");
            assert_eq!(answer.header("x-method"), method);
            assert_eq!(answer.header("x-path"), "/a%20b/%2e/c?d=e&f=%2F");
            assert_eq!(answer.header("x-host"), "shop.test");
            if !body.is_empty() {
                assert_eq!(answer.header("content-length"), "8", "{names:?} {method}");
                assert_eq!(answer.header("x-length"), "8", "{names:?} {method}: a known length stays known");
            }
        }
        pair.mesh.ended("ok", 7).await;
        let protocol = if names.0 == Speaks::Http1 { "protocol=\"http1\"" } else { "protocol=\"http2\"" };
        assert_eq!(pair.mesh.metric("hopguard_requests_total", &[protocol, "outcome=\"ok\""]), 7.0);
        // Three of the methods must not be sent twice, and get a connection that cannot be closing just now.
        let most = if names.1 == Speaks::Http1 { 4 } else { 1 };
        assert!((1..=most).contains(&pair.upstream.connections()), "{names:?}: {}", pair.upstream.connections());
        pair.mesh.stop().await;
    }
}

#[tokio::test]
async fn trailers_pass_both_ways() {
    for names in ALL {
        let mut pair = pair(names).await;
        let asked = Request::post("/trailers").header("te", "trailers").header("trailer", "x-sum");
        let answer = pair.caller.ask(asked.body(with_trailers("hello", &[("x-sum", "5")])).unwrap()).await;
        assert_eq!(answer.header("x-sum-seen"), "5", "{names:?}");
        assert_eq!(answer.body, "hello");
        assert_eq!(
            answer.trailers.unwrap_or_default().get("x-out").map(|out| out.to_str().unwrap()),
            Some("done"),
            "{names:?}"
        );
        pair.mesh.stop().await;
    }
}

#[tokio::test]
async fn answers_without_a_body_have_none() {
    for names in ALL {
        let mut pair = pair(names).await;
        for (method, path, status) in
            [("HEAD", "/", 200), ("GET", "/204", 204), ("GET", "/304", 304), ("GET", "/", 200)]
        {
            let asked = Request::builder().method(method).uri(path).body(empty()).unwrap();
            let answer = pair.caller.ask(asked).await;
            assert_eq!((answer.status.as_u16(), answer.body.len()), (status, 0), "{names:?} {method} {path}");
            assert!(status != 204 || !answer.headers.contains_key("content-length"), "{answer:?}");
            assert!(!answer.headers.contains_key("transfer-encoding"), "{answer:?}");
        }
        pair.mesh.ended("ok", 4).await;
        pair.mesh.stop().await;
    }
}

#[tokio::test]
async fn large_bodies_stream_through() {
    let piece = Bytes::from(vec![b'x'; 64 << 10]);
    for names in ALL {
        let mut pair = pair(names).await;
        let (pieces, body) = feed();
        let sending = {
            let piece = piece.clone();
            tokio::spawn(async move {
                for _ in 0..128 {
                    assert!(pieces.send(piece.clone()).await, "nobody takes it");
                }
            })
        };
        let response =
            timeout(SOON, pair.caller.send(Request::post("/echo").body(body).unwrap())).await.unwrap().unwrap();
        let answer = timeout(SOON * 2, Answer::read(response)).await.expect("it is stuck").unwrap();
        sending.await.unwrap();
        assert_eq!(answer.body.len(), 8 << 20, "{names:?}");
        assert!(answer.body.iter().all(|byte| *byte == b'x'));
        let line = pair.mesh.only("ok").await;
        assert_eq!((&line["bytes_in"], &line["bytes_out"]), (&(8 << 20).into(), &(8 << 20).into()), "{line}");
        pair.mesh.stop().await;
    }
}

#[tokio::test]
async fn a_body_that_is_not_read_is_not_taken_in() {
    for names in ALL {
        let upstream = match names.1 {
            Speaks::Http1 => Upstream::http1(hold).await,
            Speaks::Http2 => Upstream::http2(hold).await,
        };
        let protocol = if names.1 == Speaks::Http1 { "http1" } else { "http2" };
        let more = format!("    protocol: {protocol}\n    timeouts: {{ request: 4s }}");
        let mesh = Mesh::start(&policy(upstream.addr, &more)).await;
        let mut caller = Caller::open(names.0, mesh.addr("in")).await;
        let (pieces, body) = feed();
        let call = tokio::spawn(async move { caller.send(Request::post("/").body(body).unwrap()).await });
        let piece = Bytes::from(vec![b'x'; 1 << 20]);
        let mut taken = 0;
        while let Ok(true) = timeout(Duration::from_secs(1), pieces.send(piece.clone())).await {
            taken += 1;
            assert!(taken < 64, "{names:?}: {taken} MiB went in although nobody reads them");
        }
        call.abort();
        drop(pieces);
        // Who has left an HTTP/1 connection full of unread bytes is not seen to have left before the time is over.
        eventually(|| (mesh.metric("hopguard_in_flight_requests", &["app"]) == 0.0).then_some(())).await;
        mesh.stop().await;
    }
}

/// Reads nothing and answers nothing.
async fn hold(request: Request<Incoming>) -> Response<crate::support::http::Body> {
    let _unread = request;
    std::future::pending().await
}

#[tokio::test]
async fn an_answer_may_come_before_the_request_has_ended() {
    for names in ALL {
        let mut pair = pair(names).await;
        let (pieces, body) = feed();
        assert!(pieces.send("first").await);
        let response = timeout(SOON, pair.caller.send(Request::post("/early").body(body).unwrap())).await;
        let response = response.unwrap_or_else(|_| panic!("{names:?}: the answer waits for the body")).unwrap();
        let answer = timeout(SOON, Answer::read(response)).await.expect("it does not end").unwrap();
        assert_eq!((answer.status.as_u16(), &answer.body[..]), (413, &b"too much"[..]), "{names:?}");
        drop(pieces);
        let line = pair.mesh.only("client_error").await;
        assert_eq!(line["status"], 413, "{line}");
        let mut second = Caller::open(pair.names.0, pair.mesh.addr("in")).await;
        assert_eq!(second.ask(Request::get("/").body(empty()).unwrap()).await.status, 200);
        pair.mesh.stop().await;
    }
}

#[tokio::test]
async fn what_the_upstream_does_not_read_after_its_answer_has_ended_is_cut_off() {
    let (reset, mut resets) = tokio::sync::mpsc::channel(1);
    let upstream = Upstream::bytes(move |stream| {
        let reset = reset.clone();
        async move {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            let (request, mut respond) = connection.accept().await.unwrap().unwrap();
            tokio::spawn(async move {
                let mut body = request.into_body();
                let mut answer = respond.send_response(Response::new(()), false).unwrap();
                answer.send_data(Bytes::from_static(b"too much"), true).unwrap();
                // Takes what comes, and allows no more, so that only a reset can end it.
                while let Some(Ok(_)) = body.data().await {}
                reset.send(std::future::poll_fn(|cx| answer.poll_reset(cx)).await.unwrap()).await.unwrap();
            });
            while let Some(Ok(_)) = connection.accept().await {}
        }
    })
    .await;
    let mesh = Mesh::start(&policy(upstream.addr, "    protocol: http2\n    timeouts: { request: 20s }")).await;
    let mut caller = Caller::open(Speaks::Http2, mesh.addr("in")).await;
    let (pieces, body) = feed();
    // More than the stream may hold.
    assert!(pieces.send(vec![b'x'; 1 << 20]).await);
    let response = timeout(SOON, caller.send(Request::post("/").body(body).unwrap())).await.unwrap().unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(Answer::read(response).await.unwrap().body, "too much");
    let reason = timeout(SOON, resets.recv()).await.expect("the stream stays open");
    assert_eq!(reason, Some(h2::Reason::CANCEL));
    pieces.unwanted().await;
    mesh.stop().await;
}

#[tokio::test]
async fn pieces_pass_as_they_come_in_both_directions() {
    for names in ALL {
        let mut pair = pair(names).await;
        let (pieces, body) = feed();
        assert!(pieces.send("0").await);
        let mut response =
            timeout(SOON, pair.caller.send(Request::post("/echo").body(body).unwrap())).await.unwrap().unwrap();
        for piece in ["0", "1", "2", "3"] {
            let frame = timeout(SOON, response.body_mut().frame())
                .await
                .unwrap_or_else(|_| panic!("{names:?}: {piece} is held back"));
            assert_eq!(frame.unwrap().unwrap().into_data().unwrap(), piece, "{names:?}");
            let next = (piece.as_bytes()[0] + 1) as char;
            assert!(pieces.send(next.to_string()).await);
        }
        drop(pieces);
        let rest = Answer::read(response).await.unwrap();
        assert_eq!(rest.body, "4");
        pair.mesh.stop().await;
    }
}

#[tokio::test]
async fn cookies_of_http2_are_joined_for_http1() {
    let mut pair = pair((Speaks::Http2, Speaks::Http1)).await;
    let asked = Request::get("/").header("cookie", "a=1").header("cookie", "b=2").header("cookie", "c=3");
    let answer = pair.caller.ask(asked.body(empty()).unwrap()).await;
    assert_eq!(answer.header("x-cookie"), "a=1; b=2; c=3");
    pair.mesh.stop().await;
}

#[tokio::test]
async fn a_cut_body_stays_cut() {
    for speaks in [Speaks::Http1, Speaks::Http2] {
        for framing in ["content-length: 50", "transfer-encoding: chunked"] {
            let upstream = Upstream::bytes(move |stream| async move {
                let mut wire = crate::support::wire::Wire::over(stream);
                wire.head().await;
                wire.send(format!("HTTP/1.1 200 OK\r\n{framing}\r\n\r\n5\r\nhello\r\n")).await;
            })
            .await;
            let mesh = Mesh::start(&policy(upstream.addr, "    protocol: http1")).await;
            let mut caller = Caller::open(speaks, mesh.addr("in")).await;
            let read = async {
                let response = caller.send(Request::get("/").body(empty()).unwrap()).await?;
                assert_eq!(response.status(), 200);
                Answer::read(response).await
            };
            let read = timeout(SOON, read).await.expect("it hangs");
            assert!(read.is_err(), "{speaks:?} {framing}: a cut body looks whole: {read:?}");
            assert_eq!(mesh.only("upstream_cut").await["status"], 200);
            mesh.stop().await;
        }
    }
}
