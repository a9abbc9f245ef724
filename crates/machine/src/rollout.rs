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

use std::time::Duration;

use orchestra_model::{
    Code, Diagnostic, EventKind, ReleaseNumber, RunId,
    desired::Service,
    quantity::Timespan,
    rollout::{
        AnalysisStep, Guard, Hook, OnExpiry, OnInconclusive, PauseStep, Paused, Rollout as Spec, RolloutCommand,
        RolloutPhase, RolloutRecord, RolloutStep, Stepped, VerdictOutcome,
    },
    time::UnixMillis,
    traffic::{Mirror, Permille, Split},
};

pub mod judge;

#[cfg(test)]
mod tests;

/// A pause that nobody ends is turned back after a day.
const PAUSE_EXPIRES: Duration = Duration::from_secs(24 * 60 * 60);
/// Pause between two calls of a hook.
const HOOK_PAUSE: Duration = Duration::from_secs(10);
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

/// Where the hook of a step stands.
#[derive(Clone, Debug, Default, PartialEq)]
enum HookState {
    /// Not called by this server.
    #[default]
    Idle,
    /// Called; no answer yet.
    Asked,
    /// It said no; to be called again.
    Refused(UnixMillis, String),
    /// It said yes.
    Agreed,
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

    /// Whether a verdict would be heard now: `Some(true)` if it must be given, `Some(false)` if a pass may come early or
    /// only a fail matters.
    pub fn wants_verdict(&self, at: UnixMillis) -> Option<bool> {
        let analysis = self.analysis().filter(|_| self.record.paused.is_none())?;
        let over = at >= self.after(self.record.since, analysis.duration.duration());
        Some(over)
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
        let asks = matches!(self.step(), Some(RolloutStep::Pause(PauseStep { duration: None, .. })));
        // Without steps it is the step of the run that has a deadline, to which the drain of old instances is added.
        (self.keeps_both() && !asks && self.record.phase != RolloutPhase::Watching).then_some(self.record.deadline)
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

    // === raising ===

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
    fn raise(&mut self, weight: Permille, out: &mut Vec<Command>) {
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
    fn floored(&self, weight: Permille) -> Permille {
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

    // === verdicts ===

    fn take_analysis(&mut self, at: UnixMillis, step: &AnalysisStep, out: &mut Vec<Command>) -> bool {
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

    fn judged(&mut self, at: UnixMillis, outcome: VerdictOutcome, reason: String, out: &mut Vec<Command>) {
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

    // === hooks ===

    fn take_hook(&mut self, at: UnixMillis, hook: &Hook, out: &mut Vec<Command>) -> bool {
        match self.hook.clone() {
            HookState::Agreed => self.next_step(at, out),
            HookState::Refused(since, reason) => {
                if self.record.hook_calls > hook.retries {
                    let message = format!("{} did not agree: {reason}", hook_words(&hook.name));
                    out.push(Command::Fail(Diagnostic::error(Code::HOOK, message)));
                } else if at >= self.after(since, HOOK_PAUSE) {
                    self.call_hook(hook, out);
                }
                false
            }
            HookState::Idle => {
                self.call_hook(hook, out);
                false
            }
            HookState::Asked if at >= self.after(self.record.since, hook_time(hook)) => {
                let message = format!("{} did not answer", hook_words(&hook.name));
                out.push(Command::Fail(Diagnostic::error(Code::HOOK, message)));
                false
            }
            HookState::Asked => false,
        }
    }

    fn call_hook(&mut self, hook: &Hook, out: &mut Vec<Command>) {
        self.record.hook_calls += 1;
        self.hook = HookState::Asked;
        out.push(Command::Persist);
        out.push(Command::Note(EventKind::Hook, format!("{} is asked", hook_words(&hook.name))));
        out.push(Command::CallHook(self.record.hook_calls, hook.clone()));
    }

    fn hook_done(&mut self, at: UnixMillis, call: u32, answer: Result<(), String>, out: &mut Vec<Command>) {
        let Some(RolloutStep::Hook(hook)) = self.step() else { return };
        if call != self.record.hook_calls || self.hook != HookState::Asked {
            return;
        }
        let name = hook.name.clone();
        self.hook = match answer {
            Ok(()) => {
                out.push(Command::Note(EventKind::Hook, format!("{} agreed", hook_words(&name))));
                HookState::Agreed
            }
            Err(reason) => {
                out.push(Command::Note(EventKind::Hook, format!("{} did not agree: {reason}", hook_words(&name))));
                HookState::Refused(at, reason)
            }
        };
    }

    // === people ===

    fn command(&mut self, at: UnixMillis, command: &RolloutCommand, by: &str, out: &mut Vec<Command>) {
        match command {
            RolloutCommand::Pause => {
                if self.record.paused.is_none() {
                    self.pause(at, by, &format!("paused by {by}"), out);
                }
            }
            RolloutCommand::Promote if self.record.paused.is_some() => {
                self.resume_from_pause(at, &format!("promoted by {by}"), out);
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
                // Time that a person took does not count.
                if matches!(self.step(), Some(RolloutStep::Pause(PauseStep { duration: None, .. }))) {
                    self.extend(at, self.record.since);
                }
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
                // Time that a person took does not count.
                if matches!(self.step(), Some(RolloutStep::Pause(PauseStep { duration: None, .. }))) {
                    self.extend(at, self.record.since);
                }
                self.next_step(at, out);
            }
        }
    }

    fn pause(&mut self, at: UnixMillis, owner: &str, reason: &str, out: &mut Vec<Command>) {
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

    fn resume_from_pause(&mut self, at: UnixMillis, reason: &str, out: &mut Vec<Command>) {
        self.end_pause(at);
        out.push(Command::Note(EventKind::RolloutResumed, reason.to_owned()));
        out.push(Command::Persist);
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

    // === words ===

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
            Some(RolloutStep::Hook(hook)) => format!("{} to agree", hook_words(&hook.name)),
            _ if !seen.routed => "the proxy to take the new routes".to_owned(),
            _ if self.record.phase == RolloutPhase::Watching => "its time under watch to pass".to_owned(),
            _ => "nothing".to_owned(),
        }
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

/// A hook by its name, unless that is the one that all have.
fn hook_words(name: &str) -> String {
    if name == "hook" { "the hook".to_owned() } else { format!("hook {name}") }
}

fn hook_time(hook: &Hook) -> Duration {
    (hook.timeout.duration() + HOOK_PAUSE).saturating_mul(hook.retries.saturating_add(1)) + HOOK_PAUSE
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

fn expired(reason: &str, owner: &str) -> Diagnostic {
    Diagnostic::error(Code::RUN_TIMED_OUT, "nobody decided in time")
        .note(format!("{reason}; {owner} was to promote or abort"))
}
