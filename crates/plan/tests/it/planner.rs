//! One decision after the other.

use orchestra_model::{
    Desired, Plan, Resource,
    desired::{Condition, Strategy},
    plan::{Action, Step, Wait},
    quantity::Timespan,
    rollout::Stepped,
};
use orchestra_plan::{Current, Observation, Options, PlanError, plan};
use serde_json::json;

use crate::fixture::{
    applied, apply, depending, desired, environment, job, job_of, program, rid, service, service_of, stack, url_of,
    volume,
};

fn plan_of(current: &Current, desired: &Desired) -> Plan {
    plan(&environment(), current, Some(desired), Options::default()).unwrap()
}

fn plan_down(current: &Current, delete_volumes: bool) -> Plan {
    plan(&environment(), current, None, Options { delete_volumes }).unwrap()
}

fn actions(plan: &Plan) -> Vec<String> {
    plan.steps.iter().map(|step| format!("{:?} {}", step.action, step.resource)).collect()
}

fn step<'a>(plan: &'a Plan, id: &str) -> &'a Step {
    plan.step(&rid(id)).unwrap_or_else(|| panic!("no step for {id} in {:?}", actions(plan)))
}

#[test]
fn what_is_new_is_created_in_the_order_of_edges() {
    let plan = plan_of(&Current::default(), &stack());
    assert_eq!(actions(&plan), ["Create volume.data", "Run job.migrate", "Create service.api", "Create service.web"]);
    assert_eq!(
        step(&plan, "service.api").after,
        [
            (rid("volume.data"), Wait::Until(Condition::Started)),
            (rid("job.migrate"), Wait::Until(Condition::Completed))
        ]
        .into()
    );
    assert!(plan.steps.iter().all(|s| s.base.is_none() && s.changes.is_empty()));
    assert_eq!((plan.unchanged, plan.base), (0, None));
}

#[test]
fn what_is_there_needs_nothing() {
    let plan = plan_of(&applied(&stack()), &stack());
    assert!(plan.is_empty());
    assert_eq!(plan.unchanged, 4);
}

#[test]
fn what_instances_are_not_born_with_changes_in_place() {
    let mut to = stack();
    let api = service_of(&mut to, "service.api");
    api.replicas = 3;
    api.stop.grace = orchestra_model::quantity::Timespan::seconds(20);
    let plan = plan_of(&applied(&stack()), &to);
    assert_eq!(actions(&plan), ["Update service.api"]);
    let step = step(&plan, "service.api");
    let paths: Vec<_> = step.changes.iter().map(|c| (c.path.as_str(), c.replaces)).collect();
    assert_eq!(paths, [("replicas", false), ("stop.grace", false)]);
    assert_eq!((&step.changes[0].before, &step.changes[0].after), (&Some(json!(1)), &Some(json!(3))));
    // It still waits for what it depends on, though that has no step.
    assert!(step.after.contains_key(&rid("job.migrate")));
    assert_eq!(step.base, Some(stack().resources[&rid("service.api")].digest()));
    assert_eq!(step.target, Some(to.resources[&rid("service.api")].digest()));
}

#[test]
fn what_instances_are_born_with_rolls_them() {
    let mut to = stack();
    let api = service_of(&mut to, "service.api");
    api.replicas = 2;
    api.program.env.insert("LLM_URL".to_owned(), url_of("web"));
    let plan = plan_of(&applied(&stack()), &to);
    assert_eq!(actions(&plan), ["Roll service.api"]);
    let step = step(&plan, "service.api");
    let [env, replicas] = &step.changes[..] else { panic!("{:?}", step.changes) };
    assert_eq!(env.path, "program.env.LLM_URL");
    assert_eq!(
        (env.before.clone(), env.after.clone()),
        (None, Some(json!("(known after apply: services.web.urls.http)/v1")))
    );
    assert_eq!(env.unknown.len(), 1);
    assert!(env.replaces && !replicas.replaces);
    assert_eq!(step.reasons, ["new instances are needed for program.env.LLM_URL"]);
}

