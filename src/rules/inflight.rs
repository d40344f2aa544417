//! In-flight registry: the inbound requests in progress, so that an outbound call of the app can be joined with its
//! parent request.
//!
//! One registry per process, shared by all workers. The inbound side registers each request, the outbound side looks up
//! the parent request of a call. So a call gets the deadline of its parent request even if the app forwards only a
//! trace id, and the proxy status of a failed call reaches the inbound response. Invariants: bounded size; a lock is
//! held only during a map access; a request leaves the registry when its guard is dropped.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use foldhash::fast::RandomState;
use tokio::time::Instant;

use super::proxy_status::ProxyStatus;
use super::trace::{TraceKey, TraceKeys};

/// Upper bound of registered inbound requests.
pub const MOST: usize = 65_536;

/// Upper bound of requests under one id, so that a caller which repeats an id cannot make each lookup walk through all
/// of its requests.
pub const MOST_PER_KEY: usize = 64;

const SHARDS: usize = 32;

/// A shard below this capacity is not shrunk.
const ROOM: usize = 64;

type Shard = HashMap<Slot, ParentRequests, RandomState>;

/// An inbound request in progress.
#[derive(Debug)]
pub struct InboundRequest {
    deadline: Mutex<Option<Instant>>,
    blamed: Mutex<Option<ProxyStatus>>,
    abandoned: AtomicBool,
}

/// The registry.
#[derive(Debug)]
pub struct InflightRequests {
    shards: [Mutex<Shard>; SHARDS],
    hasher: RandomState,
    in_flight: AtomicUsize,
    nameless: AtomicU64,
}

/// Keeps a request in the registry until it is dropped.
#[derive(Debug)]
pub struct InflightGuard {
    table: Arc<InflightRequests>,
    inbound: Arc<InboundRequest>,
    slots: [Option<Slot>; 2],
}

/// Possible parent requests of an outbound call: one, or several with the same id (retries, fan-in).
#[derive(Debug, Clone)]
pub struct ParentRequests {
    first: Arc<InboundRequest>,
    /// Almost always empty, and then without an allocation.
    others: Vec<Arc<InboundRequest>>,
}

/// Correlation of an outbound call with inbound requests.
#[derive(Debug, Clone)]
pub enum Correlation {
    /// The call has the id of these requests.
    ByTrace(ParentRequests),
    /// The call has no known id, but exactly one inbound request is in progress.
    OnlyOne(ParentRequests),
    /// Several inbound requests are in progress, and the call has the id of none of them.
    NotJoined,
    /// No inbound request is in progress: the app made the call on its own.
    NoInbound,
}

/// Key of a request in the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Slot {
    Key(TraceKey),
    /// A request without an id; it can still be the only one in progress.
    Nameless(u64),
}

impl InboundRequest {
    /// Deadline of the request; `None` if it has none.
    pub fn deadline(&self) -> Option<Instant> {
        *self.deadline.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the deadline: the request has turned out to be a stream, so the timeout of a unary call does not apply
    /// to it or to its outbound calls.
    pub fn set_deadline(&self, deadline: Option<Instant>) {
        *self.deadline.lock().unwrap_or_else(PoisonError::into_inner) = deadline;
    }

    /// Marks the request as abandoned: its caller has gone, or got a response that is not the app's.
    pub fn abandon(&self) {
        self.abandoned.store(true, Relaxed);
    }

    /// Stores the proxy status of a failed outbound call, replacing an earlier one.
    ///
    /// "Unsent" is not stored: it is about the outbound call, while this request did reach its app.
    pub fn record_status(&self, mark: &ProxyStatus) {
        let mark = ProxyStatus { is_unsent: false, is_limited: false, ..mark.clone() };
        *self.blamed.lock().unwrap_or_else(PoisonError::into_inner) = Some(mark);
    }

    /// Proxy status of the last failed outbound call. A later success of another call does not clear it: the app's
    /// response shows whether the failure mattered.
    pub fn recorded_status(&self) -> Option<ProxyStatus> {
        self.blamed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl InflightRequests {
    /// An empty registry.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            shards: std::array::from_fn(|_| Mutex::default()),
            hasher: RandomState::default(),
            in_flight: AtomicUsize::new(0),
            nameless: AtomicU64::new(0),
        })
    }

