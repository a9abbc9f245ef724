//! How an attempt ends, and whether another one follows.
//!
//! Whatever ended it (its own exit, a check, a deadline, a provider that could not start it), the way is the same: the main
//! process exits, the rest of its tree goes, and only then the restart policy decides.

use std::time::Duration;

use orchestra_model::{Code, Diagnostic, EventKind, Now, launch::Exit, quantity::Timespan, record::InstanceIntent};

use super::{Command, Instance, Phase};
use crate::{restart::Decision, rng::Rng};

impl Instance {
    pub(super) fn launch_failed(&mut self, now: Now, problem: Diagnostic, retry: Option<Duration>) -> Vec<Command> {
        if self.phase != Phase::Launching && !matches!(self.phase, Phase::Stopping { .. }) {
            return Vec::new();
        }
        if self.record.intent != InstanceIntent::Run {
            self.enter(Phase::Gone, now);
            return vec![Command::Note(EventKind::InstanceGone, "it was never started".to_owned())];
        }
        let cause = problem.message.clone();
        self.problem = Some(problem);
        if let Some(pause) = retry {
            self.record.attempt += 1;
            self.enter(Phase::Pending { until: Some(now + pause), why: format!("another try ({cause})") }, now);
            return vec![Command::Persist, Command::Note(EventKind::InstancePending, cause)];
        }
        self.enter(Phase::Ended { exit: None }, now);
        vec![Command::Note(EventKind::InstanceFailed, cause)]
    }

    /// Ends the current attempt, after which a restart is wanted.
    pub(super) fn restart_it(&mut self, now: Now, code: Code, why: String) -> Vec<Command> {
        if !self.is_started() {
            return Vec::new();
        }
        self.note_readiness(now);
        self.problem = Some(Diagnostic::error(code, format!("instance {}: {why}", self.record.id)));
        self.record.forced = Some(why.clone());
        self.terminate(now, why)
    }

    pub(super) fn note_readiness(&mut self, now: Now) {
        if self.phase == Phase::Ready {
            self.history.observe_readiness(&self.policy.restart, now.since(self.since));
        }
    }

    pub(super) fn exited(&mut self, now: Now, exit: Exit, message: Option<&str>) -> Vec<Command> {
        if matches!(self.phase, Phase::Exited { .. } | Phase::Ended { .. } | Phase::Gone | Phase::Pending { .. }) {
            return Vec::new();
        }
        self.note_readiness(now);
        let cause = message.map_or_else(|| exit.to_string(), str::to_owned);
        if self.record.intent == InstanceIntent::Run
            && self.record.forced.is_none()
            && !(self.policy.completes && exit.is_success())
        {
            let code = if exit == Exit::NotStarted { Code::START_FAILED } else { Code::EXITED };
            let verb = if exit == Exit::NotStarted { "could not be started" } else { "exited by itself" };
            self.problem = Some(Diagnostic::error(code, format!("instance {} {verb}: {cause}", self.record.id)));
        }
        self.record.last_exit = Some(exit);
        self.pid = None;
        self.enter(Phase::Exited { exit }, now);
        vec![self.stop_probes(), Command::Note(EventKind::InstanceExited, cause)]
    }

    pub(super) fn gone(&mut self, now: Now, rng: &mut Rng) -> Vec<Command> {
        let attempt = self.record.attempt;
        let mut commands = Vec::new();
        let exit = match self.phase {
            Phase::Exited { exit } => exit,
            Phase::Gone | Phase::Ended { .. } | Phase::Pending { .. } => return Vec::new(),
            // A launch that never was, or whose end nobody saw.
            _ => {
                commands = self.exited(now, Exit::Unknown, None);
                Exit::Unknown
            }
        };
        commands.extend(self.after_gone(now, exit, attempt, rng));
        commands
    }

    fn after_gone(&mut self, now: Now, exit: Exit, attempt: u32, rng: &mut Rng) -> Vec<Command> {
        if self.record.intent != InstanceIntent::Run {
            self.enter(Phase::Gone, now);
            return vec![Command::Note(EventKind::InstanceGone, exit.to_string()), Command::Forget(attempt)];
        }
        let forced = self.record.forced.take();
        if self.policy.completes && exit.is_success() && forced.is_none() {
            self.completed = true;
            self.enter(Phase::Ended { exit: Some(exit) }, now);
            return vec![Command::Persist, Command::Note(EventKind::InstanceGone, "completed".to_owned())];
        }
        // A program that cannot be executed will not learn it by trying, unless it once could.
        let hopeless = exit == Exit::NotStarted && !self.proven;
        let decision = if hopeless {
            Decision::NotWanted
        } else {
            self.history.decide(&self.policy.restart, exit, forced.is_some(), rng)
        };
        let cause = forced.unwrap_or_else(|| exit.to_string());
        match decision {
            Decision::After(pause) => {
                self.record.attempt += 1;
                (self.record.recent_restarts, self.record.restarts) = (self.history.recent, self.history.total);
                self.record.was_ready = false;
                self.started = None;
                for health in [&mut self.ready, &mut self.live].into_iter().flatten() {
                    health.restart();
                }
                // Whoever looks is told how much of the pause is left.
                let why = format!("its restart after {cause}");
                self.enter(Phase::Pending { until: Some(now + pause), why }, now);
                let said = format!("restart in {} after {cause}", in_words(pause));
                vec![Command::Persist, Command::Note(EventKind::InstancePending, said), Command::Forget(attempt)]
            }
            Decision::NotWanted | Decision::CrashLoop => {
                let looping = decision == Decision::CrashLoop;
                let id = &self.record.id;
                let problem = if self.policy.completes {
                    Diagnostic::error(Code::JOB_FAILED, format!("job {} failed: {cause}", id.workload))
                } else if looping {
                    let often = match self.history.recent {
                        0 => "exited, and no restart is allowed".to_owned(),
                        1 => "was restarted once without success".to_owned(),
                        count => format!("was restarted {count} times without success"),
                    };
                    Diagnostic::error(Code::CRASH_LOOP, format!("instance {id} {often}: {cause}"))
                } else if hopeless {
                    self.problem.take().unwrap_or_else(|| {
                        Diagnostic::error(Code::START_FAILED, format!("instance {id} could not be started"))
                    })
                } else {
                    Diagnostic::error(
                        Code::EXITED,
                        format!("instance {id} exited and its policy does not restart it: {cause}"),
                    )
                };
                let message = problem.message.clone();
                self.problem = Some(problem);
                self.enter(Phase::Ended { exit: Some(exit) }, now);
                // The provider keeps its record until this one goes: a recovery finds there that it has ended.
                vec![Command::Persist, Command::Note(EventKind::InstanceFailed, message)]
            }
        }
    }
}

/// A pause for people: `250ms`, `1.3s`, `1m30s`.
fn in_words(pause: Duration) -> String {
    match pause.as_millis() {
        millis @ 0..1_000 => format!("{millis}ms"),
        1_000..60_000 => format!("{:.1}s", pause.as_secs_f64()),
        _ => Timespan::seconds(pause.as_secs()).to_string(),
    }
}
