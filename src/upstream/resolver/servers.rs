//! One query to the name servers of resolv.conf(5), in the order of glibc: each server in turn with its own timeout, the
//! whole list as often as `attempts` says.
//!
//! The first answer counts, also that a name does not exist: servers may know different names, and the first one has
//! precedence. A failure, or no answer in time, leads to the next server. Two differences to glibc keep a dead server from
//! delaying calls: after a second without an answer the next server is asked too, and addresses that it has are used
//! (not its denial of a name, for which the timeout of the first one counts); and a silent server is asked last for 30 s.

use std::cell::Cell;
use std::net::IpAddr;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::{Either, LocalBoxFuture, select};
use tokio::time::{Instant, sleep_until, timeout};

use crate::upstream::resolver::settings::ResolverSettings;

/// Wait for a server before the next one is asked too. By then hickory has sent the query over UDP three times.
const HEDGE_AFTER: Duration = Duration::from_secs(1);
/// Least time from one pass through the servers to the next, unless they have answered: a name server that is being started
/// refuses queries for a moment, and until the first resolution has ended, calls wait for it.
const PASS_AT_LEAST: Duration = Duration::from_secs(1);
/// A silent server is asked last for this time.
const SILENT_FOR: Duration = Duration::from_secs(30);

/// The kind of address that a query asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddressFamily {
    /// A records.
    V4,
    /// AAAA records.
    V6,
}

impl AddressFamily {
    /// The family of an address.
    pub fn of(address: &IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// Addresses of one family, at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FamilyAnswer {
    /// The addresses.
    pub addresses: Vec<IpAddr>,
    /// Time to live of the answer.
    pub ttl: Duration,
}

/// Why a query has no address. The first two are answers, the others failures.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum NoAddresses {
    /// NXDOMAIN: there is no such name, and no name below it (RFC 8020).
    NoName,
    /// The name exists and has no address of this family.
    NoData,
    /// The last server could not find out (SERVFAIL); the reason as text.
    ServerFailure(String),
    /// No server gave a usable answer; the reason as text.
    NoAnswer(String),
}

impl NoAddresses {
    /// True if a name server has answered the query.
    pub(super) fn is_answer(&self) -> bool {
        matches!(self, Self::NoName | Self::NoData)
    }
}

/// Sends one query to one name server; [`Servers`] limits the time.
pub(super) trait NameServer {
    /// Addresses of a family for an absolute name.
    fn query(&self, name: &str, family: AddressFamily) -> impl Future<Output = Result<FamilyAnswer, NoAddresses>>;
}

/// The name servers of the settings.
pub(super) struct Servers<N> {
    settings: Rc<ResolverSettings>,
    servers: Vec<ServerState<N>>,
    /// Number of queries begun, for `rotate`.
    begun: Cell<usize>,
}

/// One name server, and what is known of it.
struct ServerState<N> {
    server: N,
    last_answer: Cell<Option<Instant>>,
    silent_until: Cell<Option<Instant>>,
}

impl<N: NameServer> Servers<N> {
    /// The servers in the order of `settings.servers`.
    pub(super) fn new(settings: Rc<ResolverSettings>, servers: impl IntoIterator<Item = N>) -> Self {
        let state = |server| ServerState { server, last_answer: Cell::default(), silent_until: Cell::default() };
        Self { settings, servers: servers.into_iter().map(state).collect(), begun: Cell::new(0) }
    }

    /// The settings of these servers.
    pub(super) fn settings(&self) -> &ResolverSettings {
        &self.settings
    }

    /// Addresses of a family for an absolute name.
    pub(super) async fn query(&self, name: &str, family: AddressFamily) -> Result<FamilyAnswer, NoAddresses> {
        let order = self.order(Instant::now());
        let mut failure = NoAddresses::NoAnswer("there is no name server".to_owned());
        let mut due = Instant::now();
        for _ in 0..self.settings.attempts {
            if matches!(failure, NoAddresses::NoAnswer(_)) {
                sleep_until(due).await;
            }
            due = Instant::now() + PASS_AT_LEAST;
            match self.query_from(&order, 0, name, family).await {
                Err(error) if !error.is_answer() => failure = error,
                answer => return answer,
            }
        }
        Err(failure)
    }

