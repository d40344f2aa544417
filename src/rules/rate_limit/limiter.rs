//! Live state of `rateLimit`: how much of the limit each key has used.
//!
//! One limiter per route, shared by all workers; it survives reloads that leave the limit unchanged. It keeps one
//! number per key, the theoretical arrival time (TAT) of the generic cell rate algorithm: the time at which the key's
//! whole burst is available again. Source: ITU-T I.371, annex A, virtual scheduling algorithm.
//!
//! Invariants: a key never gets more than `burst` calls at once, nor more than `burst + t x requests / per` in any time
//! t, whatever the order of the workers. A refused call uses nothing up. At most [`MOST_KEYS`] keys have a TAT of their
//! own; further keys share one TAT, and a key that gets its own later starts with the shared one, which is stricter,
//! never laxer. The limiter reads no clock: callers pass the time.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::RateLimit;

/// Keys with a TAT of their own.
pub const MOST_KEYS: usize = 10_000;

/// Parts of the table with a lock each, so that workers with different keys seldom contend.
const SHARDS: usize = 16;

/// A full table is swept at most once in this time (1 ms in ns), however many new keys arrive.
const BETWEEN_SWEEPS: u64 = 1_000_000;

/// The rate limit is used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the rate limit is used up")]
pub struct RateLimitExceeded {
    /// After exactly this time the same call is admitted, unless another call comes first. Above zero.
    pub retry_after: Duration,
}

/// The key by which a call is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RateLimitKey<'a> {
    /// All calls of the route.
    Route,
    /// The calls of this address.
    Address(IpAddr),
    /// The calls with this header value; `None` for those without the header.
    Header(Option<&'a [u8]>),
}

/// The state of one route's rate limit.
#[derive(Debug)]
pub struct RateLimiter {
    start: Instant,
    route: AtomicU64,
    table: Table,
}

impl RateLimiter {
    /// A limiter without calls so far.
    pub fn new(now: Instant) -> Self {
        Self { start: now, route: AtomicU64::new(0), table: Table::default() }
    }

    /// Admits or refuses a call. Counting by route takes no lock; by caller or header, the lock of one part of the
    /// table.
    ///
    /// # Errors
    /// The limit of this key is used up.
    pub fn check(&self, limit: &RateLimit, key: RateLimitKey<'_>, now: Instant) -> Result<(), RateLimitExceeded> {
        let (pace, now) = (Pace::of(limit), nanos(now.saturating_duration_since(self.start)));
        match key {
            RateLimitKey::Route => pace.pass_shared(&self.route, now),
            RateLimitKey::Address(_) | RateLimitKey::Header(_) => self.table.pass(key, pace, now),
        }
    }
}

/// Saturates after 500 years, beyond all times of a policy.
fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// A limit in the units of the algorithm, nanoseconds.
#[derive(Debug, Clone, Copy)]
struct Pace {
    /// Time between two calls. Rounded up, so that no more calls pass than the policy says.
    interval: u64,
    /// How far a TAT may lie in the future when a call is admitted.
    slack: u64,
}

impl Pace {
    fn of(limit: &RateLimit) -> Self {
        let interval = nanos(limit.per.value).div_ceil(u64::from(limit.requests.value.max(1)));
        let slack = interval.saturating_mul(u64::from(limit.burst.value.saturating_sub(1)));
        Self { interval, slack }
    }

    /// The TAT after one more call.
    fn next(self, tat: u64, now: u64) -> Result<u64, RateLimitExceeded> {
        let earliest = tat.saturating_sub(self.slack);
        if earliest > now {
            return Err(RateLimitExceeded { retry_after: Duration::from_nanos(earliest - now) });
        }
        Ok(tat.max(now).saturating_add(self.interval))
    }

    fn pass(self, tat: &mut u64, now: u64) -> Result<(), RateLimitExceeded> {
        *tat = self.next(*tat, now)?;
        Ok(())
    }

