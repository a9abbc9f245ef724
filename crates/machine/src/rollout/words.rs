//! A rollout in words: the step it is at, and what it waits for.

use orchestra_model::rollout::{OnExpiry, PauseStep, RolloutPhase, RolloutStep};

use super::{
    Rollout, Seen,
    hooks::{HookState, hook_words},
};

impl Rollout {
    /// The current step in words: `step 2 of 5: weight 25 %`.
    pub fn step_words(&self) -> String {
        let total = self.stepped().map_or(0, |stepped| stepped.steps.len());
        let Some(step) = self.step() else {
            return match self.record.phase {
                RolloutPhase::Stepping | RolloutPhase::Promoting => "promotion".to_owned(),
                RolloutPhase::Watching => "watched at all traffic".to_owned(),
                RolloutPhase::Warm => "in force; the old set is kept".to_owned(),
            };
        };
        let what = match step {
            RolloutStep::Weight(weight) => format!("weight {weight}"),
            RolloutStep::Scale(amount) => format!("scale {amount}"),
            RolloutStep::Pause(PauseStep { duration: Some(length), .. }) => format!("pause {length}"),
            RolloutStep::Pause(_) => "pause until promoted".to_owned(),
            RolloutStep::Analysis(analysis) => format!("analysis for at most {}", analysis.duration),
            RolloutStep::Hook(hook) => hook_words(&hook.name),
            RolloutStep::Match(matches) if matches.is_empty() => "no matched requests".to_owned(),
            RolloutStep::Match(_) => "matched requests".to_owned(),
            RolloutStep::Mirror { share, .. } => format!("mirror {share}"),
        };
        let raised = match self.record.raised {
            Some(raised) => format!(", traffic raised to {raised}"),
            None => String::new(),
        };
        format!("step {} of {total}: {what}{raised}", self.record.step + 1)
    }

    /// What it waits for, in words.
    pub fn waits_for(&self, seen: &Seen) -> String {
        if let Some(paused) = &self.record.paused {
            return format!("{} to promote or abort ({})", paused.owner, paused.reason);
        }
        let wanted = self.canary_wanted(seen.replicas);
        if seen.available < wanted {
            return format!("instances of release {}: {} of {wanted} are available", self.record.to, seen.available);
        }
        match self.step() {
            Some(RolloutStep::Pause(PauseStep { duration: Some(length), .. })) => {
                format!("the pause of {length} to pass")
            }
            Some(RolloutStep::Pause(pause)) => {
                let owner = pause.owner.as_deref().unwrap_or("a person");
                let then = match pause.on_expiry {
                    OnExpiry::RollBack => "turned back",
                    OnExpiry::Promote => "promoted",
                };
                format!("{owner} to promote or abort ({then} after {} without a word)", pause.expires)
            }
            Some(RolloutStep::Analysis(_)) => match &self.judged {
                Some((_, reason)) => format!("a verdict ({reason})"),
                None => "a verdict".to_owned(),
            },
            Some(RolloutStep::Hook(hook)) => match &self.hook {
                HookState::Refused(_, reason) => {
                    format!("{} to agree, which it did not ({reason}); it is asked again", hook_words(&hook.name))
                }
                _ => format!("{} to agree", hook_words(&hook.name)),
            },
            _ if !seen.routed => "the proxy to take the new routes".to_owned(),
            _ if self.record.phase == RolloutPhase::Watching => "its time under watch to pass".to_owned(),
            _ => "nothing".to_owned(),
        }
    }
}
