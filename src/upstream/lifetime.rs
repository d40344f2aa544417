//! How long a connection is used: `connections.maxAge` and `connections.maxRequests`, and the part of both that a connection
//! gets.
//!
//! Each connection draws a part between 80 % and 100 % of the bounds when it is opened, so that connections opened together
//! do not end together.

use std::cell::Cell;
use std::time::Duration;

use tokio::time::Instant;

use crate::upstream::request_limit;

/// Bounds of the policy for new connections.
#[derive(Debug, Clone, Copy)]
pub struct LifetimeBounds {
    /// `connections.maxAge`.
    pub max_age: Duration,
    /// `connections.maxRequests`; `None` where the policy has none.
    pub max_requests: Option<u32>,
}

/// Why hopguard ended a connection that could have taken another request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndReason {
    /// Another connection of the same age has ended.
    Stale,
    /// `connections.maxAge`.
    MaxAge,
    /// `connections.maxRequests`.
    MaxRequests,
    /// The upstream closes connections after about so many requests.
    Learned,
    /// hopguard drains, and leaves no connection to the app behind.
    Draining,
}

/// The bounds of one connection, and what it has used of them.
#[derive(Debug)]
pub struct Lifetime {
    /// When the connection was opened.
    pub opened_at: Instant,
    /// The connection takes no request from then on.
    pub ends_at: Instant,
    max_requests: u32,
    /// The random part of this connection, from 0 to 1.
    pub spread: f32,
    used: Cell<u32>,
}

impl Lifetime {
    /// The lifetime of a connection opened at `now`; `spread`, from 0 to 1, is its own.
    pub fn new(bounds: LifetimeBounds, now: Instant, spread: f32) -> Self {
        let max_age = bounds.max_age.mul_f32(1.0 - 0.2 * spread);
        let max_requests = bounds.max_requests.map_or(u32::MAX, |most| request_limit::part(most, spread));
        Self { opened_at: now, ends_at: now + max_age, max_requests, spread, used: Cell::new(0) }
    }

    /// Counts a request.
    pub fn count_request(&self) {
        self.used.set(self.used.get().saturating_add(1));
    }

    /// Requests so far.
    pub fn requests(&self) -> u32 {
        self.used.get()
    }

    /// The bound that the connection has reached, if any.
    pub fn is_over(&self, now: Instant) -> Option<EndReason> {
        if now >= self.ends_at {
            Some(EndReason::MaxAge)
        } else if self.used.get() >= self.max_requests {
            Some(EndReason::MaxRequests)
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_ends_between_80_and_100_percent_of_the_bounds() {
        let now = Instant::now();
        let bounds = LifetimeBounds { max_age: Duration::from_secs(300), max_requests: Some(10) };
        for (spread, seconds, requests) in [(0.0, 300, 10), (0.5, 270, 9), (1.0, 240, 8)] {
            let lifetime = Lifetime::new(bounds, now, spread);
            let (before, at) = (Duration::from_secs(seconds - 1), Duration::from_secs(seconds + 1));
            assert_eq!(lifetime.is_over(now + before), None, "{spread}");
            assert_eq!(lifetime.is_over(now + at), Some(EndReason::MaxAge), "{spread}");
            for _ in 1..requests {
                lifetime.count_request();
            }
            assert_eq!(lifetime.is_over(now), None, "{spread}");
            lifetime.count_request();
            assert_eq!(lifetime.is_over(now), Some(EndReason::MaxRequests), "{spread}");
        }
        let unbounded = Lifetime::new(LifetimeBounds { max_requests: None, ..bounds }, now, 1.0);
        (0..1000).for_each(|_| unbounded.count_request());
        assert_eq!(unbounded.is_over(now), None);
    }
}
