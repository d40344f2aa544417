//! The resolver's settings, as glibc reads them from `/etc/resolv.conf` and the environment: resolv.conf(5).
//!
//! The crate `resolv-conf` knows the syntax. This file adds what glibc does beyond it: the limits of the values, the
//! environment, the order in which a name is tried with the search domains, and the timeout of each name server.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::Duration;

use resolv_conf::{Config, ScopedIp};

/// Port of a name server; resolv.conf has no field for another one.
const PORT: u16 = 53;
/// Name servers that glibc uses; further ones are ignored (`MAXNS`).
const MAX_SERVERS: usize = 3;
/// Limit of `ndots` (`RES_MAXNDOTS`).
const MAX_NDOTS: usize = 15;
/// Limit of `timeout` in seconds (`RES_MAXRETRANS`).
const MAX_TIMEOUT: u32 = 30;
/// Limit of `attempts` (`RES_MAXRETRY`).
const MAX_ATTEMPTS: u32 = 5;

/// The environment variables that change the settings for one process.
#[derive(Debug, Clone, Default)]
pub struct ResolverEnvironment {
    /// `LOCALDOMAIN`: search domains, separated by spaces, that replace those of the file.
    pub local_domain: Option<String>,
    /// `RES_OPTIONS`: options, separated by spaces, that are read after those of the file.
    pub options: Option<String>,
}

/// The resolver's settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ResolverSettings {
    /// The name servers in their order, at least one and at most 3; 127.0.0.1 if the file has none.
    pub(super) servers: Vec<SocketAddr>,
    /// Search domains; the domain of the host name if the file has neither `search` nor `domain`.
    pub(super) search: Vec<String>,
    /// A name with at least that many dots is tried as it is before the search domains. Default 1, at most 15.
    pub(super) ndots: usize,
    /// Time for the first name server to answer a query. Default 5 s, at least 1 s, at most 30 s.
    pub(super) timeout: Duration,
    /// How often the list of name servers is gone through. Default 2, at least 1, at most 5.
    pub(super) attempts: u32,
    /// Each query begins with the next name server.
    pub(super) rotate: bool,
    /// Queries are sent over TCP only (`use-vc`).
    pub(super) use_tcp: bool,
    /// Queries have an OPT record (RFC 6891).
    pub(super) edns0: bool,
    /// IPv6 addresses are not queried.
    pub(super) no_aaaa: bool,
    /// A name without a dot is not tried as it is (`no-tld-query`).
    pub(super) no_tld_query: bool,
    /// Changes of the file are ignored (`no-reload`).
    pub(super) no_reload: bool,
}

/// One name that is queried for a configured name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SearchName {
    /// The absolute name, with a dot at its end.
    pub(super) name: String,
    /// The configured name itself, without a search domain.
    pub(super) is_as_is: bool,
}

impl ResolverSettings {
    /// Settings from the text of the file. Invalid lines are skipped; the second value names them, and a missing
    /// `nameserver`.
    pub(super) fn parse(file: &str, environment: &ResolverEnvironment) -> (Self, Vec<String>) {
        let (config, errors) = Config::parse_with_errors(combined(file, environment).as_bytes());
        let mut problems: Vec<_> = errors.iter().map(ToString::to_string).collect();
        let mut servers: Vec<_> = config.nameservers.iter().filter_map(address).take(MAX_SERVERS).collect();
        if servers.is_empty() {
            servers.push((Ipv4Addr::LOCALHOST, PORT).into());
            problems.push("it has no name server; 127.0.0.1 is used".to_owned());
        }
        let settings = Self {
            servers,
            search: search_domains(&config),
            ndots: usize::try_from(config.ndots).map_or(MAX_NDOTS, |dots| dots.min(MAX_NDOTS)),
            timeout: Duration::from_secs(config.timeout.clamp(1, MAX_TIMEOUT).into()),
            attempts: config.attempts.clamp(1, MAX_ATTEMPTS),
            rotate: config.rotate,
            use_tcp: config.use_vc,
            edns0: config.edns0,
            no_aaaa: config.no_aaaa,
            no_tld_query: config.no_tld_query,
            no_reload: config.no_reload,
        };
        (settings, problems)
    }

    /// The names to query for `name`, in order.
    ///
    /// A name with a dot at its end is absolute. `localhost` and names below it are never searched (RFC 6761 6.3).
    pub(super) fn candidates(&self, name: &str) -> Vec<SearchName> {
        let as_is = SearchName { name: format!("{}.", name.trim_end_matches('.')), is_as_is: true };
        let is_localhost = as_is.name == "localhost." || as_is.name.ends_with(".localhost.");
        if name.ends_with('.') || is_localhost {
            return vec![as_is];
        }
        let dots = name.matches('.').count();
        let mut candidates = Vec::new();
        if dots >= self.ndots {
            candidates.push(as_is.clone());
        }
        // The root as a search domain is the name as it is, at that position.
        for candidate in self.search.iter().map(|domain| searched(name, domain)) {
            if !candidates.contains(&candidate) {
                candidates.push(candidate);
            }
        }
        if !candidates.contains(&as_is) && (dots > 0 || !self.no_tld_query || candidates.is_empty()) {
            candidates.push(as_is);
        }
        candidates
    }

