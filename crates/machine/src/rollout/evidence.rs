//! What the evidence does to a rollout: a verdict moves it on or turns it back, and too little of it raises the traffic.

use std::time::Duration;

use orchestra_model::{
    Code, Diagnostic, EventKind,
    rollout::{AnalysisStep, OnInconclusive, RolloutPhase, RolloutStep, VerdictOutcome},
    time::UnixMillis,
    traffic::Permille,
};

use super::{Command, Rollout};

impl Rollout {
    /// Whether a verdict would be heard now: `Some(true)` if it must be given, `Some(false)` if a pass may come early or
    /// only a fail matters.
    pub fn wants_verdict(&self, at: UnixMillis) -> Option<bool> {
        let analysis = self.analysis().filter(|_| self.record.paused.is_none())?;
        let over = at >= self.after(self.record.since, analysis.duration.duration());
        Some(over)
    }

    /// The time that an analysis has left, if the share may grow so that it is enough: not before an eighth of it has
    /// shown how much traffic there is, and not while an earlier raise waits for instances.
    pub fn may_raise(&self, at: UnixMillis) -> Option<Duration> {
        let step = self.analysis().filter(|_| self.record.paused.is_none())?;
        let limit = self.guard()?.raise_to?;
        let passed = Duration::from_millis(at.saturating_sub(self.record.since));
        let length = step.duration.duration();
        let settled = self.record.raised.is_none_or(|raised| raised <= self.record.weight);
        let may = settled && self.record.weight > Permille::ZERO && self.record.weight < limit;
        (may && passed >= length / 8).then(|| length.saturating_sub(passed))
    }

    /// Raises the share, at least to twice what it was, so that it happens a few times only.
    pub(super) fn raise(&mut self, weight: Permille, out: &mut Vec<Command>) {
        let limit = self.guard().and_then(|guard| guard.raise_to).unwrap_or_default();
        let raised = weight.max(Permille::new(self.record.weight.get().saturating_mul(2))).min(limit);
        if self.analysis().is_none() || self.record.paused.is_some() || raised <= self.record.weight {
            return;
        }
        self.record.raised = Some(raised);
        let message =
            format!("the traffic is raised from {} to {raised}: evidence comes too slowly", self.record.weight);
        out.push(Command::Note(EventKind::RolloutStep, message));
        out.push(Command::Persist);
    }

    /// The share that a step with `weight` gives: not less than it was raised to, unless the step lowers what an earlier
    /// one asked for.
    pub(super) fn floored(&self, weight: Permille) -> Permille {
        let steps = self.stepped().map_or(&[][..], |stepped| &stepped.steps);
        let earlier = steps.iter().take(self.record.step as usize).rev().find_map(|step| match step {
            RolloutStep::Weight(weight) => Some(*weight),
            _ => None,
        });
        match self.record.raised {
            Some(raised) if weight >= earlier.unwrap_or_default() => weight.max(raised),
            _ => weight,
        }
    }

    pub(super) fn take_analysis(&mut self, at: UnixMillis, step: &AnalysisStep, out: &mut Vec<Command>) -> bool {
        let over = at >= self.after(self.record.since, step.duration.duration());
        let (outcome, reason) = match &self.judged {
            Some((VerdictOutcome::Pass, _)) => return self.next_step(at, out),
            Some(judged) if over => judged.clone(),
            // No word at all from whoever judges: that is what an error is.
            None if over => (VerdictOutcome::Error, "nothing was measured".to_owned()),
            _ => return false,
        };
        let policy = step.inconclusive.or(self.guard().map(|guard| guard.inconclusive)).unwrap_or_default();
        let word = if outcome == VerdictOutcome::Error { "could not be measured" } else { "was inconclusive" };
        match policy {
            OnInconclusive::Hold => {
                self.next_step(at, out);
                self.pause(at, "a person", &format!("the verdict {word}: {reason}"), out);
                false
            }
            OnInconclusive::PromoteAndWatch => {
                self.next_step(at, out);
                self.judged = Some((outcome, reason));
                self.record.step = u32::try_from(self.stepped().map_or(0, |s| s.steps.len())).unwrap_or(u32::MAX);
                self.enter(at, RolloutPhase::Promoting, out);
                true
            }
            OnInconclusive::RollBack => {
                let message = format!("the verdict about release {} {word}", self.record.to);
                out.push(Command::Fail(Diagnostic::error(Code::VERDICT, message).note(reason)));
                false
            }
        }
    }

    /// What was heard counts no more: an analysis begins again, within the deadline of the whole.
    pub fn judge_anew(&mut self, at: UnixMillis) {
        self.judged = None;
        if self.analysis().is_some() {
            self.record.since = at;
        }
    }

    pub(super) fn judged(&mut self, at: UnixMillis, outcome: VerdictOutcome, reason: String, out: &mut Vec<Command>) {
        if outcome == VerdictOutcome::Fail {
            let message = format!("release {} is worse than release {}", self.record.to, self.record.from);
            out.push(Command::Fail(Diagnostic::error(Code::VERDICT, message).note(reason)));
            return;
        }
        let _ = at;
        if self.analysis().is_some() {
            self.judged = Some((outcome, reason));
        }
    }
}
