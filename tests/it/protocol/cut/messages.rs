//! The table of requests and responses: each way to break off, in head, body and trailers, for each pair of protocols.

use super::talk::{At, Framing, PART, Sight, Talk};
use super::{Break, CANCEL, INTERNAL_ERROR, Lab};
use crate::support::http::Speaks;
use crate::support::peer::Ending;

/// Who breaks off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Caller,
    App,
}

/// One row of the table.
#[derive(Debug, Clone, Copy)]
struct Row {
    side: Side,
    at: At,
    how: Break,
    framing: Framing,
    /// The app has begun its response, before the caller breaks off.
    answered: bool,
    caller: Speaks,
    app: Speaks,
}

impl Row {
    fn breaker(&self) -> Speaks {
        if self.side == Side::Caller { self.caller } else { self.app }
    }

    /// False for what cannot be said in the protocol.
    fn is_possible(&self) -> bool {
        let is_http1 = self.breaker() == Speaks::Http1;
        if self.answered && (self.side == Side::App || self.at == At::Head) {
            return false;
        }
        match (self.at, self.framing) {
            (At::Trailers, Framing::Length) => false,
            (At::Trailers | At::Head, Framing::Close) => false,
            (At::Body, Framing::Close) => is_http1 && self.side == Side::App,
            // The head of a message says nothing of its body yet, if it breaks off.
            (At::Head, Framing::Length) => false,
            (At::Head | At::Body | At::Trailers, _) => true,
        }
    }

    /// What the other side sees, and the outcome in log and metrics; no outcome where no request was read.
    fn expected(&self) -> (Sight, Option<&'static str>) {
        let is_orderly = matches!(self.how, Break::GoAwayAbove)
            || (self.framing == Framing::Close && self.how == Break::Connection(Ending::Fin));
        if is_orderly {
            return (Sight::Whole, Some("ok"));
        }
        match (self.side, self.at) {
            (Side::Caller, At::Head) if matches!(self.how, Break::Connection(_)) => (Sight::Nothing, None),
            (Side::Caller, At::Head | At::Body | At::Trailers) => match self.app {
                Speaks::Http1 => (Sight::Cut, Some("caller_gone")),
                Speaks::Http2 => (Sight::Reset(CANCEL), Some("caller_gone")),
            },
            (Side::App, At::Head) => (Sight::Status(502), Some("upstream_reset")),
            (Side::App, At::Body | At::Trailers) => match self.caller {
                Speaks::Http1 => (Sight::Cut, Some("upstream_cut")),
                Speaks::Http2 => (Sight::Reset(INTERNAL_ERROR), Some("upstream_cut")),
            },
        }
    }

    async fn observe(&self, lab: &Lab, path: &str) -> Sight {
        let framing = if self.framing == Framing::Close { Framing::Chunked } else { self.framing };
        let mut caller = Talk::caller(self.caller, lab.call(self.caller).await, framing).await;
        match self.side {
            Side::Caller => self.caller_breaks_off(lab, path, &mut caller).await,
            Side::App => self.app_breaks_off(lab, path, &mut caller).await,
        }
    }

    async fn caller_breaks_off(&self, lab: &Lab, path: &str, caller: &mut Talk) -> Sight {
        if self.at == At::Head && matches!(self.how, Break::Connection(_)) {
            caller.half_head("POST / HTTP/1.1\r\nhost: shop", (":method", "POST")).await;
            caller.break_off(self.how).await;
            caller.closed().await;
            assert!(lab.is_unasked(), "{self:?}: half a request was passed on");
            return Sight::Nothing;
        }
        caller.request(path, false).await;
        let mut app = Talk::app(self.app, lab.accept().await, self.framing).await;
        if self.at != At::Head {
            caller.body(PART).await;
            app.until_part().await;
        }
        if self.answered {
            app.response().await;
            app.body(PART).await;
            caller.until_part().await;
        }
        if self.at == At::Trailers {
            caller.half_trailers(self.how).await;
        }
        caller.break_off(self.how).await;
        if self.how != Break::GoAwayAbove {
            return app.rest().await;
        }
        if self.at == At::Head {
            caller.body(PART).await;
        }
        caller.finish().await;
        let seen = app.rest().await;
        if !self.answered {
            app.response().await;
            app.body(PART).await;
        }
        app.finish().await;
        assert_eq!(caller.rest().await, Sight::Whole, "{self:?}: the response");
        seen
    }

