//! The decision: which resources get a step, which, and why.

use std::collections::{BTreeMap, BTreeSet};

use orchestra_model::{
    Desired, Digest, EnvironmentId, Plan, ReleaseNumber, Resource, ResourceId, ResourceKind,
    desired::{Condition, Dependency, Service},
    flag::FlagSet,
    plan::{Action, PLAN_FORMAT, PropertyChange, Step, Wait},
    record::ResourceRecord,
};

use crate::{
    diff,
    error::PlanError,
    flags,
    graph::{self, edges},
};

/// What there is now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Current {
    /// Release in force.
    pub base: Option<ReleaseNumber>,
    /// What was last applied, by resource.
    pub resources: BTreeMap<ResourceId, ResourceRecord>,
    /// What the world shows. A resource that is missing here was not looked at.
    pub observed: BTreeMap<ResourceId, Observation>,
    /// Flags of the release in force.
    pub flags: FlagSet,
}

/// What the world shows of a resource.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observation {
    /// It is as it was applied.
    Present,
    /// It is not there.
    Missing,
    /// It is there, but not as it was applied; in words.
    Degraded(String),
}

/// What may be done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Delete volumes that nothing desires any more; otherwise they are kept, with their data, and named in
    /// [`Plan::kept`].
    pub delete_volumes: bool,
}

/// Decides how to get from `current` to `desired`; `None` takes everything down.
///
/// # Errors
/// If `desired` is of another environment, or its edges lead nowhere or form a cycle.
pub fn plan(
    environment: &EnvironmentId,
    current: &Current,
    desired: Option<&Desired>,
    options: Options,
) -> Result<Plan, PlanError> {
    let decided = decide(environment, current, desired, options)?;
    Ok(Plan { desired: desired.cloned(), ..decided })
}

/// [`plan`] for callers that give `desired` away: with thousands of resources the copy costs more than the plan.
///
/// # Errors
/// Those of [`plan`].
pub fn plan_owned(
    environment: &EnvironmentId,
    current: &Current,
    desired: Option<Desired>,
    options: Options,
) -> Result<Plan, PlanError> {
    let decided = decide(environment, current, desired.as_ref(), options)?;
    Ok(Plan { desired, ..decided })
}

/// The plan without its goal.
fn decide(
    environment: &EnvironmentId,
    current: &Current,
    desired: Option<&Desired>,
    options: Options,
) -> Result<Plan, PlanError> {
    let nothing = BTreeMap::new();
    let resources = match desired {
        Some(desired) if desired.environment != *environment => {
            return Err(PlanError::OtherEnvironment {
                expected: environment.clone(),
                found: desired.environment.clone(),
            });
        }
        Some(desired) => &desired.resources,
        None => &nothing,
    };
    if let Some((id, _)) = resources.iter().find(|(id, resource)| id.kind != resource.kind()) {
        return Err(PlanError::KindMismatch { id: id.clone() });
    }
    let mut unchanged = 0;
    let mut steps = Vec::new();
    for id in graph::order(resources)? {
        match step(id, &resources[id], current) {
            Some(step) => steps.push(step),
            None => unchanged += 1,
        }
    }
    let (doomed, kept): (BTreeMap<_, _>, BTreeMap<_, _>) = current
        .resources
        .iter()
        .filter(|(id, _)| !resources.contains_key(id))
        .partition(|(id, _)| options.delete_volumes || id.kind != ResourceKind::Volume);
    let kept: Vec<&ResourceRecord> = kept.into_values().collect();
    let renames = renames(&steps, resources, &doomed);
    note_renames(&mut steps, &renames, &kept);
    let renamed = renames.into_iter().map(|(new, old)| (old, new)).collect();
    let mut leaving = still_used(&doomed, &steps, current);
    wait_for_verdicts(&mut leaving, &doomed, &steps, resources);
    steps.extend(deletions(&doomed, leaving, desired.is_none(), &renamed));
    Ok(Plan {
        format: PLAN_FORMAT,
        environment: environment.clone(),
        base: current.base,
        desired: None,
        steps,
        unchanged,
        kept: kept.into_iter().map(|record| record.id.clone()).collect(),
        flags: flags::steps(&current.flags, desired.map(|desired| &desired.flags)),
    })
}

// === one resource ===

/// The step that brings one resource to what is desired of it; `None` if it is there.
fn step(id: &ResourceId, desired: &Resource, current: &Current) -> Option<Step> {
    let record = current.resources.get(id);
    let (action, reasons, changes) = match record {
        None => (creation(desired), vec![newness(id)], Vec::new()),
        Some(record) => transition(record, desired, current.observed.get(id))?,
    };
    let after = edges(desired)
        .into_iter()
        .flatten()
        .map(|(to, Dependency { until, .. })| (to.clone(), Wait::Until(*until)))
        .collect();
    Some(Step {
        resource: id.clone(),
        action,
        reasons,
        changes,
        after,
        base: record.map(|record| record.digest.clone()),
        target: Some(desired.digest()),
    })
}

