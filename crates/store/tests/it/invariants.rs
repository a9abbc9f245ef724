//! Commits that contradict the state are refused as a whole, with the invariant's name.

use orchestra_model::{
    Generation, ReleaseNumber, ResourceKind, RunId,
    launch::Exit,
    record::{Change, EnvironmentRecord, InstanceRecord, JournalEntry, JournalKind, ReleaseState, RunState, StepState},
};
use orchestra_store::{CommitError, Store, Violation};

use crate::fixture::{
    begin, environment, event, id, instance, journal, launch, open, release, resource, run, succeed, volume,
};

/// Commits with an event, and expects the refusal to leave no trace of it.
fn refusal(store: &Store, mut changes: Vec<Change>) -> Violation {
    let before = store.reader().last_event().unwrap();
    changes.insert(0, Change::Event(Box::new(event("trace"))));
    let outcome = store.commit_blocking(changes);
    let Err(CommitError::Refused(violation)) = outcome else { panic!("not refused: {outcome:?}") };
    assert_eq!(store.reader().last_event().unwrap(), before);
    assert!(!violation.to_string().is_empty());
    violation
}

fn environment_with(change: impl FnOnce(&mut EnvironmentRecord)) -> Vec<Change> {
    let mut record = EnvironmentRecord { generation: Generation(1), last_release: ReleaseNumber(1), ..environment() };
    change(&mut record);
    vec![Change::Environment(record)]
}

/// A state with release 1 stable, made by run 1.
fn settled(home: &std::path::Path) -> Store {
    let store = open(home);
    store.commit_blocking(begin(1, None)).unwrap();
    store.commit_blocking(succeed(1, None)).unwrap();
    store
}

#[test]
fn what_belongs_to_an_environment_needs_it() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    assert!(matches!(refusal(&store, launch(1)), Violation::NoEnvironment { .. }));
    let changes = vec![Change::Resource(Box::new(resource("v", "/v")))];
    assert!(matches!(refusal(&store, changes), Violation::NoEnvironment { .. }));
    let changes = vec![Change::Run(Box::new(run(1, 1, None)))];
    assert!(matches!(refusal(&store, changes), Violation::NoEnvironment { .. }));
    // The order within a commit does not matter.
    let mut changes = launch(1);
    changes.push(Change::Environment(environment()));
    store.commit_blocking(changes).unwrap();
}

#[test]
fn numbers_never_go_down() {
    let home = tempfile::tempdir().unwrap();
    let store = settled(home.path());
    let lower = environment_with(|e| e.generation = Generation(0));
    assert!(matches!(refusal(&store, lower), Violation::GenerationDecreases { .. }));
    let lower = environment_with(|e| e.last_release = ReleaseNumber(0));
    assert!(matches!(refusal(&store, lower), Violation::ReleaseDecreases { .. }));
    let again = vec![Change::Release(Box::new(release(0, 1)))];
    assert!(matches!(refusal(&store, again), Violation::ReleaseNotNew { .. }));
    let beyond = vec![Change::Release(Box::new(release(2, 1)))];
    assert!(matches!(refusal(&store, beyond), Violation::ReleaseBeyondLast { .. }));
}

#[test]
fn a_release_is_immutable_but_for_its_state() {
    let home = tempfile::tempdir().unwrap();
    let store = settled(home.path());
    let mut other = release(1, 1);
    other.reason = "another".to_owned();
    assert!(matches!(
        refusal(&store, vec![Change::Release(Box::new(other))]),
        Violation::ReleaseImmutable { field: "reason", .. }
    ));
    let mut other = release(1, 1);
    other.desired.resources.insert(volume("more", "/more").0, volume("more", "/more").1);
    assert!(matches!(
        refusal(&store, vec![Change::Release(Box::new(other))]),
        Violation::ReleaseImmutable { field: "desired state", .. }
    ));
    let back = vec![Change::ReleaseState(id(), ReleaseNumber(1), ReleaseState::Deploying)];
    assert!(matches!(refusal(&store, back), Violation::ReleaseTransition { .. }));
    let unknown = vec![Change::ReleaseState(id(), ReleaseNumber(7), ReleaseState::Failed)];
    assert!(matches!(refusal(&store, unknown), Violation::NoRelease { .. }));
}

#[test]
fn one_release_is_stable_and_it_is_the_one_that_is_named() {
    let home = tempfile::tempdir().unwrap();
    let store = settled(home.path());
    let retired = vec![Change::ReleaseState(id(), ReleaseNumber(1), ReleaseState::Retired)];
    assert!(matches!(refusal(&store, retired), Violation::NotStable { .. }));
    store.commit_blocking(begin(2, Some(1))).unwrap();
    let both = vec![Change::ReleaseState(id(), ReleaseNumber(2), ReleaseState::Stable)];
    assert!(matches!(refusal(&store, both), Violation::TwoStable { .. }));
    let missing = environment_with(|e| {
        e.generation = Generation(2);
        e.last_release = ReleaseNumber(9);
        e.stable = Some(ReleaseNumber(9));
    });
    assert!(matches!(refusal(&store, missing), Violation::NoRelease { .. }));
    store.commit_blocking(succeed(2, Some(1))).unwrap();
}

#[test]
fn a_final_run_does_not_reopen() {
    let home = tempfile::tempdir().unwrap();
    let store = settled(home.path());
    let reopened = vec![Change::Run(Box::new(run(1, 1, Some(1))))];
    assert!(matches!(refusal(&store, reopened), Violation::RunReopens { from: RunState::Succeeded, .. }));
    let step = vec![Change::Step(RunId(1), "volume.v0".parse().unwrap(), StepState::Running)];
    assert!(matches!(refusal(&store, step), Violation::StepOfEndedRun { .. }));
    let unknown = vec![Change::Step(RunId(5), "volume.v0".parse().unwrap(), StepState::Running)];
    assert!(matches!(refusal(&store, unknown), Violation::NoRun { .. }));
}

