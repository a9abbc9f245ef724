//! Rollouts of an environment: begun by a step of the run, looked at whenever their service is, forgotten when the old
//! set is let go.

use std::{collections::BTreeSet, net::Ipv4Addr, sync::Arc};

use orchestra_model::{
    Code, Diagnostic, EnvironmentId, EventKind, InstanceId, Name, Now, ReleaseNumber, Resource, ResourceId,
    consult::{Answer, Exporter, Question, ScrapeTarget},
    desired::{Protocol, Service},
    flag::{FlagName, Override, OverrideBy, OverrideServe},
    record::{Change, RunKind, RunState},
    rollout::{HookCall, RolloutCommand, RolloutPhase, RolloutRecord, VerdictOutcome, VerdictRecord},
    time::UnixMillis,
    traffic::{Permille, TrafficReport},
};

use super::{
    Environment, service_id,
    workload::{Want, Workload},
};
use crate::{
    About, ConsultKey, Effect, HookKey,
    instance::Instance,
    replacement::Set,
    rollout::{
        Command, Event, Rollout, Seen,
        judge::{Due, Judge},
        millis,
    },
};

/// Pause between two notes of what the judge knows: what a crash may cost is evidence of that time.
const KEEP_JUDGE: std::time::Duration = std::time::Duration::from_secs(2);

impl Environment {
    /// The moment as it is written down.
    pub(super) fn wall(&self, now: Now) -> UnixMillis {
        let passed = u64::try_from(now.since_origin().as_millis()).unwrap_or(u64::MAX);
        self.settings.epoch.saturating_add(passed)
    }

    /// The first moment at which `at` has been reached.
    pub(super) fn moment(&self, at: UnixMillis) -> Now {
        Now::at(std::time::Duration::from_millis(at.saturating_sub(self.settings.epoch)))
    }

    /// Begins the rollout of a step, or goes on with it after a recovery. To be called before what is wanted changes.
    pub(super) fn begin_rollout(&mut self, now: Now, id: &ResourceId, target: Option<&(Resource, ReleaseNumber)>) {
        let next = self.next_rollout(now, id, target);
        let Some(workload) = self.workloads.get_mut(id) else { return };
        match next {
            Next::Keep => {}
            Next::None => self.forget_rollout(id),
            Next::Resume => {
                let Some((Resource::Service(service), _)) = target else { return };
                let Some(record) = self.record.rollouts.get(&id.name).cloned() else { return };
                let from = self.judged_from(now, &record, service);
                let Some(workload) = self.workloads.get_mut(id) else { return };
                workload.judge = judge(service, record.analysis.as_ref()).map(|judge| judge.from(from));
                self.resume_rollout(now, id, record, service);
            }
            Next::Begin(baseline, rollout) => {
                workload.baseline = Some(baseline);
                workload.judge = target.and_then(|(r, _)| r.as_service()).and_then(|service| judge(service, None));
                let strategy = target.and_then(|(r, _)| r.as_service()).map_or("", |s| s.rollout.strategy.name());
                let cause = format!(
                    "{strategy} from release {} to release {}; {}",
                    rollout.record().from,
                    rollout.record().to,
                    rollout.step_words()
                );
                let (to, told) = (rollout.record().to, rollout.keeps_both());
                workload.rollout = Some(*rollout);
                self.store_rollout(id);
                if told {
                    self.note(EventKind::RolloutStarted, Some(id.clone()), None, Some(to), cause);
                }
            }
        }
    }

