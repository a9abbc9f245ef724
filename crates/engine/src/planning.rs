//! From a request to a plan: the same functions with a server and without one.
//!
//! Planning reads and never writes: it takes what is recorded and what was observed as values.

use std::collections::{BTreeMap, BTreeSet};

use orchestra_machine::Environment;
use orchestra_model::{
    Code, Desired, Diagnostic, EnvironmentId, Name, Now, Plan, ReleaseNumber, Resource, ResourceId, ResourceKind,
    autoscale::Autoscale,
    desired::{MAX_REPLICAS, Service},
    flag::FlagSet,
    record::{ReleaseRecord, ResourceRecord, RunKind},
};
use orchestra_plan::{Current, Observation, Options};
use orchestra_spec::{Context, Outline, PreviewContext, Source};

use crate::{
    control_plane::{RunRequest, What},
    environment_task::{reason, refused},
    error::EngineError,
};

/// A stack file as a client sent it.
#[derive(Clone, Debug)]
pub struct StackSource {
    /// Absolute path.
    pub path: String,
    /// Path to show in messages.
    pub shown: String,
    /// Its text.
    pub text: String,
    /// Environment; the stack's default if missing.
    pub environment: Option<Name>,
    /// What makes it a preview, if it is one.
    pub preview: Option<PreviewContext>,
}

/// A stack file that is in order.
#[derive(Clone, Debug)]
pub struct LoadedStack {
    /// What it asks for.
    pub desired: Desired,
    /// What is probably not meant.
    pub warnings: Vec<Diagnostic>,
    /// Environments that it defines.
    pub environments: Vec<Name>,
    /// Most previews of the stack at one time.
    pub preview_limit: u32,
    /// Its absolute path.
    pub source: String,
}

/// Reads a stack file. `volumes` is the folder of managed volumes.
pub fn load(source: &StackSource, volumes: &str) -> Result<LoadedStack, EngineError> {
    let directory =
        source.path.rsplit_once('/').map_or("/", |(folder, _)| if folder.is_empty() { "/" } else { folder });
    let context = Context {
        directory: directory.to_owned(),
        volumes: volumes.to_owned(),
        environment: source.environment.clone(),
        preview: source.preview.clone(),
    };
    let text = Source { path: &source.shown, bytes: source.text.as_bytes() };
    let loaded = orchestra_spec::load(text, &context).map_err(EngineError::Refused)?;
    Ok(LoadedStack {
        desired: loaded.desired,
        warnings: loaded.warnings,
        environments: loaded.environments,
        preview_limit: loaded.preview_limit,
        source: source.path.clone(),
    })
}

/// What can be said of a stack file before an environment is chosen.
pub fn outline(source: &StackSource) -> Outline {
    orchestra_spec::outline(Source { path: &source.shown, bytes: source.text.as_bytes() })
}

/// What `up` would do, given what is recorded. The stack file says nothing of restarts, so their counters stay; and of a
/// service that scales by itself it says only how many instances it begins with, so their number stays as well.
pub fn plan_stack(
    base: Option<ReleaseNumber>,
    resources: BTreeMap<ResourceId, ResourceRecord>,
    observed: BTreeMap<ResourceId, Observation>,
    flags: FlagSet,
    desired: &Desired,
) -> Result<Plan, EngineError> {
    let mut desired = desired.clone();
    for (id, resource) in &mut desired.resources {
        if let (Resource::Service(service), Some(Resource::Service(now))) =
            (resource, resources.get(id).map(|r| &r.applied))
        {
            service.restarts = now.restarts;
            keep_replicas(service, now);
        }
    }
    plan_up(Current { base, resources, observed, flags }, desired)
}

/// The number of instances of a service that goes on scaling by itself is none of a release's business.
fn keep_replicas(service: &mut Service, now: &Service) {
    if let Some(policy) = &service.scale {
        service.replicas = if now.scale.is_some() { now.replicas } else { policy.clamp(now.replicas) };
    }
}

/// What it takes to get to `desired`, given what is recorded.
#[expect(clippy::needless_pass_by_value, reason = "whoever asks has no use for it any more")]
fn plan_up(current: Current, desired: Desired) -> Result<Plan, EngineError> {
    let environment = desired.environment.clone();
    orchestra_plan::plan_owned(&environment, &current, Some(desired), Options::default())
        .map_err(|error| refused(error.diagnostic()))
}

