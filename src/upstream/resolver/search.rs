//! Resolves one configured name: the candidates of the search list in turn, both address families of each side by side.
//!
//! The first candidate with an address counts. IPv4 and IPv6 addresses are queried together, and the answer of one family
//! does not wait for the other for more than 50 ms (RFC 8305 3): many networks drop AAAA queries. The rest of the query
//! goes on in [`Resolved::pending`].

use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{Either, LocalBoxFuture, select};
use tokio::time::timeout;

use crate::upstream::resolver::servers::{AddressFamily, FamilyAnswer, NameServer, NoAddresses, Servers};

/// Wait for the second family after the first one has answered (RFC 8305 3, Resolution Delay).
const RESOLUTION_DELAY: Duration = Duration::from_millis(50);

/// A successful resolution.
pub struct Resolved {
    /// The addresses.
    pub addresses: Vec<IpAddr>,
    /// Time to live of the answer.
    pub ttl: Duration,
    /// The family whose query has no answer, or no answer yet: its last known addresses are still valid.
    pub unanswered: Option<AddressFamily>,
    /// The query of that family, if it is still waiting for an answer.
    pub pending: Option<PendingFamily>,
}

/// The answer of a family that comes late; `None` if it has no address.
pub type PendingFamily = LocalBoxFuture<'static, Option<FamilyAnswer>>;

type Query = LocalBoxFuture<'static, Result<FamilyAnswer, NoAddresses>>;

impl Resolved {
    /// A complete answer.
    pub fn new(addresses: Vec<IpAddr>, ttl: Duration) -> Self {
        Self { addresses, ttl, unanswered: None, pending: None }
    }

    fn with(mut self, other: FamilyAnswer) -> Self {
        self.addresses.extend(other.addresses);
        self.ttl = self.ttl.min(other.ttl);
        self
    }
}

impl From<FamilyAnswer> for Resolved {
    fn from(answer: FamilyAnswer) -> Self {
        Self::new(answer.addresses, answer.ttl)
    }
}

/// The addresses of a name that is not in the hosts file.
///
/// A search domain whose query fails, other than by SERVFAIL, ends the search as in glibc: a later domain might have the
/// name with another meaning. The name as it is is tried in any case.
///
/// # Errors
/// Why there is no address, as text. A failure takes precedence over the answers of other candidates.
pub(super) async fn search<N: NameServer + 'static>(servers: &Rc<Servers<N>>, name: &str) -> Result<Resolved, String> {
    let mut reason = NoAddresses::NoName;
    let mut is_over = false;
    for candidate in servers.settings().candidates(name) {
        if is_over && !candidate.is_as_is {
            continue;
        }
        match both_families(servers, &candidate.name).await {
            Ok(resolved) => return Ok(resolved),
            Err(error) => {
                is_over |= matches!(error, NoAddresses::NoAnswer(_)) && !candidate.is_as_is;
                reason = more_important(reason, error);
            }
        }
    }
    Err(match reason {
        NoAddresses::NoName => "there is no such name (NXDOMAIN)".to_owned(),
        NoAddresses::NoData => "the name has no address".to_owned(),
        NoAddresses::ServerFailure(text) | NoAddresses::NoAnswer(text) => text,
    })
}

/// The addresses of an absolute name.
async fn both_families<N: NameServer + 'static>(servers: &Rc<Servers<N>>, name: &str) -> Result<Resolved, NoAddresses> {
    let v4 = query(servers, name, AddressFamily::V4);
    if servers.settings().no_aaaa {
        return v4.await.map(Resolved::from);
    }
    let v6 = query(servers, name, AddressFamily::V6);
    let (first, other, family) = match select(v4, v6).await {
        Either::Left((first, v6)) => (first, v6, AddressFamily::V6),
        Either::Right((first, v4)) => (first, v4, AddressFamily::V4),
    };
    match first {
        Ok(found) => Ok(join(found, other, family).await),
        Err(error) => otherwise(error, other, family).await,
    }
}

fn query<N: NameServer + 'static>(servers: &Rc<Servers<N>>, name: &str, family: AddressFamily) -> Query {
    let (servers, name) = (Rc::clone(servers), name.to_owned());
    Box::pin(async move { servers.query(&name, family).await })
}

/// The first family has addresses: adds those of the other, or leaves its query pending.
async fn join(found: FamilyAnswer, mut other: Query, family: AddressFamily) -> Resolved {
    let resolved = Resolved::from(found);
    match timeout(RESOLUTION_DELAY, &mut other).await {
        Ok(Ok(other)) => resolved.with(other),
        Ok(Err(error)) => Resolved { unanswered: (!error.is_answer()).then_some(family), ..resolved },
        Err(_) => {
            let pending = other.map(Result::ok).boxed_local();
            Resolved { unanswered: Some(family), pending: Some(pending), ..resolved }
        }
    }
}