fn creation(desired: &Resource) -> Action {
    if desired.kind() == ResourceKind::Job { Action::Run } else { Action::Create }
}

fn newness(id: &ResourceId) -> String {
    if id.kind == ResourceKind::Job { "it has never run" } else { "it is new" }.to_owned()
}

type Decision = (Action, Vec<String>, Vec<PropertyChange>);

/// From what was applied, and what is seen of it, to what is desired.
fn transition(record: &ResourceRecord, desired: &Resource, seen: Option<&Observation>) -> Option<Decision> {
    // Comparing values costs a tenth of digesting them; only what differs is taken apart.
    let changes = if record.applied == *desired { None } else { Some(diff::changes(&record.applied, desired)) };
    match (&record.applied, desired) {
        (Resource::Job(before), Resource::Job(after)) => {
            let again = if before.program != after.program {
                Some("its program changed")
            } else if !record.completed {
                Some("it has not completed")
            } else {
                None
            };
            match (again, changes) {
                (Some(reason), changes) => Some((Action::Run, vec![reason.to_owned()], changes.unwrap_or_default())),
                (None, Some(changes)) => {
                    Some((Action::Update, vec!["it has completed and is not run again".to_owned()], changes))
                }
                (None, None) => None,
            }
        }
        (Resource::Service(before), Resource::Service(after)) => {
            let new_instances = changes.is_some() && before.launch_digest() != after.launch_digest();
            let restart_only = before.program == after.program;
            match (changes, defect(seen)) {
                (None, None) => None,
                (None, Some(defect)) => Some((Action::Repair, vec![defect], Vec::new())),
                (Some(changes), defect) => {
                    let missing = matches!(seen, Some(Observation::Missing));
                    let (action, reason) = match (new_instances, &defect) {
                        // Without old instances there is nothing to roll.
                        (_, Some(_)) if missing => (Action::Repair, None),
                        (true, _) if restart_only => (Action::Roll, Some("a restart was asked for".to_owned())),
                        (true, _) => (Action::Roll, Some(born_with(&changes))),
                        (false, Some(_)) => (Action::Repair, None),
                        (false, None) => (Action::Update, Some("running instances stay".to_owned())),
                    };
                    Some((action, defect.into_iter().chain(reason).collect(), changes))
                }
            }
        }
        (Resource::Volume(before), Resource::Volume(after)) => match (changes, defect(seen)) {
            (Some(changes), _) if before.path != after.path => {
                let reason = format!("its path changed; warning: data are not moved, they stay in {}", before.path);
                Some((Action::Replace, vec![reason], changes))
            }
            (Some(changes), None) => {
                let owner =
                    if after.managed { "from now on Orchestra owns it" } else { "Orchestra does not own it any more" };
                Some((Action::Update, vec![owner.to_owned()], changes))
            }
            (changes, Some(defect)) => Some((Action::Repair, vec![defect], changes.unwrap_or_default())),
            (None, None) => None,
        },
        // A record of this id with another kind in it: the store refuses those; make it anew all the same.
        _ => Some((Action::Replace, vec!["its kind changed".to_owned()], changes.unwrap_or_default())),
    }
}

/// What is wrong with what is there.
fn defect(seen: Option<&Observation>) -> Option<String> {
    match seen {
        None | Some(Observation::Present) => None,
        Some(Observation::Missing) => Some("it was applied, but is not there".to_owned()),
        Some(Observation::Degraded(how)) => Some(format!("it is not as it was applied: {how}")),
    }
}

/// Names the properties that running instances cannot take over.
fn born_with(changes: &[PropertyChange]) -> String {
    let mut paths: Vec<&str> = changes.iter().filter(|change| change.replaces).map(|c| c.path.as_str()).collect();
    let more = paths.len().saturating_sub(3);
    paths.truncate(3);
    match (paths.is_empty(), more) {
        (true, _) => "its recorded form differs".to_owned(),
        (false, 0) => format!("new instances are needed for {}", paths.join(", ")),
        (false, more) => format!("new instances are needed for {} and {more} more", paths.join(", ")),
    }
}

// === renames ===

/// Created resources that look like a deleted one under another name: the same program. Each old one counts once.
fn renames(
    steps: &[Step],
    resources: &BTreeMap<ResourceId, Resource>,
    doomed: &BTreeMap<&ResourceId, &ResourceRecord>,
) -> BTreeMap<ResourceId, ResourceId> {
    if doomed.is_empty() {
        return BTreeMap::new();
    }
    let likeness = |resource: &Resource| resource.program().map(|program| (resource.kind(), Digest::of(program)));
    let mut gone: BTreeMap<_, Vec<&ResourceId>> = BTreeMap::new();
    for (id, record) in doomed {
        if let Some(likeness) = likeness(&record.applied) {
            gone.entry(likeness).or_default().push(id);
        }
    }
    let new = steps.iter().filter(|step| step.base.is_none()).map(|step| &step.resource).collect::<BTreeSet<_>>();
    let mut renames = BTreeMap::new();
    for id in new {
        if let Some(candidates) = likeness(&resources[id]).and_then(|likeness| gone.get_mut(&likeness))
            && !candidates.is_empty()
        {
            renames.insert(id.clone(), candidates.remove(0).clone());
        }
    }
    renames
}

