//! TLS on both sides: trust, ALPN, server names, and certificates that change under load.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::client::TlsStream;

use crate::support::certificates::{Authority, Identity};
use crate::support::http::{Caller, Http1, Speaks, ask, empty, full, get, raw, request};
use crate::support::load::Load;
use crate::support::program::{Program, hopguard};
use crate::support::upstream::{Gate, Upstream};
use crate::support::wire::Wire;
use crate::support::{Mesh, eventually};

/// An upstream behind TLS that says which protocol it was spoken to in, and for which name.
async fn behind_tls(identity: &Identity, alpn: &[&str]) -> Upstream {
    let acceptor = identity.acceptor(alpn);
    Upstream::bytes(move |stream| serve(stream, acceptor.clone(), Gate::closed())).await
}

/// An upstream whose certificate the test changes: a new connection gets the one that it has then.
async fn renewed(identity: &Identity, gate: &Gate) -> (Upstream, Arc<Mutex<TlsAcceptor>>) {
    let acceptor = Arc::new(Mutex::new(identity.acceptor(&["http/1.1"])));
    let (newest, gate) = (Arc::clone(&acceptor), gate.clone());
    let upstream = Upstream::bytes(move |stream| serve(stream, newest.lock().unwrap().clone(), gate.clone())).await;
    (upstream, acceptor)
}

/// Answers over one connection; for `/slow` when the test lets it.
async fn serve(stream: TcpStream, acceptor: TlsAcceptor, gate: Gate) {
    let Ok(stream) = acceptor.accept(stream).await else { return };
    Box::pin(converse(stream, gate)).await;
}

/// The same once TLS is agreed.
async fn converse(stream: tokio_rustls::server::TlsStream<TcpStream>, gate: Gate) {
    let server = stream.get_ref().1;
    let name = server.server_name().unwrap_or("none").to_owned();
    let http2 = server.alpn_protocol() == Some(b"h2");
    let service = service_fn(move |request: Request<Incoming>| {
        let said = format!("{:?} for {name}", request.version());
        let gate = gate.clone();
        async move {
            if request.uri().path() == "/slow" {
                gate.pass().await;
            }
            Ok::<_, std::convert::Infallible>(Response::new(full(said)))
        }
    });
    let io = TokioIo::new(stream);
    let _ended = if http2 {
        hyper::server::conn::http2::Builder::new(TokioExecutor::new()).serve_connection(io, service).await
    } else {
        hyper::server::conn::http1::Builder::new().serve_connection(io, service).await
    };
}

