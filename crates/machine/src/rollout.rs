//! The rollout of one service: which share of instances and traffic the new release gets, and when it gets more.
//!
//! ```text
//!              +---------------- promote fully ----------------+
//!              |                                               v
//!   Stepping --+-- last step done --> Promoting --> [Watching] --> Warm --> (forgotten)
//!      |                                  |             |            |
//!      +---- a bad verdict, a hook's no, a deadline, an abort ------ | a rollback finds the old set ready
//!                                         v
//!                          failed: the run turns back as a whole
//! ```
//!
//! The machine says what it wants (`canary_wanted`, `split`), sees what there is ([`Seen`]), and moves on when the two
//! agree: it never waits for a command's answer, so it continues from its record after any crash. Strategies without
//! steps begin at `Promoting`. Being paused is not a phase but a mark on any of them: nothing advances while it is there,
//! and a bad verdict still turns back. Times are Unix milliseconds on a line that the driver makes monotonic for the life
//! of a server, because they are written down.

mod evidence;
mod hooks;
pub mod judge;
mod people;
mod words;

#[cfg(test)]
mod tests;

use std::time::Duration;

use orchestra_model::{
    Code, Diagnostic, EventKind, ReleaseNumber, RunId,
    desired::Service,
    quantity::Timespan,
    rollout::{
        AnalysisStep, Guard, Hook, OnExpiry, Rollout as Spec, RolloutCommand, RolloutPhase, RolloutRecord, RolloutStep,
        Stepped, VerdictOutcome,
    },
    time::UnixMillis,
    traffic::{Mirror, Permille, Split},
};

use self::{
    hooks::{HOOK_PAUSE, HookState, hook_time},
    people::{PAUSE_EXPIRES, expired},
};

/// Mirrored requests under way at a time.
const MIRROR_LIMIT: u32 = 64;

/// The rollout of one service.
#[derive(Clone, Debug)]
pub struct Rollout {
    record: RolloutRecord,
    spec: Spec,
    /// Progress in the sense of [`Spec::progress`]: most instances that were available since `progress_at`.
    best: u32,
    wanted: u32,
    progress_at: UnixMillis,
    hook: HookState,
    /// The last verdict about the analysis of this step; forgotten when the step ends.
    judged: Option<(VerdictOutcome, String)>,
}

/// What a rollout sees of the world.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Instances that are wanted of the service.
    pub replicas: u32,
    /// Instances of the new set that are available: ready for long enough and known to the data plane.
    pub available: u32,
    /// What the rollout wants of the routes is in force.
    pub routed: bool,
}

/// What happens to a rollout.
#[derive(Clone, Debug)]
pub enum Event {
    /// Time passed, or the world changed.
    Look,
    /// A person, or the run on behalf of one.
    Command {
        /// What they want. An abort is the run's business.
        command: RolloutCommand,
        /// Who.
        by: String,
    },
    /// A hook answered.
    HookDone {
        /// Call that it answers.
        call: u32,
        /// Yes, or why not.
        answer: Result<(), String>,
    },
    /// The evidence comes too slowly for the analysis.
    Scarce {
        /// The share of the traffic at which it would come in time.
        weight: Permille,
    },
    /// The evidence says something.
    Judged {
        /// What.
        outcome: VerdictOutcome,
        /// Why.
        reason: String,
    },
}

/// What a rollout wants done.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Tell people.
    Note(EventKind, String),
    /// Call the hook of the current step: call number and what to do.
    CallHook(u32, Hook),
    /// Turn back.
    Fail(Diagnostic),
    /// Write the record down.
    Persist,
}

