//! What one exchange holds while it is under way: its record, its place in flight, its connection, its timer.
//!
//! It travels with the request, then with the answer's body; dropping it, at whatever point, gives
//! everything back and writes the record.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use http::header::HeaderName;
use http::{HeaderValue, Request, header};
use tokio::time::Instant;

use crate::net::body::RequestBody;
use crate::net::flow::Flow;
use crate::policy::model::{self, Direction};
use crate::proxy::downstream::DownstreamConnection;
use crate::proxy::headers::{self, HeaderScan};
use crate::proxy::held::{Correlated, PendingFault, Permits, ReplayableRequest};
use crate::proxy::local_reply::{LocalReply, LocalReplyKind};
use crate::proxy::timeouts::TimeoutState;
use crate::proxy::worker_context::{PolicyView, WorkerContext};
use crate::rules::limits::ConcurrencyPermit;
use crate::rules::mode::{Mode, RuleName};
use crate::rules::proxy_status::ProxyStatus;
use crate::rules::retry::is_idempotent;
use crate::runtime::drain::DrainPhase;
use crate::runtime::timer::Timer;
use crate::runtime::waker::InlineWaker;
use crate::telemetry::{Exchange, Protocol, RequestLine};
use crate::upstream::cluster::{Cluster, Health};
use crate::upstream::endpoint::Endpoint;
use crate::upstream::pool::{Lease, Pool};

/// One exchange under way.
pub struct RequestContext {
    /// What will be said about it.
    pub record: Exchange,
    /// What has passed so far.
    pub flow: Rc<Flow>,
    /// What it is waited for.
    pub patience: TimeoutState,
    /// The worker that it runs on.
    pub worker: Rc<WorkerContext>,
    /// The policy that it began with.
    pub view: Rc<PolicyView>,
    /// The connection that it came over.
    pub caller: Rc<DownstreamConnection>,
    /// The waker that its upstream connection is moved with.
    pub waker: Rc<InlineWaker>,
    /// Its timer.
    pub timer: Timer,
    /// The request as it goes out, until it has been handed to a connection.
    pub request: Option<Request<RequestBody>>,
    /// The endpoint that a connection is to be opened to.
    pub picked: Option<Rc<Endpoint>>,
    /// The upstream connection, from the moment there is one.
    pub lease: Option<Lease>,
    /// Fields that the answer's `ConnectionUse` named; they may not pass as trailers.
    pub named: Vec<HeaderName>,
    /// The request expects `100 Continue`.
    pub expects: bool,
    /// The request says that its sender takes trailers.
    pub takes_trailers: bool,
    /// What the upstream said about keeping its connection, in seconds.
    pub keep_alive: Option<u32>,
    /// When the head of the answer was there; the end of the exchange once that is known.
    pub over_at: Instant,
    /// Whose call it is, seen from our service.
    pub direction: Direction,
    /// What another try needs; `None` where there can be none.
    pub spare: Option<Box<ReplayableRequest>>,
    /// Which try this is.
    pub attempt: u16,
    /// Where the present try goes.
    pub endpoint: Option<Rc<Endpoint>>,
    /// Where the tries before went.
    pub tried: Vec<SocketAddr>,
    /// The present try is on a connection that had been used before, and nothing but its close has ended the try.
    pub reused: bool,
    /// The present try has ended without that anybody can have seen the request.
    pub unsent: bool,
    /// That was so because its connection came to its end.
    pub leaving: bool,
    /// Somebody may have seen the request in one of the tries before.
    pub was_seen: bool,
    /// The method or a key of the request says that it may be repeated.
    pub is_safe: bool,
    /// What the present try says about the callee is still to be judged.
    pub trial: Permits,
    /// What a fault of the policy has left to the present try.
    pub fault: Option<Box<PendingFault>>,
    /// How the exchange hangs together with others.
    pub ties: Option<Box<Correlated>>,
    /// What its answer tells the sidecars above; once there is one, it is decided, though it may say nothing.
    pub mark: Option<Box<ProxyStatus>>,
    /// The deadline that would have ended it, were the rule enforced.
    pub late_at: Option<Instant>,
    destination: usize,
    route: usize,
    place: Option<(Option<ConcurrencyPermit>, Rc<Pool>)>,
}

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

