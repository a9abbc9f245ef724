//! A service or job: what is wanted of it, and its instances.

use std::{collections::BTreeSet, sync::Arc};

use orchestra_model::{
    Digest, InstanceId, Now, ReleaseNumber, Resource, ResourceId, ResourceKind,
    desired::{Condition, OnLoss, Service},
    record::{Change, InstanceIntent, InstanceRecord},
};

use super::{Environment, VolumeState, is_leaving, pairs::Pairs, scaling::Scaling};
use crate::{
    health::Health,
    instance::{Event, Instance, Phase, Policy},
    replacement::{self, Member, Mode, Set},
    rollout::{Rollout, judge::Judge},
};

/// A service or job.
#[derive(Clone, Debug, Default)]
pub(super) struct Workload {
    pub(super) want: Option<Want>,
    /// Its rollout, and what that replaces.
    pub(super) rollout: Option<Rollout>,
    pub(super) baseline: Option<Want>,
    /// Who judges the rollout.
    pub(super) judge: Option<Judge>,
    /// When what the judge knows was written down last.
    pub(super) judge_kept: Option<Now>,
    /// Synthetic requests to both sets of its rollout.
    pub(super) pairs: Pairs,
    /// What scales it by itself.
    pub(super) scaling: Option<Scaling>,
    /// What was wanted last, for as long as its instances leave.
    pub(super) last: Option<Arc<Resource>>,
    /// Its instances, those that leave included.
    pub(super) members: BTreeSet<InstanceId>,
    /// Dependencies that were lost and whose loss matters.
    pub(super) lost: BTreeSet<ResourceId>,
    /// Its instances were started at least once, so that a dependency can be lost.
    pub(super) begun: bool,
    /// A process of it ran since at least one was wanted, so that it can be lost.
    pub(super) ran: bool,
    /// An instance of it was ready since at least one was wanted, so that it can be lost.
    pub(super) served: bool,
}

/// What is wanted of a workload.
#[derive(Clone, Debug)]
pub(super) struct Want {
    pub(super) resource: Arc<Resource>,
    pub(super) release: ReleaseNumber,
    /// Digest that its instances must have been launched with.
    pub(super) launch_digest: Digest,
}

impl Want {
    pub(super) fn new(resource: Resource, release: ReleaseNumber) -> Self {
        let launch_digest = match &resource {
            Resource::Service(service) => service.launch_digest(),
            other => other.digest(),
        };
        Self { resource: Arc::new(resource), release, launch_digest }
    }

    pub(super) fn policy(&self) -> Policy {
        match &*self.resource {
            Resource::Service(service) => Policy::of_service(service),
            Resource::Job(job) => Policy::of_job(job),
            Resource::Volume(_) => unreachable!("volumes have no instances"),
        }
    }

    pub(super) fn health(&self) -> (Option<Health>, Option<Health>) {
        let health = self.resource.as_service().map(|s| &s.health);
        (health.and_then(|h| h.ready.clone()).map(Health::new), health.and_then(|h| h.live.clone()).map(Health::new))
    }
}

impl Workload {
    /// What an instance was made from, if that is known.
    pub(super) fn want_of(&self, launch_digest: &Digest) -> Option<&Want> {
        self.want.iter().chain(&self.baseline).find(|want| want.launch_digest == *launch_digest)
    }

    /// Which set an instance belongs to.
    pub(super) fn set_of(&self, launch_digest: &Digest) -> Set {
        let is = |want: &Option<Want>| want.as_ref().is_some_and(|want| want.launch_digest == *launch_digest);
        if is(&self.want) {
            Set::Current
        } else if is(&self.baseline) {
            Set::Baseline
        } else {
            Set::Other
        }
    }
}

