//! DNS with a real name server: the time to live of an answer, the effect of a changed address on calls and connections,
//! and calls while the name server gives no answer.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hyper::{Request, Response};
use tokio::net::UdpSocket;
use tokio::time::{Instant, sleep, timeout};

use crate::support::etc::Etc;
use crate::support::http::{Answer, ask, empty, full};
use crate::support::nameserver::{Nameserver, own_address};
use crate::support::program::Program;
use crate::support::scripted_nameserver::{Reply, ScriptedNameserver};
use crate::support::upstream::{Gate, Upstream};
use crate::support::{SOON, eventually};

const NAME: &str = "app.shop.test";

/// A policy whose listener `in` leads to one destination, `app`.
fn policy(endpoint: &str, more: &str) -> String {
    let nobody = "127.0.0.1:1";
    // A busy machine takes its time.
    let more = format!("    timeouts: {{ connect: 5s, request: 20s }}\n{more}");
    crate::support::upstream::policy(nobody.parse().unwrap(), &more).replace(nobody, endpoint)
}

/// The same where the caller says which host it wants.
fn forwarding(more: &str) -> String {
    let text = policy("nobody", more).replace("to: app }", "forward: true }");
    text.replace("    endpoints: [\"nobody\"]", "    hosts: [\"*\"]")
}

/// An upstream that says who it is; the answer to `/slow` comes when the test lets it.
async fn upstream(at: SocketAddr, who: &'static str, gate: &Gate, http2: bool) -> Upstream {
    let gate = gate.clone();
    let handler = move |request: Request<_>| {
        let gate = gate.clone();
        async move {
            if request.uri().path() == "/slow" {
                gate.pass().await;
            }
            Response::new(full(who))
        }
    };
    Upstream::on(at, handler, http2).await
}

/// Two upstreams, at the same port of two addresses.
async fn two(gate: &Gate, http2: bool) -> (Upstream, Upstream) {
    let first = upstream(SocketAddr::new(own_address(), 0), "first", gate, http2).await;
    let second = upstream(SocketAddr::new(own_address(), first.addr.port()), "second", gate, http2).await;
    (first, second)
}

/// A call for `http://app.shop.test:PORT`.
async fn call(to: SocketAddr, port: u16, path: &str) -> Answer {
    let asked = Request::get(path).header("host", format!("{NAME}:{port}")).body(empty()).unwrap();
    timeout(SOON, ask(to, asked)).await.expect("no answer")
}

/// Calls until the answer is as wanted.
async fn until(to: SocketAddr, port: u16, wanted: &str) {
    let begun = Instant::now();
    loop {
        let answer = call(to, port, "/").await;
        if answer.body == wanted {
            return;
        }
        assert!(begun.elapsed() < SOON, "not from {wanted}: {answer:?}");
        sleep(Duration::from_millis(20)).await;
    }
}

/// The addresses in use, and what was last wrong with them.
async fn shown(program: &Program) -> (Vec<String>, Option<String>) {
    let policy = program.document("/policy").await;
    let app = &policy["destinations"][0];
    let addresses = app["addresses"].as_array().unwrap().iter().map(|one| one.as_str().unwrap().to_owned());
    (addresses.collect(), app["problem"].as_str().map(str::to_owned))
}

