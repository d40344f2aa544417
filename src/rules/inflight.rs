//! The inbound requests under way, so that an outbound call of the app can be joined with the request that caused it.
//!
//! One table per process, shared by all workers. It stands between the two sides of the app: the inbound side enters
//! each request, the outbound side asks who caused a call. That gives the call the request's deadline where the app
//! forwards nothing but its trace id, and carries the mark of a failed call up through the app.
//! Invariants: bounded; no lock is held across anything but a look into a map; a request leaves with its guard.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use foldhash::fast::RandomState;
use tokio::time::Instant;

use super::proxy_status::ProxyStatus;
use super::trace::{TraceKey, TraceKeys};

/// The most inbound requests that the table holds.
pub const MOST: usize = 65_536;

/// The most requests that it holds under one key: whoever sends the same id with each request must not make each look
/// into the table a walk through all of them.
pub const MOST_PER_KEY: usize = 64;

const SHARDS: usize = 32;

/// Below this a shard keeps its room.
const ROOM: usize = 64;

type Shard = HashMap<Slot, ParentRequests, RandomState>;

/// An inbound request under way.
#[derive(Debug)]
pub struct InboundRequest {
    deadline: Mutex<Option<Instant>>,
    blamed: Mutex<Option<ProxyStatus>>,
    abandoned: AtomicBool,
}

/// The table.
#[derive(Debug)]
pub struct InflightRequests {
    shards: [Mutex<Shard>; SHARDS],
    hasher: RandomState,
    in_flight: AtomicUsize,
    nameless: AtomicU64,
}

/// A request that is in the table until this is dropped.
#[derive(Debug)]
pub struct InflightGuard {
    table: Arc<InflightRequests>,
    inbound: Arc<InboundRequest>,
    slots: [Option<Slot>; 2],
}

/// Who may have caused an outbound call: one inbound request, or several that bear one id (retries, fan-in).
#[derive(Debug, Clone)]
pub struct ParentRequests {
    first: Arc<InboundRequest>,
    /// Almost always empty, and then without an allocation.
    others: Vec<Arc<InboundRequest>>,
}

/// What is known of an outbound call's cause.
#[derive(Debug, Clone)]
pub enum Correlation {
    /// It bears an id of these.
    ByTrace(ParentRequests),
    /// It bears no id that is known, but there was one inbound request only.
    OnlyOne(ParentRequests),
    /// There are several inbound requests, and nothing tells which it belongs to.
    NotJoined,
    /// No inbound request is under way: the app calls of its own accord.
    NoInbound,
}

/// Where a request stands in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Slot {
    Key(TraceKey),
    /// A request without an id; it can still be the only one.
    Nameless(u64),
}

impl InboundRequest {
    /// When it is to be over; `None` if it lives as long as it likes.
    pub fn deadline(&self) -> Option<Instant> {
        *self.deadline.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It has shown itself as a stream: the time of a unary call is not its own, and not that of the calls that it causes.
    pub fn lift(&self, deadline: Option<Instant>) {
        *self.deadline.lock().unwrap_or_else(PoisonError::into_inner) = deadline;
    }

    /// Its caller has left, or got an answer that is not the app's: nobody waits for the app any more.
    pub fn abandon(&self) {
        self.abandoned.store(true, Relaxed);
    }

    /// Remembers the mark of a failed outbound call, in the place of an earlier one.
    ///
    /// "Unsent" is not remembered: it is true of the request that failed, but this one did reach its app.
    pub fn blame(&self, mark: &ProxyStatus) {
        let mark = ProxyStatus { is_unsent: false, is_limited: false, ..mark.clone() };
        *self.blamed.lock().unwrap_or_else(PoisonError::into_inner) = Some(mark);
    }

    /// The mark of the last outbound call that failed. A later success of another does not clear it: whether the failure
    /// mattered shows in the app's own answer.
    pub fn blamed(&self) -> Option<ProxyStatus> {
        self.blamed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl InflightRequests {
    /// An empty table.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            shards: std::array::from_fn(|_| Mutex::default()),
            hasher: RandomState::default(),
            in_flight: AtomicUsize::new(0),
            nameless: AtomicU64::new(0),
        })
    }