    /// Relaxed is enough: no other memory depends on this number.
    fn pass_shared(self, tat: &AtomicU64, now: u64) -> Result<(), RateLimitExceeded> {
        let mut seen = tat.load(Relaxed);
        loop {
            let next = self.next(seen, now)?;
            match tat.compare_exchange_weak(seen, next, Relaxed, Relaxed) {
                Ok(_) => return Ok(()),
                Err(changed) => seen = changed,
            }
        }
    }
}

/// TATs by the hash of their key. The key itself is not kept: two keys with the same hash would share a TAT, which
/// happens in one of 370 billion full tables.
type Shard = HashMap<u64, u64, foldhash::fast::RandomState>;

#[derive(Debug, Default)]
struct Table {
    /// Not a faster hash: a caller that chooses its key must not be able to cause a collision with another caller's
    /// key.
    hasher: RandomState,
    shards: [Mutex<Shard>; SHARDS],
    keys: AtomicUsize,
    /// No sweep before this time, because the last one was just now.
    sweep_at: AtomicU64,
    /// The TAT shared by all keys without one of their own, with which a new key starts.
    rest: AtomicU64,
}

impl Table {
    fn pass(&self, key: RateLimitKey<'_>, pace: Pace, now: u64) -> Result<(), RateLimitExceeded> {
        let hash = self.hasher.hash_one(key);
        if let Some(result) = self.pass_alone(hash, pace, now) {
            return result;
        }
        if self.sweep(now)
            && let Some(result) = self.pass_alone(hash, pace, now)
        {
            return result;
        }
        pace.pass_shared(&self.rest, now)
    }

    /// `None` if the key has no TAT of its own and the table has no room for one.
    fn pass_alone(&self, hash: u64, pace: Pace, now: u64) -> Option<Result<(), RateLimitExceeded>> {
        let mut shard = self.shard(hash);
        if let Some(tat) = shard.get_mut(&hash) {
            return Some(pace.pass(tat, now));
        }
        let has_room = |keys| (keys < MOST_KEYS).then_some(keys + 1);
        self.keys.fetch_update(Relaxed, Relaxed, has_room).ok()?;
        // A new key may have had calls under the shared TAT before.
        let mut tat = self.rest.load(Relaxed);
        let result = pace.pass(&mut tat, now);
        shard.insert(hash, tat);
        Some(result)
    }

    /// Drops the keys whose whole burst is available again, which a new TAT would allow too. True if there may be room
    /// now.
    fn sweep(&self, now: u64) -> bool {
        let due = self.sweep_at.load(Relaxed);
        // One worker sweeps; the others do not wait for it.
        let next = now.saturating_add(BETWEEN_SWEEPS);
        if now < due || self.sweep_at.compare_exchange(due, next, Relaxed, Relaxed).is_err() {
            return false;
        }
        let mut dropped = 0;
        for shard in &self.shards {
            let mut shard = lock(shard);
            let before = shard.len();
            shard.retain(|_, tat| *tat > now);
            dropped += before - shard.len();
        }
        self.keys.fetch_sub(dropped, Relaxed);
        dropped > 0
    }

    fn shard(&self, hash: u64) -> MutexGuard<'_, Shard> {
        // The remainder is below the number of shards, which fits any usize.
        lock(&self.shards[(hash % SHARDS as u64) as usize])
    }
}

fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problems::Sourced;
    use crate::rules::rate_limit::CountBy;
    use std::sync::atomic::AtomicU32;
    use std::thread;

    const MS: Duration = Duration::from_millis(1);

    fn limit(requests: u32, per: Duration, burst: u32) -> RateLimit {
        let (requests, per, burst) = (Sourced::built_in(requests), Sourced::built_in(per), Sourced::built_in(burst));
        RateLimit { requests, per, burst, by: Sourced::built_in(CountBy::Route) }
    }

    /// Number of keys with a TAT of their own.
    fn kept(limiter: &RateLimiter) -> usize {
        let kept = limiter.table.shards.iter().map(|shard| lock(shard).len()).sum();
        assert_eq!(limiter.table.keys.load(Relaxed), kept);
        kept
    }

    fn caller(number: u32) -> RateLimitKey<'static> {
        RateLimitKey::Address(std::net::Ipv4Addr::from_bits(number).into())
    }

    /// Calls at these milliseconds; for each, the wait until it is admitted.
    fn waits(limit: &RateLimit, calls: &[u64]) -> Vec<u128> {
        let start = Instant::now();
        let limiter = RateLimiter::new(start);
        let wait = |at: &u64| limiter.check(limit, RateLimitKey::Route, start + MS * u32::try_from(*at).unwrap());
        calls.iter().map(|at| wait(at).err().map_or(0, |refused| refused.retry_after.as_millis())).collect()
    }

    #[test]
    fn a_burst_passes_then_calls_pass_at_the_pace_of_the_limit() {
        let ten_a_second = |burst| limit(10, 1000 * MS, burst);
        let table: [(&str, u32, &[u64], &[u128]); 6] = [
            ("a burst, then refusals", 3, &[0, 0, 0, 0, 1], &[0, 0, 0, 100, 99]),
            ("without a burst each waits its turn", 1, &[0, 1, 99, 100, 199, 200], &[0, 99, 1, 0, 1, 0]),
            ("a steady pace is never refused", 1, &[0, 100, 200, 300, 400], &[0, 0, 0, 0, 0]),
            ("a refused call uses nothing up", 2, &[0, 0, 50, 50, 99, 100], &[0, 0, 50, 50, 1, 0]),
            ("after a pause the burst is back, and no more", 2, &[0, 0, 9000, 9000, 9000], &[0, 0, 0, 0, 100]),
            ("half a pause gives half of it back", 4, &[0, 0, 0, 0, 200, 200, 200], &[0, 0, 0, 0, 0, 0, 100]),
        ];
        for (case, burst, calls, expected) in table {
            assert_eq!(waits(&ten_a_second(burst), calls), expected, "{case}");
        }
    }

    #[test]
    fn retry_after_is_exact_to_the_nanosecond() {
        let (start, limit) = (Instant::now(), limit(3, 1000 * MS, 2));
        let limiter = RateLimiter::new(start);
        let mut now = start;
        for _ in 0..1000 {
            if let Err(refused) = limiter.check(&limit, RateLimitKey::Route, now) {
                assert!(refused.retry_after > Duration::ZERO);
                let just_before = now + refused.retry_after - Duration::from_nanos(1);
                let left = limiter.check(&limit, RateLimitKey::Route, just_before).unwrap_err().retry_after;
                assert_eq!(left, Duration::from_nanos(1));
                now += refused.retry_after;
                assert_eq!(limiter.check(&limit, RateLimitKey::Route, now), Ok(()));
            }
        }
        // 2 at once, then one each 333333334 ns.
        assert_eq!(now - start, Duration::from_nanos(333_333_334) * 998);
    }

    #[test]
    fn a_call_with_an_older_time_gets_no_more_than_one_in_order() {
        let (start, limit) = (Instant::now(), limit(10, 1000 * MS, 1));
        let limiter = RateLimiter::new(start);
        assert_eq!(limiter.check(&limit, RateLimitKey::Route, start + 500 * MS), Ok(()));
        let refused = limiter.check(&limit, RateLimitKey::Route, start + 400 * MS).unwrap_err();
        assert_eq!(refused.retry_after, 200 * MS);
    }

    #[test]
    fn two_keys_do_not_use_up_each_others_limit() {
        let (now, limit) = (Instant::now(), limit(1, 1000 * MS, 1));
        let limiter = RateLimiter::new(now);
        let keys = [
            caller(1),
            caller(2),
            RateLimitKey::Header(Some(b"a")),
            RateLimitKey::Header(Some(b"b")),
            RateLimitKey::Header(Some(b"")),
            RateLimitKey::Header(None),
        ];
        for key in keys {
            assert_eq!(limiter.check(&limit, key, now), Ok(()), "{key:?}");
            assert!(limiter.check(&limit, key, now).is_err(), "{key:?}");
        }
        assert_eq!(kept(&limiter), keys.len());
    }

    #[test]
    fn a_full_table_makes_room_for_new_keys_when_old_ones_are_whole_again() {
        let (start, limit) = (Instant::now(), limit(1, 1000 * MS, 1));
        let limiter = RateLimiter::new(start);
        let most = u32::try_from(MOST_KEYS).unwrap();
        for number in 0..most {
            limiter.check(&limit, caller(number), start + MS * (number / 20)).unwrap();
        }
        let now = start + 600 * MS;
        assert_eq!(limiter.check(&limit, caller(most), now), Ok(()));
        assert!(limiter.check(&limit, caller(most + 1), now).is_err(), "it shares with the key before");
        assert!(limiter.check(&limit, caller(most - 1), now).is_err(), "a known key is kept");
        assert_eq!(kept(&limiter), MOST_KEYS);
        // The first quarter, which came within 125 ms, has its burst back after 1124 ms.
        let now = start + 1124 * MS;
        assert!(limiter.check(&limit, caller(most + 2), now).is_err(), "it starts with the shared TAT");
        assert_eq!(kept(&limiter), MOST_KEYS - MOST_KEYS / 4 + 1);
        assert!(limiter.check(&limit, caller(most - 1), now).is_err(), "a known key is kept");
    }

    #[test]
    fn a_key_that_had_to_share_gets_no_second_burst_with_a_tat_of_its_own() {
        let (start, limit) = (Instant::now(), limit(1, 1000 * MS, 1));
        let limiter = RateLimiter::new(start);
        let most = u32::try_from(MOST_KEYS).unwrap();
        for number in 0..most {
            limiter.check(&limit, caller(number), start).unwrap();
        }
        assert_eq!(limiter.check(&limit, caller(most), start + 998 * MS), Ok(()), "it shares");
        for (at, left) in [(1000, 998), (1997, 1)] {
            let refused = limiter.check(&limit, caller(most), start + MS * at).unwrap_err();
            assert_eq!(refused.retry_after, MS * left, "at {at} ms all others are gone");
        }
        assert_eq!(limiter.check(&limit, caller(most), start + 1998 * MS), Ok(()));
        assert_eq!(limiter.check(&limit, caller(most + 1), start + 1998 * MS), Ok(()), "each by itself");
    }

    #[test]
    fn workers_together_never_let_more_through_than_allowed() {
        let (start, limit) = (Instant::now(), limit(1000, 1000 * MS, 50));
        let limiter = RateLimiter::new(start);
        for key in [RateLimitKey::Route, caller(7), RateLimitKey::Header(Some(b"k"))] {
            let (passed, clock) = (AtomicU32::new(0), AtomicU32::new(0));
            thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        // 20 000 calls over 200 ms of a clock that all workers share.
                        for _ in 0..5_000 {
                            let now = start + Duration::from_micros(10) * clock.fetch_add(1, Relaxed);
                            if limiter.check(&limit, key, now).is_ok() {
                                passed.fetch_add(1, Relaxed);
                            }
                        }
                    });
                }
            });
            let passed = passed.load(Relaxed);
            assert!((200..=250).contains(&passed), "{key:?}: {passed}");
        }
    }

    #[test]
    fn workers_together_keep_the_table_within_its_bound() {
        let (start, limit) = (Instant::now(), limit(1, 1000 * MS, 1));
        let limiter = RateLimiter::new(start);
        thread::scope(|scope| {
            for worker in 0..4 {
                let (limiter, limit) = (&limiter, &limit);
                scope.spawn(move || {
                    for number in 0..8_000 {
                        let _seen = limiter.check(limit, caller(worker * 4_000 + number), start + MS * number);
                    }
                });
            }
        });
        let kept = kept(&limiter);
        assert!(kept <= MOST_KEYS, "{kept}");
    }
}