/// Says of a new resource that it looks like an old one.
fn note_renames(steps: &mut [Step], renames: &BTreeMap<ResourceId, ResourceId>, kept: &[&ResourceRecord]) {
    let new_volumes =
        steps.iter().filter(|step| step.base.is_none() && step.resource.kind == ResourceKind::Volume).count();
    for step in steps.iter_mut().filter(|step| step.base.is_none()) {
        if let Some(old) = renames.get(&step.resource) {
            step.reasons.push(format!("it looks like {old} under a new name; a new name is a new resource"));
        }
        // Paths of volumes follow their names, so that only being the one old and the one new is a sign.
        if let (ResourceKind::Volume, 1, [old]) = (step.resource.kind, new_volumes, kept)
            && let Resource::Volume(volume) = &old.applied
        {
            step.reasons.push(format!(
                "it looks like {} under a new name; warning: data are not moved, they stay in {}",
                old.id, volume.path
            ));
        }
    }
}

// === deletions ===

/// What each resource that goes waits for, beside others that go.
type Leaving<'a> = BTreeMap<&'a ResourceId, BTreeMap<ResourceId, Wait>>;

/// Who stays, but still uses what goes: its own step ends that.
fn still_used<'a>(
    doomed: &BTreeMap<&'a ResourceId, &ResourceRecord>,
    steps: &[Step],
    current: &Current,
) -> Leaving<'a> {
    let mut leaving = Leaving::new();
    if doomed.is_empty() {
        return leaving;
    }
    for step in steps {
        let Some(record) = current.resources.get(&step.resource) else { continue };
        for to in record.depends_on.keys() {
            if let Some((to, _)) = doomed.get_key_value(to) {
                leaving.entry(to).or_default().insert(step.resource.clone(), Wait::Until(settled(step.resource.kind)));
            }
        }
    }
    leaving
}

/// A service goes after every rollout in steps of its release: should one be turned back, it was never stopped. It also
/// goes after the one that its port is given to, which takes the address over when it is ready.
fn wait_for_verdicts<'a>(
    leaving: &mut Leaving<'a>,
    doomed: &BTreeMap<&'a ResourceId, &ResourceRecord>,
    steps: &[Step],
    resources: &BTreeMap<ResourceId, Resource>,
) {
    let service = |id: &ResourceId| resources.get(id).and_then(Resource::as_service);
    let in_steps = |step: &&Step| {
        step.action == Action::Roll && service(&step.resource).is_some_and(|it| it.rollout.strategy.stepped().is_some())
    };
    let judged: Vec<&ResourceId> = steps.iter().filter(in_steps).map(|step| &step.resource).collect();
    let numbers = |service: &Service| service.ports.values().filter_map(|port| port.port).collect::<BTreeSet<_>>();
    for (id, record) in doomed {
        let Resource::Service(going) = &record.applied else { continue };
        let given = numbers(going);
        let takes = |step: &&Step| service(&step.resource).is_some_and(|it| !numbers(it).is_disjoint(&given));
        let heirs = steps.iter().filter(takes).map(|step| &step.resource);
        for waits_for in judged.iter().copied().chain(heirs) {
            leaving.entry(id).or_default().insert(waits_for.clone(), Wait::Until(Condition::Ready));
        }
    }
}

fn deletions(
    doomed: &BTreeMap<&ResourceId, &ResourceRecord>,
    mut leaving: Leaving<'_>,
    down: bool,
    renamed: &BTreeMap<ResourceId, ResourceId>,
) -> Vec<Step> {
    let edges = doomed.iter().map(|(id, record)| (*id, &record.depends_on)).collect();
    graph::deletion_order(&edges)
        .into_iter()
        .map(|(id, dependents)| {
            let record = doomed[id];
            let mut reasons =
                vec![if down { "everything is taken down" } else { "it is not in the stack any more" }.to_owned()];
            if let Some(new) = renamed.get(id) {
                reasons.push(format!("it looks like it was renamed to {new}"));
            }
            if let Resource::Volume(volume) = &record.applied {
                reasons.push(if volume.managed {
                    format!("warning: its data in {} are deleted", volume.path)
                } else {
                    format!("its directory {} is not Orchestra's and stays", volume.path)
                });
            }
            let mut after = leaving.remove(id).unwrap_or_default();
            after.extend(dependents.into_iter().map(|dependent| (dependent.clone(), Wait::Gone)));
            Step {
                resource: id.clone(),
                action: Action::Delete,
                reasons,
                changes: Vec::new(),
                after,
                base: Some(record.digest.clone()),
                target: None,
            }
        })
        .collect()
}

/// The condition under which a resource of this kind has taken over what its step brings.
fn settled(kind: ResourceKind) -> Condition {
    match kind {
        ResourceKind::Volume => Condition::Started,
        ResourceKind::Job => Condition::Completed,
        ResourceKind::Service => Condition::Ready,
    }
}
