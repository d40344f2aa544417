//! One try at one endpoint: after `src/proxy/attempt.rs`, and `Pool::pick`.

use super::*;

impl Live<'_> {
    pub(super) fn pick_now(&self, now: Instant) -> usize {
        let endpoints = &self.side.endpoints;
        if endpoints.len() == 1 {
            return 0;
        }
        let was_tried = |one: &Endpoint| self.tried.contains(&one.address);
        let begin = self.world.random(|rng| rng.usize(..endpoints.len()));
        let mut due = (begin..endpoints.len()).chain(0..begin);
        let due = due.find(|one| endpoints[*one].member.is_due(now) && !was_tried(&endpoints[*one]));
        if let Some(due) = due.filter(|_| self.world.mutant != Mutant::EjectedForEver) {
            return due;
        }
        let faults = |one: &Endpoint| u8::from(was_tried(one)) << 2 | u8::from(one.member.is_out(now)) << 1;
        let fewest = endpoints.iter().map(faults).min().unwrap();
        let good: Vec<_> = (0..endpoints.len()).filter(|one| faults(&endpoints[*one]) == fewest).collect();
        let load = |position: usize| &endpoints[good[position]].load;
        good[self.world.random(|rng| balance::pick(good.len(), load, rng, now)).unwrap()]
    }

    pub(super) fn pick(&mut self, now: Instant) -> usize {
        self.endpoint = None;
        let mut position = self.pick_now(now);
        if !self.enlist(position) {
            position = self.pick_now(now);
            let _ = self.enlist(position);
        }
        self.check_nobody_starves(position, now);
        self.endpoint = Some(position);
        position
    }

    pub(super) async fn send(&mut self) -> Tried {
        let (world, side) = (self.world, self.side);
        self.unsent = true;
        let mut position = self.pick(self.now());
        // Nothing has been sent, so that whoever can be reached may have the call.
        for left in (0..TRIED).rev() {
            if self.is_there(position) {
                break;
            }
            world.clock.sleep(ms(1)).await;
            let address = side.endpoints[position].address;
            side.endpoints[position].load.record_failure(ms(1), self.now());
            if left == 0 || !self.has_other(position) {
                return Err(LocalReplyKind::ConnectFailed);
            }
            let turn = std::mem::take(&mut self.trial.endpoint);
            self.judge_endpoint(position, turn, CallResult::Failure);
            self.tried.push(address);
            position = self.pick(self.now());
        }
        let began = self.now();
        if began >= self.request_at() {
            return Err(self.too_late());
        }
        self.unsent = false;
        self.reused = world.random(|rng| rng.f64() < 0.8);
        self.check_try(began);
        let request = self.outgoing(began);
        let per_try = side.policy.per_try.map(|time| began + time).filter(|_| side.direction == Direction::Outbound);
        let until = per_try.map_or(self.request_at(), |at| at.min(self.request_at()));
        let until = if world.mutant == Mutant::TimeIgnored { until + ms(300) } else { until };
        let endpoint = &side.endpoints[position];
        endpoint.load.begin();
        let begun = Begun(&endpoint.load);
        let (layer, replica) = (side.layer, endpoint.replica);
        let answer = world.clock.within(until, async {
            match side.direction {
                Direction::Outbound => Ok(world.deliver(layer, replica, request).await),
                Direction::Inbound => world.work(layer, replica, request).await,
            }
        });
        let answer = answer.await;
        drop(begun);
        let took = self.now() - began;
        match answer {
            Some(Ok(answer)) => {
                match answer.status >= 500 {
                    true => endpoint.load.record_failure(took, self.now()),
                    false => endpoint.load.record_response(took, self.now()),
                }
                Ok(answer)
            }
            Some(Err(Broken)) => {
                endpoint.load.record_failure(took, self.now());
                Err(LocalReplyKind::UpstreamReset)
            }
            None => {
                endpoint.load.record_failure(took, self.now());
                Err(if per_try == Some(until) { LocalReplyKind::PerTryTimeout } else { self.too_late() })
            }
        }
    }

    pub(super) fn too_late(&self) -> LocalReplyKind {
        if self.until.is_some() { LocalReplyKind::DeadlineExceeded } else { LocalReplyKind::RequestTimeout }
    }

    pub(super) fn is_there(&self, position: usize) -> bool {
        let wrong = self.world.trouble(self.side.layer, self.side.endpoints[position].replica);
        let away = if self.side.direction == Direction::Inbound { Wrong::AppDown } else { Wrong::Gone };
        wrong != Some(away)
    }

    pub(super) fn has_other(&self, this: usize) -> bool {
        let endpoints = self.side.endpoints.iter().enumerate();
        endpoints.into_iter().any(|(position, other)| position != this && !self.tried.contains(&other.address))
    }

    /// What goes to the next hop, with the time that is left written into it.
    pub(super) fn outgoing(&self, now: Instant) -> Request {
        let mut request = self.request.clone();
        request.keys = self.keys;
        if self.request.grpc && self.until.is_none() {
            return request;
        }
        let left = self.request_at().saturating_duration_since(now);
        let left = left.saturating_sub(reserve(left));
        request.timeout = Some(match request.grpc {
            true => deadline::format_grpc_timeout(left),
            false => deadline::expected_rq_timeout_ms(left).to_string(),
        });
        request
    }
}