/// What `down` would do, given what is recorded.
pub fn plan_down(
    environment: &EnvironmentId,
    base: Option<ReleaseNumber>,
    resources: BTreeMap<ResourceId, ResourceRecord>,
    delete_volumes: bool,
) -> Result<Plan, EngineError> {
    let current = Current { base, resources, ..Current::default() };
    orchestra_plan::plan(environment, &current, None, Options { delete_volumes })
        .map_err(|error| refused(error.diagnostic()))
}

/// A plan with what its run must know.
pub(crate) struct Planned {
    pub(crate) plan: Plan,
    pub(crate) kind: RunKind,
    pub(crate) reason: String,
    pub(crate) source: String,
    pub(crate) warnings: Vec<Diagnostic>,
}

/// Plans a request against a machine's present state.
pub(crate) fn plan_request(machine: &Environment, now: Now, request: &RunRequest) -> Result<Planned, EngineError> {
    let record = machine.record();
    let observed = observe(machine, now, &request.missing);
    let resources = || machine.resources().clone();
    let source = || record.source.clone();
    let flags = || machine.stable_release().map(|release| release.desired.flags.clone()).unwrap_or_default();
    let current = |resources, observed| Current { base: record.stable, resources, observed, flags: flags() };
    let up = |desired: Desired| plan_up(current(resources(), observed.clone()), desired);
    let planned = |plan, kind: RunKind, source: String, warnings: Vec<Diagnostic>| {
        let reason = reason(&kind);
        Planned { plan, kind, reason, source, warnings }
    };
    match &request.what {
        What::Up(stack) => {
            let plan = plan_stack(record.stable, resources(), observed, flags(), &stack.desired)?;
            Ok(planned(plan, RunKind::Up, stack.source.clone(), stack.warnings.clone()))
        }
        What::Apply { plan, source: from } => {
            let current = current(resources(), observed);
            let stale = orchestra_plan::check_saved(plan, &current).into_iter().map(|(_, diagnostic)| diagnostic);
            let stale_flags = orchestra_plan::check_saved_flags(plan, &current).into_iter().map(|(_, d)| d);
            let stale: Vec<Diagnostic> = stale.chain(stale_flags).collect();
            if !stale.is_empty() {
                return Err(EngineError::Stale(stale));
            }
            let kind = if plan.desired.is_some() { RunKind::Up } else { RunKind::Down { volumes: false } };
            let plan = orchestra_plan::rebase(plan, &current).map_err(|error| refused(error.diagnostic()))?;
            Ok(planned(plan, kind, from.clone().unwrap_or_else(source), Vec::new()))
        }
        What::Down { volumes } => {
            // What a preview kept nobody would look for again.
            let volumes = *volumes || machine.preview().is_some();
            let plan = plan_down(&record.id, record.stable, resources(), volumes)?;
            Ok(planned(plan, RunKind::Down { volumes }, source(), Vec::new()))
        }
        What::Restart { services } => {
            let mut desired = present(machine)?;
            for service in chosen(&mut desired, services)? {
                service.restarts += 1;
            }
            Ok(planned(up(desired)?, RunKind::Restart { services: services.clone() }, source(), Vec::new()))
        }
        What::Scale { replicas } => {
            let mut desired = present(machine)?;
            let (mut resources, mut replicas, mut warnings) = (resources(), replicas.clone(), Vec::new());
            for (name, count) in &mut replicas {
                for service in chosen(&mut desired, std::slice::from_ref(name))? {
                    warnings.extend(within_bounds(name, service, count));
                    if *count > MAX_REPLICAS {
                        let message = format!("{count} instances of service {name} are too many");
                        let error = Diagnostic::error(Code::INVALID_VALUE, message);
                        return Err(refused(error.help(format!("{MAX_REPLICAS} are the most"))));
                    }
                    service.replicas = *count;
                }
                // The number in force of a service that scales by itself is in no release.
                let applied = resources.get_mut(&ResourceId::new(ResourceKind::Service, name.clone()));
                if let (Some(ResourceRecord { applied: Resource::Service(applied), .. }), Some(scaled)) =
                    (applied, record.scaled.get(name))
                {
                    applied.replicas = scaled.replicas;
                }
            }
            let plan = plan_up(current(resources, observed), desired)?;
            Ok(planned(plan, RunKind::Scale { replicas }, source(), warnings))
        }
        What::Rollback { release } => {
            let (desired, warnings) = roll_back_to(machine, release);
            Ok(planned(up(desired)?, RunKind::Rollback { to: release.number }, source(), warnings))
        }
    }
}