impl Rollout {
    /// Begins.
    pub fn begin(
        run: RunId,
        (from, baseline): (ReleaseNumber, &Service),
        (to, service): (ReleaseNumber, &Service),
        at: UnixMillis,
    ) -> Self {
        let steps = service.rollout.strategy.stepped().map_or(&[][..], |stepped| &stepped.steps);
        let record = RolloutRecord {
            run,
            from,
            to,
            baseline: Box::new(baseline.clone()),
            phase: if steps.is_empty() { RolloutPhase::Promoting } else { RolloutPhase::Stepping },
            step: 0,
            started_at: at,
            since: at,
            deadline: at.saturating_add(millis(budget(&service.rollout))),
            paused: None,
            weight: Permille::ZERO,
            raised: None,
            scale: None,
            matches: Vec::new(),
            mirror: None,
            hook_calls: 0,
            analysis: None,
        };
        Self::resume(record, service, at)
    }

    /// Goes on from what was written down.
    ///
    /// The clock may have been set back while no server lived. Then what lies in the future began now at the latest, and
    /// nothing lasts longer than it would if it began now.
    pub fn resume(mut record: RolloutRecord, service: &Service, at: UnixMillis) -> Self {
        record.since = record.since.min(at);
        record.deadline = record.deadline.min(at.saturating_add(millis(budget(&service.rollout))));
        if let Some(paused) = &mut record.paused {
            paused.since = paused.since.min(at);
            paused.expires = paused.expires.min(at.saturating_add(millis(PAUSE_EXPIRES)));
        }
        Self {
            record,
            spec: service.rollout.clone(),
            best: 0,
            wanted: 0,
            progress_at: at,
            hook: HookState::Idle,
            judged: None,
        }
    }

    /// What is written down of it.
    pub fn record(&self) -> &RolloutRecord {
        &self.record
    }

    /// Keeps what the verdict needs after a crash.
    pub fn set_analysis(&mut self, analysis: Option<serde_json::Value>) {
        self.record.analysis = analysis;
    }

    /// What its steps and guard are, if it has any.
    pub fn stepped(&self) -> Option<&Stepped> {
        self.spec.strategy.stepped()
    }

    /// What turns it back.
    pub fn guard(&self) -> Option<&Guard> {
        self.stepped().and_then(|stepped| stepped.guard.as_ref())
    }

    /// Whether the release it leads to is in force and only the old set is still kept.
    pub fn is_over(&self) -> bool {
        self.record.phase == RolloutPhase::Warm
    }

    /// Whether the new set is on trial beside an old one.
    pub fn is_trying(&self) -> bool {
        self.keeps_both() && !self.is_over()
    }

    /// Whether it keeps both sets of instances side by side.
    pub fn keeps_both(&self) -> bool {
        self.stepped().is_some()
    }

    /// Whether nothing may be replaced for now.
    pub fn is_frozen(&self) -> bool {
        self.record.paused.is_some() && !self.is_over()
    }

    /// The step it is at.
    pub fn step(&self) -> Option<&RolloutStep> {
        if self.record.phase != RolloutPhase::Stepping {
            return None;
        }
        self.stepped()?.steps.get(self.record.step as usize)
    }

    /// The analysis that it waits for, if its step is one.
    pub fn analysis(&self) -> Option<&AnalysisStep> {
        if let Some(RolloutStep::Analysis(step)) = self.step() { Some(step) } else { None }
    }

    /// Instances of the new set that are wanted now.
    pub fn canary_wanted(&self, replicas: u32) -> u32 {
        if self.record.phase != RolloutPhase::Stepping {
            return replicas;
        }
        let weight = match self.step() {
            Some(RolloutStep::Weight(weight)) => self.record.weight.max(self.floored(*weight)),
            _ => self.record.weight.max(self.record.raised.unwrap_or_default()),
        };
        let copied = matches!(self.step(), Some(RolloutStep::Match(_) | RolloutStep::Mirror { .. }));
        let used = weight > Permille::ZERO || copied || !self.record.matches.is_empty() || self.record.mirror.is_some();
        let scale = match self.step() {
            Some(RolloutStep::Scale(amount)) => Some(amount.rounded_up(replicas)),
            _ => self.record.scale,
        };
        let wanted = scale.unwrap_or_else(|| weight.of_rounded_up(replicas));
        wanted.max(u32::from(used)).min(replicas)
    }

