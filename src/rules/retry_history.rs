//! Retry history: the calls whose retries were used up here in the last seconds, so that the same failure is not
//! retried again.
//!
//! `retryInOnePlace` needs it if no sidecar carries the proxy status of a failure through the app: the app repeats the
//! call under the same id, and its attempts would multiply with those of this hop. Written only on failure; while it is
//! empty, readers skip the lock, so one mutex is enough. Shared by all workers, bounded in time and size.

use std::collections::{HashMap, VecDeque};
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use foldhash::fast::RandomState;
use tokio::time::Instant;

use super::trace::{TraceKey, TraceKeys};

/// How long a call is remembered.
pub const REMEMBERED: Duration = Duration::from_secs(10);

/// Upper bound of remembered calls; the oldest is dropped first.
pub const MOST: usize = 8192;

type Call = (TraceKey, u64);

/// The history.
#[derive(Debug, Default)]
pub struct RetryHistory {
    memory: Mutex<Memory>,
    hasher: RandomState,
    /// False while the history is empty, so that readers skip the lock. Written under the lock.
    used: AtomicBool,
}

#[derive(Debug, Default)]
struct Memory {
    last: HashMap<Call, Instant, RandomState>,
    /// Entries in the order of recording; recording a call again adds an entry and invalidates the older ones. An entry
    /// for a later time delays the removal of those behind it, which expire by their own time all the same.
    entries: VecDeque<(Instant, Call)>,
}

impl RetryHistory {
    /// Hash of destination, method, authority and path. A failure of one call says nothing about other calls of the
    /// same trace.
    pub fn call_hash(&self, destination: u64, method: &str, authority: &[u8], path: &str) -> u64 {
        self.hasher.hash_one((destination, method, authority, path))
    }

    /// Records under each of these ids that the retries of a call were used up at `at`. Before that time, which may be
    /// in the future, the call counts as unknown. Entries expire relative to `now`.
    pub fn record(&self, keys: TraceKeys, call_hash: u64, at: Instant, now: Instant) {
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        for key in keys.iter() {
            let call = (key, call_hash);
            memory.last.insert(call, at);
            memory.entries.push_back((at, call));
        }
        memory.drop_expired(now);
        self.used.store(true, Relaxed);
    }

    /// Removes a call under these ids, including entries for a later time.
    pub fn remove(&self, keys: TraceKeys, call_hash: u64) {
        if self.used.load(Relaxed) {
            let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
            for key in keys.iter() {
                memory.last.remove(&(key, call_hash));
            }
            if memory.last.is_empty() {
                memory.entries.clear();
                self.used.store(false, Relaxed);
            }
        }
    }

    /// Whether the retries of a call were used up under any of these ids less than [`REMEMBERED`] ago.
    pub fn contains(&self, keys: TraceKeys, call_hash: u64, now: Instant) -> bool {
        self.at(keys, call_hash, now).is_some_and(|at| at <= now)
    }

    /// Time at which the retries were or will be used up.
    pub fn at(&self, keys: TraceKeys, call_hash: u64, now: Instant) -> Option<Instant> {
        if !self.used.load(Relaxed) {
            return None;
        }
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        memory.drop_expired(now);
        self.used.store(!memory.entries.is_empty(), Relaxed);
        let recorded = keys.iter().filter_map(|key| memory.last.get(&(key, call_hash)).copied());
        recorded.filter(|recorded| is_fresh(*recorded, now)).min()
    }
}

impl Memory {
    fn drop_expired(&mut self, now: Instant) {
        while let Some(&(recorded, call)) = self.entries.front() {
            if self.entries.len() <= MOST && is_fresh(recorded, now) {
                return;
            }
            self.entries.pop_front();
            if self.last.get(&call) == Some(&recorded) {
                self.last.remove(&call);
            }
        }
    }
}