    /// Registers a request under each of its ids. Without room under an id, it cannot be found by that id; it still
    /// counts as in progress, so another request is not taken for the only one.
    pub fn register(self: &Arc<Self>, keys: TraceKeys, deadline: Instant) -> InflightGuard {
        let deadline = Mutex::new(Some(deadline));
        let inbound = Arc::new(InboundRequest { deadline, blamed: Mutex::default(), abandoned: AtomicBool::default() });
        let mut slots = [None, None];
        // Counted before it can be found: if the count is one, no earlier request can be missing from the map.
        if self.in_flight.fetch_add(1, SeqCst) < MOST {
            for (slot, key) in slots.iter_mut().zip(keys.iter()) {
                *slot = Some(Slot::Key(key));
            }
            if slots[0].is_none() {
                slots[0] = Some(Slot::Nameless(self.nameless.fetch_add(1, Relaxed)));
            }
            for slot in &mut slots {
                *slot = slot.filter(|slot| self.put(*slot, &inbound));
            }
        }
        InflightGuard { table: Arc::clone(self), inbound, slots }
    }

    /// Parent requests of an outbound call with these ids. The trace id is looked up before the request id.
    pub fn correlate(&self, keys: TraceKeys) -> Correlation {
        let in_flight = self.in_flight();
        if in_flight == 0 {
            return Correlation::NoInbound;
        }
        if let Some(causes) = keys.iter().find_map(|key| self.find(key)) {
            return Correlation::ByTrace(causes);
        }
        if in_flight > 1 {
            return Correlation::NotJoined;
        }
        self.only_one().map_or(Correlation::NotJoined, |inbound| Correlation::OnlyOne(ParentRequests::of(inbound)))
    }

    /// The requests in progress with this id.
    pub fn find(&self, key: TraceKey) -> Option<ParentRequests> {
        let slot = Slot::Key(key);
        self.shard(slot).get(&slot).cloned()
    }

    /// Requests in progress, including those without room in the registry.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(SeqCst)
    }

    /// The only request in the registry. A second one that came before the call is seen here, in whichever order they
    /// were registered, so a call is never joined with a foreign request while its own is in progress.
    fn only_one(&self) -> Option<Arc<InboundRequest>> {
        let mut only: Option<Arc<InboundRequest>> = None;
        for shard in &self.shards {
            for causes in shard.lock().unwrap_or_else(PoisonError::into_inner).values() {
                for inbound in causes.iter() {
                    if only.as_ref().is_some_and(|only| !Arc::ptr_eq(only, inbound)) {
                        return None;
                    }
                    only.get_or_insert_with(|| Arc::clone(inbound));
                }
            }
        }
        only
    }

    fn put(&self, slot: Slot, inbound: &Arc<InboundRequest>) -> bool {
        match self.shard(slot).entry(slot) {
            Entry::Vacant(place) => {
                place.insert(ParentRequests::of(Arc::clone(inbound)));
                true
            }
            Entry::Occupied(mut place) => place.get_mut().add(inbound),
        }
    }

    fn remove(&self, slot: Slot, inbound: &Arc<InboundRequest>) {
        let mut shard = self.shard(slot);
        if shard.get_mut(&slot).is_some_and(|causes| causes.remove(inbound)) {
            shard.remove(&slot);
        }
        // Returns the memory of a burst.
        if shard.capacity() > ROOM && shard.len() < shard.capacity() / 8 {
            let room = (shard.len() * 2).max(ROOM / 2);
            shard.shrink_to(room);
        }
    }

    fn shard(&self, slot: Slot) -> MutexGuard<'_, Shard> {
        let index = self.hasher.hash_one(slot) as usize % SHARDS;
        self.shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl InflightGuard {
    /// The request, for holders other than the guard.
    pub fn inbound(&self) -> &Arc<InboundRequest> {
        &self.inbound
    }
}

impl Drop for InflightGuard {
    fn drop(&mut self) {
        for slot in self.slots.iter().flatten() {
            self.table.remove(*slot, &self.inbound);
        }
        self.table.in_flight.fetch_sub(1, SeqCst);
    }
}

impl ParentRequests {
    /// The latest of the deadlines: the parent is unknown, and a call must not fail by the deadline of another request;
    /// `None` if one of them has none.
    pub fn deadline(&self) -> Option<Instant> {
        let first = self.first.deadline()?;
        self.others.iter().try_fold(first, |latest, other| Some(latest.max(other.deadline()?)))
    }

