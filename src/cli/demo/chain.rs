//! The chain of the demo: order, payment and bank, each behind a hopguard of its own with a policy of its own.

use std::cell::Cell;
use std::net::{Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context;

use crate::app::App;
use crate::cli::demo::client::Client;
use crate::cli::demo::service::Service;
use crate::config::Settings;
use crate::policy::load;
use crate::telemetry::{HopSummary, MemoryLines, Sink};

/// How many hops there are.
pub(super) const HOPS: usize = 3;

/// How long calls in flight may take to finish at the end of the demo.
const GRACE: Duration = Duration::from_millis(500);

/// What each hop has counted, in the order of the hops; nothing for a hop without a call.
pub(super) type Reading = Vec<Option<HopSummary>>;

/// One service's place in the chain.
struct Place {
    caller: &'static str,
    name: &'static str,
    route: &'static str,
    path: &'static str,
    /// `timeouts.request` of the route.
    request: &'static str,
    /// How long the service's own work takes, in microseconds.
    work: std::ops::Range<u64>,
}

/// From the caller's side to the far end.
const PLACES: [Place; HOPS] = [
    Place { caller: "caller", name: "order", route: "place", path: "/orders", request: "1s", work: 1_000..3_000 },
    Place {
        caller: "order",
        name: "payment",
        route: "pay",
        path: "/payments/{id}",
        request: "300ms",
        work: 2_000..6_000,
    },
    Place { caller: "payment", name: "bank", route: "charge", path: "/charges", request: "200ms", work: 3_000..14_000 },
];

/// One hop: the hopguard in front of a service, and what it sees.
pub(super) struct Hop {
    /// Who calls whom, in words.
    pub(super) name: String,
    /// The route's name in the policy.
    pub(super) route: &'static str,
    /// The hopguard's address for callers.
    pub(super) door: SocketAddr,
    /// Its admin address.
    pub(super) admin: SocketAddr,
    /// The service's name.
    pub(super) service: &'static str,
    /// Its whole policy.
    pub(super) policy: String,
    /// The lines of its access log.
    pub(super) lines: MemoryLines,
    app: App,
}

/// The running chain.
pub(super) struct Chain {
    /// From the caller's side to the far end.
    pub(super) hops: Vec<Hop>,
    /// How much longer payment's work takes at the moment.
    pub(super) payment_slower: Rc<Cell<Duration>>,
}

impl Chain {
    /// Starts services and hopguards from the far end on, so that each knows the next one's address.
    pub(super) async fn start() -> anyhow::Result<Self> {
        let payment_slower = Rc::new(Cell::new(Duration::ZERO));
        let mut hops: Vec<Hop> = Vec::with_capacity(HOPS);
        for place in PLACES.iter().rev() {
            let next = hops.last().map(|hop| (Client::new(hop.door, hop.service), path_to(hop.service)));
            let slower = if place.name == "payment" { Rc::clone(&payment_slower) } else { Rc::default() };
            let service = Service { name: place.name, work: place.work.clone(), slower, next };
            let address = service.start().await.with_context(|| format!("the service {}", place.name))?;
            hops.push(place.hop(address)?);
        }
        hops.reverse();
        Ok(Self { hops, payment_slower })
    }

    /// What the hops have counted so far.
    pub(super) fn read(&self) -> Reading {
        let read = |hop: &Hop| hop.app.telemetry().summaries().into_iter().find(|one| &*one.labels.route == hop.route);
        self.hops.iter().map(read).collect()
    }

    /// Takes all hopguards down, together, in at most half a second.
    pub(super) async fn stop(self) {
        let mut stops = self.hops.into_iter().map(|hop| hop.app.stop(GRACE));
        if let (Some(first), Some(second), Some(third)) = (stops.next(), stops.next(), stops.next()) {
            tokio::join!(first, second, third);
        }
    }
}

impl Hop {
    /// The line of the policy that has the route's timeout, as `FILE:LINE`.
    pub(super) fn timeout_line(&self) -> String {
        let line = self.policy.lines().position(|line| line.contains("timeouts:")).map_or(0, |index| index + 1);
        format!("{}.yaml:{line}", self.service)
    }
}

impl Place {
    /// The hopguard in front of the service at `address`.
    fn hop(&self, address: SocketAddr) -> anyhow::Result<Hop> {
        let policy = self.policy(address);
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
        let (_, door) = app.listeners().pop().context("the policy has a listener")?;
        Ok(Hop {
            name: format!("{} -> {}", self.caller, self.name),
            route: self.route,
            door,
            admin: app.admin(),
            service: self.name,
            policy,
            lines,
            app,
        })
    }

    fn policy(&self, address: SocketAddr) -> String {
        let Self { name, route, path, request, .. } = self;
        format!(
            "apiVersion: hopguard.dev/v1alpha1
kind: Policy
service: {name}
accessLog: {{ mode: errors, format: text }}
listeners:
  - {{ name: in, bind: 127.0.0.1:0, to: {name} }}
destinations:
  - name: {name}
    endpoints: [{address}]
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
