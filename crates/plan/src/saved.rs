//! Saved plans: their form in a file, and whether they still fit.
//!
//! A saved plan is bound resource by resource, by the digest of what was applied when it was made. What happens to other
//! resources in the meantime does not void it.

use std::collections::{BTreeMap, BTreeSet};

use orchestra_model::{
    Code, Diagnostic, Digest, Plan, ResourceId,
    flag::FlagName,
    plan::{Action, FlagStep, PLAN_FORMAT, Step, Wait},
    record::ResourceRecord,
};
use serde::{Deserialize, Serialize};

use crate::{error::PlanError, graph, planner::Current};

#[derive(Serialize, Deserialize)]
struct Saved<P> {
    format: u32,
    digest: Digest,
    plan: P,
}

/// What every format begins with.
#[derive(Deserialize)]
struct Head {
    format: u32,
}

/// The form in which a plan is written to a file.
pub fn save(plan: &Plan) -> String {
    let saved = Saved { format: PLAN_FORMAT, digest: plan.digest(), plan };
    serde_json::to_string_pretty(&saved).expect("our types serialize to JSON") + "\n"
}

/// Reads what [`save`] wrote. A plan that was edited, cut or written by another version is refused (`ORC0302`).
pub fn load(text: &str) -> Result<Plan, Box<Diagnostic>> {
    let refused = |what: String| {
        Box::new(
            Diagnostic::error(Code::PLAN_UNREADABLE, "the saved plan cannot be read")
                .note(what)
                .help("make it again with `orchestra plan --out FILE`"),
        )
    };
    let head: Head = serde_json::from_str(text).map_err(|e| refused(e.to_string()))?;
    if head.format != PLAN_FORMAT {
        return Err(refused(format!("it has format {}; this version reads format {PLAN_FORMAT}", head.format)));
    }
    let saved: Saved<Plan> = serde_json::from_str(text).map_err(|e| refused(e.to_string()))?;
    if saved.plan.digest() != saved.digest {
        return Err(refused("its content does not fit its digest: it was changed after it was made".to_owned()));
    }
    Ok(saved.plan)
}

/// The resources for which a saved plan does not fit any more, each with why (`ORC0301`). Empty: it can be applied.
///
/// A step is refused if its resource was changed, created or deleted since, if what it waits for is neither there nor
/// made by the plan any more, or if it deletes what something else has come to depend on.
pub fn check_saved(plan: &Plan, current: &Current) -> Vec<(ResourceId, Diagnostic)> {
    let steps = index(plan);
    let mut users: BTreeMap<&ResourceId, &ResourceRecord> = BTreeMap::new();
    for record in current.resources.values().filter(|record| !steps.contains_key(&record.id)) {
        for to in record.depends_on.keys() {
            users.entry(to).or_insert(record);
        }
    }
    steps
        .values()
        .filter_map(|step| {
            let how = moved(step, current).or_else(|| {
                if step.action == Action::Delete {
                    users
                        .get(&step.resource)
                        .map(|user| format!("{} depends on it since release {}", user.id, user.release))
                } else {
                    let there = |id| match steps.get(id) {
                        Some(step) => step.action != Action::Delete,
                        None => current.resources.contains_key(id),
                    };
                    let gone = step.after.iter().find(|(to, wait)| **wait != Wait::Gone && !there(to));
                    gone.map(|(to, _)| format!("{to}, for which it waits, was deleted since"))
                }
            })?;
            Some((step.resource.clone(), refusal(how, step)))
        })
        .collect()
}

/// The flags for which a saved plan does not fit any more, each with why (`ORC0301`). Empty: it can be applied.
pub fn check_saved_flags(plan: &Plan, current: &Current) -> Vec<(FlagName, Diagnostic)> {
    let refused = |step: &FlagStep| {
        let how = match (&step.base, current.flags.flags.get(&step.flag).map(Digest::of)) {
            (None, None) => return None,
            (Some(base), Some(now)) if *base == now => return None,
            (None, Some(_)) => "it was defined since",
            (Some(_), Some(_)) => "its definition was changed since",
            (Some(_), None) => "it was deleted since",
        };
        let diagnostic =
            Diagnostic::error(Code::PLAN_STALE, format!("the saved plan no longer fits flag {}", step.flag))
                .note(how)
                .help("plan again: `orchestra plan`");
        Some((step.flag.clone(), diagnostic))
    };
    plan.flags.iter().filter_map(refused).collect()
}

fn index(plan: &Plan) -> BTreeMap<&ResourceId, &Step> {
    plan.steps.iter().map(|step| (&step.resource, step)).collect()
}

fn refusal(how: String, step: &Step) -> Diagnostic {
    Diagnostic::error(Code::PLAN_STALE, format!("the saved plan no longer fits {}", step.resource))
        .note(how)
        .help("plan again: `orchestra plan`")
}

/// How a resource has moved on since the plan was made.
fn moved(step: &Step, current: &Current) -> Option<String> {
    match (&step.base, current.resources.get(&step.resource)) {
        (None, None) => None,
        (Some(base), Some(now)) if *base == now.digest => None,
        (None, Some(now)) => Some(format!("it was created since, by release {}", now.release)),
        (Some(_), Some(now)) => Some(format!("it was changed since, by release {}", now.release)),
        (Some(_), None) => Some("it was deleted since".to_owned()),
    }
}

/// The plan as it is applied on top of what has happened to other resources since it was made: its steps stay as they
/// are; in its goal, everything that it has no step for is as it is now. For a plan that [`check_saved`] lets pass. A
/// plan that is applied at once comes out as it went in.
///
/// # Errors
/// If what happened since and what the plan does form a cycle, or a dependency is missing.
pub fn rebase(plan: &Plan, current: &Current) -> Result<Plan, PlanError> {
    let mut rebased = Plan { base: current.base, ..plan.clone() };
    let Some(desired) = &mut rebased.desired else { return Ok(rebased) };
    let planned_flags: BTreeSet<&FlagName> = plan.flags.iter().map(|step| &step.flag).collect();
    desired.flags.flags.retain(|name, _| planned_flags.contains(name));
    let others = current.flags.flags.iter().filter(|(name, _)| !planned_flags.contains(name));
    desired.flags.flags.extend(others.map(|(name, flag)| (name.clone(), flag.clone())));
    let steps = index(plan);
    desired.resources.retain(|id, _| steps.contains_key(id));
    let planned = desired.resources.len();
    // A volume that was kept though nothing desired it is part of the goal only if something uses it by now.
    let (kept, others): (Vec<_>, Vec<_>) =
        current.resources.iter().filter(|(id, _)| !steps.contains_key(id)).partition(|(id, _)| plan.kept.contains(id));
    desired.resources.extend(others.into_iter().map(|(id, record)| (id.clone(), record.applied.clone())));
    let used: BTreeSet<ResourceId> =
        desired.resources.values().filter_map(graph::edges).flat_map(BTreeMap::keys).cloned().collect();
    for (id, record) in kept.into_iter().filter(|(id, _)| used.contains(*id)) {
        desired.resources.insert(id.clone(), record.applied.clone());
        rebased.kept.retain(|kept| kept != id);
    }
    graph::order(&desired.resources)?;
    rebased.unchanged = u32::try_from(desired.resources.len() - planned).unwrap_or(u32::MAX);
    Ok(rebased)
}