    /// Enters a request under each of its ids. Where there is no room it is not found later on, unless under its other id;
    /// it is under way all the same, and so is not overlooked when there seems to be only one.
    pub fn enter(self: &Arc<Self>, keys: TraceKeys, deadline: Instant) -> InflightGuard {
        let deadline = Mutex::new(Some(deadline));
        let inbound = Arc::new(InboundRequest { deadline, blamed: Mutex::default(), abandoned: AtomicBool::default() });
        let mut slots = [None, None];
        // Counted before it can be found, so that whoever counts one finds no second that came before.
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

    /// Who caused an outbound call with these ids. An id decides; the trace id comes before the request id.
    pub fn join(&self, keys: TraceKeys) -> Correlation {
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

    /// The requests under way that bear this id.
    pub fn find(&self, key: TraceKey) -> Option<ParentRequests> {
        let slot = Slot::Key(key);
        self.shard(slot).get(&slot).cloned()
    }

    /// Requests under way, those included that found no room.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(SeqCst)
    }

    /// The request that stands alone in the table. A second one that came before the call is seen here, in whichever
    /// order they entered; so a call is never joined with another request than its own while its own is under way.
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

    fn take(&self, slot: Slot, inbound: &Arc<InboundRequest>) {
        let mut shard = self.shard(slot);
        if shard.get_mut(&slot).is_some_and(|causes| causes.remove(inbound)) {
            shard.remove(&slot);
        }
        // A burst does not keep its memory for ever.
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
    /// The request, to be held where its guard cannot be.
    pub fn inbound(&self) -> &Arc<InboundRequest> {
        &self.inbound
    }
}

impl Drop for InflightGuard {
    fn drop(&mut self) {
        for slot in self.slots.iter().flatten() {
            self.table.take(*slot, &self.inbound);
        }
        self.table.in_flight.fetch_sub(1, SeqCst);
    }
}

impl ParentRequests {
    /// The latest of their deadlines, because nothing tells which of them it was, and a call that has time must not
    /// fail for another's haste; `None` if one has none.
    pub fn deadline(&self) -> Option<Instant> {
        let first = self.first.deadline()?;
        self.others.iter().try_fold(first, |latest, other| Some(latest.max(other.deadline()?)))
    }

    /// Whether nobody waits for any of them any more.
    pub fn are_abandoned(&self) -> bool {
        self.iter().all(|inbound| inbound.abandoned.load(Relaxed))
    }

    /// Tells each of them the mark of a failed outbound call.
    pub fn blame(&self, mark: &ProxyStatus) {
        self.iter().for_each(|inbound| inbound.blame(mark));
    }

    /// Each of them.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<InboundRequest>> {
        std::iter::once(&self.first).chain(&self.others)
    }

    const fn of(first: Arc<InboundRequest>) -> Self {
        Self { first, others: Vec::new() }
    }

    /// False where there is no room.
    fn add(&mut self, inbound: &Arc<InboundRequest>) -> bool {
        let has_room = self.others.len() + 1 < MOST_PER_KEY;
        if has_room {
            self.others.push(Arc::clone(inbound));
        }
        has_room
    }

    /// True where nobody is left, and this is to go.
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
    /// Who caused the call, if that is known.
    pub fn causes(&self) -> Option<&ParentRequests> {
        match self {
            Self::ByTrace(causes) | Self::OnlyOne(causes) => Some(causes),
            Self::NotJoined | Self::NoInbound => None,
        }
    }

    /// When the request that caused the call is to be over, if that is known.
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
        let (one, _two) = (table.enter(trace(1), later(100)), table.enter(trace(2), later(200)));
        let join = table.join(trace(1));
        assert!(matches!(join, Correlation::ByTrace(_)));
        assert_eq!(join.deadline(), one.inbound().deadline());
        assert!(matches!(table.join(trace(3)), Correlation::NotJoined));
        assert!(matches!(table.join(TraceKeys::default()), Correlation::NotJoined));
    }

