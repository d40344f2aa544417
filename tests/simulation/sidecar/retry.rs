//! Whether another try follows: after `src/proxy/tries.rs`.

use super::*;

impl Live<'_> {
    pub(super) fn report(&self, tried: &Tried) -> FailedAttempt {
        let answer = match tried {
            Ok(answer) => answer,
            Err(kind) => {
                let failure = match kind {
                    LocalReplyKind::ConnectFailed => Some(AttemptFailure::Reset),
                    LocalReplyKind::UpstreamReset if self.unsent => {
                        match self.endpoint.is_some_and(|this| self.has_other(this)) {
                            true => Some(AttemptFailure::Unsent),
                            false => Some(AttemptFailure::Refused),
                        }
                    }
                    LocalReplyKind::UpstreamReset => Some(AttemptFailure::Reset),
                    LocalReplyKind::PerTryTimeout => Some(AttemptFailure::Timeout),
                    _ => None,
                };
                let is_elsewhere = self.is_blamed_below();
                let counts = self.is_callees_fault(*kind) && !is_elsewhere;
                return FailedAttempt {
                    failure,
                    counts,
                    is_elsewhere,
                    unseen: self.unsent,
                    mark: None,
                    pushback: None,
                };
            }
        };
        let mark = ProxyStatus::read(answer.proxy_status.iter().map(String::as_bytes));
        let is_unsent = mark.as_ref().is_some_and(|mark| mark.is_unsent);
        let mut failure = answer.code.map_or(AttemptFailure::Status(answer.status), AttemptFailure::Grpc);
        if is_unsent && self.endpoint.is_some_and(|this| self.has_other(this)) {
            failure = AttemptFailure::Unsent;
        }
        let is_elsewhere = self.world.mutant != Mutant::BlameIgnored
            && (mark.as_ref().is_some_and(|mark| mark.at.is_some()) || self.blamed().is_some());
        let is_failed =
            answer.code.map_or_else(|| is_failed_status(answer.status), |code| GrpcFailures::built_in().contains(code));
        let counts = is_failed && !is_elsewhere && !self.is_late_in_a_hurry(answer);
        let pushback = answer.pushback.filter(|_| failure != AttemptFailure::Unsent);
        FailedAttempt { failure: Some(failure), counts, is_elsewhere, unseen: is_unsent, mark, pushback }
    }

    pub(super) fn decide(&self, report: &FailedAttempt, now: Instant) -> RetryDecision {
        let Some(failure) = report.failure else { return RetryDecision::Stop(NoRetryReason::NotAFailure) };
        let own = &self.world.sidecars[self.sidecar];
        let is_spent = self.side.direction == Direction::Outbound && own.spent.contains(self.keys, self.side.id, now);
        let is_marked = report.mark.as_ref().is_some_and(|mark| mark.is_final) || is_spent;
        let seen = AttemptSummary {
            tries: self.attempt,
            failure,
            is_inbound: self.side.direction == Direction::Inbound,
            is_reused: self.reused,
            is_same_event: false,
            // An open breaker bounds retries too, and would hide that the budget does not.
            is_circuit_open: self.side.breaker.is_shut(now) && self.world.mutant != Mutant::BudgetIgnored,
            is_safe: self.request.is_safe || report.unseen || self.world.mutant == Mutant::SafetyIgnored,
            is_abandoned: self.is_abandoned(),
            is_marked_final: is_marked && self.world.mutant != Mutant::MarkIgnored,
            pushback: report.pushback.filter(|_| self.world.mutant != Mutant::MarkIgnored),
            is_replayable: self.request.is_replayable,
            left: self.request_at().saturating_duration_since(now).saturating_sub(2 * LEAST),
            random: self.world.random(Rng::f64),
        };
        let retry = &self.side.policy.retry;
        match self.world.mutant {
            Mutant::BudgetIgnored => retry.decide(&seen),
            _ => retry.next(&seen, &self.side.budget, now),
        }
    }

    pub(super) fn tell_replayer(&self, report: &FailedAttempt, tried: &Tried) {
        self.world.checks.event(|| {
            let (at, call, name, number) =
                (self.world.clock.passed(), self.request.number(), &self.side.name, self.attempt);
            let whole = self.until.as_ref().map(|until| until.whole);
            let (kind, failure, counts) = (tried.as_ref().err(), report.failure, report.counts);
            format!("{at:?} call {call} at {name}: try {number} failed: {failure:?} {kind:?}, counts: {counts}, had {whole:?}")
        });
    }

    pub(super) fn note_retry(&self, report: &FailedAttempt) {
        let got = &self.side.got;
        if report.failure == Some(AttemptFailure::Unsent) {
            self.world.checks.count("retries of the unsent");
            got.unsent.set(got.unsent.get() + 1);
            return;
        }
        self.world.checks.count("retries");
        got.retries.set(got.retries.get() + 1);
        let budget = &self.side.policy.retry.budget;
        let time = self.world.clock.passed().as_secs_f64();
        let allowed = 10.0 + f64::from(budget.min_per_second.value) * time + budget.ratio.value * got.good.get() as f64;
        let retries = got.retries.get();
        self.world.checks.claim(retries as f64 <= allowed + 1e-6, Invariant::RetryBudget, || {
            format!("{}: {retries} retries, {allowed} allowed after {time}s", self.side.name)
        });
    }

    pub(super) fn tell(&mut self, report: &FailedAttempt, why: NoRetryReason, now: Instant) {
        let is_failure = report.failure.is_some_and(|failure| self.side.policy.retry.is_failure(failure));
        if is_failure {
            self.world.checks.count(why.name());
            let is_safe = self.request.is_safe || report.unseen;
            let is_final = self.side.policy.retry.is_final(self.attempt, is_safe, Some(why));
            self.failed(report.mark.as_ref(), is_final, now);
        }
    }
}