fn is_fresh(recorded: Instant, now: Instant) -> bool {
    now.saturating_duration_since(recorded) < REMEMBERED
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(id: u128) -> TraceKeys {
        TraceKey::Trace(id).into()
    }

    /// Records a failure of this instant.
    fn record(spent: &RetryHistory, keys: TraceKeys, now: Instant) {
        spent.record(keys, 7, now, now);
    }

    #[test]
    fn a_call_is_known_for_ten_seconds_and_only_at_its_place() {
        let (spent, now) = (RetryHistory::default(), Instant::now());
        record(&spent, key(1), now);
        assert!(spent.contains(key(1), 7, now));
        assert!(spent.contains(key(1), 7, now + Duration::from_millis(9_999)));
        assert!(!spent.contains(key(1), 7, now + REMEMBERED));
        assert!(!spent.contains(key(1), 8, now));
        assert!(!spent.contains(key(2), 7, now));
        assert!(!spent.contains(TraceKeys::default(), 7, now));
    }

    #[test]
    fn a_place_is_a_method_of_a_path_of_a_host_of_a_destination() {
        let spent = RetryHistory::default();
        let first = spent.call_hash(1, "GET", b"shop", "/a");
        assert_eq!(first, spent.call_hash(1, "GET", b"shop", "/a"));
        let others =
            [(2, "GET", "shop", "/a"), (1, "POST", "shop", "/a"), (1, "GET", "bank", "/a"), (1, "GET", "shop", "/b")];
        for (destination, method, host, path) in others {
            assert_ne!(
                first,
                spent.call_hash(destination, method, host.as_bytes(), path),
                "{destination} {method} {host}{path}"
            );
        }
    }

    #[test]
    fn a_call_noted_again_is_remembered_from_then_on() {
        let (spent, now) = (RetryHistory::default(), Instant::now());
        let later = now + Duration::from_secs(8);
        record(&spent, key(1), now);
        record(&spent, key(1), later);
        record(&spent, key(2), now + REMEMBERED);
        assert!(spent.contains(key(1), 7, later + Duration::from_secs(9)));
    }

    #[test]
    fn what_is_forgotten_is_known_again_once_it_is_noted_again() {
        let (spent, now) = (RetryHistory::default(), Instant::now());
        for (keys, at) in [(key(1), now), (key(2), now), (key(3), now + REMEMBERED / 2)] {
            spent.record(keys, 7, at, now);
        }
        spent.remove(key(1), 7);
        spent.remove(key(2), 8);
        spent.remove(key(3), 7);
        let known = |later| [1, 2, 3].map(|id| spent.contains(key(id), 7, now + later));
        assert_eq!(known(Duration::ZERO), [false, true, false]);
        assert_eq!(known(REMEMBERED / 2), [false, true, false]);
        spent.record(key(1), 7, now + REMEMBERED / 2, now + REMEMBERED / 2);
        assert_eq!(known(REMEMBERED), [true, false, false]);
    }

    #[test]
    fn what_is_noted_for_later_is_known_from_then_on() {
        let (spent, now) = (RetryHistory::default(), Instant::now());
        let later = now + REMEMBERED * 2;
        spent.record(key(1), 7, later, now);
        record(&spent, key(2), now);
        assert!(!spent.contains(key(1), 7, now));
        assert_eq!(spent.at(key(1), 7, now), Some(later));
        assert!(spent.contains(key(1), 7, later));
        assert!(!spent.contains(key(1), 7, later + REMEMBERED));
        assert!(!spent.contains(key(2), 7, now + REMEMBERED), "it does not wait for those before it");
    }

    #[test]
    fn what_is_noted_for_later_wipes_out_nothing_that_was_noted_before() {
        let (spent, now) = (RetryHistory::default(), Instant::now());
        record(&spent, key(1), now);
        spent.record(key(2), 7, now + REMEMBERED * 2, now);
        assert!(spent.contains(key(1), 7, now));
        record(&spent, key(3), now + REMEMBERED);
        assert_eq!(spent.memory.lock().unwrap().last.len(), 2, "its own time wipes it out");
    }

    #[test]
    fn once_the_history_is_empty_readers_skip_the_lock() {
        let (spent, now) = (RetryHistory::default(), Instant::now());
        record(&spent, key(1), now);
        spent.record(key(2), 7, now + REMEMBERED, now);
        for (later, is_used) in [(REMEMBERED, true), (REMEMBERED * 2, false)] {
            assert!(!spent.contains(key(3), 7, now + later));
            assert_eq!(spent.used.load(Relaxed), is_used, "{later:?}");
        }
        record(&spent, key(1), now + REMEMBERED * 3);
        assert!(spent.contains(key(1), 7, now + REMEMBERED * 3));
    }

    #[test]
    fn the_oldest_goes_first_and_nothing_stays_for_ever() {
        let (spent, now) = (RetryHistory::default(), Instant::now());
        for id in 0..=MOST as u128 {
            record(&spent, key(id + 1), now);
        }
        assert!(!spent.contains(key(1), 7, now));
        assert!(spent.contains(key(2), 7, now));
        let size = |spent: &RetryHistory| {
            let memory = spent.memory.lock().unwrap();
            (memory.last.len(), memory.entries.len())
        };
        assert_eq!(size(&spent), (MOST, MOST));
        record(&spent, key(1), now + REMEMBERED);
        assert_eq!(size(&spent), (1, 1));
    }
}
