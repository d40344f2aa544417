//! What is claimed of each exchange.

use super::*;

impl Live<'_> {
    /// So much later than at the first caller a deadline may be: each hop counts anew from when the request comes in, and
    /// gives no less than a millisecond.
    pub(super) fn slack(&self) -> Duration {
        ms(2) * u32::try_from(2 * self.side.layer + 2).unwrap()
    }

    pub(super) fn check_try(&self, now: Instant) {
        let (checks, got) = (&self.world.checks, &self.side.got);
        got.tries.set(got.tries.get() + 1);
        let at = self.began + self.side.policy.request;
        checks.claim(now < at, Invariant::Deadline, || format!("{}: a try begins {:?} late", self.side.name, now - at));
        if let Some(at) = self.request.ends_by(self.slack()) {
            checks.claim(now <= at, Invariant::Deadline, || {
                format!("call {} at {}: a try begins {:?} late", self.request.call, self.side.name, now - at)
            });
        }
        let most = got.calls.get() + got.retries.get() + got.unsent.get();
        let tries = got.tries.get();
        checks.claim(tries <= most, Invariant::RetryBudget, || {
            format!("{}: {tries} tries, {most} allowed", self.side.name)
        });
    }

    pub(super) fn check_end(&self) {
        let (now, checks) = (self.now(), &self.world.checks);
        let own = self.began + self.side.policy.request;
        // Who comes too late is told so at once.
        let at = self.request.ends_by(self.slack()).map_or(own, |at| at.min(own)).max(self.began);
        checks.claim(now <= at, Invariant::Deadline, || {
            format!("call {} at {} ends {:?} late", self.request.call, self.side.name, now - at)
        });
    }

    /// A breaker may open only where something has been wrong, as far as that can be told apart.
    pub(super) fn check_blame(&self, opens: bool, name: &str) {
        let plan = &self.world.plan;
        if opens && self.world.is_blame_clear() {
            let is_right = plan.was_wrong(self.side.layer, self.world.clock.passed());
            self.world.checks.claim(is_right, Invariant::Blame, || {
                format!("{name} opens, and nothing was ever wrong with service {}", self.side.layer)
            });
        }
    }

    /// An endpoint whose time is over is tried by one of the next calls, and one that is out gets none.
    pub(super) fn check_nobody_starves(&self, picked: usize, now: Instant) {
        let endpoints = &self.side.endpoints;
        let longest = self.side.policy.ejection.open_for_max;
        for (position, one) in endpoints.iter().enumerate() {
            let is_mine = position == picked || self.tried.contains(&one.address);
            if !is_mine && one.watch.is_due(longest, now) {
                let passed = one.watch.passed_over.get() + 1;
                one.watch.passed_over.set(passed);
                self.world.checks.claim(passed <= PASSED_OVER, Invariant::Starved, || {
                    format!("{} is due and was passed over {passed} times", one.watch.name)
                });
            }
        }
        let is_out =
            endpoints[picked].watch.state() != BreakerState::Closed && matches!(self.trial.endpoint, BreakerTurn::None);
        // That a call has tried an endpoint weighs more than that another one is out.
        let is_first = self.tried.is_empty();
        let name = &endpoints[picked].watch.name;
        self.world.checks.claim(!(is_out && is_first), Invariant::Breaker, || format!("{name} is out and gets a call"));
    }
}
