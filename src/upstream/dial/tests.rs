//! Unit tests of dialling in virtual time, over streams in memory.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::net::SocketAddr;

use tokio::io::{DuplexStream, duplex};
use tokio::task::LocalSet;
use tokio::time::sleep;

use super::*;
use crate::telemetry::{Sink, Telemetry};
use crate::upstream::cluster::{Cluster, ClusterIdentity, Health};
use crate::upstream::connect::Connect;
use crate::upstream::spec;
use crate::upstream::waiters::{ConnectionWait, WaitEvent};

/// What becomes of one attempt to connect.
#[derive(Clone, Copy)]
enum Attempt {
    AcceptedAfter(u64),
    RefusedAfter(u64),
    Unanswered,
}

use Attempt::{AcceptedAfter, RefusedAfter, Unanswered};

/// Connects as a script says, the last line of it for ever; notes when it was asked, in milliseconds since the test began,
/// and by which port.
struct Script {
    began: Instant,
    attempts: RefCell<VecDeque<Attempt>>,
    asked: RefCell<Vec<(u16, u128)>>,
    /// The other ends of the streams.
    ends: Rc<RefCell<Vec<DuplexStream>>>,
}

impl Script {
    fn new(attempts: &[Attempt]) -> Rc<Self> {
        Rc::new(Self {
            began: Instant::now(),
            attempts: RefCell::new(attempts.iter().copied().collect()),
            asked: RefCell::default(),
            ends: Rc::default(),
        })
    }

    fn asked_at(&self) -> Vec<u128> {
        self.asked.borrow().iter().map(|(_, at)| *at).collect()
    }
}

impl Connect for Script {
    fn connect(&self, to: SocketAddr) -> ConnectFuture {
        self.asked.borrow_mut().push((to.port(), self.began.elapsed().as_millis()));
        let mut attempts = self.attempts.borrow_mut();
        let attempt = if attempts.len() > 1 { attempts.pop_front() } else { attempts.front().copied() };
        let ends = Rc::clone(&self.ends);
        Box::pin(async move {
            match attempt {
                Some(AcceptedAfter(millis)) => sleep(Duration::from_millis(millis)).await,
                Some(RefusedAfter(millis)) => {
                    sleep(Duration::from_millis(millis)).await;
                    return Err(ConnectError::Network(std::io::ErrorKind::ConnectionRefused.into()));
                }
                Some(Unanswered) | None => std::future::pending().await,
            }
            let (ours, theirs) = duplex(1024);
            ends.borrow_mut().push(theirs);
            Ok(Io::boxed(ours))
        })
    }
}

/// A pool with endpoints at these ports.
fn pool(script: &Rc<Script>, ports: &[u16]) -> Rc<Pool> {
    let address = |port: &u16| spec::EndpointSpec::Address(SocketAddr::from(([127, 0, 0, 1], *port)));
    let identity = ClusterIdentity {
        name: "app".into(),
        endpoints: ports.iter().map(address).collect(),
        protocol: spec::UpstreamProtocol::Auto,
        tls: None,
        host: "app".into(),
    };
    let cluster = Cluster::new(identity, Health::new(Instant::now()), &Default::default()).unwrap();
    let metrics = Telemetry::new(Sink::memory().0).shard(0).destination("app");
    Rc::new(Pool::new(cluster, Rc::clone(script) as Rc<dyn Connect>, Rc::default(), metrics))
}

/// The same with one endpoint, and that endpoint.
fn single(script: &Rc<Script>) -> (Rc<Pool>, Rc<Endpoint>) {
    let pool = pool(script, &[80]);
    let endpoint = pool.pick(Instant::now(), &[], true).unwrap();
    (pool, endpoint)
}

const OPTIONS: ConnectOptions = ConnectOptions {
    connect_timeout: Duration::from_secs(2),
    idle_timeout: Duration::from_secs(60),
    max_idle: 256,
    max_header_count: 256,
    lifetime: LifetimeBounds { max_age: Duration::from_secs(300), max_requests: None },
};

/// A call that waits at one endpoint.
fn call(pool: &Rc<Pool>, endpoint: &Rc<Endpoint>, preference: ProtocolPreference) -> ConnectionWait {
    let mut wait = ConnectionWait::new(pool, preference, OPTIONS, true);
    wait.wait_at(endpoint, false);
    wait
}

fn http1(pool: &Rc<Pool>, endpoint: &Rc<Endpoint>) -> ConnectionWait {
    call(pool, endpoint, ProtocolPreference::Http1)
}

async fn connection(wait: &mut ConnectionWait) -> Lease {
    match wait.next().await {
        WaitEvent::Connection(lease) => lease,
        WaitEvent::Failed(_, error) => panic!("{error}"),
    }
}

/// What a call gets without further waiting.
async fn at_once(wait: &mut ConnectionWait) -> Option<WaitEvent> {
    tokio::select! { biased; event = wait.next() => Some(event), () = tokio::task::yield_now() => None }
}