    /// Whether all of them are abandoned.
    pub fn are_abandoned(&self) -> bool {
        self.iter().all(|inbound| inbound.abandoned.load(Relaxed))
    }

    /// Stores the proxy status of a failed outbound call at each of them.
    pub fn record_status(&self, mark: &ProxyStatus) {
        self.iter().for_each(|inbound| inbound.record_status(mark));
    }

    /// Each of them.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<InboundRequest>> {
        std::iter::once(&self.first).chain(&self.others)
    }

    const fn of(first: Arc<InboundRequest>) -> Self {
        Self { first, others: Vec::new() }
    }

    /// False without room.
    fn add(&mut self, inbound: &Arc<InboundRequest>) -> bool {
        let has_room = self.others.len() + 1 < MOST_PER_KEY;
        if has_room {
            self.others.push(Arc::clone(inbound));
        }
        has_room
    }

    /// True if none is left, so that the entry is to be removed.
    fn remove(&mut self, inbound: &Arc<InboundRequest>) -> bool {
        if !Arc::ptr_eq(&self.first, inbound) {
            self.others.retain(|other| !Arc::ptr_eq(other, inbound));
            return false;
        }
        match self.others.pop() {
            Some(other) => {
                self.first = other;
                false
            }
            None => true,
        }
    }
}

impl Correlation {
    /// The parent requests, if known.
    pub fn causes(&self) -> Option<&ParentRequests> {
        match self {
            Self::ByTrace(causes) | Self::OnlyOne(causes) => Some(causes),
            Self::NotJoined | Self::NoInbound => None,
        }
    }

