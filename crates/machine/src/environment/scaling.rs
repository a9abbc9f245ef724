//! Scaling by itself: what the autoscaler of a service is told, and what becomes of its decisions.
//!
//! The number in force is in the environment's record, not in the release: `up` keeps it, a person sets it, the autoscaler
//! moves it. What is wanted of a workload carries that number, so everything else reads `service.replicas` as ever: whether
//! instances are started, replaced or retired for load or for a release, they take the same way.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::Arc,
    time::Duration,
};

use orchestra_model::{
    EventKind, InstanceId, Name, Now, Resource, ResourceId,
    autoscale::{Autoscale, MetricSource, ScaleDecision},
    consult::{Answer, Exporter, Question, ScrapeTarget, Scraped, Selector},
    desired::Service,
    launch::{LaunchKey, Usage},
    quantity::{Measure, Timespan},
    record::{RunKind, RunState, ScaledRecord, StepState},
    traffic::LoadReport,
};

use super::{Environment, is_leaving, service_id, workload::Workload};
use crate::{
    About, ConsultKey, Effect,
    autoscale::{Autoscaler, InstancePhase, InstanceSample, LoadMeter, Point, Reading, Sample},
    instance::{Instance, Phase},
    replacement::Set,
    rollout::Rollout,
};

/// Longest pause between two looks at what instances use, as the metrics server of Kubernetes has it.
const MEASURE_EVERY: Duration = Duration::from_secs(15);
/// Longest wait of a decision for an answer about usage.
const ANSWER: Duration = Duration::from_secs(2);
/// A measurement that is older says nothing about now.
const MEASURED_FOR: Duration = Duration::from_secs(60);
/// The same for exported metrics that are looked at often.
const EXPORTED_FOR: Duration = Duration::from_secs(15);

/// What scales one service.
#[derive(Clone, Debug)]
pub(super) struct Scaling {
    autoscaler: Autoscaler,
    meter: LoadMeter,
    /// By instance, those that have left included until the next look.
    usage: BTreeMap<InstanceId, Measured>,
    /// When to look at usage again.
    measure_at: Now,
    /// Until when a decision waits for the answer to the last look.
    answer_by: Option<Now>,
    exports: Exports,
}

/// What the instances export, as far as it is scaled by.
#[derive(Clone, Debug, Default)]
struct Exports {
    /// Where; `None` if nobody asks for it.
    exporter: Option<Exporter>,
    /// When to look again.
    look_at: Now,
    /// Pause between two looks.
    pause: Duration,
    /// Number of the open question, and until when a decision waits for its answer.
    asked: Option<(u64, Now)>,
    /// The question before was not answered: no decision waits for this one.
    impatient: bool,
    /// By instance: which start of it, when, and the numbers that it had.
    read: BTreeMap<InstanceId, (u32, Now, BTreeMap<Selector, f64>)>,
    /// Why an instance could not be read the last time.
    problem: Option<String>,
}

impl Exports {
    /// Of one metric.
    fn reading(&self, now: Now, selector: &Selector) -> Reading {
        let Some(exporter) = &self.exporter else {
            return Reading::Unavailable("the service exports no metrics".to_owned());
        };
        // Two looks may fail, and an instance may be slow to answer.
        let fresh = EXPORTED_FOR.max(self.pause.saturating_mul(3)) + exporter.timeout.duration();
        let point = |(id, (_, at, values)): (&InstanceId, &(u32, Now, BTreeMap<Selector, f64>))| {
            let value = measure(*values.get(selector)?)?;
            (now.since(*at) < fresh).then(|| (id.clone(), Point { value, at: *at, over: Duration::ZERO }))
        };
        let points: BTreeMap<InstanceId, Point> = self.read.iter().filter_map(point).collect();
        match &self.problem {
            Some(problem) if points.is_empty() => Reading::Unavailable(problem.clone()),
            None if points.is_empty() && !self.read.is_empty() => {
                let below =
                    self.read.values().any(|(.., values)| values.get(selector).is_some_and(|value| *value < 0.0));
                let what = if below { "it is below 0" } else { "no instance exports it as a finite number" };
                Reading::Unavailable(format!("{what} on {}", exporter.path))
            }
            _ => Reading::PerInstance(points),
        }
    }
}

/// A number as the autoscaler takes it; what is below 0 cannot be scaled by.
fn measure(value: f64) -> Option<Measure> {
    if value.is_nan() || value < 0.0 {
        return None;
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the cast saturates; it is not negative"
    )]
    let thousandths = (value * 1000.0).round() as u64;
    Some(Measure::thousandths(thousandths))
}

