//! Upstreams that end connections: a graceful stop, a worker process that is replaced, a bound of requests per connection, an
//! announced close, an unasked response. What must not be lost is not lost, and one event counts once.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper::Request;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, timeout};

use crate::support::http::{Answer, Body, Http1, ask, empty, full, get, request};
use crate::support::upstream::{Gate, Upstream, own_address, policy};
use crate::support::wire::Wire;
use crate::support::{Mesh, SOON, eventually};

const ANSWER: &str = "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello";

/// A policy whose listener is in front of somebody else's service, so that POSTs use idle connections too.
fn outbound(upstream: std::net::SocketAddr, more: &str) -> String {
    policy(upstream, more).replace("to: app", "to: app, direction: outbound")
}

fn post() -> Request<Body> {
    request("POST", "/").body(full("x")).unwrap()
}

fn early(mesh: &Mesh, reason: &str) -> f64 {
    mesh.metric("hopguard_pool_early_closes_total", &["app", &format!("reason=\"{reason}\"")])
}

fn open(mesh: &Mesh) -> f64 {
    mesh.metric("hopguard_pool_open_connections", &["app"])
}

/// Reads a request to the end of its body, which is `x` where there is one; `None` if the connection ends.
async fn next(stream: &mut TcpStream) -> Option<String> {
    let mut seen = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&seen).into_owned();
        if text.contains("\r\n\r\n") && (text.starts_with("GET") || text.ends_with('x')) {
            return Some(text);
        }
        if stream.read_buf(&mut seen).await.ok()? == 0 {
            return None;
        }
    }
}

async fn answer(stream: &mut TcpStream) {
    let _gone = tokio::io::AsyncWriteExt::write_all(stream, ANSWER.as_bytes()).await;
}

/// Ends a connection with RST.
fn reset(stream: TcpStream) {
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
}

/// What a connection of [`numbered`] does with a request.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Does {
    Answer,
    Finish,
    Reset,
    /// Nothing, until the connection ends or the gate opens; then it answers.
    Wait,
}

/// An upstream that asks `script` what to do with a request: the number of the connection, from 0, the number of the request on
/// it, from 1, and its path.
async fn numbered(
    gate: &Gate,
    script: impl Fn(usize, usize, &str) -> Does + Clone + Send + Sync + 'static,
) -> Upstream {
    let (connections, gate) = (Arc::<AtomicUsize>::default(), gate.clone());
    Upstream::bytes(move |mut stream| {
        let (number, script, gate) = (connections.fetch_add(1, SeqCst), script.clone(), gate.clone());
        async move {
            for request in 1.. {
                let Some(asked) = next(&mut stream).await else { return };
                let path = asked.split(' ').nth(1).unwrap_or_default();
                match script(number, request, path) {
                    Does::Answer => answer(&mut stream).await,
                    Does::Finish => return,
                    Does::Reset => return reset(stream),
                    Does::Wait => {
                        gate.pass().await;
                        answer(&mut stream).await;
                    }
                }
            }
        }
    })
    .await
}

/// So many calls at the same time, each over a connection of its own at the upstream, which answers when all have come.
async fn warm(mesh: &Mesh, upstream: &Upstream, gate: &Gate, calls: usize) {
    let to = mesh.addr("in");
    let all: Vec<_> = (0..calls).map(|_| tokio::spawn(async move { get(to, "/wait").await })).collect();
    eventually(|| (upstream.connections() == calls).then_some(())).await;
    gate.release(calls);
    for call in all {
        assert_eq!(call.await.unwrap().status, 200);
    }
    eventually(|| (mesh.metric("hopguard_pool_idle_connections", &["app"]) == calls as f64).then_some(())).await;
}