impl Environment {
    /// The instances of a workload in the order of their ids, those that leave included.
    pub(super) fn instances_of<'a>(&'a self, workload: &'a Workload) -> impl Iterator<Item = &'a Instance> + Clone {
        let ends = workload.members.first().zip(workload.members.last());
        let range = ends.into_iter().flat_map(|(first, last)| self.instances.range(first..=last));
        // Both are in order: one walk along them, and not a search for each of what may be thousands.
        let mut members = workload.members.iter().peekable();
        range.filter_map(move |(id, instance)| {
            while members.next_if(|member| *member < id).is_some() {}
            members.next_if(|member| *member == id).map(|_| instance)
        })
    }

    /// Sets what is wanted of a service; instances follow as the strategy allows.
    pub(super) fn want_service(&mut self, now: Now, id: &ResourceId, want: Option<(Resource, ReleaseNumber)>) {
        self.index_dependencies(id, want.as_ref().map(|(resource, _)| resource));
        let workload = self.workloads.entry(id.clone()).or_default();
        workload.want = want.map(|(resource, release)| Want::new(resource, release));
        if let Some(want) = &workload.want {
            workload.last = Some(want.resource.clone());
        }
        let want = workload.want.clone();
        let members: Vec<InstanceId> = workload.members.iter().cloned().collect();
        self.fit_scaling(now, id);
        for member in members {
            let Some(instance) = self.instances.get_mut(&member) else { continue };
            if is_leaving(instance) {
                continue;
            }
            if let Some(want) = &want
                && instance.record().launch_digest == want.launch_digest
            {
                let (ready, live) = want.health();
                let (endpoint, was_ready) = (instance.endpoint(), instance.is_ready());
                let commands = instance.update(now, want.policy(), ready, live, &mut self.rng);
                self.after_instance(now, &member, commands, endpoint, was_ready);
                self.tell_dependencies(now, &member);
            }
        }
        self.routes.retry(&id.name);
        self.changed.insert(id.clone());
    }

    /// Takes the next steps towards what is wanted of a workload.
    pub(super) fn reconcile(&mut self, now: Now, id: &ResourceId) {
        self.bury(id);
        self.refresh_losses(now, id);
        self.look_at_scaling(now, id);
        let Some(workload) = self.workloads.get(id) else { return };
        match id.kind {
            ResourceKind::Service => {
                let stopped_by_loss = workload.lost.iter().find(|on| {
                    workload
                        .want
                        .as_ref()
                        .and_then(|w| w.resource.dependencies().get(*on).copied())
                        .is_some_and(|d| d.on_loss == OnLoss::Stop)
                });
                match (&workload.want, stopped_by_loss) {
                    (Some(want), None) => {
                        let want = want.clone();
                        self.reconcile_service(now, id, &want);
                    }
                    (Some(_), Some(lost)) => {
                        let cause = format!("{lost} was lost");
                        self.retire_all(now, id, &cause, false);
                    }
                    (None, _) => self.retire_all(now, id, "taken down", true),
                }
            }
            ResourceKind::Job => {
                if workload.want.is_none() {
                    self.retire_all(now, id, "not wanted any more", false);
                }
            }
            ResourceKind::Volume => {}
        }
        self.bury(id);
        self.refresh_losses(now, id);
        self.reconciled.insert(id.clone());
        if self.workloads.get(id).is_some_and(|w| w.want.is_none() && w.members.is_empty()) {
            self.workloads.remove(id);
            if id.kind == ResourceKind::Service {
                self.forget_traffic(&id.name);
            }
            self.routes.retry(&id.name);
        }
    }