/// What one start of an instance used when it was looked at last.
#[derive(Clone, Debug)]
struct Measured {
    attempt: u32,
    at: Now,
    /// CPU time since its start.
    spent: Duration,
    /// CPU, once there were two looks.
    cpu: Option<Point>,
    memory: Point,
}

impl Scaling {
    fn new(policy: &Autoscale, record: Option<&ScaledRecord>, now: Now) -> Self {
        let remembered = record.map(|record| record.autoscale.clone()).unwrap_or_default();
        Self {
            autoscaler: Autoscaler::restore(policy.clone(), &remembered, now),
            meter: LoadMeter::new(policy.every.duration()),
            usage: BTreeMap::new(),
            measure_at: Now::ZERO,
            answer_by: None,
            exports: Exports::default(),
        }
    }

    /// Sentences for people.
    pub(super) fn explain(&self, now: Now) -> Vec<String> {
        self.autoscaler.explain(now)
    }

    pub(super) fn measures(&self) -> bool {
        self.autoscaler.policy().on.iter().any(|metric| metric.source.is_of_instances())
    }

    /// When a decision is due. It waits for a look that has just begun.
    fn decide_at(&self) -> Now {
        let due = self.autoscaler.deadline();
        let exported = self.exports.asked.filter(|_| !self.exports.impatient).map(|(_, by)| by);
        self.answer_by.into_iter().chain(exported).fold(due, Now::max)
    }

    /// What is scaled by of what the instances export.
    fn series(&self) -> Vec<Selector> {
        self.autoscaler.policy().on.iter().filter_map(|metric| metric.source.selector()).collect()
    }

    fn deadline(&self) -> Now {
        let decide = self.decide_at();
        let measure = self.measures().then_some(self.measure_at);
        let look = (self.exports.exporter.is_some() && self.exports.asked.is_none()).then_some(self.exports.look_at);
        measure.into_iter().chain(look).fold(decide, Now::min)
    }

    fn readings(&self, now: Now) -> BTreeMap<MetricSource, Reading> {
        let fresh = || self.usage.iter().filter(|(_, measured)| now.since(measured.at) < MEASURED_FOR);
        let mut readings = self.meter.readings(now);
        for metric in &self.autoscaler.policy().on {
            let reading = match &metric.source {
                MetricSource::RequestsPerSecond
                | MetricSource::RequestsInFlight
                | MetricSource::TokensInFlight
                | MetricSource::QueueDepth => continue,
                MetricSource::Cpu => Reading::PerInstance(
                    fresh().filter_map(|(id, measured)| Some((id.clone(), measured.cpu?))).collect(),
                ),
                MetricSource::Memory => {
                    Reading::PerInstance(fresh().map(|(id, measured)| (id.clone(), measured.memory)).collect())
                }
                MetricSource::Exported { name, labels } => {
                    self.exports.reading(now, &Selector { name: name.clone(), labels: labels.clone() })
                }
            };
            readings.insert(metric.source.clone(), reading);
        }
        readings
    }

    fn measured(&mut self, now: Now, key: LaunchKey, usage: Usage) {
        let before = self.usage.get(&key.instance).filter(|before| before.attempt == key.attempt);
        let cpu = before.and_then(|before| {
            let over = now.since(before.at);
            // Time that has run backwards begins anew.
            let spent = usage.cpu.checked_sub(before.spent)?;
            let thousandths = (spent.as_micros() * 1000).checked_div(over.as_micros())?;
            let value = Measure::thousandths(u64::try_from(thousandths).unwrap_or(u64::MAX));
            Some(Point { value, at: now, over })
        });
        let memory = Point { value: Measure::whole(usage.memory.as_bytes()), at: now, over: Duration::ZERO };
        let measured = Measured { attempt: key.attempt, at: now, spent: usage.cpu, cpu, memory };
        self.usage.insert(key.instance, measured);
    }
}

impl Environment {
    // === the number in force ===

    /// What a step wants of a service, with the number of instances that is to be in force from now on.
    pub(super) fn with_number_in_force(&mut self, now: Now, id: &ResourceId, mut resource: Resource) -> Resource {
        let Resource::Service(service) = &mut resource else { return resource };
        let Some(policy) = service.scale.clone() else { return resource };
        let known = self.record.scaled.get(&id.name).cloned();
        let mut next = self.number_for(id, service, &policy, known.as_ref());
        service.replicas = next.replicas;
        let by_hand = next.before.is_some() && self.run().is_some_and(|run| run.state == RunState::Running);
        if let Some(scaling) = self.workloads.get_mut(id).and_then(|workload| workload.scaling.as_mut())
            && let Some(from) = known.as_ref().map(|known| known.replicas).filter(|from| *from != next.replicas)
        {
            if by_hand {
                scaling.autoscaler.set_by_hand(now, from, next.replicas);
            } else {
                scaling.autoscaler.moved(now, next.replicas);
            }
            next.autoscale = scaling.autoscaler.record(now);
        }
        if known.as_ref() != Some(&next) {
            self.record.scaled.insert(id.name.clone(), next);
            self.record_changed = true;
        }
        resource
    }

