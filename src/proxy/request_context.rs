//! What is fixed for one exchange once its request is routed: policy view, route, deadline, correlation; and its record.
//!
//! An attempt reads it and adds to the record; only `deadline`, `correlation` and `proxy_status` set their own parts. The
//! context is dropped with the exchange, and then writes the record: one metric sample, one log line.

use std::rc::Rc;

use http::header::HeaderName;
use http::{HeaderValue, Request, header};
use tokio::time::Instant;

use crate::net::flow::Flow;
use crate::policy::model::{Direction, Route};
use crate::policy::snapshot::{CompiledDestination, RouteId};
use crate::proxy::correlation_state::Correlated;
use crate::proxy::downstream::DownstreamConnection;
use crate::proxy::headers::{ContentKind, HeaderScan};
use crate::proxy::local_reply::{LocalReply, LocalReplyKind};
use crate::proxy::timeout_state::{ExternalDeadline, TimeoutState};
use crate::proxy::worker_context::{PolicyView, WorkerContext};
use crate::rules::mode::{Mode, Modes, RuleName};
use crate::rules::proxy_status::ProxyStatus;
use crate::rules::retry::is_idempotent;
use crate::rules::timeouts::Timeouts;
use crate::runtime::drain::DrainPhase;
use crate::runtime::timer::Timer;
use crate::runtime::waker::InlineWaker;
use crate::telemetry::{Exchange, Protocol, RequestLine, Telemetry};
use crate::upstream::dial::ConnectOptions;
use crate::upstream::lifetime::LifetimeBounds;

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// The context of one exchange.
pub(super) struct RequestContext {
    record: Exchange,
    flow: Rc<Flow>,
    worker: Rc<WorkerContext>,
    view: Rc<PolicyView>,
    downstream: Rc<DownstreamConnection>,
    /// Wakes the task that drives the HTTP/1.1 upstream connection.
    waker: Rc<InlineWaker>,
    timer: Timer,
    times: TimeoutState,
    direction: Direction,
    route: Option<RouteId>,
    /// The method or an `Idempotency-Key` allows a repeat (RFC 9110, 9.2.2).
    is_idempotent: bool,
    /// The caller waits for `100 Continue` before it sends the body.
    expects_continue: bool,
    /// The caller takes trailers (`TE: trailers`).
    takes_trailers: bool,
    correlation: Option<Box<Correlated>>,
    proxy_status: Option<Box<ProxyStatus>>,
    /// The deadline that would have ended the exchange, were the rule enforced.
    dry_run_deadline: Option<Instant>,
    ended_at: Instant,
}

impl RequestContext {
    /// The context of a request whose head was complete when its flow began.
    pub(super) fn begin<B>(
        worker: &Rc<WorkerContext>,
        downstream: &Rc<DownstreamConnection>,
        flow: Rc<Flow>,
        request: &Request<B>,
        scan: &HeaderScan,
    ) -> Self {
        let now = flow.last_activity();
        let view = worker.view();
        let is_grpc = scan.kind == ContentKind::Grpc;
        let protocol = match request.version() {
            _ if is_grpc => Protocol::Grpc,
            http::Version::HTTP_2 => Protocol::Http2,
            _ => Protocol::Http1,
        };
        if is_grpc {
            flow.count_messages();
        }
        let direction = downstream.listener.values.direction;
        let hop = view.policy.unrouted(direction);
        let line = request_line(downstream, request, scan);
        downstream.begin();
        Self {
            record: Exchange::begin(Rc::clone(&worker.shard), now, hop, protocol, line),
            flow,
            times: TimeoutState { began: now, is_stream: false, is_grpc, deadline: None },
            timer: worker.timers.at(now + Timeouts::built_in().request.value),
            worker: Rc::clone(worker),
            view,
            downstream: Rc::clone(downstream),
            waker: downstream.waker(),
            direction,
            route: None,
            is_idempotent: scan.idempotency_key || is_idempotent(request.method().as_str()),
            expects_continue: false,
            takes_trailers: false,
            correlation: None,
            proxy_status: None,
            dry_run_deadline: None,
            ended_at: now,
        }
    }

    /// Sets the route, and with it the hop that the record counts for.
    pub(super) fn set_route(&mut self, route: RouteId, direction: Direction) {
        self.direction = direction;
        self.route = Some(route);
        let hops = &self.worker.shard.telemetry().hops;
        self.record.set_hop(self.view.policy.hop(hops, route, direction));
        if self.route().stream {
            self.set_stream();
        }
    }

    /// Notes what the caller said about `Expect` and `TE`.
    pub(super) fn set_expects_continue(&mut self, expects: bool) {
        self.expects_continue = expects;
    }

    /// Notes that the caller takes trailers.
    pub(super) fn set_takes_trailers(&mut self) {
        self.takes_trailers = true;
    }

    /// False before a route is known.
    pub(super) fn is_routed(&self) -> bool {
        self.route.is_some()
    }