#[tokio::test]
async fn the_end_of_a_reused_connection_closes_all_of_its_age() {
    for end in [Does::Finish, Does::Reset] {
        let gate = Gate::closed();
        let upstream = numbered(&gate, move |connection, _, path| match path {
            "/wait" => Does::Wait,
            "/end" if connection < 8 => end,
            _ => Does::Answer,
        })
        .await;
        let mesh = Mesh::start(&policy(upstream.addr, "    connections: { idle: 60s }")).await;
        warm(&mesh, &upstream, &gate, 8).await;
        assert_eq!(get(mesh.addr("in"), "/end").await.status, 200, "a GET is sent again over a new connection");
        assert_eq!((upstream.connections(), early(&mesh, "stale"), open(&mesh)), (9, 7.0, 1.0));
        eventually(|| (upstream.open() == 1).then_some(())).await;
        let line = mesh.log().pop().unwrap();
        assert!(line.contains("\"attempt\":2") && line.contains("\"connection\":\"new\""), "{line}");
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_busy_connection_of_that_age_answers_and_is_not_used_again() {
    let gate = Gate::closed();
    let upstream = numbered(&gate, |_, _, path| match path {
        "/wait" => Does::Wait,
        "/end" => Does::Finish,
        _ => Does::Answer,
    })
    .await;
    let more = "    connections: { idle: 60s }\n    timeouts: { request: 20s }\n    retry: off";
    let mesh = Mesh::start(&outbound(upstream.addr, more)).await;
    warm(&mesh, &upstream, &gate, 2).await;
    let to = mesh.addr("in");
    let busy = tokio::spawn(async move { ask(to, request("POST", "/wait").body(full("x")).unwrap()).await });
    eventually(|| (mesh.metric("hopguard_pool_idle_connections", &["app"]) == 1.0).then_some(())).await;
    assert_eq!(get(to, "/end").await.status, 502);
    gate.release(1);
    assert_eq!(busy.await.unwrap().status, 200);
    assert_eq!((early(&mesh, "stale"), open(&mesh)), (1.0, 0.0));
    mesh.stop().await;
}

#[tokio::test]
async fn sixteen_busy_connections_that_end_at_once_are_one_failure() {
    let (gate, down) = (Gate::closed(), Arc::new(AtomicBool::new(true)));
    let ends = Arc::clone(&down);
    // The gate lets a request go on; while the app goes down its connection ends instead.
    let served = gate.clone();
    let upstream = Upstream::bytes(move |mut stream| {
        let (gate, down) = (served.clone(), Arc::clone(&ends));
        async move {
            for request in 0.. {
                if next(&mut stream).await.is_none() {
                    return;
                }
                gate.pass().await;
                if request > 0 && down.load(SeqCst) {
                    return reset(stream);
                }
                answer(&mut stream).await;
            }
        }
    })
    .await;
    let more = "    connections: { idle: 60s }\n    timeouts: { request: 20s }\n    retry: off";
    let mesh = Mesh::start(&outbound(upstream.addr, more)).await;
    warm(&mesh, &upstream, &gate, 16).await;
    let to = mesh.addr("in");
    let all: Vec<_> = (0..16).map(|_| tokio::spawn(async move { ask(to, post()).await })).collect();
    eventually(|| (mesh.metric("hopguard_pool_idle_connections", &["app"]) == 0.0).then_some(())).await;
    gate.release(16);
    for call in all {
        let answer = call.await.unwrap();
        assert!(answer.status == 502 && answer.header("proxy-status").contains("upstream_reset"), "{answer:?}");
    }
    down.store(false, SeqCst);
    gate.release(10);
    for _ in 0..10 {
        assert_eq!(ask(to, post()).await.status, 200);
    }
    mesh.ended("ok", 26).await;
    assert_eq!((mesh.count("upstream_reset"), mesh.count("circuit_open")), (16.0, 0.0));
    assert_eq!(mesh.metric("hopguard_circuit_breaker_changes_total", &["app"]), 0.0);
    mesh.stop().await;
}

#[tokio::test]
async fn the_ends_of_new_connections_open_the_breaker() {
    let upstream = numbered(&Gate::closed(), |_, _, _| Does::Reset).await;
    let more = "    retry: off\n    circuitBreaker: { openFor: 60s, openForMax: 60s }";
    let mesh = Mesh::start(&outbound(upstream.addr, more)).await;
    for _ in 0..6 {
        ask(mesh.addr("in"), post()).await;
    }
    mesh.ended("circuit_open", 1).await;
    assert_eq!(upstream.connections(), 5);
    mesh.stop().await;
}

#[tokio::test]
async fn gets_whose_connections_end_together_are_all_sent_again() {
    let gate = Gate::closed();
    let upstream = numbered(&gate, |connection, request, _| match (connection, request) {
        (..24, 1) => Does::Wait,
        (..24, _) => Does::Finish,
        _ => Does::Answer,
    })
    .await;
    let mesh = Mesh::start(&policy(upstream.addr, "    connections: { idle: 60s }")).await;
    warm(&mesh, &upstream, &gate, 24).await;
    let to = mesh.addr("in");
    let all: Vec<_> = (0..24).map(|_| tokio::spawn(async move { get(to, "/").await })).collect();
    for call in all {
        assert_eq!(call.await.unwrap().status, 200);
    }
    mesh.ended("ok", 48).await;
    mesh.stop().await;
}

#[tokio::test]
async fn a_request_that_waits_on_a_connection_of_that_age_is_sent_again_if_it_may_be() {
    let gate = Gate::closed();
    let upstream = numbered(&gate, |connection, _, path| match path {
        "/wait" => Does::Wait,
        "/unread" if connection < 3 => Does::Wait,
        "/end" => Does::Reset,
        _ => Does::Answer,
    })
    .await;
    let more = "    connections: { idle: 60s }\n    timeouts: { request: 60s }";
    let mesh = Mesh::start(&outbound(upstream.addr, more)).await;
    warm(&mesh, &upstream, &gate, 3).await;
    let to = mesh.addr("in");
    let unsafe_call = tokio::spawn(async move { ask(to, request("POST", "/unread").body(full("x")).unwrap()).await });
    let safe_call = tokio::spawn(async move { get(to, "/unread").await });
    eventually(|| (mesh.metric("hopguard_pool_idle_connections", &["app"]) == 1.0).then_some(())).await;
    assert_eq!(ask(to, request("POST", "/end").body(full("x")).unwrap()).await.status, 502);
    assert_eq!(safe_call.await.unwrap().status, 200, "over a new connection");
    assert!(!unsafe_call.is_finished());
    gate.release(2);
    assert_eq!(unsafe_call.await.unwrap().status, 200, "over its own connection");
    assert_eq!(upstream.connections(), 4);
    assert_eq!(mesh.metric("hopguard_retries_total", &["app"]), 1.0);
    mesh.stop().await;
}

/// An app that stops as Tomcat does: new connections are refused, idle ones stay open, and every request on one of them is
/// read and dropped with FIN.
struct Stopping {
    stop: watch::Sender<bool>,
    dropped: Arc<Mutex<Vec<String>>>,
    task: JoinHandle<()>,
}

impl Stopping {
    async fn start(addr: std::net::SocketAddr) -> Self {
        let listener = TcpListener::bind(addr).await.unwrap();
        let (stop, dropped) = (watch::Sender::new(false), Arc::<Mutex<Vec<String>>>::default());
        let (told, mut leave, seen) = (stop.subscribe(), stop.subscribe(), Arc::clone(&dropped));
        let task = tokio::spawn(async move {
            let mut open = JoinSet::new();
            loop {
                tokio::select! {
                    biased;
                    accepted = listener.accept() => {
                        open.spawn(serve(accepted.unwrap().0, told.clone(), Arc::clone(&seen)));
                    }
                    _ = leave.wait_for(|stop| *stop) => break,
                }
            }
            drop(listener);
            open.join_all().await;
        });
        Self { stop, dropped, task }
    }
}

async fn serve(mut stream: TcpStream, told: watch::Receiver<bool>, dropped: Arc<Mutex<Vec<String>>>) {
    let mut is_first = true;
    while let Some(asked) = next(&mut stream).await {
        // What it has accepted, it serves.
        if !is_first && *told.borrow() {
            dropped.lock().unwrap().push(asked);
            return;
        }
        sleep(Duration::from_millis(2)).await;
        answer(&mut stream).await;
        is_first = false;
    }
}

/// Callers that take turns with a GET and a POST every 80 ms, 16 of them, until `calls` have ended; what failed.
async fn mixed_load(to: std::net::SocketAddr, ended: &Arc<AtomicUsize>, calls: usize) -> Vec<(String, Answer)> {
    let mut callers = JoinSet::new();
    for number in 0..16_u64 {
        let ended = Arc::clone(ended);
        callers.spawn(async move {
            let (mut caller, mut failed) = (Http1::open(to).await, Vec::new());
            sleep(Duration::from_millis(5 * number)).await;
            for turn in 0.. {
                if ended.load(SeqCst) >= calls {
                    break;
                }
                let method = if turn % 2 == 0 { "GET" } else { "POST" };
                let body = if turn % 2 == 0 { empty() } else { full("x") };
                let answer = caller.ask(request(method, "/").body(body).unwrap()).await;
                ended.fetch_add(1, SeqCst);
                if answer.status != 200 {
                    failed.push((method.to_owned(), answer));
                }
                sleep(Duration::from_millis(40)).await;
            }
            failed
        });
    }
    callers.join_all().await.into_iter().flatten().collect()
}

#[tokio::test]
async fn before_an_app_that_stops_like_tomcat_no_post_is_lost() {
    let addr = own_address();
    let app = Stopping::start(addr).await;
    let mesh = Mesh::start(&policy(addr, "    connections: { idle: 60s }\n    circuitBreaker: off")).await;
    let (to, ended) = (mesh.addr("in"), Arc::<AtomicUsize>::default());
    let counted = Arc::clone(&ended);
    let load = tokio::spawn(async move { mixed_load(to, &counted, 600).await });
    eventually(|| (ended.load(SeqCst) >= 300).then_some(())).await;
    app.stop.send_replace(true);
    let failed = load.await.unwrap();
    timeout(SOON, app.task).await.expect("a connection is left open").unwrap();
    let dropped = app.dropped.lock().unwrap().clone();
    let posts = dropped.iter().filter(|asked| asked.starts_with("POST")).count();
    assert_eq!(posts, 0, "{dropped:?}");
    let lost: Vec<_> =
        failed.iter().filter(|(_, answer)| !answer.header("proxy-status").contains("hopguard-unsent")).collect();
    assert!(lost.iter().all(|(method, _)| method == "GET") && lost.len() <= 1, "{lost:#?}");
    assert!(failed.len() > 200, "{} calls were refused", failed.len());
    mesh.stop().await;
}

#[tokio::test]
async fn an_app_that_refuses_a_connection_gets_nothing_over_its_idle_ones() {
    let addr = own_address();
    let app = Stopping::start(addr).await;
    let mesh = Mesh::start(&policy(addr, "    connections: { idle: 60s }\n    retry: off")).await;
    let to = mesh.addr("in");
    let first: Vec<_> = (0..4).map(|_| tokio::spawn(async move { get(to, "/").await })).collect();
    for call in first {
        assert_eq!(call.await.unwrap().status, 200);
    }
    let idle = open(&mesh);
    assert!(idle >= 1.0);
    app.stop.send_replace(true);
    eventually(|| std::net::TcpStream::connect(addr).is_err().then_some(())).await;
    let refused = ask(to, post()).await;
    assert!(refused.header("proxy-status").contains("hopguard-unsent"), "{refused:?}");
    assert_eq!(open(&mesh), 0.0);
    let refused = get(to, "/").await;
    assert!(refused.header("proxy-status").contains("hopguard-unsent"), "{refused:?}");
    assert!(app.dropped.lock().unwrap().is_empty());
    mesh.stop().await;
}

#[tokio::test]
async fn a_post_uses_an_idle_connection_of_an_app_that_accepts_too_slowly() {
    let addr = own_address();
    // A queue for one new connection, which nobody takes until the test lets it.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind(addr).unwrap();
    let listener = socket.listen(0).unwrap();
    let mesh = Mesh::start(&policy(addr, "    connections: { idle: 60s }\n    timeouts: { request: 20s }")).await;
    let to = mesh.addr("in");
    let call = tokio::spawn(async move { get(to, "/").await });
    let mut kept = listener.accept().await.unwrap().0;
    next(&mut kept).await.unwrap();
    answer(&mut kept).await;
    assert_eq!(call.await.unwrap().status, 200);
    let _fills_the_queue = TcpStream::connect(addr).await.unwrap();
    let served = tokio::spawn(async move {
        while next(&mut kept).await.is_some() {
            answer(&mut kept).await;
        }
    });
    for _ in 0..5 {
        assert_eq!(ask(to, post()).await.status, 200);
    }
    mesh.ended("ok", 6).await;
    assert_eq!(mesh.log().iter().filter(|line| line.contains("\"connection\":\"reused\"")).count(), 5);
    served.abort();
    mesh.stop().await;
}

/// An upstream that ends a connection after `most` requests; how many each connection has answered.
async fn bounded(most: usize, announces: bool) -> (Upstream, Arc<Mutex<Vec<usize>>>) {
    let served = Arc::<Mutex<Vec<usize>>>::default();
    let counted = Arc::clone(&served);
    let upstream = Upstream::bytes(move |mut stream| {
        let served = Arc::clone(&counted);
        async move {
            let mut requests = 0;
            while next(&mut stream).await.is_some() {
                if requests == most {
                    // Without a word: this request is lost.
                    break;
                }
                requests += 1;
                if announces && requests == most {
                    let last = ANSWER.replace("content-length", "connection: close\r\ncontent-length");
                    let _gone = tokio::io::AsyncWriteExt::write_all(&mut stream, last.as_bytes()).await;
                    break;
                }
                answer(&mut stream).await;
            }
            served.lock().unwrap().push(requests);
        }
    })
    .await;
    (upstream, served)
}

#[tokio::test]
async fn a_bound_of_requests_per_connection_is_learned_from_two_closes() {
    let (upstream, served) = bounded(10, false).await;
    let mesh = Mesh::start(&outbound(upstream.addr, "    connections: { idle: 60s }\n    retry: off")).await;
    let mut caller = Http1::open(mesh.addr("in")).await;
    let mut lost = 0;
    for _ in 0..300 {
        lost += usize::from(caller.ask(post()).await.status != 200);
    }
    assert_eq!(lost, 2);
    let served = served.lock().unwrap().clone();
    assert!(served[..2] == [10, 10] && served[2..].iter().all(|requests| (8..=10).contains(requests)), "{served:?}");
    assert!(early(&mesh, "learned_requests") >= 25.0);
    assert_eq!(mesh.metric("hopguard_circuit_breaker_changes_total", &["app"]), 0.0);
    mesh.stop().await;
}

/// An upstream whose worker process ends after `most` requests: all connections that it has, with the requests on them.
async fn replaced(most: usize) -> (Upstream, Arc<AtomicUsize>) {
    let (process, lost) = (watch::Sender::new(0), Arc::<AtomicUsize>::default());
    let (served, counted) = (Arc::<AtomicUsize>::default(), Arc::clone(&lost));
    let upstream = Upstream::bytes(move |mut stream| {
        let (process, served, lost) = (process.clone(), Arc::clone(&served), Arc::clone(&counted));
        async move {
            let (own, mut ended) = (*process.borrow(), process.subscribe());
            loop {
                tokio::select! {
                    biased;
                    asked = next(&mut stream) => {
                        if asked.is_none() {
                            return;
                        }
                        if *process.borrow() != own {
                            lost.fetch_add(1, SeqCst);
                            return;
                        }
                    }
                    // Its end reaches the other side only with the next request.
                    () = ended_for_long(&mut ended, own) => return,
                }
                answer(&mut stream).await;
                if (served.fetch_add(1, SeqCst) + 1).is_multiple_of(most) {
                    process.send_modify(|process| *process += 1);
                }
            }
        }
    })
    .await;
    (upstream, lost)
}

/// Returns a while after the process `own` has ended.
async fn ended_for_long(process: &mut watch::Receiver<usize>, own: usize) {
    drop(process.wait_for(|process| *process != own).await);
    sleep(Duration::from_millis(200)).await;
}

#[tokio::test]
async fn the_requests_of_a_worker_process_are_learned_from_two_ends() {
    let (upstream, lost) = replaced(400).await;
    let mesh = Mesh::start(&outbound(upstream.addr, "    connections: { idle: 60s }\n    retry: off")).await;
    let mut callers: Vec<Http1> = Vec::new();
    for _ in 0..4 {
        callers.push(Http1::open(mesh.addr("in")).await);
    }
    let mut lost_in = Vec::new();
    for _ in 0..6 {
        let before = lost.load(SeqCst);
        for round in 0..100 {
            futures_util::future::join_all(callers.iter_mut().map(|caller| caller.ask(post()))).await;
            if round % 10 == 0 {
                // Two ends within a second would count as one.
                sleep(Duration::from_millis(120)).await;
            }
        }
        lost_in.push(lost.load(SeqCst) - before);
    }
    assert!(lost_in[..3].iter().sum::<usize>() >= 2, "{lost_in:?}");
    assert_eq!(lost_in[4..], [0, 0], "{lost_in:?}");
    mesh.stop().await;
}

#[tokio::test]
async fn connections_with_an_announced_bound_do_not_all_end_after_the_same_number_of_requests() {
    let (upstream, served) = bounded(100, true).await;
    let mesh = Mesh::start(&outbound(upstream.addr, "    connections: { idle: 60s }\n    retry: off")).await;
    let mut caller = Http1::open(mesh.addr("in")).await;
    for _ in 0..2000 {
        assert_eq!(caller.ask(post()).await.status, 200);
    }
    let mut served = served.lock().unwrap().clone();
    assert_eq!(served[..2], [100, 100], "{served:?}");
    served.drain(..2);
    assert!(served.iter().all(|requests| (80..=100).contains(requests)), "{served:?}");
    served.sort_unstable();
    served.dedup();
    assert!(served.len() >= 5, "{served:?}");
    mesh.stop().await;
}

#[tokio::test]
async fn a_connection_whose_end_is_announced_is_closed_with_the_response() {
    for head in [
        "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 5",
        "HTTP/1.1 200 OK\r\nconnection: close\r\ntransfer-encoding: chunked",
        "HTTP/1.0 200 OK\r\ncontent-length: 5",
        "HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 5",
    ] {
        let body = if head.contains("chunked") { "5\r\nhello\r\n0\r\n\r\n" } else { "hello" };
        let upstream = Upstream::bytes(move |stream| async move {
            let mut wire = Wire::over(stream);
            wire.head().await;
            wire.send(format!("{head}\r\n\r\n{body}")).await;
            // Waits for the other side to close.
            wire.rest().await;
        })
        .await;
        let mesh = Mesh::start(&policy(upstream.addr, "    connections: { idle: 60s }")).await;
        assert_eq!(get(mesh.addr("in"), "/").await.body, "hello", "{head}");
        assert_eq!(open(&mesh), 0.0, "{head}");
        eventually(|| (upstream.open() == 0).then_some(())).await;
        mesh.stop().await;
    }
}

#[tokio::test]
async fn an_unasked_response_reaches_no_caller() {
    for status in ["408 Request Timeout", "500 Internal Server Error"] {
        let unasked = Gate::closed();
        let gate = unasked.clone();
        let upstream = Upstream::bytes(move |mut stream| {
            let gate = gate.clone();
            async move {
                next(&mut stream).await;
                answer(&mut stream).await;
                gate.pass().await;
                let text = format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
                let _gone = tokio::io::AsyncWriteExt::write_all(&mut stream, text.as_bytes()).await;
                while next(&mut stream).await.is_some() {}
            }
        })
        .await;
        let mesh = Mesh::start(&outbound(upstream.addr, "    connections: { idle: 60s }\n    retry: off")).await;
        for round in 1..=3 {
            assert_eq!(ask(mesh.addr("in"), post()).await.status, 200, "{status}");
            assert_eq!(upstream.connections(), round, "{status}");
            unasked.release(1);
            eventually(|| (upstream.open() == 0).then_some(())).await;
        }
        mesh.ended("ok", 3).await;
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_request_that_meets_the_timeout_of_an_idle_connection_is_sent_again() {
    let late = "HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
    let upstream = Upstream::bytes(move |mut stream| async move {
        next(&mut stream).await;
        answer(&mut stream).await;
        next(&mut stream).await;
        let _gone = tokio::io::AsyncWriteExt::write_all(&mut stream, late.as_bytes()).await;
    })
    .await;
    let mesh = Mesh::start(&policy(upstream.addr, "    connections: { idle: 60s }")).await;
    for connections in [1, 2, 3] {
        assert_eq!(get(mesh.addr("in"), "/").await.status, 200);
        assert_eq!(upstream.connections(), connections);
    }
    mesh.ended("ok", 3).await;
    assert_eq!(mesh.metric("hopguard_retries_total", &["app"]), 2.0);
    mesh.stop().await;
}
