//! People and a rollout: pauses, promotions and what happens if nobody decides.
//!
//! Time that a person took does not count: whatever deadline there is moves by it.

use std::time::Duration;

use orchestra_model::{
    Code, Diagnostic, EventKind,
    rollout::{OnExpiry, PauseStep, Paused, RolloutCommand, RolloutPhase, RolloutStep},
    time::UnixMillis,
};

use super::{Command, Rollout, millis, words};

/// A pause that nobody ends is turned back after a day.
pub(super) const PAUSE_EXPIRES: Duration = Duration::from_secs(24 * 60 * 60);

impl Rollout {
    pub(super) fn command(&mut self, at: UnixMillis, command: &RolloutCommand, by: &str, out: &mut Vec<Command>) {
        match command {
            RolloutCommand::Pause => {
                if self.record.paused.is_none() {
                    self.pause(at, by, &format!("paused by {by}"), out);
                }
            }
            RolloutCommand::Promote if self.record.paused.is_some() => {
                // A person was asked already when it was paused: one word answers both.
                let since = self.record.paused.as_ref().map_or(0, |paused| paused.since);
                let both = self.asks_a_person() && since > self.record.since;
                self.resume_from_pause(at, &format!("promoted by {by}"), out);
                if both {
                    self.skip_step(at, out);
                }
            }
            RolloutCommand::Promote => match self.record.phase {
                RolloutPhase::Stepping => {
                    out.push(Command::Note(EventKind::RolloutResumed, format!("promoted by {by}")));
                    self.skip_step(at, out);
                }
                RolloutPhase::Watching => self.end_watch(at, out),
                RolloutPhase::Promoting | RolloutPhase::Warm => {}
            },
            RolloutCommand::PromoteFully => {
                self.end_pause(at);
                self.end_asking(at);
                out.push(Command::Note(EventKind::RolloutResumed, format!("promoted fully by {by}")));
                match self.record.phase {
                    RolloutPhase::Stepping => {
                        self.judged = None;
                        self.enter(at, RolloutPhase::Promoting, out);
                    }
                    RolloutPhase::Watching => self.end_watch(at, out),
                    RolloutPhase::Promoting | RolloutPhase::Warm => out.push(Command::Persist),
                }
            }
            RolloutCommand::Abort => {
                let message = format!("the rollout to release {} was aborted by {by}", self.record.to);
                out.push(Command::Fail(Diagnostic::error(Code::RUN_CANCELLED, message)));
            }
        }
    }

    /// Ends the current step as if it were done: one that sets something sets it.
    fn skip_step(&mut self, at: UnixMillis, out: &mut Vec<Command>) {
        match self.step().cloned() {
            // These are done by instances and routes, and a person cannot speed those up.
            Some(
                RolloutStep::Weight(_) | RolloutStep::Scale(_) | RolloutStep::Match(_) | RolloutStep::Mirror { .. },
            )
            | None => {}
            Some(RolloutStep::Pause(_) | RolloutStep::Analysis(_) | RolloutStep::Hook(_)) => {
                self.end_asking(at);
                self.next_step(at, out);
            }
        }
    }

    pub(super) fn pause(&mut self, at: UnixMillis, owner: &str, reason: &str, out: &mut Vec<Command>) {
        let expires = at.saturating_add(millis(PAUSE_EXPIRES));
        self.record.paused = Some(Paused {
            owner: owner.to_owned(),
            reason: reason.to_owned(),
            since: at,
            expires,
            on_expiry: OnExpiry::RollBack,
        });
        out.push(Command::Note(
            EventKind::RolloutPaused,
            format!("{reason}; waits for {owner}, rolled back after {}", words(PAUSE_EXPIRES)),
        ));
        out.push(Command::Persist);
    }

    pub(super) fn resume_from_pause(&mut self, at: UnixMillis, reason: &str, out: &mut Vec<Command>) {
        self.end_pause(at);
        out.push(Command::Note(EventKind::RolloutResumed, reason.to_owned()));
        out.push(Command::Persist);
    }

    /// Whether the current step is a pause that a person ends.
    pub(super) fn asks_a_person(&self) -> bool {
        matches!(self.step(), Some(RolloutStep::Pause(PauseStep { duration: None, .. })))
    }

    /// Time that a person took for the current step does not count.
    fn end_asking(&mut self, at: UnixMillis) {
        if self.asks_a_person() {
            self.extend(at, self.record.since);
        }
    }

    fn end_pause(&mut self, at: UnixMillis) {
        if let Some(paused) = self.record.paused.take() {
            self.extend(at, paused.since);
            // The step's own time stood still as well.
            self.record.since =
                self.record.since.saturating_add(at.saturating_sub(paused.since.max(self.record.since)));
            self.progress_at = at;
        }
    }
}

pub(super) fn expired(reason: &str, owner: &str) -> Diagnostic {
    Diagnostic::error(Code::RUN_TIMED_OUT, "nobody decided in time")
        .note(format!("{reason}; {owner} was to promote or abort"))
}
