//! Routing: the destination and the route of a call. The most specific match applies, whatever the order in the file.

use hyper::{Request, Response};

use crate::support::http::{Answer, Caller, Http1, Speaks, ask, empty, full, grpc_request};
use crate::support::upstream::Upstream;
use crate::support::wire::Wire;
use crate::support::{Mesh, eventually};

/// Routes from the least to the most specific, as no careful author would write them.
const ROUTES: &str = "
      - { name: rest, match: { path: \"/orders/{*rest}\" } }
      - { name: any-get, match: { methods: [GET] } }
      - { name: by-tenant, match: { headers: { x-tenant: a } } }
      - { name: one, match: { path: \"/orders/{id}\" } }
      - { name: one-post, match: { path: \"/orders/{id}\", methods: [POST] } }
      - { name: one-tenant, match: { path: \"/orders/{id}\", headers: { x-tenant: a } } }
      - { name: one-both, match: { path: \"/orders/{id}\", headers: { x-tenant: a, x-tier: gold } } }
      - { name: exact, match: { path: /orders/open } }
      - { name: service, match: { grpc: shop.v1.Payment } }
      - { name: method, match: { grpc: shop.v1.Payment/Charge } }";

fn policy(upstream: &Upstream, routes: &str) -> String {
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
    routes:{routes}
",
        upstream.addr
    )
}

/// ROUTES in the opposite order.
fn reversed() -> String {
    let mut lines: Vec<_> = ROUTES.lines().collect();
    lines[1..].reverse();
    lines.join("\n")
}

type Fields = &'static [(&'static str, &'static str)];

/// Method, path, header fields, and the route that must be met.
type Call = (&'static str, &'static str, Fields, &'static str);

const CALLS: [Call; 15] = [
    ("PUT", "/orders/7/items", &[], "rest"),
    ("GET", "/orders/7/items", &[], "rest"),
    ("GET", "/", &[], "any-get"),
    ("PUT", "/", &[("x-tenant", "a")], "by-tenant"),
    ("PUT", "/", &[("x-tenant", "b")], "default"),
    ("PUT", "/orders/7", &[], "one"),
    ("PUT", "/orders/7?query=/orders/open", &[], "one"),
    ("POST", "/orders/7", &[], "one-post"),
    ("PUT", "/orders/7", &[("x-tenant", "a")], "one-tenant"),
    ("PUT", "/orders/7", &[("x-tenant", "a"), ("x-tier", "gold")], "one-both"),
    ("POST", "/orders/7", &[("x-tenant", "a"), ("x-tier", "gold")], "one-post"),
    ("GET", "/orders/open", &[], "exact"),
    ("PUT", "/orders/", &[], "default"),
    ("PUT", "/shop.v1.Payment/Charge", &[], "default"),
    ("PUT", "/ORDERS/7", &[], "default"),
];

#[tokio::test]
async fn the_most_specific_route_wins_whatever_the_order() {
    let upstream = Upstream::fixed("hello").await;
    for routes in [ROUTES.to_owned(), reversed()] {
        let mesh = Mesh::start(&policy(&upstream, &routes)).await;
        let mut caller = Http1::open(mesh.addr("in")).await;
        for (index, (method, path, fields, route)) in CALLS.iter().enumerate() {
            let mut request = Request::builder().method(*method).uri(*path).header("host", "anything.test");
            for (name, value) in *fields {
                request = request.header(*name, *value);
            }
            assert_eq!(caller.ask(request.body(empty()).unwrap()).await.status, 200);
            let line = eventually(|| mesh.log().get(index).cloned()).await;
            assert!(line.contains(&format!("\"route\":\"{route}\"")), "{method} {path} {fields:?}: {line}");
        }
        let wanted = CALLS.iter().filter(|call| call.3 == "default").count() as f64;
        assert_eq!(mesh.metric("hopguard_requests_total", &["route=\"default\"", "outcome=\"ok\""]), wanted);
        mesh.stop().await;
    }
}

#[tokio::test]
async fn grpc_methods_come_before_services_and_both_before_paths() {
    let upstream = Upstream::http2(|_| async move {
        let head = Response::builder().header("content-type", "application/grpc").header("grpc-status", "0");
        head.body(empty()).unwrap()
    })
    .await;
    for routes in [ROUTES.to_owned(), reversed()] {
        let mesh = Mesh::start(&policy(&upstream, &routes)).await;
        for (index, (path, route)) in [
            ("/shop.v1.Payment/Charge", "method"),
            ("/shop.v1.Payment/Refund", "service"),
            ("/shop.v1.Payment2/Charge", "default"),
            ("/orders/7", "one-post"),
        ]
        .into_iter()
        .enumerate()
        {
            let mut caller = Caller::open(Speaks::Http2, mesh.addr("in")).await;
            let answer = caller.ask(grpc_request(path, full(&b"\0\0\0\0\0"[..]))).await;
            assert_eq!(answer.grpc_status(), "0", "{answer:?}");
            let line = eventually(|| mesh.log().get(index).cloned()).await;
            assert!(line.contains(&format!("\"route\":\"{route}\"")), "{path}: {line}");
            assert!(line.contains("\"protocol\":\"grpc\""), "{line}");
        }
        mesh.stop().await;
    }
}

/// An explicit proxy in front of services that say who they are.
async fn city() -> (Mesh, Vec<Upstream>) {
    let names = ["exact", "suffix", "longer", "any"];
    let mut upstreams = Vec::new();
    for name in names {
        upstreams.push(Upstream::fixed(name).await);
    }
    let entry = |index: usize, hosts: &str| {
        format!("  - {{ name: {}, hosts: {hosts}, endpoints: [\"{}\"] }}\n", names[index], upstreams[index].addr)
    };
    let policy = format!(
        "apiVersion: hopguard.dev/v1alpha1
kind: Policy
service: shop
accessLog: {{ mode: all }}
listeners:
  - {{ name: out, bind: \"127.0.0.1:0\", forward: true }}
defaults:
  connections: {{ idle: 1s }}
destinations:
{}{}{}{}",
        entry(3, "[\"*\"]"),
        entry(1, "[\"*.shop.example\"]"),
        entry(2, "[\"*.deep.shop.example\"]"),
        entry(0, "[payment, pay.shop.example]"),
    );
    (Mesh::start(&policy).await, upstreams)
}

const HOSTS: [(&str, &str); 9] = [
    ("payment", "exact"),
    ("PayMent:8080", "exact"),
    ("pay.shop.example", "exact"),
    ("pay.shop.example:443", "exact"),
    ("other.shop.example", "suffix"),
    ("a.b.shop.example", "suffix"),
    ("a.deep.shop.example", "longer"),
    ("shop.example", "any"),
    ("evilshop.example", "any"),
];

#[tokio::test]
async fn the_host_chooses_the_destination_in_origin_form() {
    let (mesh, _upstreams) = city().await;
    for (host, wanted) in HOSTS {
        let request = Request::get("/").header("host", host).body(empty()).unwrap();
        assert_eq!(ask(mesh.addr("out"), request).await.body, wanted, "{host}");
    }
    mesh.ended("ok", HOSTS.len()).await;
    for name in ["exact", "suffix", "longer", "any"] {
        let wanted = HOSTS.iter().filter(|(_, destination)| *destination == name).count() as f64;
        let label = format!("destination=\"{name}\"");
        assert_eq!(mesh.metric("hopguard_requests_total", &[&label, "direction=\"outbound\""]), wanted);
    }
    mesh.stop().await;
}

#[tokio::test]
async fn the_target_chooses_the_destination_in_absolute_form_and_not_the_host_field() {
    let (mesh, _upstreams) = city().await;
    for (host, wanted) in HOSTS {
        let request =
            Request::get(format!("http://{host}/")).header("host", "a.deep.shop.example").body(empty()).unwrap();
        assert_eq!(ask(mesh.addr("out"), request).await.body, wanted, "{host}");
    }
    mesh.stop().await;
}

#[tokio::test]
async fn the_authority_chooses_the_destination_in_http2() {
    let (mesh, _upstreams) = city().await;
    let mut caller = Caller::open(Speaks::Http2, mesh.addr("out")).await;
    for (host, wanted) in HOSTS {
        let request = Request::get(format!("http://{host}/")).body(empty()).unwrap();
        assert_eq!(caller.ask(request).await.body, wanted, "{host}");
        let line =
            eventually(|| mesh.log().last().cloned().filter(|line| line.contains(&format!("\"host\":\"{host}\""))))
                .await;
        assert!(line.contains(&format!("\"destination\":\"{wanted}\"")), "{line}");
    }
    mesh.stop().await;
}

#[tokio::test]
async fn a_host_that_nobody_has_is_explained() {
    let policy = "apiVersion: hopguard.dev/v1alpha1
kind: Policy
service: shop
listeners:
  - { name: out, bind: \"127.0.0.1:0\", forward: true }
destinations:
  - { name: payment, hosts: [payment] }
";
    for (speaks, index) in [(Speaks::Http1, 0), (Speaks::Http2, 1)] {
        let mesh = Mesh::start(policy).await;
        let request = Request::get("http://paymnet:8080/x").body(empty()).unwrap();
        let answer: Answer = Caller::open(speaks, mesh.addr("out")).await.ask(request).await;
        assert_eq!(answer.status, 404, "{index}");
        let problem = answer.problem();
        assert_eq!(problem["refusal"], "no_destination");
        assert!(problem["detail"].as_str().unwrap().contains("paymnet"), "{problem}");
        let line = mesh.only("no_destination").await;
        assert_eq!(
            (&line["destination"], &line["route"], &line["status"]),
            (&"none".into(), &"none".into(), &404.into()),
            "{line}"
        );
        mesh.stop().await;
    }
}

#[tokio::test]
async fn without_endpoints_a_call_goes_where_the_caller_was_going() {
    let upstream = Upstream::http1(|request: Request<hyper::body::Incoming>| async move {
        let host = request.headers()["host"].to_str().unwrap();
        Response::new(full(format!("{host} {}", request.uri())))
    })
    .await;
    let policy = "apiVersion: hopguard.dev/v1alpha1
kind: Policy
listeners:
  - { name: out, bind: \"127.0.0.1:0\", forward: true }
destinations:
  - { name: others, hosts: [\"*\"] }
";
    let mesh = Mesh::start(policy).await;
    for host in [format!("{}", upstream.addr), format!("localhost:{}", upstream.addr.port())] {
        let request = Request::get(format!("http://{host}/a?b")).header("host", &host).body(empty()).unwrap();
        assert_eq!(ask(mesh.addr("out"), request).await.body, format!("{host} /a?b"));
        let request = Request::get("/a?b").header("host", &host).body(empty()).unwrap();
        assert_eq!(ask(mesh.addr("out"), request).await.body, format!("{host} /a?b"));
    }
    mesh.stop().await;
}

#[tokio::test]
async fn an_http1_call_without_a_host_is_no_call() {
    let upstream = Upstream::fixed("hello").await;
    let mesh = Mesh::start(&policy(&upstream, " []").replace("    routes: []\n", "")).await;
    let mut wire = Wire::open(mesh.addr("in")).await;
    wire.send("GET / HTTP/1.1\r\n\r\n").await;
    assert!(wire.rest().await.starts_with("HTTP/1.1 400 "));
    assert_eq!(mesh.only("bad_request").await["status"], 400);
    mesh.stop().await;
}