    fn number_for(
        &self,
        id: &ResourceId,
        service: &Service,
        policy: &Autoscale,
        known: Option<&ScaledRecord>,
    ) -> ScaledRecord {
        let want = self.workloads.get(id).and_then(|workload| workload.want.as_ref());
        let old = want.and_then(|want| want.resource.as_service());
        let present = known.map(|known| known.replicas).or(old.map(|old| old.replicas));
        let run = self.run();
        let by_hand = run.and_then(|run| match &run.kind {
            RunKind::Scale { replicas } => replicas.get(&id.name).copied(),
            _ => None,
        });
        let forward = run.is_some_and(|run| run.state == RunState::Running);
        let before = known.and_then(|known| known.before);
        let kept = ScaledRecord { before, ..known.cloned().unwrap_or_default() };
        match (by_hand, before) {
            (Some(_), Some(before)) if !forward => return ScaledRecord { replicas: before, ..kept },
            (Some(number), None) if forward => {
                let replicas = if number == 0 { 0 } else { policy.clamp(number) };
                return ScaledRecord { replicas, before: present, ..kept };
            }
            // Begun again after a recovery.
            _ => {}
        }
        let Some(present) = present else { return ScaledRecord { replicas: service.replicas, ..kept } };
        let off = present == 0 && old.and_then(|old| old.scale.as_ref()).is_some_and(|policy| policy.min > 0);
        let replaced = want.is_some_and(|want| want.launch_digest != service.launch_digest());
        let replicas = match policy.clamp(present) {
            // Switched off by hand: an update of what is off switches nothing on.
            _ if off => 0,
            // A release shows that it works before it sleeps.
            0 if replaced && forward => 1,
            number => number,
        };
        ScaledRecord { replicas, ..kept }
    }

    /// What was applied, with the number of instances that is in force.
    pub(super) fn as_scaled(&self, name: &Name, mut resource: Resource) -> Resource {
        if let Resource::Service(service) = &mut resource
            && service.scale.is_some()
            && let Some(scaled) = self.record.scaled.get(name)
        {
            service.replicas = scaled.replicas;
        }
        resource
    }

    /// After a run: there is no way back from a number that was set by hand.
    pub(super) fn forget_numbers_before(&mut self) {
        for scaled in self.record.scaled.values_mut() {
            self.record_changed |= scaled.before.take().is_some();
        }
    }

    /// A service that scales no more has no number beside that of its release.
    pub(super) fn forget_scaled(&mut self, name: &Name) {
        self.record_changed |= self.record.scaled.remove(name).is_some();
    }

    /// Makes the autoscaler of a service fit what is wanted of it now.
    pub(super) fn fit_scaling(&mut self, now: Now, id: &ResourceId) {
        let Some(workload) = self.workloads.get_mut(id) else { return };
        let Some(service) = workload.want.as_ref().and_then(|want| want.resource.as_service()) else {
            workload.scaling = None;
            return;
        };
        let Some(policy) = &service.scale else {
            workload.scaling = None;
            return;
        };
        let record = self.record.scaled.get(&id.name);
        let scaling = workload.scaling.get_or_insert_with(|| Scaling::new(policy, record, now));
        if scaling.autoscaler.policy().every != policy.every {
            scaling.meter = LoadMeter::new(policy.every.duration());
        }
        scaling.autoscaler.set_policy(policy.clone());
        scaling.meter.expect(service.ports.keys());
        let exporter = service.metrics.clone().filter(|_| !scaling.series().is_empty());
        if scaling.exports.exporter != exporter {
            scaling.exports = Exports { exporter, ..Exports::default() };
        }
    }

    // === what happens ===

    /// How much a route carries.
    pub(super) fn load(&mut self, now: Now, report: &LoadReport) {
        let id = service_id(&report.route.service);
        let Some(workload) = self.workloads.get_mut(&id) else { return };
        let Some(scaling) = &mut workload.scaling else { return };
        scaling.meter.report(now, report);
        let Some(service) = workload.want.as_ref().and_then(|want| want.resource.as_service()) else { return };
        if report.held > 0
            && let Some(decision) = scaling.autoscaler.wake(now, service.replicas)
        {
            self.scale(now, &id, &decision);
        }
    }