    /// How the traffic is split now; `None` leaves it to the numbers of instances.
    pub fn split(&self) -> Option<Split> {
        self.stepped()?;
        let mirror =
            self.record.mirror.map(|(share, unsafe_methods)| Mirror { share, unsafe_methods, limit: MIRROR_LIMIT });
        Some(Split {
            canary: Some(self.record.weight),
            salt: self.record.to.0,
            matches: self.record.matches.clone(),
            mirror,
            ..Split::default()
        })
    }

    /// When it must be looked at again.
    pub fn deadline(&self) -> Option<UnixMillis> {
        if self.is_over() {
            return None;
        }
        if let Some(paused) = &self.record.paused {
            return Some(paused.expires);
        }
        let progress = (self.keeps_both() && self.best < self.wanted)
            .then(|| self.after(self.progress_at, self.spec.progress.duration()));
        let step = match self.step() {
            Some(RolloutStep::Pause(pause)) => {
                let length = pause.duration.unwrap_or(pause.expires);
                Some(self.after(self.record.since, length.duration()))
            }
            Some(RolloutStep::Analysis(analysis)) => Some(self.after(self.record.since, analysis.duration.duration())),
            Some(RolloutStep::Hook(hook)) => match &self.hook {
                HookState::Refused(at, _) => Some(self.after(*at, HOOK_PAUSE)),
                HookState::Asked => Some(self.after(self.record.since, hook_time(hook))),
                HookState::Idle | HookState::Agreed => None,
            },
            _ => None,
        };
        let watch = (self.record.phase == RolloutPhase::Watching)
            .then(|| self.after(self.record.since, self.stepped().map(|s| s.keep_warm.duration()).unwrap_or_default()));
        [progress, step, watch, self.whole_deadline()].into_iter().flatten().min()
    }

    /// The absolute deadline, except while a person is asked: that has an expiry of its own.
    fn whole_deadline(&self) -> Option<UnixMillis> {
        // Without steps it is the step of the run that has a deadline, to which the drain of old instances is added.
        (self.keeps_both() && !self.asks_a_person() && self.record.phase != RolloutPhase::Watching)
            .then_some(self.record.deadline)
    }

    /// Advances on one event. No I/O, no clock.
    pub fn handle(&mut self, at: UnixMillis, event: Event, seen: &Seen) -> Vec<Command> {
        let mut out = Vec::new();
        if self.is_over() {
            return out;
        }
        match event {
            Event::Look => {}
            Event::Command { command, by } => self.command(at, &command, &by, &mut out),
            Event::HookDone { call, answer } => self.hook_done(at, call, answer, &mut out),
            Event::Scarce { weight } => self.raise(weight, &mut out),
            Event::Judged { outcome, reason } => self.judged(at, outcome, reason, &mut out),
        }
        self.look(at, seen, &mut out);
        out
    }

    // === looking ===

    fn look(&mut self, at: UnixMillis, seen: &Seen, out: &mut Vec<Command>) {
        if failed(out) {
            return;
        }
        self.watch_progress(at, seen);
        if let Some(paused) = self.record.paused.clone() {
            if at >= paused.expires {
                match paused.on_expiry {
                    OnExpiry::Promote => self.resume_from_pause(at, "nobody decided in time", out),
                    OnExpiry::RollBack => out.push(Command::Fail(expired(&paused.reason, &paused.owner))),
                }
            }
            if self.record.paused.is_some() {
                return;
            }
        }
        if self.whole_deadline().is_some_and(|deadline| at >= deadline) {
            let length = Duration::from_millis(self.record.deadline.saturating_sub(self.record.started_at));
            let message = format!("the rollout to release {} did not end within {}", self.record.to, words(length));
            let problem =
                Diagnostic::error(Code::RUN_TIMED_OUT, message).note(format!("it waited for {}", self.waits_for(seen)));
            out.push(Command::Fail(problem));
            return;
        }
        if self.keeps_both()
            && self.best < self.wanted
            && at >= self.after(self.progress_at, self.spec.progress.duration())
        {
            let message = format!(
                "no further instance of release {} became available within {}",
                self.record.to,
                words(self.spec.progress.duration())
            );
            let problem = Diagnostic::error(Code::RUN_TIMED_OUT, message)
                .note(format!("{} of {} are available", self.best, self.wanted));
            out.push(Command::Fail(problem));
            return;
        }
        while !failed(out) && self.advance(at, seen, out) {}
    }

