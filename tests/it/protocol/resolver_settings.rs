//! The resolver's settings: changes of `/etc/resolv.conf` and `/etc/hosts`, dropped AAAA queries, search domains, options,
//! and name servers that fail. Where glibc has a behaviour, it is compared with `getent` in the same settings.

use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::symlink;

use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::RecordType;
use hyper::Response;

use crate::support::etc::{Etc, Variables};
use crate::support::http::{full, get};
use crate::support::nameserver::{Nameserver, own_address};
use crate::support::program::{Program, replace};
use crate::support::scripted_nameserver::{Reply, ScriptedNameserver};
use crate::support::upstream::Upstream;
use crate::support::{SOON, eventually};

const NAME: &str = "app.shop.test";

/// A policy whose listener `in` leads to a name.
fn policy(name: &str, port: u16) -> String {
    let nobody = "127.0.0.1:1";
    let more = "    timeouts: { connect: 5s, request: 20s }\n    connections: { maxIdle: 0 }\n";
    crate::support::upstream::policy(nobody.parse().unwrap(), more).replace(nobody, &format!("dns:{name}:{port}"))
}

/// An upstream that says who it is.
async fn upstream(at: SocketAddr, who: &'static str) -> Upstream {
    Upstream::on(at, move |_| async move { Response::new(full(who)) }, false).await
}

/// Two upstreams, at the same port of two addresses.
async fn two() -> (Upstream, Upstream) {
    let first = upstream(SocketAddr::new(own_address(), 0), "first").await;
    let second = upstream(SocketAddr::new(own_address(), first.addr.port()), "second").await;
    (first, second)
}

/// A name server for the test's name, or `None` if the test does not run as root and need not.
async fn dnsmasq(address: IpAddr) -> Option<Nameserver> {
    // An hour is far longer than the test.
    Nameserver::start(&[], &[&format!("--host-record={NAME},{address},3600")]).await
}

/// Calls until the answer comes from an upstream.
async fn until(program: &Program, wanted: &str) {
    let to = program.addr("in").await.unwrap();
    let begun = tokio::time::Instant::now();
    loop {
        let answer = get(to, "/").await;
        if answer.body == wanted {
            return;
        }
        assert!(begun.elapsed() < SOON, "not from {wanted}: {answer:?}\n{}", program.log());
    }
}