    fn next_rollout(&self, now: Now, id: &ResourceId, target: Option<&(Resource, ReleaseNumber)>) -> Next {
        let Some(run) = self.run.as_ref().map(|run| &run.record) else { return Next::None };
        let Some((Resource::Service(service), release)) = target else { return Next::None };
        let Some(workload) = self.workloads.get(id) else { return Next::None };
        if run.state != RunState::Running {
            return Next::None;
        }
        if self.record.rollouts.get(&id.name).is_some_and(|record| record.run == run.id && record.to == *release) {
            return Next::Resume;
        }
        let Some(want) = &workload.want else { return Next::None };
        let Some(old) = want.resource.as_service() else { return Next::None };
        if want.launch_digest == service.launch_digest() {
            // Nothing is replaced; an old set that is kept stays.
            return Next::Keep;
        }
        // A person who goes back or restarts wants no steps; and with nothing that serves there is nothing to compare
        // with and nobody to protect.
        let stepped = run.kind == RunKind::Up;
        let serves = self.instances_of(workload).any(|instance| {
            instance.is_ready() && !super::is_leaving(instance) && instance.record().launch_digest == want.launch_digest
        });
        if !stepped || !serves || service.replicas == 0 || old.replicas == 0 {
            return Next::None;
        }
        let rollout = Rollout::begin(run.id, (want.release, old), (*release, service), self.wall(now));
        Next::Begin(want.clone(), Box::new(rollout))
    }

    /// Forgets a rollout, and with it the old set, which leaves as the strategy allows.
    pub(super) fn forget_rollout(&mut self, id: &ResourceId) {
        if let Some(workload) = self.workloads.get_mut(id) {
            (workload.rollout, workload.baseline, workload.judge) = (None, None, None);
        }
        if self.record.rollouts.remove(&id.name).is_some() {
            self.record_changed = true;
            self.routes.touch();
            self.changed.insert(id.clone());
        }
    }

    fn store_rollout(&mut self, id: &ResourceId) {
        let Some(rollout) = self.workloads.get(id).and_then(|workload| workload.rollout.as_ref()) else { return };
        self.record.rollouts.insert(id.name.clone(), rollout.record().clone());
        self.record_changed = true;
    }

    /// Gives a rollout an event together with what there is, and does what it wants.
    pub(super) fn look_at_rollout(&mut self, now: Now, id: &ResourceId, event: Event) {
        let Some(service) = self.workloads.get(id).and_then(|workload| {
            workload.rollout.as_ref()?;
            workload.want.as_ref()?.resource.as_service().cloned()
        }) else {
            return;
        };
        let turning = self.run.as_ref().is_some_and(|run| run.record.state == RunState::Reverting);
        if turning {
            return;
        }
        let seen = Seen {
            replicas: service.replicas,
            available: self.available(now, id, &service),
            routed: self.routes_in_force(id),
        };
        let at = self.wall(now);
        let event = self.ask_judge(now, id, &seen, event);
        let workload = self.workloads.get_mut(id).expect("seen above");
        let Some(rollout) = &mut workload.rollout else { return };
        let (before, paused_since) = (rollout.split(), rollout.record().paused.as_ref().map(|paused| paused.since));
        let place = |rollout: &Rollout| (rollout.record().step, rollout.analysis().is_some());
        let place_before = place(rollout);
        let commands = rollout.handle(at, event, &seen);
        let thawed = paused_since.filter(|_| !rollout.is_frozen() && !rollout.keeps_both());
        let split_changed = rollout.split() != before;
        let moved = place(rollout) != place_before;
        let deadline =
            if rollout.is_over() && self.run.is_none() { Some(rollout.cold_at()) } else { rollout.deadline() };
        if split_changed {
            self.routes.touch();
        }
        if split_changed || moved {
            // Without a port there is no route whose answer would have it looked at again, nor traffic that would have
            // the judge see that an analysis began.
            self.changed.insert(id.clone());
        }
        if let Some(deadline) = deadline {
            let moment = self.moment(deadline);
            self.alarm(id, moment.max(now));
        }
        if let Some(since) = thawed {
            self.goes_on(id, at.saturating_sub(since));
        }
        self.carry_out_rollout(now, id, commands);
        self.consult_for_verdict(now, id);
        self.ask_pair(now, id);
        self.cool_down(now, id);
    }