    fn watch_progress(&mut self, at: UnixMillis, seen: &Seen) {
        let wanted = self.canary_wanted(seen.replicas);
        if wanted != self.wanted || seen.available > self.best || self.is_frozen() {
            self.progress_at = at;
        }
        self.wanted = wanted;
        self.best = seen.available;
    }

    /// Takes one transition; whether there may be another one.
    fn advance(&mut self, at: UnixMillis, seen: &Seen, out: &mut Vec<Command>) -> bool {
        let enough = seen.available >= self.canary_wanted(seen.replicas);
        match self.record.phase {
            RolloutPhase::Stepping => {
                let Some(step) = self.step().cloned() else {
                    self.enter(at, RolloutPhase::Promoting, out);
                    return true;
                };
                self.take_step(at, &step, enough, seen, out)
            }
            RolloutPhase::Promoting => {
                if !enough {
                    return false;
                }
                if self.keeps_both() && self.record.weight != Permille::ALL {
                    self.record.weight = Permille::ALL;
                    self.record.matches.clear();
                    self.record.mirror = None;
                    out.push(Command::Persist);
                    // The routes follow.
                    return false;
                }
                // Strategies without steps are at their end when the environment has no old instance left.
                if !self.keeps_both() || !seen.routed {
                    return false;
                }
                let message = format!("release {} has all traffic", self.record.to);
                out.push(Command::Note(EventKind::RolloutPromoted, message));
                let watch = self.judged.as_ref().is_some_and(|(outcome, _)| *outcome != VerdictOutcome::Pass);
                self.judged = None;
                self.enter(at, if watch { RolloutPhase::Watching } else { RolloutPhase::Warm }, out);
                true
            }
            RolloutPhase::Watching => {
                let length = self.stepped().map(|stepped| stepped.keep_warm.duration()).unwrap_or_default();
                let over = at >= self.after(self.record.since, length);
                if over {
                    self.end_watch(at, out);
                }
                over
            }
            RolloutPhase::Warm => false,
        }
    }

    fn take_step(
        &mut self,
        at: UnixMillis,
        step: &RolloutStep,
        enough: bool,
        seen: &Seen,
        out: &mut Vec<Command>,
    ) -> bool {
        match step {
            RolloutStep::Weight(weight) => {
                let weight = self.floored(*weight);
                if self.record.weight == weight {
                    return seen.routed && self.next_step(at, out);
                }
                if enough {
                    self.record.raised = self.record.raised.filter(|raised| *raised == weight);
                    self.record.weight = weight;
                    out.push(Command::Persist);
                }
                // The routes follow.
                false
            }
            RolloutStep::Scale(amount) => {
                self.record.scale = Some(amount.rounded_up(seen.replicas));
                enough && self.next_step(at, out)
            }
            RolloutStep::Match(matches) => {
                if self.record.matches == *matches {
                    return seen.routed && self.next_step(at, out);
                }
                if enough {
                    self.record.matches.clone_from(matches);
                    out.push(Command::Persist);
                }
                false
            }
            RolloutStep::Mirror { share, unsafe_methods } => {
                let wanted = (*share > Permille::ZERO).then_some((*share, *unsafe_methods));
                if self.record.mirror == wanted {
                    return seen.routed && self.next_step(at, out);
                }
                if enough {
                    self.record.mirror = wanted;
                    out.push(Command::Persist);
                }
                false
            }
            RolloutStep::Pause(pause) => {
                if let Some(length) = pause.duration {
                    return at >= self.after(self.record.since, length.duration()) && self.next_step(at, out);
                }
                if at < self.after(self.record.since, pause.expires.duration()) {
                    return false;
                }
                match pause.on_expiry {
                    OnExpiry::Promote => {
                        self.extend(at, self.record.since);
                        self.next_step(at, out)
                    }
                    OnExpiry::RollBack => {
                        let owner = pause.owner.as_deref().unwrap_or("a person");
                        out.push(Command::Fail(expired("it was to be promoted by hand", owner)));
                        false
                    }
                }
            }
            RolloutStep::Analysis(analysis) => {
                if let Some(raised) = self.record.raised.filter(|raised| *raised > self.record.weight && enough) {
                    self.record.weight = raised;
                    out.push(Command::Persist);
                }
                self.take_analysis(at, analysis, out)
            }
            RolloutStep::Hook(hook) => self.take_hook(at, hook, out),
        }
    }