    async fn app_breaks_off(&self, lab: &Lab, path: &str, caller: &mut Talk) -> Sight {
        caller.request(path, true).await;
        let mut app = Talk::app(self.app, lab.accept().await, self.framing).await;
        if self.at == At::Head && self.how != Break::GoAwayAbove {
            if matches!(self.how, Break::Connection(_)) {
                app.half_head("HTTP/1.1 200 OK\r\nx-su", (":status", "200")).await;
            }
            app.break_off(self.how).await;
            return caller.status().await;
        }
        if self.at == At::Head {
            app.break_off(self.how).await;
        }
        app.response().await;
        app.body(PART).await;
        caller.until_part().await;
        if self.at == At::Trailers {
            app.half_trailers(self.how).await;
        }
        if self.at != At::Head {
            app.break_off(self.how).await;
        }
        if self.how == Break::GoAwayAbove {
            app.finish().await;
        }
        caller.rest().await
    }
}

/// All rows with this pair of protocols.
fn rows(caller: Speaks, app: Speaks, tls: bool) -> Vec<Row> {
    let mut rows = Vec::new();
    for side in [Side::Caller, Side::App] {
        for at in [At::Head, At::Body, At::Trailers] {
            for framing in [Framing::Chunked, Framing::Length, Framing::Close] {
                let breaker = if side == Side::Caller { caller } else { app };
                let mut all = Break::all(breaker, tls);
                if side == Side::App && app == Speaks::Http2 {
                    all.push(Break::GoAwayBelow);
                }
                let each = |answered| move |how: &Break| Row { side, at, how: *how, framing, answered, caller, app };
                rows.extend(all.iter().map(each(false)));
                rows.extend(all.iter().map(each(true)));
            }
        }
    }
    rows.retain(Row::is_possible);
    rows
}

/// Runs all rows of a pair of protocols, plain and over TLS.
async fn check(caller: Speaks, app: Speaks, least: usize) {
    let (mut count, mut wrong) = (0, Vec::new());
    for tls in [false, true] {
        let mut lab = Lab::start(app, tls, "to: app", "    timeouts: { request: 5s }\n").await;
        let mut outcomes = Vec::new();
        for (number, row) in rows(caller, app, tls).into_iter().enumerate() {
            let path = format!("/{number}");
            let (sight, outcome) = row.expected();
            let seen = row.observe(&lab, &path).await;
            let logged = if outcome.is_some() { Some(lab.outcome(&path).await) } else { None };
            if (seen, logged.as_deref()) != (sight, outcome) {
                wrong.push(format!("tls {tls}, {row:?}: {seen:?}, {logged:?}, not {sight:?}, {outcome:?}"));
            }
            outcomes.extend(outcome);
            count += 1;
        }
        if wrong.is_empty() {
            lab.stop(&outcomes).await;
        }
    }
    assert!(wrong.is_empty(), "{} of {count}:\n{}", wrong.len(), wrong.join("\n"));
    assert!(count >= least, "only {count} rows");
}

#[tokio::test]
async fn a_message_that_breaks_off_from_http1_to_http1_is_cut() {
    check(Speaks::Http1, Speaks::Http1, 36).await;
}

#[tokio::test]
async fn a_message_that_breaks_off_from_http1_to_http2_is_cut() {
    check(Speaks::Http1, Speaks::Http2, 100).await;
}

#[tokio::test]
async fn a_message_that_breaks_off_from_http2_to_http1_is_cut() {
    check(Speaks::Http2, Speaks::Http1, 100).await;
}

#[tokio::test]
async fn a_message_that_breaks_off_from_http2_to_http2_is_cut() {
    check(Speaks::Http2, Speaks::Http2, 200).await;
}
