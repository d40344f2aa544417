//! What a caller gets that has a mark of its own for an incomplete response: trailers with a status for gRPC, a reset of
//! the connection for HTTP/1.0, whose response may end with the connection (RFC 9112, 6.3).

use super::talk::{Framing, PART, Talk};
use super::{Break, CODES, Lab};
use crate::support::frames::{DATA, END_HEADERS, END_STREAM, Frames, HEADERS};
use crate::support::http::Speaks;
use crate::support::peer::Ending;

const GRPC: [(&str, &str); 2] = [(":status", "200"), ("content-type", "application/grpc")];

#[tokio::test]
async fn a_grpc_response_that_the_app_resets_ends_with_the_status_unavailable() {
    let mut lab = Lab::start(Speaks::Http2, false, "to: app", "").await;
    let mut outcomes = Vec::new();
    for code in CODES {
        let path = format!("/shop.v1.Payment/Charge{code}");
        let mut caller = Frames::client(lab.call(Speaks::Http2).await).await;
        let fields = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", &path),
            (":authority", "shop.test"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ];
        caller.headers(1, END_HEADERS, &fields).await;
        caller.send(DATA, END_STREAM, 1, b"\0\0\0\0\0").await;
        let mut app = Frames::server(lab.accept().await).await;
        let stream = app.next_of(HEADERS).await.unwrap().stream;
        app.headers(stream, END_HEADERS, &GRPC).await;
        app.send(DATA, 0, stream, b"\0\0\0\0\0").await;
        caller.next_of(DATA).await.unwrap();
        app.reset(stream, code).await;
        let last = caller.next().await.unwrap();
        assert!(last.kind == HEADERS && last.ends_stream(), "{code}: {last:?}");
        drop((caller, app));
        outcomes.push(lab.outcome(&path).await);
        let line: serde_json::Value = serde_json::from_str(lab.mesh.log().last().unwrap()).unwrap();
        assert_eq!(line["grpc_status"], "UNAVAILABLE", "{code}: {line}");
    }
    assert!(outcomes.iter().all(|outcome| outcome == "upstream_cut"), "{outcomes:?}");
    lab.stop(&outcomes.iter().map(String::as_str).collect::<Vec<_>>()).await;
}

#[tokio::test]
async fn an_http10_caller_gets_a_reset_in_place_of_the_rest() {
    for (speaks, tls) in [(Speaks::Http1, false), (Speaks::Http1, true), (Speaks::Http2, false), (Speaks::Http2, true)]
    {
        let mut lab = Lab::start(speaks, tls, "to: app", "").await;
        let mut caller = lab.call(Speaks::Http1).await;
        caller.send("GET /old HTTP/1.0\r\nhost: shop.test\r\n\r\n").await;
        let mut app = Talk::app(speaks, lab.accept().await, Framing::Chunked).await;
        app.response().await;
        app.body(PART).await;
        caller.until(PART).await.unwrap();
        app.break_off(Break::Connection(Ending::Fin)).await;
        assert_eq!(caller.rest().await, (String::new(), Ending::Reset), "{speaks:?}, tls {tls}");
        drop(app);
        assert_eq!(lab.outcome("/old").await, "upstream_cut", "{speaks:?}, tls {tls}");
        lab.stop(&["upstream_cut"]).await;
    }
}

#[tokio::test]
async fn an_http10_caller_gets_a_reset_at_the_end_of_the_grace_time() {
    let lab = Lab::start(Speaks::Http1, false, "to: app", "").await;
    let mut caller = lab.call(Speaks::Http1).await;
    caller.send("GET /old HTTP/1.0\r\nhost: shop.test\r\n\r\n").await;
    let mut app = Talk::app(Speaks::Http1, lab.accept().await, Framing::Chunked).await;
    app.response().await;
    app.body(PART).await;
    caller.until(PART).await.unwrap();
    lab.mesh.cut_off().await;
    assert_eq!(caller.rest().await, (String::new(), Ending::Reset));
}