/// What is in force now.
fn present(machine: &Environment) -> Result<Desired, EngineError> {
    machine.stable_release().map(|release| release.desired.clone()).ok_or_else(|| {
        let message = format!("nothing of {} is deployed", machine.record().id);
        refused(Diagnostic::error(Code::NOT_FOUND, message).help("deploy it first: `orchestra up`"))
    })
}

fn chosen<'a>(desired: &'a mut Desired, names: &[Name]) -> Result<Vec<&'a mut Service>, EngineError> {
    let known: Vec<String> =
        desired.resources.iter().filter(|(_, r)| r.as_service().is_some()).map(|(id, _)| id.name.to_string()).collect();
    let missing: Vec<Diagnostic> = names
        .iter()
        .filter(|name| !known.iter().any(|known| known == name.as_str()))
        .map(|name| {
            Diagnostic::error(Code::NOT_FOUND, format!("there is no service `{name}` in {}", desired.environment))
                .help(format!("services there: {}", known.join(", ")))
        })
        .collect();
    if !missing.is_empty() {
        return Err(EngineError::Refused(missing));
    }
    let wanted = |id: &ResourceId| names.is_empty() || names.contains(&id.name);
    Ok(desired
        .resources
        .iter_mut()
        .filter(|(id, _)| wanted(id))
        .filter_map(|(_, resource)| if let Resource::Service(service) = resource { Some(service) } else { None })
        .collect())
}

/// Brings a number that a person wants within what a service allows that scales by itself: it would be brought there at
/// once anyway. 0 switches it off.
fn within_bounds(name: &Name, service: &Service, count: &mut u32) -> Option<Diagnostic> {
    let policy = service.scale.as_ref()?;
    let within = if *count == 0 { 0 } else { policy.clamp(*count) };
    if within == *count {
        return None;
    }
    let Autoscale { min, max, .. } = policy;
    let message = format!("service {name} scales by itself from {min} to {max}: {count} becomes {within}");
    *count = within;
    Some(
        Diagnostic::warning(Code::INVALID_VALUE, message).help("change `min` or `max` under `scale` in the stack file"),
    )
}

/// An earlier release as a goal. Jobs stay as they are: what they did cannot be undone, and doing it again is no
/// way back. Restart counters stay as well, so that going back replaces no instance for their sake.
fn roll_back_to(machine: &Environment, release: &ReleaseRecord) -> (Desired, Vec<Diagnostic>) {
    let mut desired = release.desired.clone();
    let mut kept = Vec::new();
    for (id, resource) in &mut desired.resources {
        let Some(applied) = machine.resources().get(id) else { continue };
        match (resource, &applied.applied) {
            (resource @ Resource::Job(_), now @ Resource::Job(_)) => {
                if resource != now {
                    kept.push(id.to_string());
                }
                resource.clone_from(now);
            }
            (Resource::Service(service), Resource::Service(now)) => {
                service.restarts = now.restarts;
                keep_replicas(service, now);
            }
            _ => {}
        }
    }
    let mut warnings = Vec::new();
    if !kept.is_empty() {
        let message = format!("not undone and not run again: {}", kept.join(", "));
        warnings.push(Diagnostic::warning(Code::NOT_YET_SUPPORTED, message));
    }
    (desired, warnings)
}

/// What the world shows of what was applied.
fn observe(machine: &Environment, now: Now, missing: &BTreeSet<ResourceId>) -> BTreeMap<ResourceId, Observation> {
    let status = machine.status(now);
    let mut observed = BTreeMap::new();
    for resource in status.resources {
        let observation = match resource.id.kind {
            ResourceKind::Volume if missing.contains(&resource.id) => Observation::Missing,
            // Given up: nobody tries any more, so a run must.
            ResourceKind::Service if resource.instances.iter().any(|i| i.phase == "ended") => {
                let problem = resource.instances.iter().find_map(|i| i.problem.clone());
                Observation::Degraded(problem.unwrap_or_else(|| "an instance was given up".to_owned()))
            }
            _ => Observation::Present,
        };
        observed.insert(resource.id, observation);
    }
    observed
}
