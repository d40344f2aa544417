//! Tables of routes and hosts, and the route table against a search of every route.

use proptest::prelude::*;

use super::*;
use crate::problems::Origin;
use crate::rules::layers::{DestinationRules, RouteRules};

fn route(matches: RouteMatch) -> Route {
    Route { name: String::new(), matches, rules: RouteRules::BUILT_IN, stream: false, origin: Origin::BuiltIn }
}

fn template(template: &str) -> RouteMatch {
    RouteMatch { path: PathMatch::Template(template.into()), ..RouteMatch::default() }
}

fn index(mut matches: Vec<RouteMatch>) -> RouteTable {
    matches.push(RouteMatch::default());
    RouteTable::new(&matches.into_iter().map(route).collect::<Vec<_>>())
}

fn grpc() -> HeaderMap {
    HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static("application/grpc+proto"))])
}

#[test]
fn the_most_specific_template_wins_whatever_the_order() {
    let mut templates = [
        "/{*rest}",
        "/{a}",
        "/{a}/{b}",
        "/x/{b}",
        "/{a}/y",
        "/x/y",
        "/x/{b}.json",
        "/x/v{b}",
        "/x/v{b}.json",
        "/",
        "/x/",
        "/x/{*rest}",
    ];
    let table = [
        ("/", "/"),
        ("/q", "/{a}"),
        ("/x", "/{a}"),
        ("/x/", "/x/"),
        ("/x/y", "/x/y"),
        ("/x/z", "/x/{b}"),
        ("/q/y", "/{a}/y"),
        ("/q/z", "/{a}/{b}"),
        ("/q/", "/{*rest}"),
        ("/x/a.json", "/x/{b}.json"),
        ("/x/.json", "/x/{b}"),
        ("/x/v1", "/x/v{b}"),
        ("/x/v1.json", "/x/v{b}.json"),
        ("/x/v", "/x/{b}"),
        ("/x/y/z", "/x/{*rest}"),
        ("/q/y/z", "/{*rest}"),
    ];
    for _ in 0..templates.len() {
        templates.rotate_left(1);
        let index = index(templates.iter().map(|t| template(t)).collect());
        for (path, wanted) in table {
            let found = index.find(&Method::GET, path, &HeaderMap::new());
            assert_eq!(templates[found], wanted, "{path}");
        }
        for path in ["*", "", "//", "x"] {
            assert!(index.find(&Method::GET, path, &HeaderMap::new()) <= templates.len());
        }
    }
}

#[test]
fn a_refused_method_falls_back_to_the_next_template() {
    let post = RouteMatch { methods: vec![Method::POST], ..template("/a/{id}") };
    let index = index(vec![template("/{*rest}"), post]);
    assert_eq!(index.find(&Method::POST, "/a/5", &HeaderMap::new()), 1);
    assert_eq!(index.find(&Method::GET, "/a/5", &HeaderMap::new()), 0);
    assert_eq!(index.find(&Method::GET, "/", &HeaderMap::new()), 2);
}

#[test]
fn grpc_routes_take_grpc_calls_only_and_before_paths() {
    let method = PathMatch::GrpcMethod { service: "a.B".into(), method: "C".into() };
    let index = index(vec![
        template("/a.B/C"),
        RouteMatch { path: PathMatch::GrpcService("a.B".into()), ..RouteMatch::default() },
        RouteMatch { path: method, ..RouteMatch::default() },
    ]);
    let find = |path: &str, headers: &HeaderMap| index.find(&Method::POST, path, headers);
    assert_eq!(find("/a.B/C", &grpc()), 2);
    assert_eq!(find("/a.B/D", &grpc()), 1);
    assert_eq!(find("/a.B/D/E", &grpc()), 3);
    assert_eq!(find("/a.B/C", &HeaderMap::new()), 0);
    assert_eq!(find("/a.B/D", &HeaderMap::new()), 3);
}

#[test]
fn what_grpc_is_called_is_recognised() {
    let table = [
        ("application/grpc", true),
        ("Application/GRPC+json", true),
        ("application/grpc; x=y", true),
        ("application/grpc-web", false),
        ("application/grpcx", false),
        ("application/json", false),
        ("", false),
    ];
    for (kind, wanted) in table {
        let headers = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(kind))]);
        assert_eq!(is_grpc(&headers), wanted, "{kind}");
    }
    assert!(!is_grpc(&HeaderMap::new()));
}

fn destination(hosts: &[&str]) -> Destination {
    let host = |text: &&str| match text.strip_prefix("*.") {
        Some(suffix) => HostPattern::Suffix(suffix.into()),
        None if *text == "*" => HostPattern::Any,
        None => HostPattern::Exact((*text).into()),
    };
    Destination {
        name: String::new(),
        hosts: hosts.iter().map(host).collect(),
        endpoints: Vec::new(),
        protocol: crate::upstream::spec::UpstreamProtocol::Auto,
        tls: None,
        rules: DestinationRules::BUILT_IN,
        connections: crate::upstream::spec::Connections::built_in(),
        routes: Vec::new(),
        origin: Origin::BuiltIn,
    }
}