    fn carry_out_rollout(&mut self, now: Now, id: &ResourceId, commands: Vec<Command>) {
        let to = self.workloads.get(id).and_then(|w| w.rollout.as_ref()).map(|rollout| rollout.record().to);
        for command in commands {
            match command {
                Command::Persist => {
                    self.store_rollout(id);
                    self.routes.touch();
                }
                Command::Note(kind, cause) => self.note(kind, Some(id.clone()), None, to, cause),
                Command::CallHook(call, hook) => self.call_hook(id, call, hook),
                Command::Fail(problem) => {
                    self.fail_rollout(now, id, problem);
                    return;
                }
            }
        }
    }

    fn call_hook(&mut self, id: &ResourceId, call: u32, hook: orchestra_model::rollout::Hook) {
        let Some(workload) = self.workloads.get(id) else { return };
        let (Some(rollout), Some(want)) = (&workload.rollout, &workload.want) else { return };
        let record = rollout.record();
        let key = HookKey { service: id.name.clone(), release: record.to, step: record.step, call };
        let document = serde_json::json!({
            "stack": self.record.id.stack,
            "environment": self.record.id.environment,
            "service": id.name,
            "hook": hook.name,
            "call": call,
            "from_release": record.from,
            "to_release": record.to,
            "step": record.step + 1,
            "weight_percent": f64::from(record.weight.get()) / 10.0,
        });
        let directory = match (&hook.call, want.resource.program()) {
            (HookCall::Command(_), Some(program)) => program.directory.clone(),
            _ => "/".to_owned(),
        };
        self.out.effects.push(Effect::RunHook { key, hook, directory, document: document.to_string() });
    }

    fn fail_rollout(&mut self, now: Now, id: &ResourceId, problem: Diagnostic) {
        let of_run = self
            .run
            .as_ref()
            .is_some_and(|run| run.record.state == RunState::Running && run.record.steps.contains_key(id));
        if of_run {
            // Out of time: which instance kept it waiting, and why.
            let late = if problem.code == Code::RUN_TIMED_OUT { self.newcomer_waits_for(id) } else { None };
            let problem = late.into_iter().fold(problem, Diagnostic::note);
            self.fail_step(now, id, problem);
        }
    }

    /// What the first instance of the new set that waits for something waits for, in words.
    fn newcomer_waits_for(&self, id: &ResourceId) -> Option<String> {
        let workload = self.workloads.get(id)?;
        let members = workload.members.iter().filter_map(|member| self.instances.get(member));
        let mut new = members.filter(|i| workload.set_of(&i.record().launch_digest) == Set::Current);
        new.find_map(|instance| instance.waits_for().map(|what| format!("{} waits for {what}", instance.record().id)))
    }

    /// Whether the answer of a hook would still mean something: nobody has promoted past it, and nothing turns back.
    pub fn waits_for_hook(&self, key: &HookKey) -> bool {
        let turning = self.run.as_ref().is_some_and(|run| run.record.state == RunState::Reverting);
        let rollout = self.workloads.get(&service_id(&key.service)).and_then(|workload| workload.rollout.as_ref());
        !turning
            && rollout.is_some_and(|rollout| {
                let record = rollout.record();
                (record.to, record.step) == (key.release, key.step) && rollout.waits_for_hook(key.call)
            })
    }

    /// An answer of a hook.
    pub(super) fn hook_done(&mut self, now: Now, key: &HookKey, answer: Result<(), String>) {
        let id = service_id(&key.service);
        let current = self
            .workloads
            .get(&id)
            .and_then(|w| w.rollout.as_ref())
            .is_some_and(|rollout| rollout.record().to == key.release && rollout.record().step == key.step);
        if current {
            self.look_at_rollout(now, &id, Event::HookDone { call: key.call, answer });
            self.changed.insert(id);
        }
    }