impl RequestContext {
    /// An exchange whose head was complete when its flow began. The destination is set later, before anything asks for it.
    pub fn begin<B>(
        worker: &Rc<WorkerContext>,
        caller: &Rc<DownstreamConnection>,
        flow: Rc<Flow>,
        request: &Request<B>,
        present: &HeaderScan,
    ) -> Box<Self> {
        let now = flow.last();
        let view = worker.view();
        let grpc = present.kind == headers::ContentKind::Grpc;
        let protocol = match request.version() {
            _ if grpc => Protocol::Grpc,
            http::Version::HTTP_2 => Protocol::Http2,
            _ => Protocol::Http1,
        };
        if grpc {
            flow.count_messages();
        }
        let hop = view.policy.unrouted(caller.listener.values.direction);
        let line = request_line(caller, request, present);
        caller.begin();
        Box::new(Self {
            record: Exchange::begin(Rc::clone(&worker.shard), now, hop, protocol, line),
            flow,
            patience: TimeoutState { began: now, try_began: now, answered: false, stream: false, grpc, until: None },
            timer: worker.timers.at(now + crate::rules::timeouts::Timeouts::built_in().request.value),
            worker: Rc::clone(worker),
            view,
            caller: Rc::clone(caller),
            request: None,
            picked: None,
            waker: caller.waker(),
            lease: None,
            named: Vec::new(),
            expects: false,
            takes_trailers: false,
            keep_alive: None,
            over_at: now,
            direction: caller.listener.values.direction,
            spare: None,
            attempt: 0,
            endpoint: None,
            tried: Vec::new(),
            reused: false,
            unsent: false,
            leaving: false,
            was_seen: false,
            is_safe: present.idempotency_key || is_idempotent(request.method().as_str()),
            trial: Permits::default(),
            fault: None,
            ties: None,
            mark: None,
            late_at: None,
            destination: usize::MAX,
            route: 0,
            place: None,
        })
    }

    /// Names the destination and the route that the request meets.
    pub fn met(&mut self, destination: usize, route: usize, direction: Direction) {
        self.destination = destination;
        self.route = route;
        self.direction = direction;
        let hops = &self.worker.shard.telemetry().hops;
        self.record.set_hop(self.view.policy.hop(hops, destination, route, direction));
        self.patience.stream = self.view.destination(destination).values.routes[route].stream;
    }

    /// True before a destination is known.
    pub fn is_unrouted(&self) -> bool {
        self.destination == usize::MAX
    }

    /// Notes that a rule in `warn` would have acted: for the log line, and for the metric. Once for each call.
    pub fn would(&mut self, rule: RuleName) {
        let noted = &mut self.record.annotations_mut().dry_run;
        if noted.contains(&rule.as_str()) {
            return;
        }
        noted.push(rule.as_str());
        let name = &self.view.destination(self.destination).values.name;
        self.worker.shard.telemetry().dry_run(name, rule.as_str());
    }

    /// The position of the destination.
    pub fn destination(&self) -> usize {
        self.destination
    }

    /// The position of the route in its destination.
    pub fn route_position(&self) -> usize {
        self.route
    }

    /// The values of the destination.
    pub fn destination_values(&self) -> &model::Destination {
        &self.view.destination(self.destination).values
    }

    /// The values of the route.
    pub fn route(&self) -> &model::Route {
        &self.destination_values().routes[self.route]
    }

