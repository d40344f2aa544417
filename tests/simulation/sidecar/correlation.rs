//! What sidecars tell each other: after `src/proxy/ties.rs`.

use super::*;

impl Live<'_> {
    pub(super) fn failed(&mut self, below: Option<&ProxyStatus>, is_final: bool, now: Instant) {
        if self.side.direction == Direction::Inbound {
            return;
        }
        let is_final = is_final || below.is_some_and(|mark| mark.is_final);
        let at = below.and_then(|mark| mark.at.clone()).unwrap_or_else(|| self.side.name.as_str().into());
        self.failed_at = below.is_some();
        let mark = ProxyStatus { is_final, at: Some(at), ..ProxyStatus::default() };
        if let Some(causes) = &self.causes {
            causes.record_status(&mark);
        }
        let has_tried_out = self.tries > 1 || (self.tries == 1 && self.request.is_safe);
        if mark.is_final && has_tried_out {
            self.world.sidecars[self.sidecar].spent.record(self.keys, self.side.id, now, now);
        }
        self.mark = Some(mark);
    }

    pub(super) fn is_abandoned(&self) -> bool {
        self.late_at.is_some() || self.causes.as_ref().is_some_and(ParentRequests::are_abandoned)
    }

    /// Nobody waits for the app any more.
    pub(super) fn abandon(&self, at: Option<Instant>) {
        if let Some(entered) = &self.entered {
            entered.inbound().abandon();
        }
        if let Some(at) = at {
            let now = self.now();
            let at = if at <= now + ms(10) { now } else { at };
            self.world.sidecars[self.sidecar].late.record(self.keys, LATE, at, now);
        }
    }

    pub(super) fn blamed(&self) -> Option<ProxyStatus> {
        self.entered.as_ref()?.inbound().recorded_status()
    }

    pub(super) fn refused(&mut self, kind: LocalReplyKind) {
        let now = self.now();
        if self.side.direction == Direction::Outbound {
            if kind.is_of_the_callee() && self.mark.is_none() {
                self.failed(None, true, now);
            }
            return;
        }
        self.abandon(matches!(kind, LocalReplyKind::RequestTimeout | LocalReplyKind::DeadlineExceeded).then_some(now));
        let mut mark = self.blamed().unwrap_or_default();
        let is_left = kind == LocalReplyKind::UpstreamReset && self.unsent;
        mark.is_unsent = (kind.is_before_the_app() || is_left) && !self.was_seen;
        self.mark = Some(mark);
    }

    /// The answer on its way back: the callee's with our mark, or one of our own.
    pub(super) fn hand_over(&mut self, tried: Tried) -> Answer {
        let (mut answer, is_own) = match tried {
            Ok(answer) => {
                let said = answer.code.map_or(AttemptFailure::Status(answer.status), AttemptFailure::Grpc);
                let is_failed = self.side.policy.retry.is_failure(said);
                if !is_failed {
                    return answer;
                }
                if self.side.direction == Direction::Inbound {
                    self.mark = self.blamed();
                }
                (answer, false)
            }
            Err(kind) => {
                self.world.checks.count(kind_name(kind));
                self.refused(kind);
                (refusal(kind, self.request.grpc), true)
            }
        };
        let mark = self.mark.clone().unwrap_or_default();
        if is_own || self.mark.is_some() || !answer.proxy_status.is_empty() {
            answer.proxy_status.push(write_member(|member| mark.write(member)));
        }
        if mark.is_final && self.request.grpc {
            answer.pushback = Some(Pushback::Stop);
        }
        answer
    }
}
