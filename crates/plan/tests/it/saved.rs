//! Saved plans: exactly the resources that moved on are refused.

use orchestra_model::{Plan, Resource, plan::PLAN_FORMAT};
use orchestra_plan::{Current, Options, check_saved, load, plan, rebase, save};

use crate::fixture::{applied, apply, depending, environment, record, rid, service, service_of, stack};

fn plan_of(current: &Current, desired: &orchestra_model::Desired) -> Plan {
    plan(&environment(), current, Some(desired), Options::default()).unwrap()
}

fn refused(plan: &Plan, current: &Current) -> Vec<String> {
    let refused = check_saved(plan, current);
    assert!(refused.iter().all(|(id, d)| d.code.as_str() == "ORC0301" && d.message.contains(&id.to_string())));
    refused.into_iter().map(|(id, diagnostic)| format!("{id}: {}", diagnostic.notes[0])).collect()
}

/// Current with `id` applied anew in another form, by release 2.
fn moved(current: &Current, id: &str, change: impl FnOnce(&mut Resource)) -> Current {
    let mut current = Current { base: Some(orchestra_model::ReleaseNumber(2)), ..current.clone() };
    let mut resource = current.resources[&rid(id)].applied.clone();
    change(&mut resource);
    current.resources.insert(rid(id), record(&rid(id), &resource, 2));
    current
}

fn replicas(count: u32) -> impl FnOnce(&mut Resource) {
    move |resource| {
        let Resource::Service(service) = resource else { panic!("no service") };
        service.replicas = count;
    }
}

#[test]
fn a_plan_survives_its_file() {
    let plan = plan_of(&Current::default(), &stack());
    assert_eq!(load(&save(&plan)).unwrap(), plan);
}

#[test]
fn a_file_that_was_edited_cut_or_made_by_another_version_is_refused() {
    let text = save(&plan_of(&Current::default(), &stack()));
    let cases = [
        text.replace("./bin/api", "./bin/evil"),
        text[..text.len() / 2].to_owned(),
        text.replacen(&format!("\"format\": {PLAN_FORMAT}"), "\"format\": 99", 1),
        String::new(),
        "{}".to_owned(),
    ];
    for case in cases {
        assert_ne!(case, text);
        assert_eq!(load(&case).unwrap_err().code.as_str(), "ORC0302");
    }
}

#[test]
fn what_moved_is_refused_and_the_rest_is_not() {
    let current = applied(&stack());
    let mut to = stack();
    service_of(&mut to, "service.api").replicas = 3;
    service_of(&mut to, "service.web").replicas = 3;
    let plan = plan_of(&current, &to);
    assert!(refused(&plan, &current).is_empty());
    let now = moved(&current, "service.api", replicas(7));
    assert_eq!(refused(&plan, &now), ["service.api: it was changed since, by release 2"]);
    // The job has no step, so that its change is no concern of this plan.
    let now = moved(&current, "job.migrate", |resource| {
        let Resource::Job(job) = resource else { panic!("no job") };
        job.retries = 9;
    });
    assert!(refused(&plan, &now).is_empty());
}

#[test]
fn what_was_created_or_deleted_meanwhile_is_refused() {
    let plan = plan_of(&Current::default(), &stack());
    let mut now = Current::default();
    now.resources.insert(rid("volume.data"), record(&rid("volume.data"), &stack().resources[&rid("volume.data")], 1));
    assert_eq!(refused(&plan, &now), ["volume.data: it was created since, by release 1"]);
    let current = applied(&stack());
    let mut to = stack();
    service_of(&mut to, "service.web").replicas = 3;
    let plan = plan_of(&current, &to);
    let mut now = current.clone();
    now.resources.remove(&rid("service.web"));
    assert_eq!(refused(&plan, &now), ["service.web: it was deleted since"]);
    let mut now = current;
    now.resources.remove(&rid("service.api"));
    assert_eq!(refused(&plan, &now), ["service.web: service.api, for which it waits, was deleted since"]);
}

#[test]
fn a_deletion_is_refused_if_something_new_depends_on_it() {
    let current = applied(&stack());
    let mut to = stack();
    to.resources.remove(&rid("service.web"));
    let plan = plan_of(&current, &to);
    let mut now = current;
    let user = depending(Resource::Service(service("./bin/crawler")), &["service.web"]);
    now.resources.insert(rid("service.crawler"), record(&rid("service.crawler"), &user, 2));
    assert_eq!(refused(&plan, &now), ["service.web: service.crawler depends on it since release 2"]);
}

#[test]
fn a_rebased_plan_takes_over_what_it_has_no_step_for() {
    let current = applied(&stack());
    let mut to = stack();
    service_of(&mut to, "service.web").replicas = 3;
    let saved = plan_of(&current, &to);
    assert_eq!(rebase(&saved, &current).unwrap(), saved, "nothing happened meanwhile");
    let now = moved(&current, "service.api", replicas(7));
    assert!(refused(&saved, &now).is_empty());
    let rebased = rebase(&saved, &now).unwrap();
    assert_eq!(rebased.steps, saved.steps);
    assert_eq!(rebased.base, now.base);
    let after = apply(&rebased, &now);
    let goal = rebased.desired.unwrap();
    assert_eq!(goal.service(&"api".parse().unwrap()).unwrap().replicas, 7);
    assert_eq!(goal.service(&"web".parse().unwrap()).unwrap().replicas, 3);
    assert!(plan_of(&after, &goal).is_empty());
}

#[test]
fn a_rebased_plan_that_would_close_a_cycle_is_refused() {
    let current = applied(&stack());
    let mut to = stack();
    // web -> api is there; the plan makes api -> extra.
    to.resources.insert(rid("service.extra"), Resource::Service(service("./bin/extra")));
    let saved_extra = plan_of(&current, &to);
    let current = apply(&saved_extra, &current);
    crate::fixture::depend(to.resources.get_mut(&rid("service.api")).unwrap(), "service.extra");
    let saved = plan_of(&current, &to);
    let now = moved(&current, "service.extra", |resource| crate::fixture::depend(resource, "service.api"));
    assert!(check_saved(&saved, &now).is_empty());
    assert!(rebase(&saved, &now).is_err());
}