#[test]
fn a_reverting_run_does_not_go_forward() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    store.commit_blocking(begin(1, None)).unwrap();
    let with = |state| {
        let mut run = run(1, 1, Some(1));
        run.state = state;
        vec![Change::Run(Box::new(run))]
    };
    store.commit_blocking(with(RunState::Reverting)).unwrap();
    assert!(matches!(refusal(&store, with(RunState::Succeeded)), Violation::RunTransition { .. }));
    assert!(matches!(refusal(&store, with(RunState::Running)), Violation::RunTransition { .. }));
    store.commit_blocking(with(RunState::Failed)).unwrap();
}

#[test]
fn an_older_generation_is_fenced_off() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    store.commit_blocking(begin(1, None)).unwrap();
    // Somebody took over: the environment moved on to generation 2.
    let taken = environment_with(|e| {
        e.generation = Generation(2);
        e.run = Some(RunId(1));
    });
    store.commit_blocking(taken).unwrap();
    let step = vec![Change::Step(RunId(1), "volume.v0".parse().unwrap(), StepState::Running)];
    assert!(matches!(refusal(&store, step), Violation::Fenced { .. }));
    let entry = JournalEntry { key: "k".to_owned(), run: Some(RunId(1)), entry: JournalKind::Intent };
    assert!(matches!(refusal(&store, vec![Change::Journal(entry)]), Violation::Fenced { .. }));
    assert!(matches!(refusal(&store, vec![Change::Run(Box::new(run(1, 1, Some(1))))]), Violation::Fenced { .. }));
    // It may be closed, so that the next one can begin.
    let mut closed = run(1, 1, Some(1));
    closed.state = RunState::Cancelled;
    store.commit_blocking(vec![Change::Run(Box::new(closed))]).unwrap();
    let reused = vec![Change::Run(Box::new(run(2, 1, None)))];
    assert!(matches!(refusal(&store, reused), Violation::GenerationReused { .. }));
    let ahead = vec![Change::Run(Box::new(run(2, 3, None)))];
    assert!(matches!(refusal(&store, ahead), Violation::Inconsistent { .. }));
    store.commit_blocking(vec![Change::Run(Box::new(run(2, 2, None)))]).unwrap();
}

#[test]
fn one_run_at_a_time() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    store.commit_blocking(begin(1, None)).unwrap();
    assert!(matches!(refusal(&store, begin(2, None)), Violation::TwoRuns { .. }));
    let foreign = environment_with(|e| e.run = Some(RunId(40)));
    assert!(matches!(refusal(&store, foreign), Violation::NoRun { .. }));
    let mut other = run(1, 1, Some(1));
    other.kind = orchestra_model::record::RunKind::Down { volumes: false };
    assert!(matches!(
        refusal(&store, vec![Change::Run(Box::new(other))]),
        Violation::RunImmutable { field: "kind", .. }
    ));
}

#[test]
fn an_instance_keeps_what_it_was_born_with_and_stays_forgotten() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    store.commit_blocking(vec![Change::Environment(environment())]).unwrap();
    store.commit_blocking(launch(1)).unwrap();
    let with = |change: fn(&mut InstanceRecord)| {
        let mut record = instance(1);
        change(&mut record);
        vec![Change::Instance(Box::new(record))]
    };
    let other = with(|i| i.launch_digest = orchestra_model::Digest::of("another"));
    assert!(matches!(refusal(&store, other), Violation::InstanceImmutable { field: "launch digest", .. }));
    let other = with(|i| i.kind = ResourceKind::Job);
    assert!(matches!(refusal(&store, other), Violation::InstanceImmutable { field: "kind", .. }));
    let other = with(|i| i.kind = ResourceKind::Volume);
    assert!(matches!(refusal(&store, other), Violation::Inconsistent { .. }));
    store.commit_blocking(with(|i| i.attempt = 3)).unwrap();
    assert!(matches!(refusal(&store, with(|_| ())), Violation::AttemptDecreases { from: 3, to: 1, .. }));
    store.commit_blocking(vec![Change::ForgetInstance(id(), instance(1).id)]).unwrap();
    let late = with(|i| i.last_exit = Some(Exit::Code(0)));
    assert!(matches!(refusal(&store, late), Violation::InstanceForgotten { .. }));
}

#[test]
fn records_do_not_contradict_themselves() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    store.commit_blocking(vec![Change::Environment(environment())]).unwrap();
    let mut record = resource("v", "/v");
    record.digest = orchestra_model::Digest::of("another");
    assert!(matches!(refusal(&store, vec![Change::Resource(Box::new(record))]), Violation::Inconsistent { .. }));
    let mut record = resource("v", "/v");
    record.id.kind = ResourceKind::Job;
    assert!(matches!(refusal(&store, vec![Change::Resource(Box::new(record))]), Violation::Inconsistent { .. }));
}

#[test]
fn an_outcome_needs_its_intent() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    assert!(matches!(refusal(&store, vec![journal("k", JournalKind::Done)]), Violation::NoIntent { .. }));
    store.commit_blocking(vec![journal("k", JournalKind::Intent), journal("k", JournalKind::Done)]).unwrap();
    assert!(matches!(refusal(&store, vec![journal("k", JournalKind::Done)]), Violation::NoIntent { .. }));
}