#[tokio::test]
async fn a_name_is_asked_for_again_when_its_time_to_live_is_over() {
    let here = own_address();
    let record = |name: &str, seconds: u32| format!("--host-record={name}.shop.test,{here},{seconds}");
    let records = [record("none", 0), record("two", 2), record("hour", 3600)];
    let mut options: Vec<_> = records.iter().map(String::as_str).collect();
    options.push("--cname=alias.shop.test,hour.shop.test,1");
    let Some(server) = Nameserver::start(&[], &options).await else { return };
    let upstream = upstream(SocketAddr::new(here, 0), "here", &Gate::closed(), false).await;
    let port = upstream.addr.port();
    let names = ["none", "two", "hour", "alias"];
    let endpoints: Vec<_> = names.iter().map(|name| format!("dns:{name}.shop.test:{port}")).collect();
    let begun = Instant::now();
    let others: String = names[1..]
        .iter()
        .zip(&endpoints[1..])
        .map(|(name, endpoint)| format!("  - {{ name: {name}, hosts: [{name}], endpoints: [\"{endpoint}\"] }}\n"))
        .collect();
    let program = server.run(&policy(&endpoints[0], &others)).await;
    assert_eq!(call(program.addr("in").await.unwrap(), port, "/").await.body, "here");
    let asked = |name: &str| server.asked(&format!("{name}.shop.test"));
    eventually(|| (asked("none") >= 4 && asked("two") >= 2 && asked("alias") >= 2).then_some(())).await;
    // A second is the least, also for an answer that says it is not to be kept at all.
    let seen = names.map(|name| (name, asked(name)));
    let most = |every: u64| 1 + usize::try_from(begun.elapsed().as_secs() / every).unwrap();
    for ((name, times), most) in seen.into_iter().zip([most(1), most(2), 1, most(1)]) {
        assert!(times <= most, "{name} was asked for {times} times in {:?}", begun.elapsed());
    }
}

#[tokio::test]
async fn a_changed_address_takes_the_calls_along_and_lets_old_connections_go() {
    for (kind, http2) in [("to", false), ("to", true), ("forward", false)] {
        let gate = Gate::closed();
        let (first, second) = two(&gate, http2).await;
        let port = first.addr.port();
        let Some(server) = Nameserver::start(&[(NAME, first.addr.ip())], &[]).await else { return };
        let protocol = if http2 { "http2" } else { "http1" };
        let more = format!("    protocol: {protocol}\n    connections: {{ idle: 60s }}");
        let text = if kind == "to" { policy(&format!("dns:{NAME}:{port}"), &more) } else { forwarding(&more) };
        let program = server.run(&text).await;
        let to = program.addr("in").await.unwrap();
        let slow = tokio::spawn(async move { call(to, port, "/slow").await });
        eventually(|| (first.requests() == 1).then_some(())).await;
        assert_eq!(call(to, port, "/").await.body, "first");
        assert_eq!(first.open(), if http2 { 1 } else { 2 });
        server.set(&[(NAME, second.addr.ip())]).await;
        until(to, port, "second").await;
        let before = first.requests();
        for _ in 0..10 {
            assert_eq!(call(to, port, "/").await.body, "second");
        }
        assert_eq!(first.requests(), before, "{kind} {protocol}");
        // The idle connection went; the one in use stays until its call has ended.
        eventually(|| (first.open() == 1).then_some(())).await;
        gate.release(1);
        let slow = slow.await.unwrap();
        assert_eq!((slow.status.as_u16(), &slow.body[..]), (200, &b"first"[..]));
        eventually(|| (first.open() == 0).then_some(())).await;
        assert_eq!(second.open(), 1, "{kind} {protocol}");
        assert_eq!(program.metric("hopguard_pool_open_connections", &["app"]).await, 1.0);
        let calls = program.metric("hopguard_requests_total", &["outcome=\"ok\""]).await;
        assert_eq!(calls as usize, first.requests() + second.requests());
        let slow = eventually(|| program.access().into_iter().find(|line| line["path"] == "/slow")).await;
        assert_eq!(slow["endpoint"], first.addr.to_string(), "{slow}");
    }
}

#[tokio::test]
async fn a_name_that_comes_into_being_is_found() {
    let Some(server) = Nameserver::start(&[], &[]).await else { return };
    let upstream = upstream(SocketAddr::new(own_address(), 0), "here", &Gate::closed(), false).await;
    let port = upstream.addr.port();
    // With the dot at its end the name is whole: no search domain is tried after it.
    let program = server.run(&policy(&format!("dns:{NAME}.:{port}"), "")).await;
    let to = program.addr("in").await.unwrap();
    eventually(|| (server.asked(NAME) >= 2).then_some(())).await;
    assert_eq!(server.asked(&format!("{NAME}.shop.test")), 0);
    let answer = call(to, port, "/").await;
    assert_eq!(answer.problem()["refusal"], "dns_failed", "{answer:?}");
    assert!(shown(&program).await.1.unwrap().contains(NAME));
    let line = eventually(|| program.access().pop()).await;
    assert_eq!((&line["outcome"], &line["status"]), (&"dns_failed".into(), &answer.status.as_u16().into()));
    assert_eq!(program.metric("hopguard_requests_total", &["outcome=\"dns_failed\""]).await, 1.0);
    server.set(&[(NAME, upstream.addr.ip())]).await;
    until(to, port, "here").await;
    program.said("all names are resolved again").await;
    assert_eq!(shown(&program).await, (vec![upstream.addr.to_string()], None));
}