    /// What instances use.
    pub(super) fn usage(&mut self, now: Now, service: &Name, usage: Vec<(LaunchKey, Usage)>) {
        let id = service_id(service);
        let Some(workload) = self.workloads.get_mut(&id) else { return };
        let Some(scaling) = &mut workload.scaling else { return };
        scaling.answer_by = None;
        scaling.usage.retain(|instance, _| workload.members.contains(instance));
        for (key, usage) in usage {
            if workload.members.contains(&key.instance) {
                scaling.measured(now, key, usage);
            }
        }
        self.changed.insert(id);
    }

    /// What the instances export.
    pub(super) fn exported(&mut self, now: Now, id: &ResourceId, number: u64, answer: Answer) {
        let Some(scaling) = self.workloads.get_mut(id).and_then(|workload| workload.scaling.as_mut()) else { return };
        let series = scaling.series();
        let exports = &mut scaling.exports;
        if exports.asked.take_if(|(open, _)| *open == number).is_none() {
            return;
        }
        exports.problem = None;
        match answer {
            Answer::Scraped(scraped) => {
                let present: BTreeSet<&InstanceId> = scraped.iter().map(|it| &it.instance).collect();
                exports.read.retain(|instance, _| present.contains(instance));
                for Scraped { instance, attempt, values } in scraped {
                    match values {
                        Ok(values) => {
                            let known = series.iter().zip(values);
                            let known = known.filter_map(|(series, value)| Some((series.clone(), value?))).collect();
                            exports.read.insert(instance, (attempt, now, known));
                        }
                        Err(why) => {
                            // What another start of it said is nothing that this one does.
                            exports.read.retain(|id, (start, ..)| *id != instance || *start == attempt);
                            exports.problem = Some(format!("{instance}: {why}"));
                        }
                    }
                }
            }
            Answer::Error(why) => exports.problem = Some(why),
            Answer::Values(_) => {}
        }
    }

    /// Asks the instances for what they export.
    fn look_at_exports(&mut self, now: Now, id: &ResourceId) {
        let Some(workload) = self.workloads.get(id) else { return };
        let Some(scaling) = &workload.scaling else { return };
        let Some(exporter) = scaling.exports.exporter.clone() else { return };
        let open = scaling.exports.asked.is_some_and(|(_, by)| by > now);
        if open || scaling.exports.look_at > now {
            return;
        }
        let members = self.instances_of(workload);
        let running = members.filter(|instance| instance.is_started() && !is_leaving(instance));
        let target = |instance: &Instance| {
            let record = instance.record();
            let address = (Ipv4Addr::LOCALHOST, *record.ports.get(&exporter.port)?).into();
            Some(ScrapeTarget { instance: record.id.clone(), attempt: record.attempt, address })
        };
        let targets: Vec<ScrapeTarget> = running.filter_map(target).collect();
        let series = scaling.series();
        let scaling = self.workloads.get_mut(id).and_then(|workload| workload.scaling.as_mut()).expect("seen above");
        // Each decision has numbers of its own.
        let every = exporter.every.duration().min(scaling.autoscaler.policy().every.duration());
        scaling.exports.look_at = now + every;
        scaling.exports.pause = every;
        scaling.exports.impatient = scaling.exports.asked.take().is_some();
        if scaling.exports.impatient {
            scaling.exports.problem = Some("no answer".to_owned());
        }
        if targets.is_empty() {
            scaling.exports.read.clear();
            return;
        }
        self.asked += 1;
        scaling.exports.asked = Some((self.asked, now + exporter.timeout.duration() + ANSWER));
        let question = Question::Scrape { targets, path: exporter.path.clone(), series };
        let key = ConsultKey { service: id.name.clone(), about: About::Scale, number: self.asked };
        self.out.effects.push(Effect::Consult { key, question, timeout: exporter.timeout });
    }

    /// Measures and decides what is due.
    pub(super) fn look_at_scaling(&mut self, now: Now, id: &ResourceId) {
        self.measure_usage(now, id);
        self.look_at_exports(now, id);
        let Some(workload) = self.workloads.get(id) else { return };
        let Some(scaling) = &workload.scaling else { return };
        let serves = || self.instances_of(workload).any(|i| i.is_ready() && !is_leaving(i));
        let woke = scaling.autoscaler.is_starting_cold() && serves();
        let sample = if woke || scaling.decide_at() <= now { self.sample(id, workload, scaling, now) } else { None };
        let scaling = self.workloads.get_mut(id).and_then(|workload| workload.scaling.as_mut()).expect("seen above");
        let decision = sample.and_then(|sample| scaling.autoscaler.handle(now, &sample));
        let deadline = scaling.deadline();
        self.alarm(id, deadline);
        if let Some(decision) = decision {
            self.scale(now, id, &decision);
        }
    }