    /// Time for the name server at `position` to answer: glibc doubles it with each position and divides it by the number
    /// of servers. At least 1 s.
    pub(super) fn timeout_at(&self, position: usize) -> Duration {
        let factor = 1_u64 << position.min(MAX_SERVERS);
        let seconds = self.timeout.as_secs() * factor;
        let count = if position == 0 { 1 } else { self.servers.len().max(1) };
        Duration::from_secs((seconds / u64::try_from(count).unwrap_or(1)).max(1))
    }
}

/// The lines of the file that glibc reads, followed by the environment in the same syntax.
fn combined(file: &str, environment: &ResolverEnvironment) -> String {
    // A keyword must begin the line, and `search` without a domain changes nothing.
    let is_read = |line: &&str| !line.starts_with([' ', '\t']) && line.trim() != "search";
    let mut text: String = file.lines().filter(is_read).flat_map(|line| [line, "\n"]).collect();
    for (keyword, value) in [("search", &environment.local_domain), ("options", &environment.options)] {
        let words: Vec<_> = value.iter().flat_map(|value| value.split_whitespace()).collect();
        if !words.is_empty() {
            text.push_str(&format!("{keyword} {}\n", words.join(" ")));
        }
    }
    text
}

/// The last `search` or `domain`; without both, the domain of the host name.
fn search_domains(config: &Config) -> Vec<String> {
    let mut domains: Vec<_> = config.get_last_search_or_domain().cloned().collect();
    if domains.is_empty() {
        domains.extend(config.get_system_domain());
    }
    // systemd-resolved and NetworkManager write `--` where there is no domain.
    domains.retain(|domain| domain != "--");
    domains
}

fn searched(name: &str, domain: &str) -> SearchName {
    match domain.trim_matches('.') {
        "" => SearchName { name: format!("{name}."), is_as_is: true },
        domain => SearchName { name: format!("{name}.{domain}."), is_as_is: false },
    }
}

/// The address of a name server. `None` if the interface of a link-local address does not exist.
fn address(server: &ScopedIp) -> Option<SocketAddr> {
    match server {
        ScopedIp::V6(ip, Some(scope)) => Some(SocketAddrV6::new(*ip, PORT, 0, interface(ip, scope)?).into()),
        server => Some(SocketAddr::new(IpAddr::from(server), PORT)),
    }
}