/// The first family has no address: the addresses of the other, `family`.
async fn otherwise(error: NoAddresses, other: Query, family: AddressFamily) -> Result<Resolved, NoAddresses> {
    // A name that does not exist has no address of either family (RFC 8020), so a dropped AAAA query does not delay the
    // search. The contrary is not relied on: some servers deny a name that has no IPv6 address (RFC 4074 4.2).
    let answer = match (&error, family) {
        (NoAddresses::NoName, AddressFamily::V6) => match timeout(RESOLUTION_DELAY, other).await {
            Ok(answer) => answer,
            Err(_) => return Err(error),
        },
        _ => other.await,
    };
    let failed = match family {
        AddressFamily::V4 => AddressFamily::V6,
        AddressFamily::V6 => AddressFamily::V4,
    };
    match answer {
        Ok(found) => Ok(Resolved { unanswered: (!error.is_answer()).then_some(failed), ..found.into() }),
        Err(other) => Err(more_important(error, other)),
    }
}

/// The reason that says more: a failure before an answer, the first failure before a later one.
fn more_important(first: NoAddresses, second: NoAddresses) -> NoAddresses {
    let weight = |reason: &NoAddresses| match reason {
        NoAddresses::NoName => 0,
        NoAddresses::NoData => 1,
        NoAddresses::ServerFailure(_) => 2,
        NoAddresses::NoAnswer(_) => 3,
    };
    if weight(&second) > weight(&first) { second } else { first }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upstream::resolver::settings::{ResolverEnvironment, ResolverSettings};
    use std::cell::RefCell;
    use tokio::time::{Instant, sleep};

    /// What the name server does with a query, after a number of milliseconds.
    #[derive(Debug, Clone)]
    enum Reply {
        Found(u64),
        No(u64, NoAddresses),
        Drops,
    }
    use Reply::{Drops, Found, No};

    /// Name, reply to A queries, reply to AAAA queries; other names do not exist.
    type Script = Vec<(&'static str, Reply, Reply)>;

    struct Scripted {
        script: Script,
        queries: Rc<RefCell<Vec<String>>>,
    }

    impl NameServer for Scripted {
        async fn query(&self, name: &str, family: AddressFamily) -> Result<FamilyAnswer, NoAddresses> {
            if family == AddressFamily::V4 {
                self.queries.borrow_mut().push(name.to_owned());
            }
            let known = self.script.iter().find(|(known, ..)| *known == name);
            let reply = known.map_or(No(0, NoAddresses::NoName), |(_, v4, v6)| match family {
                AddressFamily::V4 => v4.clone(),
                AddressFamily::V6 => v6.clone(),
            });
            match reply {
                Found(after) => {
                    sleep(Duration::from_millis(after)).await;
                    let address = if family == AddressFamily::V4 { "10.0.0.4" } else { "fd00::6" };
                    let ttl = Duration::from_secs(if family == AddressFamily::V4 { 40 } else { 60 });
                    Ok(FamilyAnswer { addresses: vec![address.parse().unwrap()], ttl })
                }
                No(after, why) => {
                    sleep(Duration::from_millis(after)).await;
                    Err(why)
                }
                Drops => std::future::pending().await,
            }
        }
    }

    struct Seen {
        result: Result<Resolved, String>,
        after: u128,
        queries: Vec<String>,
    }

    async fn play(options: &str, name: &str, script: Script) -> Seen {
        let file = format!("nameserver 10.0.0.1\nsearch a.test b.test\noptions attempts:1 {options}\n");
        let settings = ResolverSettings::parse(&file, &ResolverEnvironment::default()).0;
        let queries = Rc::default();
        let server = Scripted { script, queries: Rc::clone(&queries) };
        let servers = Rc::new(Servers::new(Rc::new(settings), [server]));
        let begun = Instant::now();
        let result = search(&servers, name).await;
        Seen { result, after: begun.elapsed().as_millis(), queries: queries.take() }
    }

    /// Addresses (4, 6) and the unanswered family (`?`).
    fn shown(result: &Result<Resolved, String>) -> String {
        match result {
            Ok(resolved) => {
                let of = |ip: &IpAddr| if ip.is_ipv4() { "4" } else { "6" };
                let addresses: String = resolved.addresses.iter().map(of).collect();
                let unanswered = resolved.unanswered.map_or(String::new(), |family| format!(" {family:?}?"));
                let pending = if resolved.pending.is_some() { " pending" } else { "" };
                format!("{addresses}{unanswered}{pending}")
            }
            Err(error) => error.clone(),
        }
    }

    fn fails() -> NoAddresses {
        NoAddresses::ServerFailure("SERVFAIL".to_owned())
    }

    #[tokio::test(start_paused = true)]
    async fn one_family_waits_for_the_other_for_50_ms_only() {
        let no_name = |after| No(after, NoAddresses::NoName);
        let no_data = |after| No(after, NoAddresses::NoData);
        let late = "no answer from name server 10.0.0.1 in 5s";
        for (v4, v6, wanted, after) in [
            (Found(7), Found(20), "46", 20),
            (Found(20), Found(7), "64", 20),
            (Found(7), Found(56), "46", 56),
            (Found(7), Found(300), "4 V6? pending", 57),
            (Found(7), Drops, "4 V6? pending", 57),
            (Drops, Found(7), "6 V4? pending", 57),
            (Found(7), no_data(9), "4", 9),
            (Found(7), no_name(9), "4", 9),
            (Found(7), No(9, fails()), "4 V6?", 9),
            // Without an address there is no reason to hurry.
            (no_data(7), Found(300), "6", 300),
            (Found(300), no_name(7), "4", 300),
            (Found(300), no_data(7), "4", 300),
            (No(7, fails()), Found(300), "6 V4?", 300),
            (no_data(7), Drops, late, 5_000),
            // A name that does not exist has no IPv6 address either.
            (no_name(7), Found(20), "6", 20),
            (no_name(7), Drops, "there is no such name (NXDOMAIN)", 57),
            (no_name(7), no_data(9), "the name has no address", 9),
            (Drops, no_name(7), late, 5_000),
            (Drops, Drops, late, 5_000),
        ] {
            let case = format!("{v4:?} {v6:?}");
            let seen = play("", "shop.test.", vec![("shop.test.", v4, v6)]).await;
            assert_eq!((shown(&seen.result).as_str(), seen.after), (wanted, after), "{case}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_family_comes_in_the_end() {
        for (v6, wanted) in [(Found(900), Some("fd00::6")), (No(900, fails()), None), (Drops, None)] {
            let seen = play("", "shop.test.", vec![("shop.test.", Found(0), v6)]).await;
            let late = seen.result.unwrap().pending.unwrap().await;
            assert_eq!(late.map(|late| late.addresses[0].to_string()).as_deref(), wanted);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn without_aaaa_queries_only_ipv4_addresses_are_found() {
        let seen = play("no-aaaa", "shop.test.", vec![("shop.test.", Found(7), Found(0))]).await;
        assert_eq!((shown(&seen.result).as_str(), seen.after), ("4", 7));
    }

    #[tokio::test(start_paused = true)]
    async fn the_time_to_live_is_the_shorter_one() {
        let seen = play("", "shop.test.", vec![("shop.test.", Found(0), Found(0))]).await;
        assert_eq!(seen.result.unwrap().ttl, Duration::from_secs(40));
    }

    #[tokio::test(start_paused = true)]
    async fn the_search_goes_on_after_an_answer_and_servfail_and_ends_at_other_failures() {
        let both = |reply: Reply| (reply.clone(), reply);
        let reply = |why: &NoAddresses| both(No(0, why.clone()));
        let refused = NoAddresses::NoAnswer("REFUSED".to_owned());
        for (why, as_is_found, queried, wanted) in [
            (NoAddresses::NoName, true, "app.a.test. app.b.test.", "46"),
            (NoAddresses::NoData, true, "app.a.test. app.b.test.", "46"),
            (fails(), true, "app.a.test. app.b.test.", "46"),
            (refused.clone(), true, "app.a.test. app.", "46"),
            (refused, false, "app.a.test. app.", "REFUSED"),
        ] {
            let (a4, a6) = reply(&why);
            let mut script = vec![("app.a.test.", a4, a6), ("app.b.test.", Found(0), Found(0))];
            if as_is_found {
                script.push(("app.", Found(0), Found(0)));
            }
            let seen = play("", "app", script).await;
            assert_eq!((seen.queries.join(" ").as_str(), shown(&seen.result).as_str()), (queried, wanted), "{why:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_failure_of_the_name_as_it_is_the_search_domains_are_tried() {
        let script = vec![("app.x.", Drops, Drops), ("app.x.b.test.", Found(0), Found(0))];
        let seen = play("", "app.x", script).await;
        assert_eq!(seen.queries.join(" "), "app.x. app.x.a.test. app.x.b.test.");
        assert_eq!(shown(&seen.result), "46");
    }

    #[tokio::test(start_paused = true)]
    async fn the_most_important_reason_is_reported() {
        let no_data = || No(0, NoAddresses::NoData);
        let seen = play("", "app", vec![("app.a.test.", no_data(), no_data())]).await;
        assert_eq!(shown(&seen.result), "the name has no address");
        let failure = || No(0, fails());
        let seen = play("", "app", vec![("app.a.test.", failure(), failure())]).await;
        assert_eq!(shown(&seen.result), "SERVFAIL");
        assert_eq!(shown(&play("", "app", vec![]).await.result), "there is no such name (NXDOMAIN)");
    }

    #[tokio::test(start_paused = true)]
    async fn dropped_aaaa_queries_delay_each_search_domain_by_50_ms() {
        let no_name = || No(1, NoAddresses::NoName);
        let script =
            vec![("app.a.test.", no_name(), Drops), ("app.b.test.", no_name(), Drops), ("app.", Found(1), Drops)];
        let seen = play("", "app", script).await;
        assert_eq!((shown(&seen.result).as_str(), seen.after), ("4 V6? pending", 3 * 51));
    }
}