    /// One pass through the servers from `position` on.
    fn query_from<'a>(
        &'a self,
        order: &'a [usize],
        position: usize,
        name: &'a str,
        family: AddressFamily,
    ) -> LocalBoxFuture<'a, Result<FamilyAnswer, NoAddresses>> {
        Box::pin(async move {
            let begun = Instant::now();
            let mut first = pin!(self.query_one(order[position], position, name, family));
            if position + 1 == order.len() {
                return first.await;
            }
            let next = || self.query_from(order, position + 1, name, family);
            match timeout(HEDGE_AFTER, &mut first).await {
                Ok(Err(error)) if !error.is_answer() => return next().await,
                Ok(answer) => return answer,
                Err(_) => {}
            }
            match select(first, next()).await {
                Either::Left((Err(error), next)) if !error.is_answer() => next.await,
                Either::Left((answer, _)) => answer,
                Either::Right((Ok(found), _)) => {
                    self.servers[order[position]].note_silence(begun);
                    Ok(found)
                }
                Either::Right((error, first)) => match first.await {
                    Err(failure) if !failure.is_answer() => error,
                    answer => answer,
                },
            }
        })
    }

    /// A query to one server, in the time that it has at `position`.
    async fn query_one(
        &self,
        index: usize,
        position: usize,
        name: &str,
        family: AddressFamily,
    ) -> Result<FamilyAnswer, NoAddresses> {
        let (state, begun, limit) = (&self.servers[index], Instant::now(), self.settings.timeout_at(position));
        match timeout(limit, state.server.query(name, family)).await {
            Ok(answer) => {
                state.last_answer.set(Some(Instant::now()));
                state.silent_until.set(None);
                answer
            }
            Err(_) => {
                state.note_silence(begun);
                let address = self.settings.servers[index].ip();
                Err(NoAddresses::NoAnswer(format!("no answer from name server {address} in {limit:?}")))
            }
        }
    }

    /// Indices of the servers in the order in which a query asks them.
    fn order(&self, now: Instant) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.servers.len()).collect();
        if self.settings.rotate && !order.is_empty() {
            let begun = self.begun.replace(self.begun.get().wrapping_add(1));
            order.rotate_left(begun % self.servers.len());
        }
        order.sort_by_key(|&index| self.servers[index].silent_until.get().is_some_and(|until| now < until));
        order
    }
}

