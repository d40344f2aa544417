//! The chain of the demo: order, payment and bank, each with its own hopguard for inbound and outbound calls.
//!
//! A call goes caller -> hopguard -> order -> hopguard -> hopguard -> payment -> hopguard -> hopguard -> bank. The hopguard of
//! the calling service counts a hop: order -> payment is counted by order's hopguard. The caller of order has no hopguard, so
//! order's own hopguard counts the first hop.

use std::net::{Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context;

use crate::app::App;
use crate::cli::demo::client::Client;
use crate::cli::demo::service::{self, OnFailure, Service, ServiceState};
use crate::config::Settings;
use crate::policy::load;
use crate::telemetry::{MemoryLines, Sink};

/// Number of services, and of hops.
pub(super) const HOP_COUNT: usize = 3;

/// Grace time for calls in flight at the end of the demo.
const GRACE: Duration = Duration::from_millis(500);

/// Maximum number of lines kept of each access log.
const LINES: usize = 100;

/// One hop of the chain: a service and the calls to it.
pub(super) struct HopSpec {
    /// The calling service.
    caller: &'static str,
    /// The called service.
    pub(super) service: &'static str,
    /// The route of these calls in the policy.
    pub(super) route: &'static str,
    path: &'static str,
    /// `timeouts.request` of the route.
    request: &'static str,
    /// Range of the service's own work time, in microseconds.
    work: std::ops::Range<u64>,
}

/// The hops from the caller to the bank.
pub(super) const HOPS: [HopSpec; HOP_COUNT] = [
    HopSpec { caller: "caller", service: "order", route: "place", path: "/orders", request: "2s", work: 1_000..3_000 },
    HopSpec {
        caller: "order",
        service: "payment",
        route: "pay",
        path: "/payments/{id}",
        request: "1s",
        work: 2_000..6_000,
    },
    HopSpec {
        caller: "payment",
        service: "bank",
        route: "charge",
        path: "/charges",
        request: "1s",
        work: 3_000..14_000,
    },
];

/// A running service with its hopguard.
pub(super) struct ChainNode {
    /// Name of the service.
    pub(super) name: &'static str,
    /// State of the service.
    pub(super) state: Rc<ServiceState>,
    /// Inbound listener: calls to the service.
    pub(super) inbound: SocketAddr,
    /// Outbound listener: calls that the service makes. The bank makes none; there it is the inbound listener.
    pub(super) outbound: SocketAddr,
    /// Admin address of the hopguard.
    pub(super) admin: SocketAddr,
    /// Complete policy of the hopguard.
    pub(super) policy: String,
    /// The last lines of the access log.
    pub(super) lines: MemoryLines,
    /// The hopguard.
    pub(super) app: App,
}

/// The running chain.
pub(super) struct Chain {
    /// Called by the load.
    pub(super) order: ChainNode,
    /// Called by order.
    pub(super) payment: ChainNode,
    /// Called by payment.
    pub(super) bank: ChainNode,
}

impl Chain {
    /// Starts services and hopguards from the bank to order, because each policy contains the address of the next hopguard.
    /// `rules` is a line of all policies, with its line end, or empty.
    ///
    /// # Errors
    /// If an address or a thread cannot be had.
    pub(super) async fn start(rules: &str) -> anyhow::Result<Self> {
        let [order, payment, bank] = &HOPS;
        let bank = bank.start(None, rules).await?;
        let payment = payment.start(Some((&HOPS[2], bank.inbound)), rules).await?;
        let order = order.start(Some((&HOPS[1], payment.inbound)), rules).await?;
        Ok(Self { order, payment, bank })
    }

    /// The nodes from order to the bank.
    pub(super) fn nodes(&self) -> [&ChainNode; HOP_COUNT] {
        [&self.order, &self.payment, &self.bank]
    }

    /// Removes all but the last [`LINES`] lines of each access log.
    pub(super) fn trim_access_logs(&self) {
        for node in self.nodes() {
            if let Ok(mut lines) = node.lines.lock() {
                let old = lines.len().saturating_sub(LINES);
                lines.drain(..old);
            }
        }
    }

    /// Stops all hopguards at the same time; takes at most half a second.
    pub(super) async fn stop(self) {
        tokio::join!(self.order.app.stop(GRACE), self.payment.app.stop(GRACE), self.bank.app.stop(GRACE));
    }
}

impl HopSpec {
    /// `CALLER -> SERVICE`.
    pub(super) fn title(&self) -> String {
        format!("{} -> {}", self.caller, self.service)
    }

    /// Starts the service and its hopguard.
    async fn start(&self, next: Option<(&HopSpec, SocketAddr)>, rules: &str) -> anyhow::Result<ChainNode> {
        let (listener, address) = service::bind().await.with_context(|| format!("the service {}", self.service))?;
        let policy = self.policy(address, next, rules);
        let model = load::load_str(&format!("{}.yaml", self.service), &policy)?;
        let settings = Settings {
            policy: None,
            service: self.service.to_owned(),
            admin: (Ipv4Addr::LOCALHOST, 0).into(),
            workers: 1,
            grace: GRACE,
            drain_delay: Duration::ZERO,
        };
        let (sink, lines) = Sink::memory();
        let app = App::start(settings, model, sink)?;
        let listeners = app.listeners();
        let address_of = |wanted| listeners.iter().find(|(name, _)| name == wanted).map(|(_, address)| *address);
        let inbound = address_of("in").context("the policy has a listener")?;
        let outbound = address_of("out").unwrap_or(inbound);
        let state = Rc::<ServiceState>::default();
        let service = Service {
            name: self.service,
            work: self.work.clone(),
            state: Rc::clone(&state),
            next: next.map(|(next, _)| (Client::new(outbound, next.service), path_to(next.service))),
            on_failure: if self.service == "order" { OnFailure::AcceptForLater } else { OnFailure::Fail },
        };
        service.start(listener);
        Ok(ChainNode { name: self.service, state, inbound, outbound, admin: app.admin(), policy, lines, app })
    }

    fn policy(&self, address: SocketAddr, next: Option<(&HopSpec, SocketAddr)>, rules: &str) -> String {
        let name = self.service;
        let mut listeners = format!("  - {{ name: in, bind: 127.0.0.1:0, to: {name} }}\n");
        let mut destinations = self.destination("", address);
        if let Some((next, address)) = next {
            listeners.push_str("  - { name: out, bind: 127.0.0.1:0, forward: true }\n");
            destinations.push_str(&next.destination(&format!("    hosts: [{}]\n", next.service), address));
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
        let Self { service: name, route, path, request, .. } = self;
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

/// The path of the calls to a service.
pub(super) fn path_to(service: &str) -> &'static str {
    match service {
        "order" => "/orders",
        "payment" => "/payments/4711",
        _ => "/charges",
    }
}