    fn reconcile_service(&mut self, now: Now, id: &ResourceId, want: &Want) {
        let Some(service) = want.resource.as_service() else { return };
        self.look_at_rollout(now, id, crate::rollout::Event::Look);
        // The rollout may have turned the run back, and with it what is wanted.
        let Some(want) = self
            .workloads
            .get(id)
            .and_then(|workload| workload.want.clone())
            .filter(|w| w.launch_digest == want.launch_digest && w.release == want.release)
        else {
            return;
        };
        let members: Vec<Member> = self.members(now, id, service);
        let mode = self.mode(id, service);
        let mut decision = replacement::decide(mode, service.replicas, &members);
        if self.is_to_be_put_back(id) {
            // What is still there of before will be wanted again in a moment.
            decision.retire.retain(|id| !members.iter().any(|m| m.id == *id && m.healthy && m.set != Set::Current));
        }
        for retired in decision.retire {
            let current = members.iter().any(|m| m.id == retired && m.set == Set::Current);
            let cause = if current {
                format!("{} replicas are wanted", mode.wanted(service.replicas).unwrap_or(service.replicas))
            } else {
                format!("replaced by release {}", want.release)
            };
            self.tell_instance(now, &retired, Event::Drain { cause, brief: false });
        }
        for _ in 0..decision.start {
            self.add_instance(now, id, &want);
        }
        if let Some(baseline) = self.workloads.get(id).and_then(|workload| workload.baseline.clone()) {
            for _ in 0..decision.start_baseline {
                self.add_instance(now, id, &baseline);
            }
        }
    }

    /// How the instances of a service are replaced now.
    pub(super) fn mode(&self, id: &ResourceId, service: &Service) -> Mode {
        match self.workloads.get(id).and_then(|workload| workload.rollout.as_ref()) {
            Some(rollout) if rollout.keeps_both() && rollout.is_over() => Mode::Keep,
            Some(rollout) if rollout.keeps_both() => Mode::Beside { current: rollout.canary_wanted(service.replicas) },
            Some(rollout) if rollout.is_frozen() => Mode::Frozen,
            _ => Mode::direct(&service.rollout, service.replicas),
        }
    }

    fn members(&mut self, now: Now, id: &ResourceId, service: &Service) -> Vec<Member> {
        let workload = &self.workloads[id];
        let min_ready = service.rollout.min_ready.duration();
        let mut wake = None;
        let ids = self.instances_of(workload);
        // One of a release that had none of these ports is as ready as it can be without a route.
        let routable =
            |instance: &Instance| service.ports.keys().any(|port| instance.record().ports.contains_key(port));
        let members = ids
            .map(|instance| {
                let set = workload.set_of(&instance.record().launch_digest);
                // Only new ones have to prove themselves.
                let proven_at = instance.since() + min_ready;
                let proven = set != Set::Current || now >= proven_at;
                if instance.is_ready() && !proven {
                    wake = Some(wake.map_or(proven_at, |at: Now| at.min(proven_at)));
                }
                let serving = instance.is_ready() && (!routable(instance) || self.routes.admits(instance));
                Member {
                    id: instance.record().id.clone(),
                    set,
                    healthy: instance.is_ready(),
                    serving,
                    ready: serving && proven,
                    leaving: is_leaving(instance),
                    failed: instance.is_failed(),
                }
            })
            .collect();
        if let Some(at) = wake {
            self.alarm(id, at);
        }
        members
    }

    /// Has a workload looked at again.
    pub(super) fn alarm(&mut self, id: &ResourceId, at: Now) {
        let alarm = self.alarms.entry(id.clone()).or_insert(at);
        *alarm = at.min(*alarm);
    }

    /// Instances of the set that a service's rollout leads to that are available.
    pub(super) fn available(&mut self, now: Now, id: &ResourceId, service: &Service) -> u32 {
        let members = self.members(now, id, service);
        let available = members.iter().filter(|m| m.set == Set::Current && m.ready && !m.leaving).count();
        u32::try_from(available).unwrap_or(u32::MAX)
    }

    fn retire_all(&mut self, now: Now, id: &ResourceId, cause: &str, brief: bool) {
        let members: Vec<InstanceId> = self.workloads[id].members.iter().cloned().collect();
        for member in members {
            if self.instances.get(&member).is_some_and(|i| i.intent() != InstanceIntent::Stop) {
                self.tell_instance(now, &member, Event::Drain { cause: cause.to_owned(), brief });
            }
        }
    }

