//! What one try says about the destination and about the endpoint: after `src/proxy/trial.rs`.

use super::*;

impl Live<'_> {
    pub(super) fn thresholds(&self) -> Thresholds {
        let thresholds = self.side.policy.breaker;
        match self.world.mutant {
            Mutant::ProbesUnlimited => Thresholds { probes: u32::MAX, open_for: ms(2), ..thresholds },
            Mutant::NeverOpens => Thresholds { consecutive_failures: u32::MAX, rate: None, ..thresholds },
            _ => thresholds,
        }
    }

    pub(super) fn ejection(&self) -> Thresholds {
        let thresholds = self.side.policy.ejection;
        match self.world.mutant {
            Mutant::EjectedForEver => Thresholds { open_for: ms(3_600_000), open_for_max: ms(7_200_000), ..thresholds },
            _ => thresholds,
        }
    }

    pub(super) fn admit(&mut self) -> Result<(), LocalReplyKind> {
        self.trial = Permits::default();
        let (watch, checks, now) = (&self.side.watch, &self.world.checks, self.now());
        let thresholds = self.thresholds();
        match self.side.breaker.admit(&thresholds, now) {
            Admission::Admit(pass) => self.trial.destination = BreakerTurn::Permit(pass, watch.passes(checks)),
            Admission::Probe { probe, change } => {
                if let Some(change) = change {
                    watch.changed(&change, &self.side.policy.breaker, now, checks);
                }
                self.trial.destination =
                    BreakerTurn::Probe(probe, watch.probes(&self.side.policy.breaker, now, checks));
            }
            Admission::Refuse { .. } => {
                watch.refuses(checks);
                checks.count("refused by a breaker");
                return Err(LocalReplyKind::CircuitOpen);
            }
        }
        Ok(())
    }

    pub(super) fn enlist(&mut self, position: usize) -> bool {
        let (endpoint, checks, now) = (&self.side.endpoints[position], &self.world.checks, self.now());
        let thresholds = self.ejection();
        self.trial.endpoint = match endpoint.member.admit(&thresholds, now) {
            Admission::Admit(pass) => BreakerTurn::Permit(pass, endpoint.watch.passes(checks)),
            Admission::Probe { probe, change } => {
                if let Some(change) = change {
                    endpoint.watch.changed(&change, &self.side.policy.ejection, now, checks);
                }
                BreakerTurn::Probe(probe, endpoint.watch.probes(&self.side.policy.ejection, now, checks))
            }
            Admission::Refuse { .. } => {
                endpoint.watch.refuses(checks);
                return false;
            }
        };
        true
    }

    pub(super) fn judge(&mut self, outcome: CallResult) {
        let trial = std::mem::take(&mut self.trial);
        let (side, checks, now) = (self.side, &self.world.checks, self.now());
        let was_in = matches!(trial.endpoint, BreakerTurn::Permit(..));
        if let Some(position) = self.endpoint {
            self.judge_endpoint(position, trial.endpoint, outcome);
        }
        let is_one_well = outcome == CallResult::Failure && side.group.has_well_member();
        let (mut thresholds, mut most) = (self.thresholds(), side.policy.breaker.consecutive_failures);
        if is_one_well {
            (thresholds, most) = (thresholds.by_share_alone(), u32::MAX);
        }
        let random = self.world.random(Rng::f64);
        let change = match trial.destination {
            BreakerTurn::None => None,
            BreakerTurn::Permit(pass, period) => {
                let change = side.breaker.record(pass, &thresholds, outcome, now, random);
                side.watch.judged(period, outcome, change.is_some(), most, checks);
                change
            }
            BreakerTurn::Probe(probe, place) => {
                drop(place);
                probe.record(&thresholds, outcome, now, random)
            }
        };
        if let Some(change) = change {
            side.watch.changed(&change, &side.policy.breaker, now, checks);
            self.check_blame(change.to == BreakerState::Open, &side.watch.name);
            if change.to == BreakerState::Open
                && was_in
                && !is_one_well
                && let Some(first) = side.group.end_first_ejection(now)
            {
                let is_first = |one: &&Endpoint| one.member.address() == first.address();
                side.endpoints.iter().filter(is_first).for_each(|one| one.watch.hurried(now));
            }
        }
    }

    /// It has answered for itself, even if somebody below has failed: that is what a probe wants to know.
    pub(super) fn has_answered(&mut self) {
        if !matches!(self.trial.destination, BreakerTurn::Probe(..)) {
            self.trial.destination = BreakerTurn::None;
        }
        if !matches!(self.trial.endpoint, BreakerTurn::Probe(..)) {
            self.trial.endpoint = BreakerTurn::None;
        }
        self.judge(CallResult::Success);
    }

    pub(super) fn judge_endpoint(&self, position: usize, turn: BreakerTurn, outcome: CallResult) {
        let (side, checks, now) = (self.side, &self.world.checks, self.now());
        let Endpoint { member, watch, .. } = &side.endpoints[position];
        let thresholds = self.ejection();
        let random = self.world.random(Rng::f64);
        let event = match turn {
            BreakerTurn::None => None,
            BreakerTurn::Permit(pass, period) => {
                let event = member.record(pass, &thresholds, outcome, now, random);
                watch.judged(period, outcome, event.is_some(), side.policy.ejection.consecutive_failures, checks);
                event
            }
            BreakerTurn::Probe(probe, place) => {
                drop(place);
                probe.record(&thresholds, outcome, now, random).map(EjectionEvent::Ejected)
            }
        };
        match event {
            Some(EjectionEvent::Ejected(change)) => {
                watch.changed(&change, &side.policy.ejection, now, checks);
                self.check_blame(change.to == BreakerState::Open, &watch.name);
                let is_one_in = side.endpoints.iter().any(|one| one.watch.state() == BreakerState::Closed);
                checks.claim(is_one_in, Invariant::LastOne, || format!("{}: all are out", side.name));
            }
            Some(EjectionEvent::Kept { .. }) => watch.kept(checks),
            None => {}
        }
    }

    pub(super) fn judge_complete(&mut self, answer: &Answer) {
        if is_failed_status(answer.status) {
            return;
        }
        if !answer.code.is_some_and(|code| GrpcFailures::built_in().contains(code)) {
            self.side.budget.earn();
            self.side.got.good.set(self.side.got.good.get() + 1);
            self.judge(CallResult::Success);
        } else if !self.failed_at && !self.is_blamed_below() && !self.is_late_in_a_hurry(answer) {
            self.judge(CallResult::Failure);
        }
    }

    pub(super) fn is_callees_fault(&self, kind: LocalReplyKind) -> bool {
        match kind {
            LocalReplyKind::ConnectFailed
            | LocalReplyKind::UpstreamReset
            | LocalReplyKind::PerTryTimeout
            | LocalReplyKind::RequestTimeout => true,
            LocalReplyKind::DeadlineExceeded => !self.is_in_a_hurry(),
            _ => false,
        }
    }

    /// The callee was not given the time that it may take.
    pub(super) fn is_late_in_a_hurry(&self, answer: &Answer) -> bool {
        answer.code.map_or(answer.status == 504, |code| code == 4) && self.is_in_a_hurry()
    }

    /// The app failed because somebody failed whom it called.
    pub(super) fn is_blamed_below(&self) -> bool {
        self.world.mutant != Mutant::BlameIgnored && self.blamed().is_some()
    }

    pub(super) fn is_in_a_hurry(&self) -> bool {
        let part = if self.side.direction == Direction::Inbound { 2 } else { 10 };
        self.until.as_ref().is_some_and(|until| until.whole < self.side.policy.request / part)
    }
}