    /// What went through a watched route.
    pub(super) fn traffic(&mut self, now: Now, report: &TrafficReport) {
        let id = service_id(&report.route.service);
        let Some(workload) = self.workloads.get_mut(&id) else { return };
        let current = workload.rollout.as_ref().is_some_and(|rollout| rollout.record().to.0 == report.watch);
        let Some(judge) = workload.judge.as_mut().filter(|_| current) else { return };
        let frozen = judge.observe(now, report);
        workload.pairs.served(report);
        self.keep_judge_now_and_then(now, &id);
        if frozen {
            self.routes.touch();
        }
        self.look_at_rollout(now, &id, Event::Look);
        self.changed.insert(id);
    }

    /// Asks for the numbers from elsewhere that are due.
    fn consult_for_verdict(&mut self, now: Now, id: &ResourceId) {
        let Some(workload) = self.workloads.get(id) else { return };
        let (Some(rollout), Some(judge), Some(want)) = (&workload.rollout, &workload.judge, &workload.want) else {
            return;
        };
        if rollout.is_over() {
            return;
        }
        let release = rollout.record().to;
        let exporter = want.resource.as_service().and_then(|service| service.metrics.clone());
        let record = rollout.record();
        let EnvironmentId { stack, environment } = &self.record.id;
        let places = [
            ("$stack", stack.to_string()),
            ("$environment", environment.to_string()),
            ("$service", id.name.to_string()),
            ("$release", record.to.to_string()),
            ("$baseline", record.from.to_string()),
        ];
        let ask = |due: Due| match due {
            Due::Metric(index) => {
                let metric = judge.metric(index)?;
                let query = fill(&metric.query, &places);
                let (address, token, ca) = (metric.address.clone(), metric.token.clone(), metric.ca.clone());
                let question = Question::Query { address, query, token, ca };
                Some((due, Some(question), metric.every, metric.timeout, BTreeSet::new()))
            }
            Due::Counters => {
                let exporter = exporter.as_ref()?;
                let (targets, canary) = self.exporting(workload, exporter);
                let (path, series) = (exporter.path.clone(), judge.series().to_vec());
                let question = (!canary.is_empty()).then_some(Question::Scrape { targets, path, series });
                Some((due, question, exporter.every, exporter.timeout, canary))
            }
        };
        let questions: Vec<_> = judge.due(now).into_iter().filter_map(ask).collect();
        for (due, question, every, timeout, canary) in questions {
            let judge = self.workloads.get_mut(id).and_then(|workload| workload.judge.as_mut()).expect("seen above");
            let Some(question) = question else {
                judge.skipped(now, due, every.duration());
                continue;
            };
            self.asked += 1;
            if due == Due::Counters {
                judge.looks_at(canary);
            }
            judge.asked(now, due, self.asked, every.duration(), timeout.duration());
            let key = ConsultKey { service: id.name.clone(), about: About::Verdict(release, due), number: self.asked };
            self.out.effects.push(Effect::Consult { key, question, timeout });
        }
        let judge = self.workloads.get(id).and_then(|workload| workload.judge.as_ref());
        if let Some(at) = judge.and_then(Judge::deadline).filter(|at| *at > now) {
            self.alarm(id, at);
        }
    }

    /// Instances that serve and export metrics, and those of the new set among them.
    fn exporting(&self, workload: &Workload, exporter: &Exporter) -> (Vec<ScrapeTarget>, BTreeSet<(InstanceId, u32)>) {
        let members = self.instances_of(workload);
        let serving = members.filter(|i| i.is_ready() && !super::is_leaving(i) && self.routes.admits(i));
        let (mut targets, mut canary) = (Vec::new(), BTreeSet::new());
        for instance in serving {
            let record = instance.record();
            let Some(port) = record.ports.get(&exporter.port) else { continue };
            if workload.set_of(&record.launch_digest) == Set::Current {
                canary.insert((record.id.clone(), record.attempt));
            }
            targets.push(ScrapeTarget {
                instance: record.id.clone(),
                attempt: record.attempt,
                address: (Ipv4Addr::LOCALHOST, *port).into(),
            });
        }
        (targets, canary)
    }