/// The addresses in use.
async fn addresses(program: &Program) -> Vec<String> {
    let policy = program.document("/policy").await;
    let addresses = policy["destinations"][0]["addresses"].as_array().unwrap().clone();
    addresses.iter().map(|one| one.as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn changed_resolver_settings_count_at_once() {
    let (first, second) = two().await;
    let (Some(one), Some(other)) = (dnsmasq(first.addr.ip()).await, dnsmasq(second.addr.ip()).await) else { return };
    let program = one.run(&policy(NAME, first.addr.port())).await;
    until(&program, "first").await;
    let file = one.etc.resolv_conf();
    let settings = |server: &Nameserver| format!("nameserver {}\n", server.at);
    // Written in place, as a container runtime does.
    std::fs::write(&file, settings(&other)).unwrap();
    until(&program, "second").await;
    program.said("the system's resolver settings or hosts file have changed").await;
    // Replaced by renaming, as DHCP clients do.
    replace(&file, &settings(&one));
    until(&program, "first").await;
    // A link, first to one file and then to another, as in a mounted ConfigMap.
    for (name, server) in [("one", &other), ("two", &one)] {
        std::fs::write(one.etc.path().join(name), settings(server)).unwrap();
        symlink(name, one.etc.path().join("link")).unwrap();
        std::fs::rename(one.etc.path().join("link"), &file).unwrap();
        until(&program, if name == "one" { "second" } else { "first" }).await;
    }
    assert!(program.access().iter().all(|line| line["outcome"] == "ok"), "{:#?}", program.access());
    let calls = program.metric("hopguard_requests_total", &["outcome=\"ok\""]).await;
    assert_eq!(calls as usize, first.requests() + second.requests());
}

#[tokio::test]
async fn a_changed_hosts_file_counts_at_once() {
    let (first, second) = two().await;
    let Some(server) = dnsmasq(first.addr.ip()).await else { return };
    let program = server.run(&policy(NAME, first.addr.port())).await;
    until(&program, "first").await;
    let before = std::fs::read_to_string(server.etc.hosts()).unwrap();
    replace(&server.etc.hosts(), &format!("{before}{} {NAME}\n", second.addr.ip()));
    until(&program, "second").await;
    assert_eq!(addresses(&program).await, [second.addr.to_string()]);
    std::fs::write(server.etc.hosts(), before).unwrap();
    until(&program, "first").await;
    assert!(program.access().iter().all(|line| line["outcome"] == "ok"), "{:#?}", program.access());
}

#[tokio::test]
async fn a_settings_file_without_a_name_server_is_reported_and_its_successor_counts() {
    let (first, _) = two().await;
    let Some(server) = dnsmasq(first.addr.ip()).await else { return };
    server.empty_settings();
    let program = server.run(&policy(NAME, first.addr.port())).await;
    let said = program.said("the system's resolver settings cannot be used").await;
    assert!(said["problem"].as_str().unwrap().contains("127.0.0.1"), "{said}");
    // No server runs there.
    program.said("a name cannot be resolved").await;
    std::fs::write(server.etc.resolv_conf(), format!("nameserver {}\n", server.at)).unwrap();
    until(&program, "first").await;
    program.said("all names are resolved again").await;
}

#[tokio::test]
async fn dropped_aaaa_queries_delay_no_call_and_a_late_answer_is_added() {
    let upstream = upstream(SocketAddr::new(own_address(), 0), "here").await;
    let port = upstream.addr.port();
    let here = upstream.addr.ip();
    let script = move |_: &str, record_type| match record_type {
        RecordType::A => Reply::address(here),
        _ => Reply::Hold,
    };
    // Longer than any test: only an answer ends the wait.
    let Ok(server) = ScriptedNameserver::start(true, script).await else { return };
    let settings = format!("nameserver {}\noptions timeout:30 attempts:5\n", server.at);
    let Some(etc) = Etc::new(&settings) else { return };
    let program = etc.run(&policy(NAME, port), &[]).await;
    let answer = get(program.addr("in").await.unwrap(), "/").await;
    assert_eq!((answer.status.as_u16(), &answer.body[..]), (200, &b"here"[..]));
    assert!(server.held() > 0, "the AAAA query was not sent");
    assert_eq!(addresses(&program).await, [upstream.addr.to_string()]);
    let line = eventually(|| program.access().pop()).await;
    assert_eq!((&line["outcome"], &line["endpoint"]), (&"ok".into(), &upstream.addr.to_string().into()), "{line}");
    server.release(&Reply::address("::1".parse().unwrap())).await;
    let begun = tokio::time::Instant::now();
    while addresses(&program).await.len() < 2 {
        assert!(begun.elapsed() < SOON, "the late address is not in use");
    }
    assert_eq!(addresses(&program).await, [format!("[::1]:{port}"), upstream.addr.to_string()]);
    assert_eq!(program.metric("hopguard_requests_total", &["outcome=\"ok\""]).await, 1.0);
}

/// Replies by the zone of the name.
fn by_zone(name: &str, record_type: RecordType) -> Reply {
    match name.split_once('.').map_or("", |(_, zone)| zone) {
        "found.test." if record_type == RecordType::A => Reply::address([10, 0, 0, 1].into()),
        "found.test." | "nodata.test." => Reply::Code(ResponseCode::NoError),
        "six.test." if record_type == RecordType::AAAA => Reply::address("fd00::1".parse().unwrap()),
        "servfail.test." => Reply::Code(ResponseCode::ServFail),
        "refused.test." => Reply::Code(ResponseCode::Refused),
        _ => Reply::Code(ResponseCode::NXDomain),
    }
}

/// A row of the comparison: settings, variables, name.
type Row<'a> = (&'a str, Variables<'a>, &'a str);

const ROWS: &[Row<'_>] = &[
    ("", &[], "app"),
    ("search a.test found.test b.test", &[], "app"),
    ("search a.test b.test", &[], "app"),
    ("search a.test b.test", &[], "app.x"),
    ("search a.test b.test\noptions ndots:5", &[], "app.x"),
    ("search a.test b.test\noptions ndots:0", &[], "app"),
    ("search a.test", &[], "app."),
    ("search nodata.test found.test", &[], "app"),
    ("search servfail.test found.test", &[], "app"),
    ("search refused.test found.test", &[], "app"),
    ("search six.test found.test", &[], "app"),
    ("search found.test", &[], "app.nodata.test"),
    ("search found.test", &[], "app.servfail.test"),
    ("domain d.test\nsearch found.test", &[], "app"),
    ("search found.test\ndomain d.test", &[], "app"),
    ("search a.test.\n search b.test\n; search c.test\n#search d.test\nsearch", &[], "app"),
    ("search .", &[], "app"),
    ("search a.test .", &[], "app"),
    ("search a b c d e f g h", &[], "x"),
    ("search a.test\noptions ndots:99 timeout:99 attempts:99", &[], "a.b.c.d.e.f.g.h.i.j.k.l.m.n.o"),
    ("search a.test\noptions ndots:99", &[], "a.b.c.d.e.f.g.h.i.j.k.l.m.n.o.p"),
    ("search servfail.test\noptions attempts:3", &[], "app"),
    ("search servfail.test\noptions attempts:1 edns0", &[], "app"),
    ("search a.test\noptions use-vc", &[], "app"),
    ("search found.test\noptions no-aaaa", &[], "app"),
    ("search a.test\noptions no-tld-query", &[], "app"),
    ("search a.test", &[("LOCALDOMAIN", "b.test found.test")], "app"),
    ("search a.test\noptions ndots:1", &[("RES_OPTIONS", "ndots:3 attempts:1")], "app.servfail.test"),
];

#[tokio::test]
async fn names_are_queried_as_by_glibc() {
    let Ok(server) = ScriptedNameserver::start(true, by_zone).await else { return };
    for (settings, variables, name) in ROWS {
        let Some(etc) = Etc::new(&format!("nameserver {}\n{settings}\n", server.at)) else { return };
        server.forget();
        let wanted = etc.getent(name, variables).await;
        let queries = queries(&server);
        server.forget();
        let program = etc.run(&policy(name, 80), variables).await;
        let ours = eventually(|| (self::queries(&server).len() >= queries.len()).then(|| self::queries(&server))).await;
        // A name that is not found is resolved again and again.
        let ours: Vec<_> = ours.into_iter().take(queries.len()).collect();
        assert_eq!(ours, queries, "{settings:?} {variables:?} {name}");
        let wanted: Vec<_> = wanted.iter().map(|address| socket(address)).collect();
        let begun = tokio::time::Instant::now();
        while addresses(&program).await != wanted {
            assert!(begun.elapsed() < SOON, "{settings:?} {name}: {:?} and not {wanted:?}", addresses(&program).await);
        }
    }
}

/// The A queries, with the properties that options change.
fn queries(server: &ScriptedNameserver) -> Vec<(String, bool, bool)> {
    let queries = server.seen().into_iter().filter(|query| query.record_type == RecordType::A);
    queries.map(|query| (query.name, query.edns, query.tcp)).collect()
}

fn socket(address: &str) -> String {
    SocketAddr::new(address.parse().unwrap(), 80).to_string()
}

#[tokio::test]
async fn a_name_server_that_fails_is_followed_by_the_next() {
    let upstream = upstream(SocketAddr::new(own_address(), 0), "here").await;
    let Some(second) = dnsmasq(upstream.addr.ip()).await else { return };
    let failing = |code| move |_: &str, _| Reply::Code(code);
    let servfail = ScriptedNameserver::start(true, failing(ResponseCode::ServFail)).await.unwrap();
    let refused = ScriptedNameserver::start(true, failing(ResponseCode::Refused)).await.unwrap();
    let silent = ScriptedNameserver::start(true, |_, _| Reply::Hold).await.unwrap();
    let nobody = own_address();
    for (first, options) in [(servfail.at, ""), (refused.at, ""), (silent.at, "timeout:30"), (nobody, "timeout:30")] {
        let settings = format!("nameserver {first}\nnameserver {}\noptions {options}\n", second.at);
        let Some(etc) = Etc::new(&settings) else { return };
        let before = second.asked(NAME);
        let program = etc.run(&policy(&format!("{NAME}."), upstream.addr.port()), &[]).await;
        let answer = get(program.addr("in").await.unwrap(), "/").await;
        assert_eq!((answer.status.as_u16(), &answer.body[..]), (200, &b"here"[..]), "{first} {options}");
        assert_eq!(second.asked(NAME), before + 1, "{first} {options}");
    }
    for server in [&servfail, &refused, &silent] {
        assert!(server.names().contains(&format!("{NAME}.")));
    }
    // The answer of the first server counts, also that there is no such name.
    let knows_nothing = ScriptedNameserver::start(true, failing(ResponseCode::NXDomain)).await.unwrap();
    let settings = format!("nameserver {}\nnameserver {}\n", knows_nothing.at, second.at);
    let Some(etc) = Etc::new(&settings) else { return };
    let before = second.asked(NAME);
    let program = etc.run(&policy(&format!("{NAME}."), upstream.addr.port()), &[]).await;
    let answer = get(program.addr("in").await.unwrap(), "/").await;
    assert_eq!(answer.problem()["refusal"], "dns_failed", "{answer:?}");
    let line = eventually(|| program.access().pop()).await;
    assert_eq!(line["outcome"], "dns_failed", "{line}");
    assert_eq!(program.metric("hopguard_requests_total", &["outcome=\"dns_failed\""]).await, 1.0);
    assert_eq!(second.asked(NAME), before);
}

#[tokio::test]
async fn rotation_asks_all_name_servers_and_otherwise_only_the_first_is_asked() {
    let upstream = upstream(SocketAddr::new(own_address(), 0), "here").await;
    let here = upstream.addr.ip();
    let script = move |_: &str, _| Reply::Addresses(vec![here], 0);
    for (options, rotates) in [("rotate", true), ("", false)] {
        let Ok(one) = ScriptedNameserver::start(true, script).await else { return };
        let other = ScriptedNameserver::start(true, script).await.unwrap();
        let settings = format!("nameserver {}\nnameserver {}\noptions no-aaaa {options}\n", one.at, other.at);
        let Some(etc) = Etc::new(&settings) else { return };
        let program = etc.run(&policy(&format!("{NAME}."), upstream.addr.port()), &[]).await;
        until(&program, "here").await;
        // A second later its time to live is over.
        let all = || one.names().len() + other.names().len();
        eventually(|| (all() >= 2).then_some(())).await;
        assert_eq!(!other.names().is_empty(), rotates, "{options}");
    }
}

#[tokio::test]
async fn use_vc_works_where_udp_is_blocked() {
    let upstream = upstream(SocketAddr::new(own_address(), 0), "here").await;
    let here = upstream.addr.ip();
    let Ok(server) = ScriptedNameserver::start(false, move |_, _| Reply::Addresses(vec![here], 0)).await else {
        return;
    };
    let Some(etc) = Etc::new(&format!("nameserver {}\noptions use-vc edns0\n", server.at)) else { return };
    let program = etc.run(&policy(NAME, upstream.addr.port()), &[]).await;
    until(&program, "here").await;
    assert!(server.seen().iter().all(|query| query.tcp && query.edns), "{:?}", server.seen());
}