    /// The route's identity. Before routing, that of the first one: nothing asks for it then.
    pub(super) fn route_id(&self) -> RouteId {
        self.route.unwrap_or_default()
    }

    /// The values of the route.
    pub(super) fn route(&self) -> &Route {
        self.view.policy.route(self.route_id())
    }

    /// The time limits of the route.
    pub(super) fn timeouts(&self) -> &Timeouts {
        &self.route().timeouts
    }

    /// One destination of the policy, by its position.
    pub(super) fn destination(&self, position: usize) -> &CompiledDestination {
        self.view.destination(position)
    }

    /// The name of the destination that the route belongs to, as metrics and log bear it.
    pub(super) fn destination_name(&self) -> &str {
        &self.view.destination(self.route_id().owner()).values.name
    }

    /// The mode of each rule.
    pub(super) fn modes(&self) -> &Modes {
        &self.view.policy.model.modes
    }

    /// The policy view with which the request began.
    pub(super) fn view(&self) -> &Rc<PolicyView> {
        &self.view
    }

    /// The worker that the exchange runs on.
    pub(super) fn worker(&self) -> &Rc<WorkerContext> {
        &self.worker
    }

    /// What the policy says about new connections to a destination.
    pub(super) fn connect_options(&self, destination: usize) -> ConnectOptions {
        let keep = &self.destination(destination).values.connections;
        ConnectOptions {
            connect_timeout: self.timeouts().connect.value,
            idle_timeout: keep.idle.value,
            max_idle: keep.max_idle.value as usize,
            max_header_count: keep.max_header_count.value,
            lifetime: LifetimeBounds {
                max_age: keep.max_age.value,
                max_requests: keep.max_requests.as_ref().map(|most| most.value),
            },
        }
    }

    /// Counters and log of the process.
    pub(super) fn telemetry(&self) -> &std::sync::Arc<Telemetry> {
        self.worker.shard.telemetry()
    }

    /// The connection that the request came over.
    pub(super) fn downstream(&self) -> &Rc<DownstreamConnection> {
        &self.downstream
    }

    /// The bytes that have passed so far, in both directions.
    pub(super) fn flow(&self) -> &Rc<Flow> {
        &self.flow
    }

    /// The waker for the upstream connection.
    pub(super) fn waker(&self) -> &Rc<InlineWaker> {
        &self.waker
    }

    /// The exchange's own timer.
    pub(super) fn timer(&mut self) -> &mut Timer {
        &mut self.timer
    }

    /// The timer, and what the time limits depend on.
    pub(super) fn timer_and_limits(&mut self) -> (&mut Timer, &TimeoutState, &Timeouts, &Flow) {
        let limits = &self.view.policy.route(self.route.unwrap_or_default()).timeouts;
        (&mut self.timer, &self.times, limits, &self.flow)
    }

    /// `inbound` or `outbound`, of the listener.
    pub(super) fn direction(&self) -> Direction {
        self.direction
    }

    /// When the head of the request was complete.
    pub(super) fn began(&self) -> Instant {
        self.times.began
    }

    /// What the time limits depend on.
    pub(super) fn timeout_state(&self) -> &TimeoutState {
        &self.times
    }

    /// True for a gRPC call.
    pub(super) fn is_grpc(&self) -> bool {
        self.times.is_grpc
    }

    /// When a unary call ends: at the policy's `request`, or earlier where its deadline is.
    pub(super) fn request_at(&self) -> Instant {
        self.times.request_at(self.timeouts())
    }

    /// Notes that the response is a stream.
    pub(super) fn set_stream(&mut self) {
        self.times.is_stream = true;
        self.flow.set_stream();
    }

    /// Adopts a deadline that the policy did not set.
    pub(super) fn set_deadline(&mut self, deadline: ExternalDeadline) {
        self.times.deadline = Some(deadline);
    }

    /// Sets or clears the deadline that a dry run would have enforced.
    pub(super) fn set_dry_run_deadline(&mut self, at: Option<Instant>) {
        self.dry_run_deadline = at;
    }

    /// True if the method or a key allows a repeat.
    pub(super) fn is_idempotent(&self) -> bool {
        self.is_idempotent
    }

    /// True if the caller waits for `100 Continue`.
    pub(super) fn expects_continue(&self) -> bool {
        self.expects_continue
    }

    /// True if the caller takes trailers.
    pub(super) fn takes_trailers(&self) -> bool {
        self.takes_trailers
    }

    /// The record so far.
    pub(super) fn record(&self) -> &Exchange {
        &self.record
    }

    /// The record, to be added to.
    pub(super) fn record_mut(&mut self) -> &mut Exchange {
        &mut self.record
    }

    /// How the exchange is correlated with others; `None` where the policy has listeners on one side of the app only.
    pub(super) fn correlation(&self) -> Option<&Correlated> {
        self.correlation.as_deref()
    }