    /// Numbers from elsewhere.
    pub(super) fn consulted(&mut self, now: Now, key: &ConsultKey, answer: Answer) {
        let id = service_id(&key.service);
        match key.about {
            About::Scale => self.exported(now, &id, key.number, answer),
            About::Verdict(release, due) => {
                let Some(workload) = self.workloads.get_mut(&id) else { return };
                let current = workload.rollout.as_ref().is_some_and(|rollout| rollout.record().to == release);
                let Some(judge) = workload.judge.as_mut().filter(|_| current) else { return };
                judge.consulted(due, key.number, answer);
                self.keep_judge(now, &id);
                self.look_at_rollout(now, &id, Event::Look);
            }
        }
        self.changed.insert(id);
    }

    /// Writes down what the judge would need after a crash, unless that was done a moment ago.
    pub(super) fn keep_judge_now_and_then(&mut self, now: Now, id: &ResourceId) {
        let kept = self.workloads.get(id).and_then(|workload| workload.judge_kept);
        if kept.is_none_or(|kept| now.since(kept) >= KEEP_JUDGE) {
            self.keep_judge(now, id);
        }
    }

    /// Writes down what the judge would need after a crash.
    fn keep_judge(&mut self, now: Now, id: &ResourceId) {
        let Some(workload) = self.workloads.get_mut(id) else { return };
        if let (Some(rollout), Some(judge)) = (&mut workload.rollout, &workload.judge) {
            workload.judge_kept = Some(now);
            rollout.set_analysis(judge.memory());
            self.store_rollout(id);
        }
    }

    /// Puts a verdict in the place of a mere look, if there is one that matters.
    fn ask_judge(&mut self, now: Now, id: &ResourceId, seen: &Seen, event: Event) -> Event {
        let at = self.wall(now);
        let Some(workload) = self.workloads.get_mut(id) else { return event };
        let (Some(rollout), Some(judge)) = (&workload.rollout, &mut workload.judge) else { return event };
        let record = rollout.record();
        if rollout.analysis().is_some() && record.raised == Some(record.weight) {
            judge.raised(record.weight);
        }
        judge.follow(record.weight, record.step, seen.available);
        if !rollout.is_over() {
            let place = (record.step, rollout.analysis().is_some());
            let foreign = !record.matches.is_empty() || record.mirror.is_some();
            judge.look(now, place, record.weight > Permille::ZERO && seen.available > 0, foreign);
        }
        if !matches!(event, Event::Look) || rollout.is_over() {
            return event;
        }
        let wanted = rollout.wants_verdict(at);
        let Some((outcome, reason)) = judge.verdict(wanted == Some(true)) else {
            let weight = rollout.may_raise(at).and_then(|remains| judge.advice(remains));
            return weight.map_or(event, |weight| Event::Scarce { weight });
        };
        if outcome != VerdictOutcome::Fail && wanted.is_none() {
            return event;
        }
        let (from, to, step) = (record.from, record.to, record.step + 1);
        let evidence = judge.evidence();
        let flag = rollout.guard().and_then(|guard| guard.flag.as_deref()).filter(|_| outcome == VerdictOutcome::Fail);
        let flag: Option<FlagName> = flag.and_then(|flag| flag.parse().ok()).filter(|flag| self.flag_is_on(flag));
        let verdict = VerdictRecord {
            service: id.name.clone(),
            baseline: from,
            step: if wanted.is_some() { step } else { 0 },
            at: 0,
            outcome,
            reason: reason.clone(),
            evidence,
            flag: flag.clone(),
        };
        self.out.changes.push(Change::Verdict(self.record.id.clone(), to, Box::new(verdict)));
        let word = match outcome {
            VerdictOutcome::Pass => "pass",
            VerdictOutcome::Fail => "fail",
            VerdictOutcome::Inconclusive => "inconclusive",
            VerdictOutcome::Error => "error",
        };
        self.note(EventKind::Verdict, Some(id.clone()), None, Some(to), format!("{word}: {reason}"));
        if let Some(flag) = flag {
            self.turn_off((now, at), id, flag, reason);
            return Event::Look;
        }
        Event::Judged { outcome, reason }
    }