impl<N> ServerState<N> {
    /// A query that was sent at `begun` has no answer. A server that drops only one kind of query is not silent.
    fn note_silence(&self, begun: Instant) {
        if self.last_answer.get().is_none_or(|last| last <= begun) {
            self.silent_until.set(Some(Instant::now() + SILENT_FOR));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upstream::resolver::settings::ResolverEnvironment;
    use std::cell::RefCell;

    /// What a scripted server does with a query.
    #[derive(Debug, Clone, Copy)]
    enum Reply {
        Found,
        No,
        Fails,
        Refuses,
        Drops,
        /// Answers after 3 s.
        Late,
        /// Answers queries for IPv4 addresses only.
        DropsV6,
    }

    /// Times in seconds and numbers of the servers that were asked.
    type Log = Rc<RefCell<Vec<(u64, usize)>>>;

    struct Scripted {
        number: usize,
        reply: Rc<Cell<Reply>>,
        log: Log,
        begun: Instant,
    }

    impl NameServer for Scripted {
        async fn query(&self, _name: &str, family: AddressFamily) -> Result<FamilyAnswer, NoAddresses> {
            self.log.borrow_mut().push((self.begun.elapsed().as_secs(), self.number));
            let found = FamilyAnswer { addresses: vec![[10, 0, 0, self.number as u8].into()], ttl: Duration::ZERO };
            match (self.reply.get(), family) {
                (Reply::Found, _) | (Reply::DropsV6, AddressFamily::V4) => Ok(found),
                (Reply::Late, _) => {
                    tokio::time::sleep(Duration::from_secs(3)).await;
                    Ok(found)
                }
                (Reply::No, _) => Err(NoAddresses::NoName),
                (Reply::Fails, _) => Err(NoAddresses::ServerFailure("SERVFAIL".to_owned())),
                (Reply::Refuses, _) => Err(NoAddresses::NoAnswer("refused".to_owned())),
                (Reply::Drops | Reply::DropsV6, _) => std::future::pending().await,
            }
        }
    }

    struct Lab {
        servers: Servers<Scripted>,
        replies: Vec<Rc<Cell<Reply>>>,
        log: Log,
    }

    impl Lab {
        fn new(options: &str, replies: &[Reply]) -> Self {
            let lines: String = (1..=replies.len()).map(|n| format!("nameserver 10.0.0.{n}\n")).collect();
            let file = format!("{lines}options {options}\n");
            let settings = ResolverSettings::parse(&file, &ResolverEnvironment::default()).0;
            let (log, begun) = (Log::default(), Instant::now());
            let replies: Vec<_> = replies.iter().map(|reply| Rc::new(Cell::new(*reply))).collect();
            let scripted = replies.iter().enumerate().map(|(index, reply)| {
                let (reply, log) = (Rc::clone(reply), Rc::clone(&log));
                Scripted { number: index + 1, reply, log, begun }
            });
            Self { servers: Servers::new(Rc::new(settings), scripted), replies: replies.clone(), log }
        }

        /// Queries: who was asked since the last call, and the number of the server that answered.
        async fn ask(&self, family: AddressFamily) -> (Vec<(u64, usize)>, Result<usize, NoAddresses>) {
            let answer = self.servers.query("shop.test.", family).await;
            let number = |ip: &IpAddr| usize::from(ip.to_string().ends_with('2')) + 1;
            (self.log.take(), answer.map(|found| number(&found.addresses[0])))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_leads_to_the_next_server_and_an_answer_does_not() {
        use Reply::{Drops, Fails, Found, No, Refuses};
        for (replies, seen, wanted) in [
            ([Found, Found], vec![(0, 1)], Ok(1)),
            ([Fails, Found], vec![(0, 1), (0, 2)], Ok(2)),
            ([Refuses, Found], vec![(0, 1), (0, 2)], Ok(2)),
            ([Drops, Found], vec![(0, 1), (1, 2)], Ok(2)),
            // The first server has precedence: the second may be one for the public names only.
            ([No, Found], vec![(0, 1)], Err(NoAddresses::NoName)),
            ([Fails, No], vec![(0, 1), (0, 2)], Err(NoAddresses::NoName)),
        ] {
            assert_eq!(Lab::new("", &replies).ask(AddressFamily::V4).await, (seen, wanted), "{replies:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_denial_of_a_name_by_a_later_server_counts_when_the_first_is_given_up() {
        let begun = Instant::now();
        let lab = Lab::new("", &[Reply::Drops, Reply::No]);
        assert_eq!(lab.ask(AddressFamily::V4).await, (vec![(0, 1), (1, 2)], Err(NoAddresses::NoName)));
        assert_eq!(begun.elapsed(), Duration::from_secs(5));
        // A slow first server is still heard.
        let lab = Lab::new("", &[Reply::Late, Reply::No]);
        assert_eq!(lab.ask(AddressFamily::V4).await, (vec![(0, 1), (1, 2)], Ok(1)));
        assert_eq!(lab.ask(AddressFamily::V4).await.0, [(3, 1), (4, 2)]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_list_is_gone_through_as_often_as_attempts_says() {
        let three = [Reply::Drops; 3];
        let (seen, answer) = Lab::new("timeout:2 attempts:2", &three).ask(AddressFamily::V4).await;
        assert_eq!(seen, [(0, 1), (1, 2), (2, 3), (4, 1), (5, 2), (6, 3)]);
        assert_eq!(answer, Err(NoAddresses::NoAnswer("no answer from name server 10.0.0.3 in 2s".to_owned())));
        let (seen, answer) = Lab::new("attempts:3", &[Reply::Fails]).ask(AddressFamily::V4).await;
        assert_eq!(seen, [(0, 1), (0, 1), (0, 1)]);
        assert_eq!(answer, Err(NoAddresses::ServerFailure("SERVFAIL".to_owned())));
        let (seen, _) = Lab::new("timeout:3 attempts:2", &[Reply::Drops]).ask(AddressFamily::V4).await;
        assert_eq!(seen, [(0, 1), (3, 1)]);
        let (seen, _) = Lab::new("attempts:3", &[Reply::Refuses]).ask(AddressFamily::V4).await;
        assert_eq!(seen, [(0, 1), (1, 1), (2, 1)]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_server_is_asked_last_for_a_while() {
        let lab = Lab::new("", &[Reply::Drops, Reply::Found]);
        assert_eq!(lab.ask(AddressFamily::V4).await.0, [(0, 1), (1, 2)]);
        assert_eq!(lab.ask(AddressFamily::V4).await.0, [(1, 2)]);
        // Its own failure leads back to the silent one, which answers again.
        lab.replies[0].set(Reply::Found);
        lab.replies[1].set(Reply::Fails);
        assert_eq!(lab.ask(AddressFamily::V4).await, (vec![(1, 2), (1, 1)], Ok(1)));
        assert_eq!(lab.ask(AddressFamily::V4).await, (vec![(1, 1)], Ok(1)));
        lab.replies[0].set(Reply::Drops);
        lab.replies[1].set(Reply::Found);
        assert_eq!(lab.ask(AddressFamily::V4).await.0, [(1, 1), (2, 2)]);
        tokio::time::sleep(SILENT_FOR).await;
        assert_eq!(lab.ask(AddressFamily::V4).await.0, [(32, 1), (33, 2)]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_drops_ipv6_queries_keeps_its_precedence() {
        let lab = Lab::new("", &[Reply::DropsV6, Reply::Found]);
        let while_waiting = async {
            tokio::time::sleep(Duration::from_millis(500)).await;
            lab.servers.query("shop.test.", AddressFamily::V4).await
        };
        let (v6, v4) = tokio::join!(lab.ask(AddressFamily::V6), while_waiting);
        assert_eq!((v6.0, v4.is_ok()), (vec![(0, 1), (0, 1), (1, 2)], true));
        assert_eq!(lab.ask(AddressFamily::V4).await, (vec![(1, 1)], Ok(1)));
    }

    #[tokio::test(start_paused = true)]
    async fn rotation_begins_each_query_with_the_next_server() {
        let lab = Lab::new("rotate", &[Reply::Found; 3]);
        for number in [1, 2, 3, 1] {
            assert_eq!(lab.ask(AddressFamily::V4).await.0, [(0, number)]);
        }
        let lab = Lab::new("rotate", &[Reply::Fails, Reply::Fails, Reply::Found]);
        assert_eq!(lab.ask(AddressFamily::V4).await.0, [(0, 1), (0, 2), (0, 3)]);
        assert_eq!(lab.ask(AddressFamily::V4).await.0, [(0, 2), (0, 3)]);
    }
}