#[test]
fn a_host_leads_to_its_name_then_its_longest_suffix_then_any() {
    let some = [destination(&["a.shop", "::1"]), destination(&["*.shop"]), destination(&["*.b.shop"])];
    let index = HostTable::new(&some);
    let table = [
        ("a.shop", Some(0)),
        ("A.Shop.", Some(0)),
        ("[::1]", Some(0)),
        ("::1", Some(0)),
        ("x.shop", Some(1)),
        ("x.y.shop", Some(1)),
        ("X.B.SHOP", Some(2)),
        ("b.shop", Some(1)),
        ("shop", None),
        ("", None),
    ];
    for (host, wanted) in table {
        assert_eq!(index.find(host), wanted, "{host}");
    }
    let all = HostTable::new(&[destination(&["a"]), destination(&["*"])]);
    assert_eq!((all.find("a"), all.find("b"), all.find("")), (Some(0), Some(1), Some(1)));
}

/// The same decision without a table: evaluates every route and keeps the best match.
fn naive(matches: &[RouteMatch], method: &Method, path: &str, headers: &HeaderMap) -> usize {
    let fits = |index: &usize| {
        let RouteMatch { methods, path: wanted, headers: wanted_headers } = &matches[*index];
        let on_path = match wanted {
            PathMatch::Template(template) => fits_template(&parse_template(template).unwrap(), path),
            PathMatch::Any | PathMatch::GrpcMethod { .. } | PathMatch::GrpcService(_) => true,
        };
        let has = |(name, value): &(HeaderName, HeaderValue)| headers.get(name) == Some(value);
        on_path && (methods.is_empty() || methods.contains(method)) && wanted_headers.iter().all(has)
    };
    let rank = |index: &usize| {
        let shape = match &matches[*index].path {
            PathMatch::Template(template) => parse_template(template).unwrap().iter().map(weight).collect(),
            PathMatch::Any | PathMatch::GrpcMethod { .. } | PathMatch::GrpcService(_) => vec![(9, 0, 0)],
        };
        (shape, precedence(&matches[*index]), *index)
    };
    (0..matches.len()).filter(fits).min_by(|a, b| rank(a).partial_cmp(&rank(b)).unwrap()).unwrap_or(matches.len())
}

fn weight(segment: &Segment) -> (u8, i64, i64) {
    let length = |text: &str| -i64::try_from(text.len()).unwrap();
    match segment {
        Segment::Exact(_) => (0, 0, 0),
        Segment::Parameter { prefix, suffix } => (1, length(prefix), length(suffix)),
        Segment::Rest => (2, 0, 0),
    }
}

fn fits_template(segments: &[Segment], path: &str) -> bool {
    let Some(path) = path.strip_prefix('/') else { return false };
    let parts: Vec<&str> = path.split('/').collect();
    for (at, segment) in segments.iter().enumerate() {
        let Some(part) = parts.get(at) else { return false };
        let fits = match segment {
            Segment::Exact(text) => text == part,
            Segment::Parameter { prefix, suffix } => part
                .strip_prefix(prefix.as_str())
                .and_then(|rest| rest.strip_suffix(suffix.as_str()))
                .is_some_and(|rest| !rest.is_empty()),
            Segment::Rest => return !parts[at..].join("/").is_empty(),
        };
        if !fits {
            return false;
        }
    }
    parts.len() == segments.len()
}

fn some_template() -> impl Strategy<Value = String> {
    let part = prop::sample::select(vec!["a", "b", "{p}", "a{p}", "{p}b", "a{p}b", ""]);
    let end = prop::sample::select(vec!["", "/{*rest}"]);
    (prop::collection::vec(part, 1..4), end).prop_map(|(parts, end)| {
        let numbered = parts.iter().enumerate().map(|(at, part)| part.replace("{p}", &format!("{{p{at}}}")));
        format!("/{}{end}", numbered.collect::<Vec<_>>().join("/"))
    })
}

fn some_match() -> impl Strategy<Value = RouteMatch> {
    let path = prop_oneof![8 => some_template().prop_map(PathMatch::Template), 1 => Just(PathMatch::Any)];
    let methods = prop::sample::subsequence(vec![Method::GET, Method::POST], 0..=2);
    let headers = prop::sample::subsequence(vec!["x-a", "x-b"], 0..=2);
    (path, methods, headers).prop_map(|(path, methods, names)| {
        let header = |name| (HeaderName::from_static(name), HeaderValue::from_static("1"));
        RouteMatch { methods, path, headers: names.into_iter().map(header).collect() }
    })
}

fn some_path() -> impl Strategy<Value = String> {
    let part = prop::sample::select(vec!["a", "b", "c", "ab", "acb", "", "aab"]);
    prop::collection::vec(part, 0..5).prop_map(|parts| format!("/{}", parts.join("/")))
}

proptest! {
    #[test]
    fn the_index_finds_what_trying_every_route_finds(
        matches in prop::collection::vec(some_match(), 0..12),
        calls in prop::collection::vec((some_path(), any::<bool>(), prop::sample::subsequence(vec!["x-a", "x-b"], 0..=2)), 1..12),
    ) {
        let index = index(matches.clone());
        for (path, is_get, names) in calls {
            let method = if is_get { Method::GET } else { Method::POST };
            let header = |name| (HeaderName::from_static(name), HeaderValue::from_static("1"));
            let headers = HeaderMap::from_iter(names.into_iter().map(header));
            prop_assert_eq!(index.find(&method, &path, &headers), naive(&matches, &method, &path, &headers), "{}", path);
        }
    }

    #[test]
    fn a_template_of_any_text_is_read_or_refused(text in "\\PC{0,20}", braces in "/[{}*a/.]{0,12}") {
        for text in [text, braces] {
            if let Ok(segments) = parse_template(&text) {
                prop_assert!(!segments.is_empty());
            }
        }
    }
}