    /// Turns the flag off that a release came with, and judges anew.
    fn turn_off(&mut self, (now, at): (Now, UnixMillis), id: &ResourceId, flag: FlagName, reason: String) {
        let release = self.workloads.get(id).and_then(|w| w.rollout.as_ref()).map(|rollout| rollout.record().to);
        let cause = format!("flag {flag} is off: {reason}");
        if let Some(release) = release {
            let by = OverrideBy::Verdict { release };
            let decision = Override { serve: OverrideServe::Off, by, reason, since: at };
            self.record.flag_overrides.insert(flag, decision);
            self.record_changed = true;
        }
        self.note(EventKind::FlagSwitched, Some(id.clone()), None, release, cause);
        self.refresh_flags(at);
        let from = self.workloads.get(id).and_then(|workload| {
            self.judged_from(now, workload.rollout.as_ref()?.record(), workload.want.as_ref()?.resource.as_service()?)
        });
        if let Some(workload) = self.workloads.get_mut(id) {
            workload.judge = workload.judge.as_ref().map(|judge| judge.anew().from(from));
            if let Some(rollout) = &mut workload.rollout {
                rollout.judge_anew(at);
            }
        }
        // Together with the switch: otherwise the next server would judge by what was heard before it.
        self.keep_judge(now, id);
    }

    /// The flag that a verdict of this rollout turned off, and when.
    fn flag_turned_off(&self, record: &RolloutRecord, service: &Service) -> Option<(&FlagName, UnixMillis)> {
        let guard = service.rollout.strategy.stepped()?.guard.as_ref()?;
        let (flag, over) = self.record.flag_overrides.get_key_value(guard.flag.as_deref()?)?;
        (over.by == OverrideBy::Verdict { release: record.to }).then_some((flag, over.since))
    }

    /// When answers begin to count again, if a flag was turned off a moment ago: requests that began with it on still end,
    /// and programs that keep what they were told hear of it.
    fn judged_from(&self, now: Now, record: &RolloutRecord, service: &Service) -> Option<Now> {
        let (_, since) = self.flag_turned_off(record, service)?;
        let warm_up = service.rollout.strategy.stepped()?.guard.as_ref()?.warm_up;
        // The clock may have been set back since.
        let from = since.min(self.wall(now)).saturating_add(millis(warm_up.duration()));
        (from > self.wall(now)).then(|| self.moment(from))
    }

    /// A person moves the rollout of one service, or all of the run.
    pub(super) fn rollout_command(&mut self, now: Now, service: Option<&Name>, command: &RolloutCommand, by: &str) {
        let Some(run) = self.run.as_ref().map(|run| run.record.id) else { return };
        if *command == RolloutCommand::Abort {
            self.abort_run(now, run, by);
            return;
        }
        let concerned: Vec<ResourceId> = self
            .workloads
            .iter()
            .filter(|(id, workload)| {
                workload.rollout.as_ref().is_some_and(|rollout| rollout.record().run == run && !rollout.is_over())
                    && service.is_none_or(|name| *name == id.name)
            })
            .map(|(id, _)| id.clone())
            .collect();
        for id in concerned {
            self.look_at_rollout(now, &id, Event::Command { command: command.clone(), by: by.to_owned() });
            self.changed.insert(id);
        }
    }

