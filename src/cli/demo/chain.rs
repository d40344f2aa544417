//! The chain of the demo: order, payment and bank, each with a hopguard of its own that stands before and behind it.
//!
//! A call goes caller -> hopguard -> order -> hopguard -> hopguard -> payment -> hopguard -> hopguard -> bank. A hop is
//! counted where it begins: order -> payment by order's hopguard. The first one begins outside; there it is the other end.

use std::net::{Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context;

use crate::app::App;
use crate::cli::demo::client::Client;
use crate::cli::demo::service::{self, Otherwise, Service, State};
use crate::config::Settings;
use crate::policy::load;
use crate::telemetry::{MemoryLines, Sink};

/// How many services there are, and so how many hops.
pub(super) const HOPS: usize = 3;

/// How long calls in flight may take to finish at the end of the demo.
const GRACE: Duration = Duration::from_millis(500);

/// Lines of each access log that are kept.
const LINES: usize = 100;

/// One service's place in the chain.
pub(super) struct Place {
    /// Who calls it.
    caller: &'static str,
    /// Its name.
    pub(super) name: &'static str,
    /// The route of the calls to it.
    pub(super) route: &'static str,
    path: &'static str,
    /// `timeouts.request` of the route.
    request: &'static str,
    /// How long its own work takes, in microseconds.
    work: std::ops::Range<u64>,
}

/// From the caller's side to the far end.
pub(super) const PLACES: [Place; HOPS] = [
    Place { caller: "caller", name: "order", route: "place", path: "/orders", request: "2s", work: 1_000..3_000 },
    Place { caller: "order", name: "payment", route: "pay", path: "/payments/{id}", request: "1s", work: 2_000..6_000 },
    Place { caller: "payment", name: "bank", route: "charge", path: "/charges", request: "1s", work: 3_000..14_000 },
];

/// A service and its hopguard.
pub(super) struct Member {
    /// The service's name.
    pub(super) name: &'static str,
    /// The service.
    pub(super) state: Rc<State>,
    /// Where its hopguard takes calls to it.
    pub(super) door: SocketAddr,
    /// Where its hopguard takes calls that it makes; the last one makes none, and this is its door again.
    pub(super) out: SocketAddr,
    /// Its hopguard's admin address.
    pub(super) admin: SocketAddr,
    /// Its hopguard's whole policy.
    pub(super) policy: String,
    /// The last lines of its hopguard's access log.
    pub(super) lines: MemoryLines,
    /// Its hopguard.
    pub(super) app: App,
}

/// The running chain.
pub(super) struct Chain {
    /// Called by everybody.
    pub(super) order: Member,
    /// Called by order.
    pub(super) payment: Member,
    /// Called by payment.
    pub(super) bank: Member,
}

impl Chain {
    /// Starts services and hopguards from the far end on, so that each knows the next one's address. `rules` is a line of
    /// all their policies, or nothing.
    pub(super) async fn start(rules: &str) -> anyhow::Result<Self> {
        let [order, payment, bank] = &PLACES;
        let bank = bank.member(None, rules).await?;
        let payment = payment.member(Some((&PLACES[2], bank.door)), rules).await?;
        let order = order.member(Some((&PLACES[1], payment.door)), rules).await?;
        Ok(Self { order, payment, bank })
    }

    /// From the caller's side to the far end.
    pub(super) fn members(&self) -> [&Member; HOPS] {
        [&self.order, &self.payment, &self.bank]
    }

    /// Forgets lines of the access logs that nobody will read any more.
    pub(super) fn forget_old_lines(&self) {
        for member in self.members() {
            if let Ok(mut lines) = member.lines.lock() {
                let old = lines.len().saturating_sub(LINES);
                lines.drain(..old);
            }
        }
    }

    /// Takes all hopguards down, together, in at most half a second.
    pub(super) async fn stop(self) {
        tokio::join!(self.order.app.stop(GRACE), self.payment.app.stop(GRACE), self.bank.app.stop(GRACE));
    }
}

impl Place {
    /// Who calls whom, in words.
    pub(super) fn hop(&self) -> String {
        format!("{} -> {}", self.caller, self.name)
    }

    /// Starts the service and its hopguard.
    async fn member(&self, next: Option<(&Place, SocketAddr)>, rules: &str) -> anyhow::Result<Member> {
        let (listener, address) = service::bind().await.with_context(|| format!("the service {}", self.name))?;
        let policy = self.policy(address, next, rules);
        let model = load::load_str(&format!("{}.yaml", self.name), &policy)?;
        let settings = Settings {
            policy: None,
            service: self.name.to_owned(),
            admin: (Ipv4Addr::LOCALHOST, 0).into(),
            workers: 1,
            grace: GRACE,
            drain_delay: Duration::ZERO,
        };
        let (sink, lines) = Sink::memory();
        let app = App::start(settings, model, sink)?;
        let listeners = app.listeners();
        let address_of = |wanted| listeners.iter().find(|(name, _)| name == wanted).map(|(_, address)| *address);
        let door = address_of("in").context("the policy has a listener")?;
        let out = address_of("out").unwrap_or(door);
        let state = Rc::<State>::default();
        let service = Service {
            name: self.name,
            work: self.work.clone(),
            state: Rc::clone(&state),
            next: next.map(|(next, _)| (Client::new(out, next.name), path_to(next.name))),
            otherwise: if self.name == "order" { Otherwise::Later } else { Otherwise::Fail },
        };
        service.start(listener);
        Ok(Member { name: self.name, state, door, out, admin: app.admin(), policy, lines, app })
    }

    fn policy(&self, address: SocketAddr, next: Option<(&Place, SocketAddr)>, rules: &str) -> String {
        let name = self.name;
        let mut listeners = format!("  - {{ name: in, bind: 127.0.0.1:0, to: {name} }}\n");
        let mut destinations = self.destination("", address);
        if let Some((next, address)) = next {
            listeners.push_str("  - { name: out, bind: 127.0.0.1:0, forward: true }\n");
            destinations.push_str(&next.destination(&format!("    hosts: [{}]\n", next.name), address));
        }
        format!(
            "apiVersion: hopguard.dev/v1alpha1
kind: Policy
service: {name}
accessLog: {{ mode: errors, format: text }}
{rules}listeners:
{listeners}destinations:
{destinations}"
        )
    }

    fn destination(&self, hosts: &str, address: SocketAddr) -> String {
        let Self { name, route, path, request, .. } = self;
        format!(
            "  - name: {name}
{hosts}    endpoints: [{address}]
    routes:
      - name: {route}
        match: {{ methods: [POST], path: \"{path}\" }}
        timeouts: {{ request: {request} }}
"
        )
    }
}

/// The path with which a service is called.
pub(super) fn path_to(service: &str) -> &'static str {
    match service {
        "order" => "/orders",
        "payment" => "/payments/4711",
        _ => "/charges",
    }
}