async fn run<T>(test: impl Future<Output = T>) -> T {
    LocalSet::new().run_until(test).await
}

#[tokio::test(start_paused = true)]
async fn a_connection_whose_call_left_serves_the_next_call() {
    run(async {
        let script = Script::new(&[AcceptedAfter(100)]);
        let (pool, endpoint) = single(&script);
        drop(http1(&pool, &endpoint));
        assert_eq!(pool.metrics.pending.value(), 1);
        sleep(Duration::from_millis(150)).await;
        let mut cx = Context::from_waker(Waker::noop());
        let lease = pool.checkout(&endpoint, ProtocolPreference::Http1, Instant::now(), &mut cx);
        assert!(lease.is_some_and(|lease| lease.is_http1()));
        assert_eq!((script.ends.borrow().len(), pool.metrics.pending.value()), (1, 0));
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn the_oldest_call_takes_a_connection_that_another_call_gives_back() {
    run(async {
        let script = Script::new(&[AcceptedAfter(0), Unanswered]);
        let (pool, endpoint) = single(&script);
        let lease = connection(&mut http1(&pool, &endpoint)).await;
        let (mut second, mut third) = (http1(&pool, &endpoint), http1(&pool, &endpoint));
        assert_eq!(pool.metrics.waiting.value(), 2);
        pool.keep(lease, OPTIONS);
        assert!(at_once(&mut third).await.is_none());
        let lease = connection(&mut second).await;
        assert!(lease.reused);
        drop(second);
        pool.keep(lease, OPTIONS);
        assert!(connection(&mut third).await.reused);
        assert_eq!((script.ends.borrow().len(), pool.metrics.idle.value()), (1, 0));
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_connection_handed_to_a_call_that_leaves_goes_to_the_next_one() {
    run(async {
        let script = Script::new(&[AcceptedAfter(0), Unanswered]);
        let (pool, endpoint) = single(&script);
        let lease = connection(&mut http1(&pool, &endpoint)).await;
        let (second, mut third) = (http1(&pool, &endpoint), http1(&pool, &endpoint));
        pool.keep(lease, OPTIONS);
        drop(second);
        assert!(connection(&mut third).await.reused);
        drop(third);
        assert_eq!((pool.metrics.waiting.value(), pool.metrics.open.value()), (0, 0));
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_call_that_needs_a_new_connection_leaves_used_ones_to_others_until_it_takes_them() {
    run(async {
        let script = Script::new(&[AcceptedAfter(0), Unanswered]);
        let (pool, endpoint) = single(&script);
        let lease = connection(&mut http1(&pool, &endpoint)).await;
        let mut fresh = ConnectionWait::new(&pool, ProtocolPreference::Http1, OPTIONS, false);
        fresh.wait_at(&endpoint, false);
        let mut other = http1(&pool, &endpoint);
        pool.keep(lease, OPTIONS);
        assert!(at_once(&mut fresh).await.is_none());
        let lease = connection(&mut other).await;
        fresh.take_reused();
        pool.keep(lease, OPTIONS);
        assert!(connection(&mut fresh).await.reused);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn an_unanswered_connection_request_gets_others_beside_it() {
    run(async {
        let script = Script::new(&[AcceptedAfter(1100), Unanswered]);
        let (pool, endpoint) = single(&script);
        let mut wait = http1(&pool, &endpoint);
        assert!(!connection(&mut wait).await.reused);
        assert_eq!((script.began.elapsed().as_millis(), script.asked_at()), (1100, vec![0, 250]));
        drop(wait);
        let script = Script::new(&[Unanswered, AcceptedAfter(5)]);
        let (pool, endpoint) = single(&script);
        connection(&mut http1(&pool, &endpoint)).await;
        assert_eq!((script.began.elapsed().as_millis(), script.asked_at()), (255, vec![0, 250]));
        let script = Script::new(&[Unanswered]);
        let (pool, endpoint) = single(&script);
        let _wait = http1(&pool, &endpoint);
        sleep(Duration::from_secs(5)).await;
        assert_eq!(script.asked_at().iter().filter(|at| **at < 2000).collect::<Vec<_>>(), [&0, &250, &1250]);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_call_that_can_go_elsewhere_causes_no_second_connection_request() {
    run(async {
        let script = Script::new(&[Unanswered]);
        let (pool, endpoint) = single(&script);
        let mut wait = ConnectionWait::new(&pool, ProtocolPreference::Http1, OPTIONS, true);
        wait.wait_at(&endpoint, true);
        sleep(Duration::from_millis(1900)).await;
        assert_eq!(script.asked_at(), [0]);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn connections_being_opened_are_limited_and_the_limit_follows_what_is_accepted() {
    run(async {
        let script = Script::new(&[AcceptedAfter(100)]);
        let (pool, endpoint) = single(&script);
        let mut calls: Vec<_> = (0..100).map(|_| http1(&pool, &endpoint)).collect();
        sleep(Duration::from_millis(50)).await;
        assert_eq!(script.asked_at().len(), 16);
        for call in &mut calls {
            connection(call).await;
        }
        let round = |at: u128| script.asked_at().iter().filter(|asked| **asked == at).count();
        assert_eq!([0, 100, 200, 300].map(round), [16, 32, 52, 0]);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn after_an_outage_the_first_connections_are_few() {
    run(async {
        let script = Script::new(&[Unanswered]);
        let (pool, endpoint) = single(&script);
        for _ in 0..4 {
            let calls: Vec<_> = (0..32).map(|_| http1(&pool, &endpoint)).collect();
            sleep(Duration::from_millis(2500)).await;
            drop(calls);
            // The connections that were begun for calls that waited last time out as well.
            sleep(Duration::from_millis(2500)).await;
        }
        script.asked.borrow_mut().clear();
        *script.attempts.borrow_mut() = [AcceptedAfter(10)].into();
        let _calls: Vec<_> = (0..32).map(|_| http1(&pool, &endpoint)).collect();
        sleep(Duration::from_millis(5)).await;
        assert_eq!(script.asked_at().len(), 2);
        sleep(Duration::from_millis(10)).await;
        assert_eq!(script.asked_at().len(), 6);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_long_handshake_does_not_hold_up_other_connections() {
    run(async {
        let script = Script::new(&[AcceptedAfter(10)]);
        let (pool, endpoint) = single(&script);
        // The other ends do not speak HTTP/2, so the handshake of each connection lasts; one serves 256 calls.
        let _calls: Vec<_> = (0..20 * 256).map(|_| call(&pool, &endpoint, ProtocolPreference::Http2)).collect();
        sleep(Duration::from_millis(25)).await;
        assert_eq!((script.asked_at().len(), pool.metrics.pending.value()), (20, 20));
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_refused_connection_is_told_to_the_call_that_it_was_opened_for() {
    run(async {
        let script = Script::new(&[RefusedAfter(10), AcceptedAfter(20), AcceptedAfter(30)]);
        let (pool, endpoint) = single(&script);
        let mut calls: Vec<_> = (0..3).map(|_| http1(&pool, &endpoint)).collect();
        assert!(matches!(calls[0].next().await, WaitEvent::Failed(_, ConnectError::Network(_))));
        assert!(endpoint.reachability.is_unreachable(Instant::now()));
        connection(&mut calls[1]).await;
        connection(&mut calls[2]).await;
        assert_eq!((script.began.elapsed().as_millis(), script.asked_at()), (30, vec![0, 0, 0]));
        assert!(!endpoint.reachability.is_unreachable(Instant::now()));
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_is_not_accepted_for_a_quarter_of_a_second_lets_the_endpoint_be_avoided() {
    run(async {
        let script = Script::new(&[Unanswered]);
        let pool = pool(&script, &[80, 81]);
        let picks = |at: u16| {
            (0..50).filter(|_| pool.pick(Instant::now(), &[], true).unwrap().address.socket.port() == at).count()
        };
        let dead = std::iter::repeat_with(|| pool.pick(Instant::now(), &[], true).unwrap())
            .find(|endpoint| endpoint.address.socket.port() == 80)
            .unwrap();
        let wait = http1(&pool, &dead);
        sleep(Duration::from_millis(249)).await;
        assert!(picks(80) > 0);
        sleep(Duration::from_millis(2)).await;
        assert_eq!(picks(80), 0);
        // Not even after `timeouts.connect`, for a second.
        sleep(Duration::from_millis(2500)).await;
        drop(wait);
        assert_eq!(picks(80), 0);
        sleep(Duration::from_secs(1)).await;
        assert!(picks(80) > 0);
        // One call tries it out; the others stay away.
        let _wait = http1(&pool, &dead);
        assert_eq!(picks(80), 0);
        // A response over an older connection shows that it is there.
        dead.reachability.answered(Instant::now() + Duration::from_millis(1));
        assert!(picks(80) > 0);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_late_connection_speaks_against_an_endpoint_only_if_it_gave_no_sign_of_life() {
    run(async {
        for is_alive in [false, true] {
            let script = Script::new(&[Unanswered]);
            let (pool, endpoint) = single(&script);
            let _wait = http1(&pool, &endpoint);
            sleep(Duration::from_millis(1000)).await;
            if is_alive {
                endpoint.reachability.answered(Instant::now());
            }
            sleep(Duration::from_millis(1001)).await;
            assert_eq!(endpoint.reachability.is_unreachable(Instant::now()), !is_alive);
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn calls_wait_together_for_a_connection_that_they_can_share() {
    run(async {
        let script = Script::new(&[AcceptedAfter(10)]);
        let (pool, endpoint) = single(&script);
        let _calls: Vec<_> = (0..50).map(|_| call(&pool, &endpoint, ProtocolPreference::Http2)).collect();
        sleep(Duration::from_millis(50)).await;
        assert_eq!(script.asked_at(), [0]);
    })
    .await;
}
