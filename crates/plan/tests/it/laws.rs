//! Laws that hold for every stack.

use std::collections::{BTreeMap, BTreeSet};

use orchestra_model::{
    Desired, Plan, Resource, ResourceId,
    desired::Target,
    flag::FlagSet,
    plan::{Action, Wait},
};
use orchestra_plan::{Current, Observation, Options, Style, check_saved, load, plan, rebase, render, save};
use proptest::{prelude::*, sample::Index};

use crate::fixture::{apply, depend, environment, job, record, service, text, volume};

/// One resource in the making: which name, what kind, what content, what it depends on.
type Part = (u8, u8, u8, Vec<Index>);

/// A stack of valid edges: each resource depends on earlier ones only.
fn build(parts: &[Part]) -> Desired {
    let mut resources: BTreeMap<ResourceId, Resource> = BTreeMap::new();
    let mut ids: Vec<ResourceId> = Vec::new();
    for (name, kind, content, edges) in parts {
        let (kind, mut resource) = match kind % 4 {
            0 => ("volume", volume(&format!("/v/{}", content % 3))),
            1 => ("job", Resource::Job(job(&format!("job {}", content % 3)))),
            _ => {
                let mut service = service("api");
                service.replicas = u32::from(content % 3);
                service.program.command.push(text(if content % 5 > 2 { "new" } else { "old" }));
                service.restarts = u64::from(content / 200);
                ("service", Resource::Service(service))
            }
        };
        let id: ResourceId = format!("{kind}.n{}", name % 12).parse().unwrap();
        if resources.contains_key(&id) {
            continue;
        }
        for edge in edges {
            if !ids.is_empty() {
                depend(&mut resource, &edge.get(&ids).to_string());
            }
        }
        ids.push(id.clone());
        resources.insert(id, resource);
    }
    Desired {
        environment: environment(),
        target: Target::Process,
        resources,
        flags: FlagSet::default(),
        preview: None,
        secrets: BTreeMap::new(),
    }
}

fn stacks() -> impl Strategy<Value = Desired> {
    prop::collection::vec((any::<u8>(), any::<u8>(), any::<u8>(), prop::collection::vec(any::<Index>(), 0..4)), 0..16)
        .prop_map(|parts| build(&parts))
}

/// What is there: some of what a stack asks for was applied, jobs may have failed, the world may have lost things.
fn currents() -> impl Strategy<Value = Current> {
    (stacks(), stacks(), prop::collection::vec(any::<u8>(), 40)).prop_map(|(one, two, dice)| {
        let mut dice = dice.into_iter().cycle();
        let mut current = Current { base: Some(orchestra_model::ReleaseNumber(3)), ..Current::default() };
        for (release, stack) in [(1, one), (2, two)] {
            for (id, resource) in &stack.resources {
                let die = dice.next().unwrap_or_default();
                if die % 4 == 0 {
                    continue;
                }
                let mut record = record(id, resource, release);
                record.completed = die % 3 != 0;
                current.resources.insert(id.clone(), record);
                match die % 7 {
                    0 => current.observed.insert(id.clone(), Observation::Missing),
                    1 => current.observed.insert(id.clone(), Observation::Degraded("less".to_owned())),
                    2 => current.observed.insert(id.clone(), Observation::Present),
                    _ => None,
                };
            }
        }
        current
    })
}

fn goals() -> impl Strategy<Value = (Option<Desired>, Options)> {
    (prop::option::weighted(0.8, stacks()), any::<bool>())
        .prop_map(|(desired, delete_volumes)| (desired, Options { delete_volumes }))
}

fn plan_of(current: &Current, goal: &(Option<Desired>, Options)) -> Plan {
    plan(&environment(), current, goal.0.as_ref(), goal.1).unwrap()
}