    /// Whether a failure that happened further down than the destination (`is_below`) is kept from counting here.
    pub fn spares(&mut self, is_below: bool) -> bool {
        let mode = self.view.policy.model.modes.blame_in_one_place.value;
        if is_below && mode == Mode::DryRun {
            self.would(RuleName::BlameInOnePlace);
        }
        is_below && mode.is_enforced()
    }

    /// Whether the word of the callee's sidecar that its app never got the request (`is_said`) is taken.
    pub fn believes_unsent(&mut self, is_said: bool) -> bool {
        let mode = self.view.policy.model.modes.unsent.value;
        if is_said && mode == Mode::DryRun {
            self.would(RuleName::Unsent);
        }
        is_said && mode.is_enforced()
    }

    /// When the present try went to its connection.
    pub fn sent_at(&self) -> Instant {
        let lost = self.fault.as_ref().map_or(Duration::ZERO, |fault| fault.lost);
        self.patience.try_began + lost
    }

    /// What the failures of the destination have led to; `None` before the exchange has a place there.
    pub fn health(&self) -> Option<&Health> {
        self.cluster().map(|cluster| &cluster.health)
    }

    /// Where the exchange goes; `None` before it has a place there.
    pub fn cluster(&self) -> Option<&Cluster> {
        self.place.as_ref().map(|(_, pool)| &*pool.cluster)
    }

    /// Takes up the place in flight (none where `limits` is not enforced), which is given back at the end.
    pub fn hold(&mut self, pass: Option<ConcurrencyPermit>, pool: Rc<Pool>) {
        pool.metrics.in_flight.increment();
        self.place = Some((pass, pool));
    }

    /// Says what the end of an inbound call means for what the app still calls.
    fn leave(&self) {
        let (Direction::Inbound, Some(ties)) = (self.direction, &self.ties) else { return };
        if self.record.status().is_none() && !self.is_unrouted() {
            ties.abandon(&self.worker.late, self.ends_at(), Instant::now());
        } else if self.record.status().is_some() && self.record.refusal().is_none() {
            ties.answered(&self.worker.late);
        }
    }

    /// When an inbound call that nobody waits for would have been over.
    fn ends_at(&self) -> Option<Instant> {
        match self.patience.is_unary() {
            true => Some(self.patience.request_at(&self.route().timeouts)),
            // It may be a stream, which lives longer, unless it came with a deadline of its own.
            false => self.patience.until.filter(|_| self.patience.grpc).map(|until| until.at),
        }
    }
}

fn request_line<B>(caller: &DownstreamConnection, request: &Request<B>, present: &HeaderScan) -> RequestLine {
    let fields = request.headers();
    RequestLine {
        method: request.method().clone(),
        uri: request.uri().clone(),
        host: (present.hosts > 0).then(|| fields.get(header::HOST).cloned()).flatten(),
        caller: Some(caller.peer),
        traceparent: present.trace.then(|| fields.get(TRACEPARENT).cloned()).flatten(),
    }
}

/// A request of which nothing is known but that it could not be read.
pub fn unread(caller: &DownstreamConnection) -> RequestLine {
    RequestLine {
        method: http::Method::from_bytes(b"-").unwrap_or_default(),
        uri: http::Uri::from_static("*"),
        host: None::<HeaderValue>,
        caller: Some(caller.peer),
        traceparent: None,
    }
}

impl Drop for RequestContext {
    fn drop(&mut self) {
        self.record.set_body_bytes(self.flow.request.bytes(), self.flow.response.bytes());
        if self.worker.connections.phase() == DrainPhase::Over {
            let detail = "the grace time was over before the call was";
            self.record.refuse(LocalReply::plain(LocalReplyKind::Draining, detail).record());
        }
        // A caller that left before its answer was there has no other end than this.
        if self.late_at.is_some_and(|at| Instant::now() > at) {
            self.would(RuleName::Deadline);
        }
        self.leave();
        if let Some((_, pool)) = &self.place {
            pool.metrics.in_flight.decrement();
        }
        self.flow.finish();
        self.caller.finish(self.over_at);
    }
}