    fn next_step(&mut self, at: UnixMillis, out: &mut Vec<Command>) -> bool {
        self.record.step += 1;
        self.record.hook_calls = 0;
        self.hook = HookState::Idle;
        self.judged = None;
        if self.step().is_none() {
            self.enter(at, RolloutPhase::Promoting, out);
        } else {
            self.record.since = at;
            out.push(Command::Note(EventKind::RolloutStep, self.step_words()));
            out.push(Command::Persist);
        }
        true
    }

    fn enter(&mut self, at: UnixMillis, phase: RolloutPhase, out: &mut Vec<Command>) {
        self.record.phase = phase;
        self.record.since = at;
        if phase == RolloutPhase::Promoting {
            self.record.step = u32::try_from(self.stepped().map_or(0, |s| s.steps.len())).unwrap_or(u32::MAX);
        }
        out.push(Command::Persist);
    }

    /// The time under watch has an end of its own; what is left of the rollout's begins again after it.
    fn end_watch(&mut self, at: UnixMillis, out: &mut Vec<Command>) {
        self.extend(at, self.record.since);
        self.enter(at, RolloutPhase::Warm, out);
    }

    /// Moves the absolute deadline by the time since `since`.
    fn extend(&mut self, at: UnixMillis, since: UnixMillis) {
        self.record.deadline = self.record.deadline.saturating_add(at.saturating_sub(since));
    }

    /// The run has ended: from now on the old set's time runs.
    pub fn run_ended(&mut self, at: UnixMillis) {
        self.record.since = at;
    }

    /// When the old set is let go, once the run has ended.
    pub fn cold_at(&self) -> UnixMillis {
        let keep = self.stepped().map(|stepped| stepped.keep_warm.duration()).unwrap_or_default();
        self.after(self.record.since, keep)
    }

    fn after(&self, since: UnixMillis, length: Duration) -> UnixMillis {
        let _ = self;
        since.saturating_add(millis(length))
    }
}

fn failed(out: &[Command]) -> bool {
    out.iter().any(|command| matches!(command, Command::Fail(_)))
}

/// Whole milliseconds, as moments are written down.
pub(crate) fn millis(length: Duration) -> u64 {
    u64::try_from(length.as_millis()).unwrap_or(u64::MAX)
}

fn words(length: Duration) -> String {
    orchestra_model::quantity::Timespan::millis(millis(length)).to_string()
}

/// Time that a whole rollout may take: what the spec says, and what its steps wait for by themselves.
pub fn budget(spec: &Spec) -> Duration {
    let timed = |step: &RolloutStep| match step {
        RolloutStep::Pause(pause) => pause.duration.map(Timespan::duration).unwrap_or_default(),
        RolloutStep::Analysis(analysis) => analysis.duration.duration(),
        RolloutStep::Hook(hook) => hook_time(hook),
        _ => Duration::ZERO,
    };
    let steps = spec.strategy.stepped().map_or(&[][..], |stepped| &stepped.steps);
    spec.deadline.duration() + steps.iter().map(timed).sum::<Duration>()
}