    /// Sets the correlation, or what is kept of it.
    pub(super) fn set_correlation(&mut self, correlation: Option<Box<Correlated>>) {
        self.correlation = correlation;
    }

    /// The correlation, to be added to.
    pub(super) fn correlation_mut(&mut self) -> Option<&mut Correlated> {
        self.correlation.as_deref_mut()
    }

    /// What the response tells the hops above; `None` before that is decided.
    pub(super) fn proxy_status(&self) -> Option<&ProxyStatus> {
        self.proxy_status.as_deref()
    }

    /// Decides what the response tells the hops above.
    pub(super) fn set_proxy_status(&mut self, status: Option<ProxyStatus>) {
        self.proxy_status = status.map(Box::new);
    }

    /// When the head of the response was there; the end of the exchange once that is known.
    pub(super) fn ended_at(&self) -> Instant {
        self.ended_at
    }

    /// Notes the head of the response, or the end of the exchange.
    pub(super) fn set_ended_at(&mut self, now: Instant) {
        self.ended_at = now;
    }

    /// Counts and logs, once per call, that a rule in `dryRun` would have acted.
    pub(super) fn record_dry_run(&mut self, rule: RuleName) {
        let noted = &mut self.record.annotations_mut().dry_run;
        if noted.contains(&rule.as_str()) {
            return;
        }
        noted.push(rule.as_str());
        let owner = &self.view.destination(self.route_id().owner()).values.name;
        self.worker.shard.telemetry().dry_run(owner, rule.as_str());
    }

    /// Whether a failure further down than the upstream (`is_below`) is kept from counting against the upstream.
    pub(super) fn spares_upstream(&mut self, is_below: bool) -> bool {
        let mode = self.modes().blame_in_one_place.value;
        if is_below && mode == Mode::DryRun {
            self.record_dry_run(RuleName::BlameInOnePlace);
        }
        is_below && mode.is_enforced()
    }

    /// Whether the statement of the upstream's sidecar that its app never got the request is used.
    pub(super) fn believes_unsent(&mut self, is_said: bool) -> bool {
        let mode = self.modes().unsent.value;
        if is_said && mode == Mode::DryRun {
            self.record_dry_run(RuleName::Unsent);
        }
        is_said && mode.is_enforced()
    }
}

impl RequestContext {
    /// The exchange is over: what that means for calls which the app still makes for it.
    fn end_correlation(&self) {
        let (Direction::Inbound, Some(correlated)) = (self.direction, &self.correlation) else { return };
        let abandoned = &self.worker.abandoned;
        if self.record.status().is_none() && self.is_routed() {
            correlated.abandon(abandoned, self.would_end_at(), Instant::now());
        } else if self.record.status().is_some() && self.record.refusal().is_none() {
            correlated.answered(abandoned);
        }
    }

    /// When an inbound call whose caller has gone would have ended.
    fn would_end_at(&self) -> Option<Instant> {
        match self.times.is_unary() {
            true => Some(self.request_at()),
            // A stream lives longer, unless it came with a deadline of its own.
            false => self.times.stream_deadline(),
        }
    }
}

fn request_line<B>(downstream: &DownstreamConnection, request: &Request<B>, scan: &HeaderScan) -> RequestLine {
    let headers = request.headers();
    RequestLine {
        method: request.method().clone(),
        uri: request.uri().clone(),
        host: (scan.hosts > 0).then(|| headers.get(header::HOST).cloned()).flatten(),
        caller: Some(downstream.peer),
        traceparent: scan.trace.then(|| headers.get(TRACEPARENT).cloned()).flatten(),
    }
}

/// The request line of bytes that could not be parsed as a request.
pub(super) fn unparsed_request(downstream: &DownstreamConnection) -> RequestLine {
    RequestLine {
        method: http::Method::from_bytes(b"-").unwrap_or_default(),
        uri: http::Uri::from_static("*"),
        host: None::<HeaderValue>,
        caller: Some(downstream.peer),
        traceparent: None,
    }
}

impl Drop for RequestContext {
    fn drop(&mut self) {
        let (sent, received) = (self.flow.request.bytes(), self.flow.response.bytes());
        self.record.set_body_bytes(sent, received);
        if self.worker.connections.phase() == DrainPhase::Over {
            let detail = "the grace time ended before the call";
            self.record.refuse(LocalReply::plain(LocalReplyKind::Draining, detail).record());
        }
        // For a caller that left before its response there is no other point at which the deadline is compared.
        if self.flow.request.is_over_limit() && !self.flow.request.fails_by_limit() {
            self.record_dry_run(RuleName::MaxBodySize);
        }
        if self.dry_run_deadline.is_some_and(|at| Instant::now() > at) {
            self.record_dry_run(RuleName::Deadline);
        }
        self.end_correlation();
        self.flow.finish();
        self.downstream.finish(self.ended_at);
    }
}