/// The index of the interface `scope`, which is a name or a number; 0, no interface, for an address that needs none.
fn interface(ip: &Ipv6Addr, scope: &str) -> Option<u32> {
    if !ip.is_unicast_link_local() {
        return Some(0);
    }
    if let Ok(index) = scope.parse() {
        return Some(index);
    }
    std::fs::read_to_string(format!("/sys/class/net/{scope}/ifindex")).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(file: &str) -> ResolverSettings {
        ResolverSettings::parse(file, &ResolverEnvironment::default()).0
    }

    /// Candidates of a name, with the settings of a file and options of the environment.
    fn names(file: &str, options: &str, name: &str) -> String {
        let environment = ResolverEnvironment { local_domain: None, options: Some(options.to_owned()) };
        let settings = ResolverSettings::parse(&format!("nameserver 10.0.0.1\n{file}"), &environment).0;
        let names: Vec<_> = settings.candidates(name).into_iter().map(|one| one.name).collect();
        names.join(" ")
    }

    #[test]
    fn names_are_searched_in_the_order_of_glibc() {
        let long = "a.b.c.d.e.f.g.h.i.j.k.l.m.n.o";
        let table = [
            ("search a.test b.test", "", "app", "app.a.test. app.b.test. app."),
            ("search a.test b.test", "", "app.x", "app.x. app.x.a.test. app.x.b.test."),
            ("search a.test b.test", "ndots:5", "app.x", "app.x.a.test. app.x.b.test. app.x."),
            ("search a.test\noptions ndots:5", "ndots:1", "app.x", "app.x. app.x.a.test."),
            ("search a.test", "ndots:0", "app", "app. app.a.test."),
            ("search a.test", "", "app.", "app."),
            ("search a.test", "ndots:5", "app.x.", "app.x."),
            ("search a.test.", "", "app", "app.a.test. app."),
            ("search .", "", "app", "app."),
            ("search . a.test", "", "app", "app. app.a.test."),
            ("search a.test . a.test", "", "app.x", "app.x. app.x.a.test."),
            ("search --", "", "app", "app."),
            ("search a.test", "no-tld-query", "app", "app.a.test."),
            ("search a.test", "no-tld-query ndots:5", "app.x", "app.x.a.test. app.x."),
            ("search a.test", "ndots:5", "localhost", "localhost."),
            ("search a.test", "", "db.localhost", "db.localhost."),
            ("domain d.test\nsearch a.test", "", "app", "app.a.test. app."),
            ("search a.test\ndomain d.test", "", "app", "app.d.test. app."),
            ("search a.test\nsearch b.test", "", "app", "app.b.test. app."),
            ("search a.test\nsearch\nsearch  ", "", "app", "app.a.test. app."),
            (" search a.test\n\tsearch b.test\nsearch c.test", "", "app", "app.c.test. app."),
            ("# search a.test\n; search b.test\nsearch c.test # d.test", "", "app", "app.c.test. app."),
            ("search a b c d e f g", "", "x", "x.a. x.b. x.c. x.d. x.e. x.f. x.g. x."),
            ("search z.test", "ndots:99", long, &format!("{long}.z.test. {long}.")),
            ("search z.test", "ndots:99", &format!("{long}.p"), &format!("{long}.p. {long}.p.z.test.")),
        ];
        for (file, options, name, wanted) in table {
            assert_eq!(names(file, options, name), wanted, "{file:?} {options} {name}");
        }
    }

    #[test]
    fn the_environment_replaces_the_search_domains() {
        let environment = |domain: &str| ResolverEnvironment {
            local_domain: Some(domain.to_owned()),
            options: Some("ndots:3\nnameserver 1.1.1.1".to_owned()),
        };
        let file = "nameserver 10.0.0.1\nsearch a.test\n";
        for (domain, wanted) in [("l.test  m.test", vec!["l.test", "m.test"]), ("", vec!["a.test"])] {
            let (settings, _) = ResolverSettings::parse(file, &environment(domain));
            assert_eq!((settings.search, settings.ndots, settings.servers.len()), (to_owned(&wanted), 3, 1));
        }
    }

    fn to_owned(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn values_have_the_defaults_and_limits_of_glibc() {
        for (options, ndots, timeout, attempts) in [
            ("", 1, 5, 2),
            ("ndots:2 timeout:3 attempts:4", 2, 3, 4),
            ("ndots:16 timeout:31 attempts:6", 15, 30, 5),
            ("ndots:0 timeout:0 attempts:0", 0, 1, 1),
            ("ndots:4294967295 timeout:4294967295 attempts:4294967295", 15, 30, 5),
            ("ndots timeout: attempts:x unknown debug", 1, 5, 2),
        ] {
            let settings = parse(&format!("nameserver 10.0.0.1\noptions {options}\n"));
            let seen = (settings.ndots, settings.timeout.as_secs(), settings.attempts);
            assert_eq!(seen, (ndots, timeout, attempts), "{options}");
        }
        let flags = |settings: &ResolverSettings| {
            let (rotate, tcp, edns0) = (settings.rotate, settings.use_tcp, settings.edns0);
            [rotate, tcp, edns0, settings.no_aaaa, settings.no_tld_query, settings.no_reload]
        };
        assert_eq!(flags(&parse("")), [false; 6]);
        assert_eq!(flags(&parse("options rotate use-vc edns0 no-aaaa\noptions no-tld-query no-reload")), [true; 6]);
    }

    #[test]
    fn the_first_three_name_servers_count_and_without_one_the_machine_itself() {
        let servers = |file: &str| {
            let (settings, problems) = ResolverSettings::parse(file, &ResolverEnvironment::default());
            let servers: Vec<_> = settings.servers.iter().map(SocketAddr::to_string).collect();
            (servers.join(" "), problems.len())
        };
        let four = "nameserver 10.0.0.1\nnameserver ::1\nnameserver 10.0.0.3\nnameserver 10.0.0.4\n";
        assert_eq!(servers(four), ("10.0.0.1:53 [::1]:53 10.0.0.3:53".to_owned(), 0));
        assert_eq!(servers("nameserver shop\nnameserver 10.0.0.2\n"), ("10.0.0.2:53".to_owned(), 1));
        assert_eq!(servers("nameserver fe80::1%lo\n"), ("[fe80::1%1]:53".to_owned(), 0));
        assert_eq!(servers("nameserver fe80::1%7\n"), ("[fe80::1%7]:53".to_owned(), 0));
        assert_eq!(servers("nameserver fe80::1%none\n"), ("127.0.0.1:53".to_owned(), 1));
        assert_eq!(servers("nameserver 10.0.0.1\r\nsearch a.test\r\n"), ("10.0.0.1:53".to_owned(), 0));
        for file in ["", "\n", "search a.test\n", "#nameserver 10.0.0.1\n"] {
            assert_eq!(servers(file), ("127.0.0.1:53".to_owned(), 1), "{file:?}");
        }
    }

    #[test]
    fn the_timeout_of_a_name_server_depends_on_its_position() {
        let one = "nameserver 10.0.0.1\n";
        let timeouts = |count: usize, options: &str| {
            let settings = parse(&format!("{}options {options}\n", one.repeat(count)));
            let timeouts: Vec<_> = (0..count).map(|position| settings.timeout_at(position).as_secs()).collect();
            timeouts
        };
        assert_eq!(timeouts(1, ""), [5]);
        assert_eq!(timeouts(2, ""), [5, 5]);
        assert_eq!(timeouts(3, ""), [5, 3, 6]);
        assert_eq!(timeouts(3, "timeout:2"), [2, 1, 2]);
        assert_eq!(timeouts(3, "timeout:0"), [1, 1, 1]);
    }
}