fn policy(folder: &Path, upstream: &Upstream, tls: &str) -> String {
    format!(
        "apiVersion: hopguard.dev/v1alpha1
kind: Policy
service: shop
accessLog: {{ mode: all }}
listeners:
  - {{ name: in, bind: \"127.0.0.1:0\", to: app }}
destinations:
  - name: app
    endpoints: [\"{}\"]
    timeouts: {{ connect: 2s, request: 5s }}
    tls: {{ ca: \"{}\", {tls} }}
",
        upstream.addr,
        folder.join("ca.crt").display(),
    )
}

#[tokio::test]
async fn an_upstream_agrees_on_the_protocol() {
    let (folder, authority) = (tempfile::tempdir().unwrap(), Authority::new());
    std::fs::write(folder.path().join("ca.crt"), authority.pem()).unwrap();
    let identity = authority.issue("bank.test");
    for (alpn, wanted) in [(vec!["h2", "http/1.1"], "HTTP/2.0"), (vec!["http/1.1"], "HTTP/1.1"), (vec![], "HTTP/1.1")] {
        let upstream = behind_tls(&identity, &alpn).await;
        let mesh = Mesh::start(&policy(folder.path(), &upstream, "serverName: bank.test")).await;
        for speaks in [Speaks::Http1, Speaks::Http2] {
            let answer =
                Caller::open(speaks, mesh.addr("in")).await.ask(Request::get("/").body(empty()).unwrap()).await;
            assert_eq!(answer.body, format!("{wanted} for bank.test"), "{alpn:?} {speaks:?}");
        }
        assert_eq!(upstream.connections(), 1, "{alpn:?}");
        mesh.ended("ok", 2).await;
        mesh.stop().await;
    }
}

/// Speaks HTTP/2 where that is agreed on; over HTTP/1.1 it becomes a WebSocket at once.
async fn switching(identity: &Identity) -> Upstream {
    let acceptor = identity.acceptor(&["h2", "http/1.1"]);
    Upstream::bytes(move |stream| {
        let acceptor = acceptor.clone();
        async move {
            let Ok(mut stream) = acceptor.accept(stream).await else { return };
            if stream.get_ref().1.alpn_protocol() == Some(b"h2") {
                return Box::pin(converse(stream, Gate::closed())).await;
            }
            let _head = stream.read(&mut [0; 4096]).await;
            let switched = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nhello";
            let _gone = stream.write_all(switched.as_bytes()).await;
            let _gone = stream.shutdown().await;
        }
    })
    .await
}

#[tokio::test]
async fn a_websocket_goes_over_http1_to_an_upstream_that_would_rather_speak_http2() {
    let (folder, authority) = (tempfile::tempdir().unwrap(), Authority::new());
    std::fs::write(folder.path().join("ca.crt"), authority.pem()).unwrap();
    for protocol in ["auto", "http2", "http1"] {
        let upstream = switching(&authority.issue("bank.test")).await;
        let tls = format!("serverName: bank.test }}\n    protocol: {protocol}\n    limits: {{ queue: 0");
        let mesh = Mesh::start(&policy(folder.path(), &upstream, &tls)).await;
        let mut wire = Wire::open(mesh.addr("in")).await;
        wire.send("GET /chat HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n").await;
        assert!(wire.head().await.starts_with("HTTP/1.1 101 "), "{protocol}");
        wire.until("hello").await;
        drop(wire);
        let line = mesh.only("ok").await;
        assert_eq!((&line["protocol"], &line["status"]), (&"websocket".into(), &101.into()), "{protocol}: {line}");
        if protocol != "http1" {
            let to = mesh.addr("in");
            let calls: Vec<_> = (0..6).map(|_| tokio::spawn(async move { get(to, "/").await.body })).collect();
            for call in calls {
                assert_eq!(call.await.unwrap(), "HTTP/2.0 for bank.test", "{protocol}");
            }
            assert_eq!(upstream.connections(), 2, "{protocol}: one for the WebSocket, one that all others share");
        }
        mesh.stop().await;
    }
}

#[tokio::test]
async fn an_upstream_that_is_to_speak_http2_and_agrees_on_nothing_is_refused() {
    let (folder, authority) = (tempfile::tempdir().unwrap(), Authority::new());
    std::fs::write(folder.path().join("ca.crt"), authority.pem()).unwrap();
    let upstream = behind_tls(&authority.issue("bank.test"), &[]).await;
    let tls = "serverName: bank.test }\n    protocol: http2\n    retry: off\n    limits: { queue: 0";
    let mesh = Mesh::start(&policy(folder.path(), &upstream, tls)).await;
    let answer = get(mesh.addr("in"), "/").await;
    assert_eq!(
        (answer.status.as_u16(), &answer.problem()["refusal"]),
        (502, &"upstream_protocol".into()),
        "{answer:?}"
    );
    let detail = answer.problem()["detail"].as_str().unwrap().to_owned();
    assert!(detail.contains("does not speak HTTP/2"), "{detail}");
    assert_eq!(mesh.only("upstream_protocol").await["status"], 502);
    assert_eq!(mesh.metric("hopguard_pool_connect_failures_total", &["app"]), 1.0);
    mesh.stop().await;
}

/// Calls that have so long, to an upstream that accepts connections and then lets TLS wait.
async fn cut_short(millis: u32) -> (Mesh, serde_json::Value) {
    let (folder, authority) = (tempfile::tempdir().unwrap(), Authority::new());
    std::fs::write(folder.path().join("ca.crt"), authority.pem()).unwrap();
    let upstream = Upstream::bytes(|stream| async move {
        let _open = stream;
        std::future::pending().await
    })
    .await;
    let text =
        policy(folder.path(), &upstream, "serverName: bank.test").replace("to: app", "to: app, direction: outbound");
    let mesh = Mesh::start(&text.replace("request: 5s }", "request: 2s }\n    retry: off")).await;
    let asked = request("GET", "/").header("x-envoy-expected-rq-timeout-ms", millis).body(empty()).unwrap();
    assert_eq!(ask(mesh.addr("in"), asked).await.status, 504);
    let line = mesh.only("deadline_exceeded").await;
    (mesh, line)
}

#[tokio::test]
async fn a_handshake_that_a_callers_deadline_does_not_wait_for_goes_on_until_its_own_time_is_over() {
    for millis in [50, 500] {
        let (mesh, line) = cut_short(millis).await;
        assert!(line["endpoint"].is_string(), "{line}");
        let failures = || mesh.metric("hopguard_pool_connect_failures_total", &["app"]);
        assert_eq!(failures(), 0.0, "{millis} ms of 2 s");
        eventually(|| (failures() == 1.0).then_some(())).await;
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_burst_to_an_upstream_without_http2_does_not_connect_one_after_the_other() {
    const CALLS: usize = 6;
    let (folder, authority) = (tempfile::tempdir().unwrap(), Authority::new());
    std::fs::write(folder.path().join("ca.crt"), authority.pem()).unwrap();
    let acceptor = authority.issue("bank.test").acceptor(&["http/1.1"]);
    let (handshakes, answers) = (Gate::closed(), Gate::closed());
    let (open, held) = (handshakes.clone(), answers.clone());
    let upstream = Upstream::bytes(move |stream| {
        let (acceptor, open, held) = (acceptor.clone(), open.clone(), held.clone());
        async move {
            open.pass().await;
            Box::pin(serve(stream, acceptor, held)).await;
        }
    })
    .await;
    let mesh = Mesh::start(&policy(folder.path(), &upstream, "serverName: bank.test")).await;
    let to = mesh.addr("in");
    let calls: Vec<_> = (0..CALLS).map(|_| tokio::spawn(async move { get(to, "/slow").await.status })).collect();
    // One finds out what the upstream speaks; then nobody waits for anybody.
    eventually(|| (upstream.connections() == 1).then_some(())).await;
    handshakes.release(1);
    eventually(|| (upstream.connections() == CALLS).then_some(())).await;
    handshakes.release(CALLS - 1);
    answers.release(CALLS);
    for call in calls {
        assert_eq!(call.await.unwrap(), 200);
    }
    mesh.stop().await;
}

#[tokio::test]
async fn without_a_server_name_it_is_the_destinations_host() {
    let (folder, authority) = (tempfile::tempdir().unwrap(), Authority::new());
    std::fs::write(folder.path().join("ca.crt"), authority.pem()).unwrap();
    let upstream = behind_tls(&authority.issue("bank.test"), &["http/1.1"]).await;
    let text = policy(folder.path(), &upstream, "").replace(", }", " }");
    let mesh = Mesh::start(&text.replace("    timeouts", "    hosts: [\"*.test\", bank.test]\n    timeouts")).await;
    assert_eq!(get(mesh.addr("in"), "/").await.body, "HTTP/1.1 for bank.test");
    mesh.stop().await;
}

#[tokio::test]
async fn without_endpoints_the_certificate_must_bear_the_name_that_was_asked_for() {
    let (folder, authority) = (tempfile::tempdir().unwrap(), Authority::new());
    std::fs::write(folder.path().join("ca.crt"), authority.pem()).unwrap();
    let text = format!(
        "apiVersion: hopguard.dev/v1alpha1
kind: Policy
accessLog: {{ mode: all }}
listeners:
  - {{ name: out, bind: \"127.0.0.1:0\", forward: true }}
destinations:
  - {{ name: others, hosts: [\"*\"], timeouts: {{ connect: 2s, request: 5s }}, tls: {{ ca: \"{}\" }} }}
",
        folder.path().join("ca.crt").display()
    );
    let right = behind_tls(&authority.issue("127.0.0.1"), &["http/1.1"]).await;
    let wrong = behind_tls(&authority.issue("elsewhere.test"), &["http/1.1"]).await;
    let mesh = Mesh::start(&text).await;
    for (upstream, status) in [(&right, 200), (&wrong, 502)] {
        let answer =
            ask(mesh.addr("out"), Request::get("/").header("host", upstream.addr.to_string()).body(empty()).unwrap())
                .await;
        assert_eq!(answer.status, status, "{answer:?}");
    }
    let absolute = format!("GET https://{}/ HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", right.addr);
    let answer = raw(mesh.addr("out"), absolute.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("HTTP/1.1 for"), "{answer}");
    assert_eq!(mesh.only("tls_failed").await["destination"], "others");
    mesh.stop().await;
}

#[tokio::test]
async fn a_certificate_that_does_not_fit_is_refused_and_explained() {
    let (folder, authority) = (tempfile::tempdir().unwrap(), Authority::new());
    std::fs::write(folder.path().join("ca.crt"), authority.pem()).unwrap();
    let strangers = Authority::new();
    for (identity, name) in [(authority.issue("other.test"), "name"), (strangers.issue("bank.test"), "issuer")] {
        let upstream = behind_tls(&identity, &["http/1.1"]).await;
        let mesh = Mesh::start(&policy(folder.path(), &upstream, "serverName: bank.test")).await;
        let answer = get(mesh.addr("in"), "/").await;
        assert_eq!(answer.status, 502, "{answer:?}");
        let problem = answer.problem();
        assert_eq!(problem["refusal"], "tls_failed", "{name}");
        let detail = problem["detail"].as_str().unwrap().to_lowercase();
        assert!(detail.contains("certificate"), "{detail}");
        let wanted = if name == "name" { "bank.test" } else { "issuer" };
        assert!(detail.contains(wanted), "it does not say what is wrong: {detail}");
        assert_eq!(mesh.only("tls_failed").await["status"], 502);
        mesh.stop().await;
    }
}

#[tokio::test]
async fn an_upstream_without_tls_is_a_tls_failure() {
    let (folder, authority) = (tempfile::tempdir().unwrap(), Authority::new());
    std::fs::write(folder.path().join("ca.crt"), authority.pem()).unwrap();
    let upstream = Upstream::fixed("plain").await;
    let mesh = Mesh::start(&policy(folder.path(), &upstream, "serverName: bank.test")).await;
    let answer = get(mesh.addr("in"), "/").await;
    assert_eq!(answer.problem()["refusal"], "tls_failed");
    mesh.only("tls_failed").await;
    mesh.stop().await;
}

fn tls_listener(upstream: &Upstream) -> String {
    crate::support::upstream::policy(upstream.addr, "")
        .replace("to: app }", "to: app, tls: { certificate: tls.crt, key: tls.key } }")
}

/// What the caller of a TLS listener was shown.
fn shown(stream: &TlsStream<TcpStream>) -> Vec<u8> {
    stream.get_ref().1.peer_certificates().unwrap()[0].to_vec()
}

async fn http1(stream: TlsStream<TcpStream>) -> Http1 {
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    Http1(sender)
}

#[tokio::test]
async fn a_listener_offers_both_protocols() {
    let (folder, authority) = (tempfile::tempdir().unwrap(), Authority::new());
    authority.issue("shop.test").write(folder.path());
    let upstream = Upstream::fixed("hello").await;
    let file = folder.path().join("policy.yaml");
    std::fs::write(&file, tls_listener(&upstream)).unwrap();
    let program = Program::run(&file, &[]).await;
    let to = program.addr("in").await.unwrap();
    for (alpn, agreed) in [(vec!["h2", "http/1.1"], Some("h2")), (vec!["http/1.1"], Some("http/1.1")), (vec![], None)] {
        let stream = authority.connect(to, "shop.test", &alpn).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), agreed.map(str::as_bytes), "{alpn:?}");
        if agreed == Some("h2") {
            let (sender, connection) =
                Box::pin(hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)))
                    .await
                    .unwrap();
            tokio::spawn(connection);
            let answer = Caller::Http2(sender).ask(Request::get("/").body(empty()).unwrap()).await;
            assert_eq!(answer.body, "hello");
        } else {
            assert_eq!(http1(stream).await.ask(request("GET", "/").body(empty()).unwrap()).await.body, "hello");
        }
    }
    assert_eq!(program.metric("hopguard_requests_total", &["outcome=\"ok\""]).await, 3.0);
    assert!(Authority::new().connect(to, "shop.test", &[]).await.is_err());
}

#[tokio::test]
async fn a_plain_caller_of_a_tls_listener_is_not_served() {
    let (folder, authority) = (tempfile::tempdir().unwrap(), Authority::new());
    authority.issue("shop.test").write(folder.path());
    let upstream = Upstream::fixed("hello").await;
    let file = folder.path().join("policy.yaml");
    std::fs::write(&file, tls_listener(&upstream)).unwrap();
    let program = Program::run(&file, &[]).await;
    let mut wire = crate::support::wire::Wire::open(program.addr("in").await.unwrap()).await;
    wire.send("GET / HTTP/1.1\r\nhost: shop.test\r\n\r\n").await;
    assert!(!wire.rest().await.contains("hello"));
    assert_eq!(upstream.requests(), 0);
}

#[tokio::test]
async fn a_renewed_certificate_is_shown_and_cuts_nobody() {
    let (folder, authority) = (tempfile::tempdir().unwrap(), Authority::new());
    authority.issue("shop.test").write(folder.path());
    let upstream = Upstream::fixed("hello").await;
    let file = folder.path().join("policy.yaml");
    std::fs::write(&file, tls_listener(&upstream)).unwrap();
    let program = Program::run(&file, &[]).await;
    let to = program.addr("in").await.unwrap();
    let old = authority.connect(to, "shop.test", &[]).await.unwrap();
    let before = shown(&old);
    let mut caller = http1(old).await;
    assert_eq!(caller.ask(request("GET", "/").body(empty()).unwrap()).await.body, "hello");
    authority.issue("shop.test").write(folder.path());
    let begun = tokio::time::Instant::now();
    while shown(&authority.connect(to, "shop.test", &[]).await.unwrap()) == before {
        assert!(begun.elapsed() < crate::support::SOON, "the old certificate is still shown");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert_eq!(caller.ask(request("GET", "/").body(empty()).unwrap()).await.body, "hello", "the old connection lives");
    std::fs::write(folder.path().join("tls.key"), "not a key").unwrap();
    eventually(|| program.log().contains("tls.key").then_some(())).await;
    let still = authority.connect(to, "shop.test", &[]).await.expect("a bad key takes nothing away");
    assert_eq!(http1(still).await.ask(request("GET", "/").body(empty()).unwrap()).await.body, "hello");
}

/// Lines of the program's own log that say so.
fn said(program: &Program, what: &str) -> usize {
    program.log().matches(what).count()
}

/// Puts authorities into the file at once, and waits until the program has taken them up.
async fn trust(program: &Program, folder: &Path, authorities: &[&Authority]) {
    let before = said(program, "certificates were reloaded");
    let beside = folder.join("ca.new");
    std::fs::write(&beside, authorities.iter().map(|one| one.pem()).collect::<String>()).unwrap();
    std::fs::rename(beside, folder.join("ca.crt")).unwrap();
    eventually(|| (said(program, "certificates were reloaded") > before).then_some(())).await;
}

async fn reloads(program: &Program, result: &str) -> f64 {
    program.metric("hopguard_certificate_reloads_total", &[&format!("result=\"{result}\"")]).await
}

/// Waits until `/policy` says that changed certificates are not in use and why, or that all are.
async fn until_error(program: &Program, wanted: Option<&str>) {
    let begun = tokio::time::Instant::now();
    loop {
        let error = program.document("/policy").await["certificateError"].take();
        match (error["message"].as_str(), wanted) {
            (None, None) => return,
            (Some(said), Some(wanted)) if said.contains(wanted) => return,
            _ => assert!(begun.elapsed() < crate::support::SOON, "{error}"),
        }
    }
}

/// A program with two ways to one upstream: `in` keeps connections, `fresh` opens one for each call.
async fn two_ways(folder: &Path, upstream: &Upstream) -> Program {
    let text = policy(folder, upstream, "serverName: bank.test");
    let text = text.replace("request: 5s }", "request: 60s }\n    protocol: http1\n    connections: { idle: 60s }");
    let at = text.find("  - name: app").unwrap();
    let fresh = text[at..].replace("name: app", "name: fresh").replace("idle: 60s", "maxIdle: 0");
    let listener = "listeners:\n  - { name: fresh, bind: \"127.0.0.1:0\", to: fresh }";
    let file = folder.join("policy.yaml");
    std::fs::write(&file, text.replacen("listeners:", listener, 1) + &fresh).unwrap();
    Program::run(&file, &[]).await
}

#[tokio::test]
async fn an_upstream_moves_to_another_authority_without_a_lost_call() {
    let (folder, old, new) = (tempfile::tempdir().unwrap(), Authority::new(), Authority::new());
    let folder = folder.path();
    std::fs::write(folder.join("ca.crt"), old.pem()).unwrap();
    let gate = Gate::closed();
    let (upstream, certificate) = renewed(&old.issue("bank.test"), &gate).await;
    let shows = |authority: &Authority| {
        *certificate.lock().unwrap() = authority.issue("bank.test").acceptor(&["http/1.1"]);
    };
    let program = two_ways(folder, &upstream).await;
    let (kept, fresh) = (program.addr("in").await.unwrap(), program.addr("fresh").await.unwrap());
    let slow = tokio::spawn(async move { get(kept, "/slow").await });
    eventually(|| (upstream.open() == 1).then_some(())).await;
    let load = Load::none().add(fresh, Speaks::Http1, 2, Duration::from_millis(5));
    trust(&program, folder, &[&old, &new]).await;
    shows(&new);
    trust(&program, folder, &[&new]).await;
    let before = load.good();
    eventually(|| (load.good() >= before + 20).then_some(())).await;
    let report = load.end().await;
    assert!(report.failures.is_empty(), "{:?}", report.failures.first());
    // The old authority is really out, and a connection from its time goes on all the same.
    shows(&old);
    let refused = get(fresh, "/").await;
    assert_eq!((refused.status.as_u16(), refused.problem()["refusal"].as_str()), (502, Some("tls_failed")));
    gate.release(1);
    assert_eq!(slow.await.unwrap().status, 200);
    let (get_kept, opened) = (get(kept, "/").await, upstream.connections());
    assert_eq!(get_kept.status, 200, "the connection that was kept: {get_kept:?}");
    assert_eq!(upstream.connections(), opened);
    shows(&new);
    assert_eq!(get(fresh, "/").await.status, 200);
    assert_eq!(program.metric("hopguard_requests_total", &["outcome=\"tls_failed\""]).await, 1.0);
    assert_eq!(program.metric("hopguard_policy_reloads_total", &[]).await, 1.0, "the policy is the same");
}

#[tokio::test]
async fn authorities_that_cannot_be_used_change_nothing_and_are_named() {
    let (folder, authority) = (tempfile::tempdir().unwrap(), Authority::new());
    let (folder, ca) = (folder.path(), folder.path().join("ca.crt"));
    std::fs::write(&ca, authority.pem()).unwrap();
    let (upstream, _) = renewed(&authority.issue("bank.test"), &Gate::closed()).await;
    let program = two_ways(folder, &upstream).await;
    let fresh = program.addr("fresh").await.unwrap();
    let cut = authority.pem()[..200].to_owned();
    let wrong = authority.pem().replace("MII", "AAA");
    for (times, broken) in [Some("no certificate"), Some(&cut), Some(&wrong), Some(""), None].into_iter().enumerate() {
        let before = said(&program, "cannot be used; the old ones stay");
        match broken {
            Some(text) => std::fs::write(&ca, text).unwrap(),
            None => std::fs::remove_file(&ca).unwrap(),
        }
        eventually(|| (said(&program, "cannot be used; the old ones stay") > before).then_some(())).await;
        let line = program.log().lines().rfind(|line| line.contains("the old ones stay")).unwrap().to_owned();
        assert!(line.contains("ca.crt"), "{broken:?}: {line}");
        assert_eq!(get(fresh, "/").await.status, 200, "{broken:?}");
        assert_eq!(program.get("/ready").await.status, 200);
        until_error(&program, Some("ca.crt")).await;
        assert_eq!(reloads(&program, "failed").await as usize, times + 1);
    }
    trust(&program, folder, &[&authority]).await;
    assert_eq!(get(fresh, "/").await.status, 200);
    until_error(&program, None).await;
    assert_eq!(reloads(&program, "ok").await, 1.0);
}

#[tokio::test]
async fn places_that_callers_name_have_the_certificates_of_their_destination() {
    let (folder, old, new) = (tempfile::tempdir().unwrap(), Authority::new(), Authority::new());
    let folder = folder.path();
    std::fs::write(folder.join("ca.crt"), old.pem()).unwrap();
    let (first, certificate) = renewed(&old.issue("127.0.0.1"), &Gate::closed()).await;
    let (second, _) = renewed(&new.issue("127.0.0.1"), &Gate::closed()).await;
    let text = policy(folder, &first, "").replace(", }", " }").replace("to: app", "forward: true");
    let endpoint = format!("endpoints: [\"{}\"]", first.addr);
    let text = text.replace(&endpoint, "hosts: [\"*\"]\n    connections: { maxIdle: 0 }");
    let file = folder.join("policy.yaml");
    std::fs::write(&file, text).unwrap();
    let program = Program::run(&file, &[]).await;
    let to = program.addr("in").await.unwrap();
    let call = async |upstream: &Upstream| {
        ask(to, Request::get("/").header("host", upstream.addr.to_string()).body(empty()).unwrap()).await.status
    };
    assert_eq!(call(&first).await, 200);
    trust(&program, folder, &[&new]).await;
    *certificate.lock().unwrap() = new.issue("127.0.0.1").acceptor(&["http/1.1"]);
    assert_eq!(call(&first).await, 200, "a place that was known before");
    std::fs::write(folder.join("ca.crt"), "no certificate").unwrap();
    until_error(&program, Some("ca.crt")).await;
    assert_eq!(call(&second).await, 200, "a place that is new while the file cannot be used");
}

#[tokio::test]
async fn certificates_that_change_together_with_the_policy_are_read() {
    let (folder, old, new) = (tempfile::tempdir().unwrap(), Authority::new(), Authority::new());
    let folder = folder.path();
    let (upstream, certificate) = renewed(&old.issue("bank.test"), &Gate::closed()).await;
    // As Kubernetes mounts a ConfigMap: all files change at one moment.
    let mount = |version: &str, authority: &Authority, more: &str| {
        let data = folder.join(version);
        std::fs::create_dir(&data).unwrap();
        let text = policy(folder, &upstream, "serverName: bank.test");
        let text = text.replace("request: 5s }", "request: 5s }\n    connections: { maxIdle: 0 }");
        std::fs::write(data.join("policy.yaml"), text + more).unwrap();
        std::fs::write(data.join("ca.crt"), authority.pem()).unwrap();
        std::fs::write(data.join("other.crt"), authority.pem()).unwrap();
        std::os::unix::fs::symlink(version, folder.join("..new")).unwrap();
        std::fs::rename(folder.join("..new"), folder.join("..data")).unwrap();
    };
    mount("..1", &old, "");
    for name in ["policy.yaml", "ca.crt", "other.crt"] {
        std::os::unix::fs::symlink(Path::new("..data").join(name), folder.join(name)).unwrap();
    }
    let program = Program::run(&folder.join("policy.yaml"), &[]).await;
    let to = program.addr("in").await.unwrap();
    assert_eq!(get(to, "/").await.status, 200);
    let other = "  - { name: other, hosts: [other.test], endpoints: [\"127.0.0.1:1\"], tls: { ca: other.crt } }\n";
    mount("..2", &new, other);
    program.said("the policy was reloaded").await;
    program.said("certificates were reloaded").await;
    *certificate.lock().unwrap() = new.issue("bank.test").acceptor(&["http/1.1"]);
    assert_eq!(get(to, "/").await.status, 200);
}

#[tokio::test]
async fn many_destinations_with_the_roots_of_the_system_read_them_once() {
    let folder = tempfile::tempdir().unwrap();
    let [roots, file] = ["roots.pem", "policy.yaml"].map(|name| folder.path().join(name));
    assert!(std::process::Command::new("mkfifo").arg(&roots).status().unwrap().success());
    let more: String = (0..20)
        .map(|n| format!("  - {{ name: more{n}, hosts: [more{n}], endpoints: [\"127.0.0.1:1\"], tls: {{}} }}\n"))
        .collect();
    let one = crate::support::upstream::policy("127.0.0.1:1".parse().unwrap(), "    tls: {}");
    std::fs::write(&file, one + &more).unwrap();
    let mut command = hopguard(&["run", "--policy", file.to_str().unwrap(), "--admin", "127.0.0.1:0"]);
    command.args(["--workers", "1", "--log-format", "json"]).env("SSL_CERT_FILE", &roots).env_remove("SSL_CERT_DIR");
    // The pipe has them for one reader: a second would wait for ever.
    let pem = Authority::new().pem();
    let given = tokio::task::spawn_blocking(move || std::fs::write(roots, pem).unwrap());
    let program = Program::start(command).await;
    given.await.unwrap();
    assert_eq!(program.get("/ready").await.status, 200);
}