    /// Adds one instance of what is wanted; it launches as soon as nothing stands in its way.
    pub(super) fn add_instance(&mut self, now: Now, id: &ResourceId, want: &Want) {
        let ordinals = self.record.ordinals.entry(id.name.clone()).or_default();
        let ordinal = ordinals.entry(want.release).or_insert(0);
        *ordinal += 1;
        let instance_id = InstanceId { workload: id.name.clone(), release: want.release, ordinal: *ordinal };
        self.record_changed = true;
        let record = InstanceRecord {
            environment: self.record.id.clone(),
            id: instance_id.clone(),
            kind: id.kind,
            launch_digest: want.launch_digest.clone(),
            attempt: 1,
            ports: std::collections::BTreeMap::new(),
            intent: InstanceIntent::Run,
            was_ready: false,
            last_exit: None,
            forced: None,
            recent_restarts: 0,
            restarts: 0,
            created_at: 0,
        };
        let (ready, live) = want.health();
        let instance = Instance::new(record, want.policy(), ready, live, now);
        self.instances.insert(instance_id.clone(), instance);
        self.tell_dependencies(now, &instance_id);
        let workload = self.workloads.get_mut(id).expect("an instance is added to an existing workload");
        workload.members.insert(instance_id);
        workload.begun = true;
    }

    /// Tells an instance about the services that its checks depend on.
    fn tell_dependencies(&mut self, now: Now, id: &InstanceId) {
        let Some(instance) = self.instances.get(id) else { return };
        let dependencies: BTreeSet<_> = [crate::Which::Ready, crate::Which::Live]
            .into_iter()
            .filter_map(|which| instance.health(which))
            .flat_map(|health| health.dependencies().cloned().collect::<Vec<_>>())
            .collect();
        for service in dependencies {
            let serves = self.serves(&super::service_id(&service));
            self.tell_instance(now, id, Event::DependencyReady(service, serves));
        }
    }

    /// Launches what waits and may.
    pub(super) fn launch_pending(&mut self, now: Now, id: &ResourceId) {
        let Some(workload) = self.workloads.get(id) else { return };
        let Some(want) = workload.want.clone() else { return };
        let is_due =
            |i: &&Instance| matches!(i.phase(), Phase::Pending { until, .. } if until.is_none_or(|at| at <= now));
        let due = self.instances_of(workload).filter(is_due).filter(|i| !is_leaving(i));
        let pending: Vec<InstanceId> = due.map(|i| i.record().id.clone()).collect();
        if pending.is_empty() {
            return;
        }
        // Once for all of them: there may be thousands.
        let mut used = self.used_ports();
        for member in pending {
            // An instance of neither set that waits for its restart keeps waiting: it is about to be retired. So does one
            // of the baseline that nobody needs any more.
            let own = self.workloads[id].want_of(&self.instances[&member].record().launch_digest).cloned();
            let own = own.filter(|own| own.launch_digest == want.launch_digest || self.keeps_baseline(id));
            let obstacle = match &own {
                Some(own) => self.launch_obstacle(id, own),
                None => Some("its replacement".to_owned()),
            };
            if let Some(obstacle) = obstacle {
                self.instances.get_mut(&member).expect("listed above").wait_for(obstacle);
            } else {
                let ports = self.choose_ports(own.as_ref().unwrap_or(&want), &mut used);
                self.instances.get_mut(&member).expect("listed above").set_ports(ports);
                self.tell_instance(now, &member, Event::MayLaunch);
            }
        }
    }

    /// Whether instances of the baseline are started again when they exit.
    fn keeps_baseline(&self, id: &ResourceId) -> bool {
        let rollout = self.workloads.get(id).and_then(|workload| workload.rollout.as_ref());
        rollout.is_some_and(|rollout| rollout.keeps_both() && !rollout.is_over())
    }