#[test]
fn lists_are_one_property_and_texts_are_readable() {
    let mut to = stack();
    service_of(&mut to, "service.api").program.command.push(orchestra_model::Text(Vec::new()));
    service_of(&mut to, "service.web").program.env.insert("EMPTY".to_owned(), orchestra_model::Text(Vec::new()));
    let plan = plan_of(&applied(&stack()), &to);
    let change = &step(&plan, "service.api").changes[0];
    assert_eq!(
        (change.before.clone(), change.after.clone()),
        (Some(json!(["./bin/api"])), Some(json!(["./bin/api", ""])))
    );
    assert_eq!(step(&plan, "service.web").changes[0].after, Some(json!("")));
}

#[test]
fn a_restart_rolls_and_says_so() {
    let mut to = stack();
    service_of(&mut to, "service.api").restarts += 1;
    let plan = plan_of(&applied(&stack()), &to);
    assert_eq!(step(&plan, "service.api").action, Action::Roll);
    assert_eq!(step(&plan, "service.api").reasons, ["a restart was asked for"]);
}

#[test]
fn a_job_runs_again_only_if_its_program_changed_or_it_never_completed() {
    let mut to = stack();
    job_of(&mut to, "job.migrate").retries = 9;
    assert_eq!(actions(&plan_of(&applied(&stack()), &to)), ["Update job.migrate"]);
    job_of(&mut to, "job.migrate").program.command.push(crate::fixture::text("--all"));
    assert_eq!(actions(&plan_of(&applied(&stack()), &to)), ["Run job.migrate"]);
    let mut current = applied(&stack());
    current.resources.get_mut(&rid("job.migrate")).unwrap().completed = false;
    let plan = plan_of(&current, &stack());
    assert_eq!(actions(&plan), ["Run job.migrate"]);
    assert_eq!(step(&plan, "job.migrate").reasons, ["it has not completed"]);
    // That nothing is left of a job that has completed is as it should be.
    let mut current = applied(&stack());
    current.observed.insert(rid("job.migrate"), Observation::Missing);
    assert!(plan_of(&current, &stack()).is_empty());
}

#[test]
fn a_changed_job_runs_before_the_services_behind_it_roll() {
    let mut to = stack();
    job_of(&mut to, "job.migrate").program.command.push(crate::fixture::text("--all"));
    service_of(&mut to, "service.api").restarts = 1;
    assert_eq!(actions(&plan_of(&applied(&stack()), &to)), ["Run job.migrate", "Roll service.api"]);
}

#[test]
fn what_the_world_lost_is_repaired() {
    let mut current = applied(&stack());
    current.observed.insert(rid("service.api"), Observation::Missing);
    current.observed.insert(rid("service.web"), Observation::Degraded("1 of 2 instances".to_owned()));
    current.observed.insert(rid("volume.data"), Observation::Present);
    let plan = plan_of(&current, &stack());
    assert_eq!(actions(&plan), ["Repair service.api", "Repair service.web"]);
    assert_eq!(step(&plan, "service.web").reasons, ["it is not as it was applied: 1 of 2 instances"]);
    current.observed.insert(rid("volume.data"), Observation::Missing);
    assert_eq!(plan_of(&current, &stack()).steps[0].action, Action::Repair);
}

#[test]
fn a_repair_takes_changes_along_and_a_roll_repairs() {
    let mut current = applied(&stack());
    let mut to = stack();
    service_of(&mut to, "service.api").program.command = vec![crate::fixture::text("./bin/api2")];
    current.observed.insert(rid("service.api"), Observation::Degraded("none ready".to_owned()));
    assert_eq!(actions(&plan_of(&current, &to)), ["Roll service.api"]);
    assert_eq!(plan_of(&current, &to).steps[0].reasons.len(), 2);
    current.observed.insert(rid("service.api"), Observation::Missing);
    let plan = plan_of(&current, &to);
    assert_eq!(actions(&plan), ["Repair service.api"], "there is nothing to roll");
    assert_eq!(step(&plan, "service.api").changes.len(), 1);
    let mut to = stack();
    service_of(&mut to, "service.api").replicas = 2;
    current.observed.insert(rid("service.api"), Observation::Degraded("none ready".to_owned()));
    assert_eq!(actions(&plan_of(&current, &to)), ["Repair service.api"]);
}