    #[test]
    fn either_of_two_ids_is_enough() {
        let table = InflightRequests::new();
        let (one, two) = (table.enter(both(1), later(100)), table.enter(both(2), later(200)));
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
        assert!(matches!(table.join(trace(1)), Correlation::NoInbound));
        for keys in [TraceKeys::default(), both(1)] {
            let only = table.enter(keys, later(100));
            for call in [TraceKeys::default(), trace(9)] {
                let join = table.join(call);
                assert!(matches!(join, Correlation::OnlyOne(_)), "{join:?}");
                assert_eq!(join.deadline(), only.inbound().deadline());
            }
            let second = table.enter(TraceKeys::default(), later(100));
            assert!(matches!(table.join(trace(9)), Correlation::NotJoined));
            drop(second);
            assert!(matches!(table.join(trace(9)), Correlation::OnlyOne(_)));
        }
        assert!(matches!(table.join(trace(1)), Correlation::NoInbound));
    }

    #[test]
    fn of_several_with_one_id_the_latest_deadline_holds_and_each_is_told() {
        let table = InflightRequests::new();
        let mut requests: Vec<_> = [100, 300, 200].map(|millis| table.enter(trace(1), later(millis))).into();
        let causes = table.find(TraceKey::Trace(1)).unwrap();
        assert_eq!(causes.deadline(), requests[1].inbound().deadline());
        causes.blame(&failed("bank"));
        assert!(requests.iter().all(|one| one.inbound().blamed().is_some()));
        let latest = requests.remove(1);
        drop(latest);
        assert_eq!(table.join(trace(1)).deadline(), requests[1].inbound().deadline());
        requests.remove(1);
        assert_eq!(table.join(trace(1)).deadline(), requests[0].inbound().deadline());
        requests.clear();
        assert!(is_empty(&table));
    }

    #[test]
    fn a_stream_among_those_with_one_id_has_as_much_time_as_it_likes() {
        let table = InflightRequests::new();
        let requests: Vec<_> = [100, 300].map(|millis| table.enter(trace(1), later(millis))).into();
        for stream in &requests {
            let own = stream.inbound().deadline();
            stream.inbound().lift(None);
            assert_eq!(table.join(trace(1)).deadline(), None);
            stream.inbound().lift(own);
        }
        assert_eq!(table.join(trace(1)).deadline(), requests[1].inbound().deadline());
    }

    #[test]
    fn calls_are_abandoned_once_each_request_that_may_have_caused_them_is() {
        let table = InflightRequests::new();
        let requests = [100, 300].map(|millis| table.enter(trace(1), later(millis)));
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
        let request = table.enter(trace(1), later(100));
        assert_eq!(request.inbound().blamed(), None);
        request.inbound().blame(&failed("bank"));
        request.inbound().blame(&failed("stock"));
        let expected = ProxyStatus { is_final: true, at: Some("stock".into()), ..ProxyStatus::default() };
        assert_eq!(request.inbound().blamed(), Some(expected));
    }

    #[test]
    fn the_table_is_bounded_in_all_and_per_id() {
        let table = InflightRequests::new();
        let requests: Vec<_> = (0..=MOST as u128).map(|id| table.enter(trace(id + 1), later(100))).collect();
        assert_eq!(table.in_flight(), MOST + 1);
        assert!(table.find(TraceKey::Trace(MOST as u128)).is_some());
        assert!(table.find(TraceKey::Trace(MOST as u128 + 1)).is_none());
        drop(requests);
        assert!(is_empty(&table));
        let room: usize = table.shards.iter().map(|shard| shard.lock().unwrap().capacity()).sum();
        assert!(room <= SHARDS * ROOM, "room for {room} is kept");

        let same: Vec<_> = (0..=MOST_PER_KEY).map(|_| table.enter(trace(1), later(100))).collect();
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
                        let shared = table.enter(trace(1 + round % 7), later(50));
                        let keys = trace(1_000_000 * (thread + 1) + round);
                        let own = table.enter(keys, later(100));
                        let Correlation::ByTrace(causes) = table.join(keys) else { panic!("its own is not found") };
                        assert!(causes.iter().all(|one| Arc::ptr_eq(one, own.inbound())));
                        causes.blame(&failed("bank"));
                        drop(shared);
                    }
                });
            }
        });
        assert!(is_empty(&table));
        assert_eq!(table.in_flight(), 0);
    }
}
