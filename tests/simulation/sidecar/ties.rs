//! What sidecars tell each other: after `src/proxy/ties.rs`.

use super::*;

impl Live<'_> {
    pub(super) fn failed(&mut self, below: Option<&Mark>, is_final: bool, now: Instant) {
        if self.side.direction == Direction::Inbound {
            return;
        }
        let is_final = is_final || below.is_some_and(|mark| mark.is_final);
        let at = below.and_then(|mark| mark.at.clone()).unwrap_or_else(|| self.side.name.as_str().into());
        self.failed_at = below.is_some();
        let mark = Mark { is_final, is_unsent: false, at: Some(at) };
        if let Some(causes) = &self.causes {
            causes.blame(&mark);
        }
        if mark.is_final {
            self.world.sidecars[self.sidecar].spent.note(self.keys, self.side.id, now, now);
        }
        self.mark = Some(mark);
    }

    pub(super) fn blamed(&self) -> Option<Mark> {
        self.entered.as_ref()?.inbound().blamed()
    }

    pub(super) fn refused(&mut self, kind: Kind) {
        let now = self.now();
        if self.side.direction == Direction::Outbound {
            if kind.is_of_the_callee() && self.mark.is_none() {
                self.failed(None, true, now);
            }
            return;
        }
        if matches!(kind, Kind::RequestTimeout | Kind::DeadlineExceeded) {
            self.world.sidecars[self.sidecar].late.note(self.keys, LATE, now, now);
        }
        let mut mark = self.blamed().unwrap_or_default();
        mark.is_unsent = kind.is_before_the_app() && !self.was_seen;
        self.mark = Some(mark);
    }

    /// The answer on its way back: the callee's with our mark, or one of our own.
    pub(super) fn hand_over(&mut self, tried: Tried) -> Answer {
        let (mut answer, is_own) = match tried {
            Ok(answer) => {
                let is_failed = answer.code.map_or(answer.status >= 500, is_failed_code);
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
            answer.proxy_status.push(format!("hopguard{}", mark.write_parameters()));
        }
        if mark.is_final && self.request.grpc {
            answer.pushback = Some(Pushback::Stop);
        }
        answer
    }
}