#[test]
fn a_volume_that_moves_is_replaced_with_a_warning() {
    let mut to = stack();
    to.resources.insert(rid("volume.data"), volume("/mnt/data"));
    let plan = plan_of(&applied(&stack()), &to);
    assert_eq!(actions(&plan), ["Replace volume.data"]);
    let step = step(&plan, "volume.data");
    assert!(step.reasons[0].contains("warning: data are not moved, they stay in /var/lib/demo/data"), "{step:?}");
    assert!(step.changes[0].replaces);
}

#[test]
fn what_is_not_in_the_stack_any_more_goes_after_its_dependents_have_left() {
    let mut to = stack();
    to.resources.remove(&rid("service.api"));
    service_of(&mut to, "service.web").depends_on.clear();
    let plan = plan_of(&applied(&stack()), &to);
    assert_eq!(actions(&plan), ["Update service.web", "Delete service.api"]);
    let delete = step(&plan, "service.api");
    assert_eq!(delete.after, [(rid("service.web"), Wait::Until(Condition::Ready))].into());
    assert_eq!((delete.target.clone(), delete.reasons.len()), (None, 1));
}

#[test]
fn a_service_goes_after_the_rollouts_in_steps_of_its_release() {
    let canary = |port: u16| {
        let mut to = stack();
        to.resources.remove(&rid("service.web"));
        let api = service_of(&mut to, "service.api");
        api.program = program("./api v2");
        api.ports.values_mut().next().unwrap().port = Some(port);
        let stepped = Stepped { steps: Vec::new(), keep_warm: Timespan::default(), guard: None };
        api.rollout.strategy = Strategy::Canary(stepped);
        plan_of(&applied(&stack()), &to)
    };
    let waits = step(&canary(9090), "service.web").after.clone();
    assert_eq!(waits, [(rid("service.api"), Wait::Until(Condition::Ready))].into());
    // So it does where the rollout takes its port over.
    assert_eq!(step(&canary(8080), "service.web").after, waits);
}

#[test]
fn a_service_goes_after_the_one_that_its_port_is_given_to() {
    let mut to = stack();
    let web = to.resources.remove(&rid("service.web")).unwrap();
    to.resources.insert(rid("service.front"), web);
    let plan = plan_of(&applied(&stack()), &to);
    assert_eq!(actions(&plan), ["Create service.front", "Delete service.web"]);
    let after = [(rid("service.front"), Wait::Until(Condition::Ready))].into();
    assert_eq!(step(&plan, "service.web").after, after);
}

#[test]
fn everything_goes_in_reverse_and_volumes_stay_unless_told() {
    let current = applied(&stack());
    let plan = plan_down(&current, false);
    assert_eq!(actions(&plan), ["Delete service.web", "Delete service.api", "Delete job.migrate"]);
    assert_eq!(plan.kept, [rid("volume.data")]);
    assert_eq!(step(&plan, "job.migrate").after, [(rid("service.api"), Wait::Gone)].into());
    let plan = plan_down(&current, true);
    assert_eq!(
        actions(&plan),
        ["Delete service.web", "Delete service.api", "Delete job.migrate", "Delete volume.data"]
    );
    assert!(plan.kept.is_empty());
    assert!(step(&plan, "volume.data").reasons[1].contains("warning: its data in /var/lib/demo/data are deleted"));
    assert_eq!(
        step(&plan, "volume.data").after,
        [(rid("job.migrate"), Wait::Gone), (rid("service.api"), Wait::Gone)].into()
    );
}

#[test]
fn what_was_kept_is_used_again_or_deleted_later() {
    let current = apply(&plan_down(&applied(&stack()), false), &applied(&stack()));
    assert_eq!(current.resources.len(), 1);
    let plan = plan_of(&current, &stack());
    assert_eq!((plan.unchanged, plan.steps.len()), (1, 3));
    assert_eq!(actions(&plan_down(&current, false)), Vec::<String>::new());
    assert_eq!(actions(&plan_down(&current, true)), ["Delete volume.data"]);
    assert!(apply(&plan_down(&current, true), &current).resources.is_empty());
}

#[test]
fn edges_of_what_is_deleted_come_from_its_record() {
    // The stack that is taken down says nothing about edges: there is none.
    let current = applied(&desired([
        ("service.a", depending(Resource::Service(service("a")), &["service.b"])),
        ("service.b", depending(Resource::Service(service("b")), &["service.c"])),
        ("service.c", Resource::Service(service("c"))),
    ]));
    assert_eq!(actions(&plan_down(&current, false)), ["Delete service.a", "Delete service.b", "Delete service.c"]);
}