#[tokio::test]
async fn all_addresses_of_a_name_are_used_and_one_that_is_down_costs_no_call() {
    let (first, second) = two(&Gate::closed(), false).await;
    let port = first.addr.port();
    // Nobody is at the IPv6 address, as on a machine that has none.
    let records = [(NAME, first.addr.ip()), (NAME, second.addr.ip()), (NAME, IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]))];
    let Some(server) = Nameserver::start(&records, &[]).await else { return };
    // The settings say what a short name is short for.
    let program = server.run(&policy(&format!("dns:app:{port}"), "")).await;
    let to = program.addr("in").await.unwrap();
    for _ in 0..40 {
        assert_eq!(call(to, port, "/").await.status, 200);
    }
    assert!(first.requests().min(second.requests()) > 0, "{} and {}", first.requests(), second.requests());
    assert_eq!(shown(&program).await.0.len(), 3);
    drop(first);
    for _ in 0..40 {
        assert_eq!(call(to, port, "/").await.body, "second");
    }
    assert_eq!(program.metric("hopguard_requests_total", &["outcome=\"ok\""]).await, 80.0);
    assert!(program.metric("hopguard_pool_connect_failures_total", &["app"]).await >= 1.0);
}

#[tokio::test]
async fn the_old_address_stays_while_the_name_server_is_dead() {
    let (first, second) = two(&Gate::closed(), false).await;
    let port = first.addr.port();
    let Some(mut server) = Nameserver::start(&[(NAME, first.addr.ip())], &[]).await else { return };
    let program = server.run(&policy(&format!("dns:{NAME}.:{port}"), "")).await;
    let to = program.addr("in").await.unwrap();
    assert_eq!(call(to, port, "/").await.body, "first");
    server.kill().await;
    // In its place is somebody who hears the question, and says nothing.
    let dead = UdpSocket::bind((server.at, 53)).await.unwrap();
    timeout(SOON, dead.recv(&mut [0; 512])).await.expect("nobody asks").unwrap();
    let mut given_up = std::pin::pin!(program.said("a name cannot be resolved"));
    while timeout(Duration::from_millis(20), &mut given_up).await.is_err() {
        assert_eq!(call(to, port, "/").await.body, "first");
    }
    assert_eq!(call(to, port, "/").await.body, "first");
    drop(dead);
    server.revive(&[(NAME, second.addr.ip())]).await;
    until(to, port, "second").await;
    assert_eq!(shown(&program).await, (vec![second.addr.to_string()], None));
    assert!(program.access().iter().all(|line| line["outcome"] == "ok"), "{:#?}", program.access());
}

#[tokio::test]
async fn the_old_address_stays_while_the_name_server_refuses_and_that_is_said() {
    // A name outside its zone: without a record it refuses to answer for it.
    let (name, short) = ("app.elsewhere.test", own_address());
    let (first, second) = two(&Gate::closed(), false).await;
    let port = first.addr.port();
    let Some(server) = Nameserver::start(&[(name, first.addr.ip())], &[]).await else { return };
    let program = server.run(&policy(&format!("dns:{name}:{port}"), "")).await;
    let to = program.addr("in").await.unwrap();
    assert_eq!(call(to, port, "/").await.body, "first");
    server.set(&[("other.elsewhere.test", short)]).await;
    let said = program.said("a name cannot be resolved").await;
    assert_eq!((&said["destination"], &said["kept"]), (&"app".into(), &1.into()), "{said}");
    // The log line comes first, by a moment.
    let begun = Instant::now();
    let (addresses, problem) = loop {
        match shown(&program).await {
            (addresses, Some(problem)) => break (addresses, problem),
            (_, None) => assert!(begun.elapsed() < SOON, "no problem is shown"),
        }
    };
    assert_eq!(addresses, [first.addr.to_string()]);
    assert!(problem.contains(name), "{problem}");
    for _ in 0..10 {
        assert_eq!(call(to, port, "/").await.body, "first");
    }
    server.set(&[(name, second.addr.ip())]).await;
    until(to, port, "second").await;
    program.said("all names are resolved again").await;
    assert_eq!(shown(&program).await, (vec![second.addr.to_string()], None));
}