    /// Deadline of the parent request, if known.
    pub fn deadline(&self) -> Option<Instant> {
        self.causes().and_then(ParentRequests::deadline)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn trace(id: u128) -> TraceKeys {
        TraceKey::Trace(id).into()
    }

    /// A trace id and a request id.
    fn both(id: u16) -> TraceKeys {
        let mut headers = http::HeaderMap::new();
        headers.insert("x-b3-traceid", format!("{id:032x}").parse().unwrap());
        headers.insert("x-request-id", id.into());
        TraceKeys::of(&headers)
    }

    fn later(millis: u64) -> Instant {
        Instant::now() + Duration::from_millis(millis)
    }

    fn failed(at: &str) -> ProxyStatus {
        ProxyStatus { is_final: true, is_unsent: true, at: Some(at.into()), ..ProxyStatus::default() }
    }

    fn is_empty(table: &InflightRequests) -> bool {
        table.shards.iter().all(|shard| shard.lock().unwrap().is_empty())
    }

    #[test]
    fn a_call_is_joined_by_its_id() {
        let table = InflightRequests::new();
        let (one, _two) = (table.register(trace(1), later(100)), table.register(trace(2), later(200)));
        let join = table.correlate(trace(1));
        assert!(matches!(join, Correlation::ByTrace(_)));
        assert_eq!(join.deadline(), one.inbound().deadline());
        assert!(matches!(table.correlate(trace(3)), Correlation::NotJoined));
        assert!(matches!(table.correlate(TraceKeys::default()), Correlation::NotJoined));
    }

    #[test]
    fn either_of_two_ids_is_enough() {
        let table = InflightRequests::new();
        let (one, two) = (table.register(both(1), later(100)), table.register(both(2), later(200)));
        for key in both(2).iter() {
            let causes = table.find(key).unwrap();
            assert!(Arc::ptr_eq(causes.iter().next().unwrap(), two.inbound()));
        }
        drop((one, two));
        assert!(is_empty(&table));
    }

    #[test]
    fn a_call_without_an_id_belongs_to_the_only_request_there_is() {
        let table = InflightRequests::new();
        assert!(matches!(table.correlate(trace(1)), Correlation::NoInbound));
        for keys in [TraceKeys::default(), both(1)] {
            let only = table.register(keys, later(100));
            for call in [TraceKeys::default(), trace(9)] {
                let join = table.correlate(call);
                assert!(matches!(join, Correlation::OnlyOne(_)), "{join:?}");
                assert_eq!(join.deadline(), only.inbound().deadline());
            }
            let second = table.register(TraceKeys::default(), later(100));
            assert!(matches!(table.correlate(trace(9)), Correlation::NotJoined));
            drop(second);
            assert!(matches!(table.correlate(trace(9)), Correlation::OnlyOne(_)));
        }
        assert!(matches!(table.correlate(trace(1)), Correlation::NoInbound));
    }

    #[test]
    fn of_several_with_one_id_the_latest_deadline_holds_and_each_gets_the_status() {
        let table = InflightRequests::new();
        let mut requests: Vec<_> = [100, 300, 200].map(|millis| table.register(trace(1), later(millis))).into();
        let causes = table.find(TraceKey::Trace(1)).unwrap();
        assert_eq!(causes.deadline(), requests[1].inbound().deadline());
        causes.record_status(&failed("bank"));
        assert!(requests.iter().all(|one| one.inbound().recorded_status().is_some()));
        let latest = requests.remove(1);
        drop(latest);
        assert_eq!(table.correlate(trace(1)).deadline(), requests[1].inbound().deadline());
        requests.remove(1);
        assert_eq!(table.correlate(trace(1)).deadline(), requests[0].inbound().deadline());
        requests.clear();
        assert!(is_empty(&table));
    }

    #[test]
    fn a_stream_among_those_with_one_id_lifts_their_deadline() {
        let table = InflightRequests::new();
        let requests: Vec<_> = [100, 300].map(|millis| table.register(trace(1), later(millis))).into();
        for stream in &requests {
            let own = stream.inbound().deadline();
            stream.inbound().set_deadline(None);
            assert_eq!(table.correlate(trace(1)).deadline(), None);
            stream.inbound().set_deadline(own);
        }
        assert_eq!(table.correlate(trace(1)).deadline(), requests[1].inbound().deadline());
    }

    #[test]
    fn calls_are_abandoned_once_each_request_that_may_have_caused_them_is() {
        let table = InflightRequests::new();
        let requests = [100, 300].map(|millis| table.register(trace(1), later(millis)));
        let causes = table.find(TraceKey::Trace(1)).unwrap();
        for one in requests {
            assert!(!causes.are_abandoned());
            one.inbound().abandon();
        }
        assert!(causes.are_abandoned(), "also when they have left the table");
    }

    #[test]
    fn the_last_blame_stays_and_never_says_unsent() {
        let table = InflightRequests::new();
        let request = table.register(trace(1), later(100));
        assert_eq!(request.inbound().recorded_status(), None);
        request.inbound().record_status(&failed("bank"));
        request.inbound().record_status(&failed("stock"));
        let expected = ProxyStatus { is_final: true, at: Some("stock".into()), ..ProxyStatus::default() };
        assert_eq!(request.inbound().recorded_status(), Some(expected));
    }

    #[test]
    fn the_table_is_bounded_in_all_and_per_id() {
        let table = InflightRequests::new();
        let requests: Vec<_> = (0..=MOST as u128).map(|id| table.register(trace(id + 1), later(100))).collect();
        assert_eq!(table.in_flight(), MOST + 1);
        assert!(table.find(TraceKey::Trace(MOST as u128)).is_some());
        assert!(table.find(TraceKey::Trace(MOST as u128 + 1)).is_none());
        drop(requests);
        assert!(is_empty(&table));
        let room: usize = table.shards.iter().map(|shard| shard.lock().unwrap().capacity()).sum();
        assert!(room <= SHARDS * ROOM, "room for {room} is kept");

        let same: Vec<_> = (0..=MOST_PER_KEY).map(|_| table.register(trace(1), later(100))).collect();
        assert_eq!(table.find(TraceKey::Trace(1)).unwrap().iter().count(), MOST_PER_KEY);
        drop(same);
        assert!(is_empty(&table));
        assert_eq!(table.in_flight(), 0);
    }

    #[test]
    fn under_many_threads_each_finds_its_own_and_nothing_stays() {
        let table = InflightRequests::new();
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let table = &table;
                scope.spawn(move || {
                    for round in 0..2_000_u128 {
                        let shared = table.register(trace(1 + round % 7), later(50));
                        let keys = trace(1_000_000 * (thread + 1) + round);
                        let own = table.register(keys, later(100));
                        let Correlation::ByTrace(causes) = table.correlate(keys) else {
                            panic!("its own is not found")
                        };
                        assert!(causes.iter().all(|one| Arc::ptr_eq(one, own.inbound())));
                        causes.record_status(&failed("bank"));
                        drop(shared);
                    }
                });
            }
        });
        assert!(is_empty(&table));
        assert_eq!(table.in_flight(), 0);
    }
}