    /// Forgets instances of which nothing is left.
    fn bury(&mut self, id: &ResourceId) {
        let Some(workload) = self.workloads.get(id) else { return };
        // This is looked at with each event of each of them.
        let there = self.instances_of(workload).filter(|i| *i.phase() != Phase::Gone);
        if there.count() == workload.members.len() {
            return;
        }
        let workload = self.workloads.get_mut(id).expect("seen above");
        let gone: Vec<InstanceId> = workload
            .members
            .iter()
            .filter(|member| self.instances.get(*member).is_none_or(|i| *i.phase() == Phase::Gone))
            .cloned()
            .collect();
        for member in gone {
            workload.members.remove(&member);
            self.instances.remove(&member);
            if let Some(at) = self.timer_of.remove(&member) {
                self.timers.remove(&(at, member.clone()));
            }
            self.routes.touch();
            self.out.changes.push(Change::ForgetInstance(self.record.id.clone(), member));
        }
    }

    /// Remembers what a service was to others.
    pub(super) fn note_presence(&mut self, id: &ResourceId) {
        let (runs, serves) = (self.runs(id), self.serves(id));
        let Some(workload) = self.workloads.get_mut(id) else { return };
        let none = workload.want.as_ref().and_then(|want| want.resource.as_service()).is_some_and(|s| s.replicas == 0);
        workload.ran = !none && (workload.ran || runs);
        workload.served = !none && (workload.served || serves);
    }

    /// Whether somebody who depends on the resource would call it there: a service with a ready instance.
    pub(super) fn serves(&self, id: &ResourceId) -> bool {
        match id.kind {
            ResourceKind::Volume => self.volumes.get(id).is_some_and(VolumeState::exists),
            ResourceKind::Job => self.holds(id, Condition::Completed),
            ResourceKind::Service => self.workloads.get(id).is_some_and(|workload| {
                let wanted_none =
                    workload.want.as_ref().and_then(|w| w.resource.as_service()).is_some_and(|s| s.replicas == 0);
                wanted_none || self.instances_of(workload).any(Instance::is_ready)
            }),
        }
    }

    /// Whether a process of a service runs, or none is wanted.
    pub(super) fn runs(&self, id: &ResourceId) -> bool {
        self.workloads.get(id).is_some_and(|workload| {
            let wanted_none =
                workload.want.as_ref().and_then(|w| w.resource.as_service()).is_some_and(|s| s.replicas == 0);
            wanted_none || self.instances_of(workload).any(Instance::is_started)
        })
    }

    /// Whether a condition on a resource holds.
    pub(super) fn holds(&self, id: &ResourceId, condition: Condition) -> bool {
        match id.kind {
            ResourceKind::Volume => self.volumes.get(id).is_some_and(VolumeState::exists),
            ResourceKind::Job => match condition {
                Condition::Completed | Condition::Ready => self.resources.get(id).is_some_and(|r| r.completed),
                Condition::Started => {
                    self.resources.get(id).is_some_and(|r| r.completed)
                        || self.workloads.get(id).is_some_and(|w| self.instances_of(w).any(Instance::is_started))
                }
            },
            ResourceKind::Service => self.workloads.get(id).is_some_and(|workload| {
                let Some(want) = &workload.want else { return false };
                let Some(service) = want.resource.as_service() else { return false };
                let count = self
                    .instances_of(workload)
                    .filter(|i| !is_leaving(i) && i.record().launch_digest == want.launch_digest)
                    .filter(|i| match condition {
                        Condition::Started => i.is_started(),
                        Condition::Ready | Condition::Completed => {
                            i.is_ready()
                                && (service.ports.is_empty()
                                    || self.routes.admitted(&i.record().id, i.record().attempt))
                        }
                    })
                    .count();
                count >= service.replicas as usize
            }),
        }
    }
}