#[test]
fn a_cycle_among_old_records_does_not_keep_anything_up() {
    let one = desired([
        ("service.a", depending(Resource::Service(service("a")), &["service.b"])),
        ("service.b", Resource::Service(service("b"))),
        ("service.c", depending(Resource::Service(service("c")), &["service.a"])),
    ]);
    let mut current = applied(&one);
    let turned = depending(Resource::Service(service("b")), &["service.a"]);
    current.resources.insert(rid("service.b"), crate::fixture::record(&rid("service.b"), &turned, 2));
    let plan = plan_down(&current, false);
    assert_eq!(actions(&plan), ["Delete service.c", "Delete service.a", "Delete service.b"]);
    // No step waits for one that comes later.
    for (at, step) in plan.steps.iter().enumerate() {
        assert!(step.after.keys().all(|id| plan.steps[..at].iter().any(|s| s.resource == *id)), "{step:?}");
    }
}

#[test]
fn a_new_name_looks_like_a_rename() {
    let mut to = stack();
    let web = to.resources.remove(&rid("service.web")).unwrap();
    to.resources.insert(rid("service.site"), web);
    let plan = plan_of(&applied(&stack()), &to);
    assert_eq!(actions(&plan), ["Create service.site", "Delete service.web"]);
    assert!(step(&plan, "service.site").reasons[1].contains("looks like service.web under a new name"));
    assert!(step(&plan, "service.web").reasons[1].contains("renamed to service.site"));
    let mut to = stack();
    to.resources.remove(&rid("volume.data"));
    to.resources.insert(rid("volume.store"), volume("/var/lib/demo/store"));
    job_of(&mut to, "job.migrate").depends_on.clear();
    service_of(&mut to, "service.api").depends_on.clear();
    let plan = plan_of(&applied(&stack()), &to);
    assert_eq!(plan.kept, [rid("volume.data")]);
    assert!(step(&plan, "volume.store").reasons[1].contains("warning: data are not moved"), "{plan:?}");
}

#[test]
fn another_program_is_no_rename() {
    let mut to = stack();
    to.resources.remove(&rid("service.web"));
    to.resources.insert(rid("service.site"), Resource::Service(service("./bin/site")));
    let plan = plan_of(&applied(&stack()), &to);
    assert_eq!(step(&plan, "service.site").reasons.len(), 1);
}

#[test]
fn what_cannot_be_ordered_is_refused() {
    let plan_of = |desired: &Desired| plan(&environment(), &Current::default(), Some(desired), Options::default());
    let dangling = desired([("service.a", depending(Resource::Service(service("a")), &["service.b"]))]);
    let error = plan_of(&dangling).unwrap_err();
    assert_eq!(error.to_string(), "service.a depends on service.b, which does not exist");
    let cycle = desired([
        ("job.z", depending(Resource::Job(job("z")), &["service.a"])),
        ("service.a", depending(Resource::Service(service("a")), &["service.b"])),
        ("service.b", depending(Resource::Service(service("b")), &["service.c", "service.d"])),
        ("service.c", depending(Resource::Service(service("c")), &["service.a"])),
        ("service.d", depending(Resource::Service(service("d")), &["service.b"])),
    ]);
    let error = plan_of(&cycle).unwrap_err();
    assert_eq!(error.to_string(), "dependencies form a cycle: service.b -> service.d -> service.b", "the shortest one");
    assert_eq!(error.diagnostic().code.as_str(), "ORC0208");
    let own = desired([("service.a", depending(Resource::Service(service("a")), &["service.a"]))]);
    assert_eq!(plan_of(&own).unwrap_err(), PlanError::Cycle { cycle: vec![rid("service.a")] });
    let mut other = stack();
    other.environment = "demo/production".parse().unwrap();
    assert!(matches!(plan_of(&other), Err(PlanError::OtherEnvironment { .. })));
    let mut wrong = stack();
    wrong.resources.insert(rid("service.x"), volume("/x"));
    assert!(matches!(plan_of(&wrong), Err(PlanError::KindMismatch { .. })));
}