    fn measure_usage(&mut self, now: Now, id: &ResourceId) {
        let Some(workload) = self.workloads.get(id) else { return };
        if !workload.scaling.as_ref().is_some_and(|scaling| scaling.measures() && scaling.measure_at <= now) {
            return;
        }
        let members = self.instances_of(workload);
        let running = members.filter(|instance| instance.is_started() && !is_leaving(instance));
        let keys: Vec<LaunchKey> = running.map(|i| self.launch_key(&i.record().id, i.record().attempt)).collect();
        let scaling = self.workloads.get_mut(id).and_then(|workload| workload.scaling.as_mut()).expect("seen above");
        scaling.measure_at = now + scaling.autoscaler.policy().every.duration().min(MEASURE_EVERY);
        if !keys.is_empty() {
            scaling.answer_by = Some(now + ANSWER);
            self.out.effects.push(Effect::MeasureUsage { service: id.name.clone(), keys });
        }
    }

    /// Puts a decision into force.
    fn scale(&mut self, now: Now, id: &ResourceId, decision: &ScaleDecision) {
        let Some(workload) = self.workloads.get_mut(id) else { return };
        let (Some(want), Some(scaling)) = (&mut workload.want, &workload.scaling) else { return };
        if let Resource::Service(service) = Arc::make_mut(&mut want.resource) {
            service.replicas = decision.to;
        }
        workload.last = Some(want.resource.clone());
        let release = want.release;
        let known = self.record.scaled.entry(id.name.clone()).or_default();
        known.replicas = decision.to;
        known.autoscale = scaling.autoscaler.record(now);
        self.record_changed = true;
        self.note(EventKind::Scaled, Some(id.clone()), None, Some(release), decision.to_string());
        self.routes.touch();
        self.changed.insert(id.clone());
    }

    fn sample(&self, id: &ResourceId, workload: &Workload, scaling: &Scaling, now: Now) -> Option<Sample> {
        let want = workload.want.as_ref()?;
        let service = want.resource.as_service()?;
        let over = workload.rollout.as_ref().is_some_and(Rollout::is_over);
        let members = self.instances_of(workload);
        let instances = members.map(|instance| {
            let digest = &instance.record().launch_digest;
            let program = workload.want_of(digest).unwrap_or(want).resource.program();
            let resources = program.map(|program| &program.resources);
            // An old set that is only kept warm carries nothing.
            let kept = over && workload.set_of(digest) == Set::Baseline;
            InstanceSample {
                id: instance.record().id.clone(),
                phase: if kept { InstancePhase::Leaving } else { phase(instance) },
                cpu: resources.and_then(|resources| resources.cpu),
                memory: resources.and_then(|resources| resources.memory),
            }
        });
        let step = self.run().and_then(|run| run.steps.get(id).copied());
        Some(Sample {
            replicas: service.replicas,
            instances: instances.collect(),
            readings: scaling.readings(now),
            activity: scaling.meter.activity(now),
            rollout: step == Some(StepState::Running) || (workload.rollout.is_some() && !over),
        })
    }

    /// How long requests to a service wait for an instance that is started because of them; `None` if it does not sleep
    /// or is not asleep, starting or restarting.
    pub(super) fn cold_start(&self, workload: &Workload, service: &Service) -> Option<Timespan> {
        let to_zero = service.scale.as_ref()?.to_zero?;
        let serves = self.instances_of(workload).any(|instance| instance.is_ready() && !is_leaving(instance));
        let rolls = workload.rollout.as_ref().is_some_and(|rollout| !rollout.is_over());
        (!rolls && !serves).then_some(to_zero.cold_start)
    }
}

fn phase(instance: &Instance) -> InstancePhase {
    match (instance.phase(), instance.started()) {
        _ if is_leaving(instance) || instance.is_failed() => InstancePhase::Leaving,
        (Phase::Starting, Some(started)) => InstancePhase::Running { started, ready: false, since: started },
        (Phase::Ready | Phase::Unready, Some(started)) => {
            InstancePhase::Running { started, ready: instance.is_ready(), since: instance.since() }
        }
        // Also one that is being restarted.
        _ => InstancePhase::Pending,
    }
}

#[cfg(test)]
mod tests;