#[tokio::test]
async fn a_first_look_up_may_take_longer_than_a_connection() {
    let upstream = upstream(SocketAddr::new(own_address(), 0), "here", &Gate::closed(), false).await;
    let port = upstream.addr.port();
    let Ok(server) = ScriptedNameserver::start(true, |_, _| Reply::Hold).await else { return };
    let Some(etc) = Etc::new(&format!("nameserver {}\n", server.at)) else { return };
    let policy = policy(&format!("dns:{NAME}.:{port}"), "").replace("connect: 5s", "connect: 50ms");
    let program = etc.run(&policy, &[]).await;
    let to = program.addr("in").await.unwrap();
    let begun = Instant::now();
    let waiting = tokio::spawn(async move { call(to, port, "/").await });
    eventually(|| (server.held() > 0).then_some(())).await;
    // Far longer than `connect`.
    sleep(Duration::from_millis(200)).await;
    server.release(&Reply::address(upstream.addr.ip())).await;
    let answer = waiting.await.unwrap();
    assert_eq!((answer.status.as_u16(), &answer.body[..]), (200, &b"here"[..]), "{answer:?}");
    assert!(begun.elapsed() > Duration::from_millis(50), "it took {:?}", begun.elapsed());
    let line = eventually(|| program.access().pop()).await;
    assert_eq!((&line["outcome"], &line["attempt"]), (&"ok".into(), &1.into()), "{line}");
    // It was not hopguard that took so long.
    let [connect, own] = ["connect_ms", "overhead_ms"].map(|field| line[field].as_f64().unwrap());
    assert!(connect > 50.0 && own < connect, "{line}");
    assert_eq!(program.metric("hopguard_requests_total", &["outcome=\"ok\""]).await, 1.0);
}

#[tokio::test]
async fn a_name_whose_server_is_silent_holds_up_no_other() {
    let silent = UdpSocket::bind((own_address(), 53)).await.unwrap();
    let to_the_silent = format!("--server=/silent.test/{}", silent.local_addr().unwrap().ip());
    let upstream = upstream(SocketAddr::new(own_address(), 0), "here", &Gate::closed(), false).await;
    let port = upstream.addr.port();
    let Some(server) = Nameserver::start(&[(NAME, upstream.addr.ip())], &[&to_the_silent]).await else { return };
    let both = format!("dns:app.silent.test.:{port}\", \"dns:{NAME}.:{port}");
    let program = server.run(&policy(&both, "")).await;
    let to = program.addr("in").await.unwrap();
    assert_eq!(call(to, port, "/").await.body, "here");
    let line = program.said("a name cannot be resolved").await;
    // Had one to wait for the other, it would have been asked for once by now.
    assert!(server.asked(NAME) >= 3, "asked for {} times before the silent one was given up", server.asked(NAME));
    assert!(line["problem"].as_str().unwrap().starts_with("app.silent.test.: "), "{line}");
    assert_eq!((&line["kept"], call(to, port, "/").await.status.as_u16()), (&1.into(), 200), "{line}");
    assert_eq!(shown(&program).await.0, [upstream.addr.to_string()]);
}

#[tokio::test]
async fn without_settings_that_can_be_used_the_hosts_file_counts_and_that_is_said() {
    let upstream = upstream("127.0.0.1:0".parse().unwrap(), "here", &Gate::closed(), false).await;
    let port = upstream.addr.port();
    let Some(server) = Nameserver::start(&[], &[]).await else { return };
    server.empty_settings();
    let program = server.run(&policy(&format!("dns:localhost:{port}"), "")).await;
    program.said("the system's resolver settings cannot be used").await;
    assert_eq!(call(program.addr("in").await.unwrap(), port, "/").await.body, "here");
    assert!(shown(&program).await.0.contains(&upstream.addr.to_string()));
    assert_eq!(server.asked("localhost"), 0);
}