    /// Whether [`Event::Rollout`](super::Event::Rollout) would move anything; otherwise why not.
    ///
    /// # Errors
    ///
    /// There is no run, or no rollout of that service in it.
    pub fn can_command(&self, service: Option<&Name>, command: &RolloutCommand) -> Result<(), Diagnostic> {
        let nothing = |message: String| {
            Err(Diagnostic::error(Code::NO_ROLLOUT, message)
                .help("`orchestra status` shows what goes on; `orchestra rollback` goes back to an earlier release"))
        };
        let Some(run) = &self.run else { return nothing("no run is in progress".to_owned()) };
        if run.record.state != RunState::Running {
            return nothing(format!("{} is being turned back already", run.record.id));
        }
        if *command == RolloutCommand::Abort {
            return Ok(());
        }
        let moves = |id: &ResourceId| {
            let rollout = self.workloads.get(id).and_then(|workload| workload.rollout.as_ref());
            rollout.is_some_and(|rollout| !rollout.is_over())
        };
        match service {
            Some(name) if !moves(&service_id(name)) => nothing(format!("service {name} has no rollout in progress")),
            None if !self.workloads.keys().any(moves) => {
                nothing(format!("no service has a rollout in progress in {}", run.record.id))
            }
            _ => Ok(()),
        }
    }

    /// Whether a rollout in steps goes on.
    pub fn is_rolling_out(&self) -> bool {
        self.run.as_ref().is_some_and(|run| run.record.state == RunState::Running)
            && self.workloads.values().any(|workload| {
                workload.rollout.as_ref().is_some_and(|rollout| rollout.keeps_both() && !rollout.is_over())
            })
    }

    /// After a run has ended: rollouts that failed are forgotten, and the time of the old sets begins.
    pub(super) fn end_rollouts(&mut self, now: Now, succeeded: bool) {
        let ids: Vec<ResourceId> = self.record.rollouts.keys().map(service_id).collect();
        let at = self.wall(now);
        for id in ids {
            let over = self.workloads.get_mut(&id).and_then(|w| w.rollout.as_mut()).filter(|rollout| rollout.is_over());
            let Some(rollout) = over.filter(|_| succeeded) else {
                self.forget_rollout(&id);
                continue;
            };
            rollout.run_ended(at);
            let cold = self.moment(self.workloads[&id].rollout.as_ref().map_or(at, Rollout::cold_at));
            self.store_rollout(&id);
            self.alarm(&id, cold.max(now));
            self.changed.insert(id);
        }
    }

    /// Lets the old set go when its time is over.
    fn cool_down(&mut self, now: Now, id: &ResourceId) {
        if self.run.is_some() {
            return;
        }
        let at = self.wall(now);
        let rollout = self.workloads.get(id).and_then(|workload| workload.rollout.as_ref());
        let Some(release) = rollout.filter(|r| r.is_over() && r.cold_at() <= at).map(|r| r.record().to) else { return };
        self.forget_rollout(id);
        if let Some(words) = self.stand_in(id) {
            self.note(EventKind::StepWaiting, Some(id.clone()), None, Some(release), format!("waits for {words}"));
        }
    }

    /// After a recovery: the rollouts whose run has ended.
    pub(super) fn recover_rollouts(&mut self, now: Now) {
        for (name, record) in self.record.rollouts.clone() {
            let id = service_id(&name);
            let Some(workload) = self.workloads.get_mut(&id) else {
                self.record.rollouts.remove(&name);
                self.record_changed = true;
                continue;
            };
            let wanted = workload.want.as_ref().map(|want| Arc::clone(&want.resource));
            if let (RolloutPhase::Warm, Some(service)) = (record.phase, wanted.as_ref().and_then(|r| r.as_service())) {
                self.resume_rollout(now, &id, record, service);
            }
        }
    }