fn position(plan: &Plan, id: &ResourceId) -> Option<usize> {
    plan.steps.iter().position(|step| step.resource == *id)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn plan_then_apply_is_a_fixed_point(current in currents(), goal in goals()) {
        let first = plan_of(&current, &goal);
        let after = apply(&first, &current);
        let second = plan_of(&after, &goal);
        prop_assert!(second.is_empty(), "{second:?}");
        prop_assert_eq!(&second.kept, &first.kept);
        let expected: BTreeMap<ResourceId, Resource> =
            goal.0.map(|desired| desired.resources).unwrap_or_default();
        let mut there: BTreeMap<ResourceId, Resource> =
            after.resources.into_iter().map(|(id, record)| (id, record.applied)).collect();
        there.retain(|id, _| !first.kept.contains(id));
        prop_assert_eq!(there, expected);
    }

    #[test]
    fn order_respects_edges(current in currents(), goal in goals()) {
        let plan = plan_of(&current, &goal);
        for (at, step) in plan.steps.iter().enumerate() {
            for (to, wait) in &step.after {
                match (position(&plan, to), wait) {
                    // Whatever a step waits for comes before it, so that walking in order never blocks.
                    (Some(other), _) => prop_assert!(other < at, "{} waits for {to}", step.resource),
                    (None, Wait::Gone) => prop_assert!(false, "{to} is not deleted"),
                    (None, Wait::Until(_)) => prop_assert!(plan.desired.as_ref().unwrap().resources.contains_key(to)),
                }
            }
            if let Some(resource) = plan.desired.as_ref().and_then(|desired| desired.resources.get(&step.resource)) {
                let edges: BTreeSet<_> = resource.dependencies().into_keys().collect();
                prop_assert_eq!(step.after.keys().cloned().collect::<BTreeSet<_>>(), edges);
            }
        }
        let ids: BTreeSet<_> = plan.steps.iter().map(|step| &step.resource).collect();
        prop_assert_eq!(ids.len(), plan.steps.len(), "one step per resource");
    }

    #[test]
    fn deletions_go_in_reverse(stack in stacks()) {
        let current = apply(&plan_of(&Current::default(), &(Some(stack.clone()), Options::default())), &Current::default());
        let down = plan_of(&current, &(None, Options { delete_volumes: true }));
        prop_assert_eq!(down.steps.len(), stack.resources.len());
        for (id, resource) in &stack.resources {
            for to in resource.dependencies().keys() {
                prop_assert!(position(&down, id) < position(&down, to), "{id} depends on {to}");
                prop_assert_eq!(down.step(to).unwrap().after.get(id), Some(&Wait::Gone));
            }
        }
    }

    #[test]
    fn who_stays_has_left_what_goes_before_it_goes(current in currents(), goal in goals()) {
        let plan = plan_of(&current, &goal);
        for step in plan.steps.iter().filter(|step| step.action == Action::Delete) {
            for user in current.resources.values().filter(|record| record.depends_on.contains_key(&step.resource)) {
                if goal.0.as_ref().is_some_and(|desired| desired.resources.contains_key(&user.id)) {
                    prop_assert!(matches!(step.after.get(&user.id), Some(Wait::Until(_))), "{step:?}");
                }
            }
        }
    }

    #[test]
    fn equal_inputs_give_equal_plans_and_digests(parts in prop::collection::vec(
        (any::<u8>(), any::<u8>(), any::<u8>(), prop::collection::vec(any::<Index>(), 0..4)), 0..16), current in currents()
    ) {
        let desired = build(&parts);
        let goal = (Some(desired.clone()), Options::default());
        let one = plan_of(&current, &goal);
        // The same maps, filled in another order.
        let turned = Desired { resources: desired.resources.clone().into_iter().rev().collect(), ..desired };
        let turned_current = Current {
            resources: current.resources.clone().into_iter().rev().collect(),
            observed: current.observed.clone().into_iter().rev().collect(),
            ..current
        };
        let two = plan_of(&turned_current, &(Some(turned), Options::default()));
        prop_assert_eq!(one.digest(), two.digest());
        prop_assert_eq!(save(&one), save(&two));
        prop_assert_eq!(load(&save(&one)).unwrap(), one);
    }

    #[test]
    fn every_change_has_a_step_that_says_why_and_nothing_else_has(current in currents(), goal in goals()) {
        let plan = plan_of(&current, &goal);
        for (id, resource) in goal.0.iter().flat_map(|desired| &desired.resources) {
            let record = current.resources.get(id);
            let same = record.is_some_and(|record| record.applied == *resource);
            match plan.step(id) {
                Some(step) => {
                    prop_assert!(!step.reasons.is_empty());
                    prop_assert_eq!(step.changes.is_empty(), same || record.is_none(), "{:?}", step);
                    let seen = current.observed.get(id).is_some_and(|seen| *seen != Observation::Present);
                    let unfinished = record.is_some_and(|record| !record.completed);
                    prop_assert!(!same || seen || unfinished, "{step:?} without a cause");
                }
                None => prop_assert!(same),
            }
        }
        let deleted: BTreeSet<_> =
            plan.steps.iter().filter(|s| s.action == Action::Delete).map(|s| &s.resource).chain(&plan.kept).collect();
        let gone: BTreeSet<_> = current
            .resources
            .keys()
            .filter(|id| !goal.0.as_ref().is_some_and(|desired| desired.resources.contains_key(id)))
            .collect();
        prop_assert_eq!(deleted, gone);
    }

    #[test]
    fn exactly_what_moved_is_refused(current in currents(), goal in goals(), moved in prop::collection::vec(any::<Index>(), 0..4)) {
        let plan = plan_of(&current, &goal);
        prop_assert!(check_saved(&plan, &current).is_empty());
        let mut now = current.clone();
        let mut changed = BTreeSet::new();
        let ids: Vec<ResourceId> = current.resources.keys().cloned().collect();
        for index in moved.iter().filter(|_| !ids.is_empty()) {
            let id = index.get(&ids);
            // Another content with the same edges: nothing else is concerned.
            let mut applied = current.resources[id].applied.clone();
            match &mut applied {
                Resource::Volume(volume) => volume.path.push_str("/moved"),
                Resource::Job(job) => job.retries += 100,
                Resource::Service(service) => service.replicas += 100,
            }
            now.resources.insert(id.clone(), record(id, &applied, 9));
            changed.insert(id.clone());
        }
        let refused: BTreeSet<_> = check_saved(&plan, &now).into_iter().map(|(id, _)| id).collect();
        let expected: BTreeSet<_> = changed.into_iter().filter(|id| plan.step(id).is_some()).collect();
        prop_assert_eq!(&refused, &expected);
        // What is let pass can be put on top of what happened, and then is a fixed point.
        if refused.is_empty() && plan.desired.is_some() {
            let rebased = rebase(&plan, &now).unwrap();
            let after = apply(&rebased, &now);
            let goal = (rebased.desired.clone(), Options::default());
            let left = plan_of(&after, &goal);
            let unfinished = |id: &ResourceId| !now.resources[id].completed;
            prop_assert!(left.steps.iter().all(|s| s.action == Action::Run && unfinished(&s.resource)), "{left:?}");
        }
    }

    #[test]
    fn any_plan_can_be_drawn(current in currents(), goal in goals(), width in 0_usize..200, verbose: bool) {
        let plan = plan_of(&current, &goal);
        let drawn = render(&plan, Style { color: false, width, verbose });
        prop_assert!(drawn.ends_with('\n'));
        for step in &plan.steps {
            prop_assert!(drawn.contains(&step.resource.to_string()));
        }
    }
}
