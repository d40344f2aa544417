//! TLS on both sides: who is trusted, what is agreed on, and certificates that change while calls run.

use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use crate::support::certificates::{Authority, Identity};
use crate::support::http::{Caller, Http1, Speaks, ask, empty, full, get, request};
use crate::support::program::Program;
use crate::support::upstream::Upstream;
use crate::support::{Mesh, eventually};

/// An upstream behind TLS that says which protocol it was spoken to in, and for which name.
async fn behind_tls(identity: &Identity, alpn: &[&str]) -> Upstream {
    let acceptor = identity.acceptor(alpn);
    Upstream::bytes(move |stream| {
        let acceptor = acceptor.clone();
        async move {
            let Ok(stream) = acceptor.accept(stream).await else { return };
            let server = stream.get_ref().1;
            let name = server.server_name().unwrap_or("none").to_owned();
            let http2 = server.alpn_protocol() == Some(b"h2");
            let service = service_fn(move |request: Request<Incoming>| {
                let said = format!("{:?} for {name}", request.version());
                async move { Ok::<_, std::convert::Infallible>(Response::new(full(said))) }
            });
            let io = TokioIo::new(stream);
            let _ended = if http2 {
                hyper::server::conn::http2::Builder::new(TokioExecutor::new()).serve_connection(io, service).await
            } else {
                hyper::server::conn::http1::Builder::new().serve_connection(io, service).await
            };
        }
    })
    .await
}

fn policy(folder: &std::path::Path, upstream: &Upstream, tls: &str) -> String {
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