    /// Goes on with what is written down of a rollout. If the clock was set back its times have changed, and that is
    /// written down: the next server may find the clock set forward again.
    fn resume_rollout(&mut self, now: Now, id: &ResourceId, record: RolloutRecord, service: &Service) {
        let baseline = Want::new(Resource::Service((*record.baseline).clone()), record.from);
        let rollout = Rollout::resume(record, service, self.wall(now));
        let known = self.record.rollouts.insert(id.name.clone(), rollout.record().clone());
        self.record_changed |= known.as_ref() != Some(rollout.record());
        let workload = self.workloads.get_mut(id).expect("a rollout is of a service that is there");
        workload.baseline = Some(baseline);
        workload.rollout = Some(rollout);
    }

    /// The rollout of a service, for people.
    pub fn rollout(&self, id: &ResourceId) -> Option<&Rollout> {
        self.workloads.get(id)?.rollout.as_ref()
    }

    /// What the rollout of a service sees.
    pub(super) fn rollout_seen(&self, id: &ResourceId) -> Option<Seen> {
        let workload = self.workloads.get(id)?;
        let want = workload.want.as_ref()?;
        let service = want.resource.as_service()?;
        let current = self.instances_of(workload).filter(|instance| {
            instance.is_ready()
                && !super::is_leaving(instance)
                && instance.record().launch_digest == want.launch_digest
                && (service.ports.is_empty() || self.routes.admits(instance))
        });
        Some(Seen {
            replicas: service.replicas,
            available: u32::try_from(current.count()).unwrap_or(u32::MAX),
            routed: self.routes_in_force(id),
        })
    }

    /// What the rollout of a service waits for.
    pub(super) fn rollout_waits_for(&self, id: &ResourceId) -> Option<String> {
        let workload = self.workloads.get(id)?;
        let rollout = workload.rollout.as_ref().filter(|rollout| !rollout.is_over())?;
        if !rollout.keeps_both() && !rollout.is_frozen() {
            return None;
        }
        let digest = &workload.want.as_ref()?.launch_digest;
        let seen = self.rollout_seen(id)?;
        let waits = rollout.waits_for(&seen);
        let of_instance = || {
            let own = self.instances_of(workload);
            let mut own = own.filter(|instance| instance.record().launch_digest == *digest);
            own.find_map(Instance::waits_for)
        };
        let of_judge = || {
            let judge = workload.judge.as_ref()?;
            rollout.analysis()?;
            let service = workload.want.as_ref()?.resource.as_service()?;
            let words: Vec<String> = std::iter::once(judge.words()).chain(judge.sources()).collect();
            let words = words.join("; ");
            Some(match self.flag_turned_off(rollout.record(), service) {
                Some((flag, _)) => format!("since a bad one turned flag {flag} off, {words}"),
                None => words,
            })
        };
        let detail = if seen.available < rollout.canary_wanted(seen.replicas) { of_instance() } else { of_judge() };
        let detail = detail.map(|detail| format!(": {detail}")).unwrap_or_default();
        let surplus = self.surplus_waits_for(id).map(|surplus| format!("; {surplus}")).unwrap_or_default();
        Some(format!("{}: {waits}{detail}{surplus}", rollout.step_words()))
    }
}

/// A query with what it asks about. A `$` that begins no known word stays what it is.
fn fill(query: &str, places: &[(&str, String)]) -> String {
    places.iter().fold(query.to_owned(), |query, (place, value)| query.replace(place, value))
}

/// What becomes of a service's rollout when something else is wanted of it.
enum Next {
    /// The one that is there stays.
    Keep,
    /// There is none.
    None,
    /// The one that was written down goes on.
    Resume,
    /// A new one, with what it replaces.
    Begin(Want, Box<Rollout>),
}

/// The judge of a rollout in steps.
fn judge(service: &Service, memory: Option<&serde_json::Value>) -> Option<Judge> {
    let guard = service.rollout.strategy.stepped()?.guard.as_ref()?;
    let sticky = service.ports.values().any(|port| port.policy.sticky.is_some() || port.policy.pin);
    let blind = service.ports.values().all(|port| port.protocol == Protocol::Tcp);
    Some(Judge::resume(guard, sticky, memory).blind(blind))
}
