//! What is committed is there, in order, durable and visible to those who follow along.

use std::{collections::BTreeMap, sync::Arc};

use orchestra_model::{
    EventKind, ReleaseNumber, RunId,
    record::{Change, EnvironmentRecord, JournalKind, RunRecord, RunState, StepState},
};
use orchestra_store::{CommitError, EventFilter, OpenError, Store};

use crate::fixture::{
    NOW, begin, desired, environment, event, id, instance, journal, launch, open, release, resource, run, succeed,
};

#[tokio::test]
async fn everything_reads_back_as_it_was_written_also_after_reopening() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    store.commit(begin(1, None)).await.unwrap();
    store
        .commit(vec![
            Change::Step(RunId(1), "volume.v0".parse().unwrap(), StepState::Running),
            Change::Resource(Box::new(resource("v0", "/srv/1"))),
            Change::Instance(Box::new(instance(1))),
        ])
        .await
        .unwrap();
    let check = |store: &Store| {
        let state = store.reader().state(&id()).unwrap().unwrap();
        let expected =
            RunRecord { steps: [("volume.v0".parse().unwrap(), StepState::Running)].into(), ..run(1, 1, Some(1)) };
        assert_eq!(state.run, Some(expected));
        assert_eq!(state.releases, [(ReleaseNumber(1), release(1, 1))].into());
        assert_eq!(state.resources.into_values().collect::<Vec<_>>(), [resource("v0", "/srv/1")]);
        assert_eq!(state.instances.into_values().collect::<Vec<_>>(), [instance(1)]);
        assert_eq!(store.reader().environments().unwrap(), [state.environment]);
        store.reader().verify().unwrap();
    };
    check(&store);
    drop(store);
    check(&open(home.path()));
}

#[tokio::test]
async fn history_names_releases_and_runs_newest_first() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    store.commit(begin(1, None)).await.unwrap();
    store.commit(succeed(1, None)).await.unwrap();
    store.commit(begin(2, Some(1))).await.unwrap();
    store.commit(succeed(2, Some(1))).await.unwrap();
    let releases = store.reader().releases(&id(), 10).unwrap();
    assert_eq!(releases.iter().map(|r| r.number.0).collect::<Vec<_>>(), [2, 1]);
    assert!(releases.iter().all(|r| r.kept));
    assert_eq!(store.reader().releases(&id(), 1).unwrap().len(), 1);
    let runs = store.read(|reader| reader.runs(Some(&id()), 10)).await.unwrap();
    assert_eq!(
        runs.iter().map(|r| (r.id.0, r.state)).collect::<Vec<_>>(),
        [(2, RunState::Succeeded), (1, RunState::Succeeded)]
    );
    assert_eq!(store.reader().release(&id(), ReleaseNumber(1)).unwrap().unwrap().desired, desired(&["/srv/1"]));
    assert_eq!(store.reader().run(RunId(2)).unwrap().unwrap().plan.unchanged, 3);
    assert_eq!(store.reader().run(RunId(9)).unwrap(), None);
    assert!(store.reader().state(&id()).unwrap().unwrap().run.is_none());
    assert_eq!(store.next_run_id(), RunId(1), "ids are counted from what was there at the opening");
    drop(store);
    assert_eq!(open(home.path()).next_run_id(), RunId(3));
}

#[tokio::test]
async fn the_order_of_calls_is_the_order_of_commits_and_of_events() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    let mut events = store.subscribe_events();
    store.commit(vec![Change::Environment(environment())]).await.unwrap();
    let commits: Vec<_> = (1..=200).map(|n| store.commit(launch(n))).collect();
    for (n, commit) in (1..).zip(commits) {
        let committed = commit.await.unwrap();
        assert_eq!(committed.at, NOW);
        let [event] = &committed.events[..] else { panic!("one event per launch") };
        assert_eq!((event.sequence, event.at, event.cause.clone()), (n, NOW, format!("launch {n}")));
        // Published before the caller is answered, so it is there already.
        assert_eq!(events.try_recv().unwrap(), *event);
    }
    let stored = store.reader().events(&EventFilter::default()).unwrap();
    assert_eq!(stored.iter().map(|e| e.sequence).collect::<Vec<_>>(), (1..=200).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_commit_happens_even_if_nobody_waits_for_it() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    drop(store.commit(vec![Change::Environment(environment())]));
    drop(store.commit(launch(1)));
    drop(store);
    assert_eq!(open(home.path()).reader().state(&id()).unwrap().unwrap().instances.len(), 1);
}

#[tokio::test]
async fn a_refused_commit_leaves_nothing_and_does_not_hinder_its_neighbours() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    store.commit(vec![Change::Environment(environment())]).await.unwrap();
    let mut broken = launch(2);
    broken.push(journal("never begun", JournalKind::Done));
    let (before, refused, after) = (store.commit(launch(1)), store.commit(broken), store.commit(launch(3)));
    before.await.unwrap();
    assert!(matches!(refused.await, Err(CommitError::Refused(_))));
    assert_eq!(after.await.unwrap().events[0].sequence, 2, "no gap in the sequence");
    let state = store.reader().state(&id()).unwrap().unwrap();
    assert_eq!(state.instances.keys().map(|id| id.ordinal).collect::<Vec<_>>(), [1, 3]);
    assert_eq!(store.reader().open_intents().unwrap().len(), 2);
}

#[tokio::test]
async fn intents_are_open_until_their_outcome() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    store.commit(vec![journal("a", JournalKind::Intent)]).await.unwrap();
    store.commit(vec![journal("b", JournalKind::Intent)]).await.unwrap();
    store.commit(vec![journal("c", JournalKind::Intent)]).await.unwrap();
    store.commit(vec![journal("a", JournalKind::Done)]).await.unwrap();
    store.commit(vec![journal("c", JournalKind::Failed("no".to_owned()))]).await.unwrap();
    let keys = |lines: Vec<orchestra_store::Journaled>| lines.into_iter().map(|l| l.entry.key).collect::<Vec<_>>();
    assert_eq!(keys(store.reader().open_intents().unwrap()), ["b"]);
    assert_eq!(keys(store.reader().journal_tail(2).unwrap()), ["a", "c"]);
    drop(store);
    assert_eq!(keys(open(home.path()).reader().open_intents().unwrap()), ["b"]);
}

#[tokio::test]
async fn events_are_found_by_what_they_are_about() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    let about = |n: u32| {
        let mut event = event(format!("e{n}"));
        event.kind = EventKind::InstanceExited;
        event.resource = Some(if n.is_multiple_of(2) { "service.even" } else { "service.odd" }.parse().unwrap());
        event.instance = Some(format!("api-r1-{}", n % 3).parse().unwrap());
        event.run = (n > 5).then_some(RunId(7));
        event
    };
    store.commit((1..=10).map(|n| Change::Event(Box::new(about(n)))).collect()).await.unwrap();
    let mut other = event("elsewhere");
    other.environment = "other/dev".parse().unwrap();
    store.commit(vec![Change::Event(Box::new(other))]).await.unwrap();
    let find =
        |filter: EventFilter| store.reader().events(&filter).unwrap().iter().map(|e| e.sequence).collect::<Vec<_>>();
    let all = EventFilter::default();
    assert_eq!(find(EventFilter { environment: Some(id()), limit: 3, ..all.clone() }), [1, 2, 3]);
    assert_eq!(find(EventFilter { environment: Some(id()), limit: 3, tail: true, ..all.clone() }), [8, 9, 10]);
    assert_eq!(find(EventFilter { resource: Some("service.even".parse().unwrap()), ..all.clone() }), [2, 4, 6, 8, 10]);
    assert_eq!(find(EventFilter { instance: Some("api-r1-0".parse().unwrap()), ..all.clone() }), [3, 6, 9]);
    assert_eq!(find(EventFilter { run: Some(RunId(7)), after_sequence: 8, ..all.clone() }), [9, 10]);
    assert_eq!(find(EventFilter { after_sequence: 10, ..all }), [11]);
    assert_eq!(store.reader().last_event().unwrap(), 11);
}

#[tokio::test]
async fn ordinals_are_raised_by_instances_and_never_fall_below_a_living_one() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    store.commit(vec![Change::Environment(environment())]).await.unwrap();
    store.commit(launch(5)).await.unwrap();
    let last = || {
        let state = store.reader().state(&id()).unwrap().unwrap();
        state.environment.ordinals.get("api").and_then(|releases| releases.get(&ReleaseNumber(1)).copied())
    };
    assert_eq!(last(), Some(5));
    let with = |ordinal: Option<u32>| {
        let ordinals = ordinal.map(|n| ("api".parse().unwrap(), BTreeMap::from([(ReleaseNumber(1), n)])));
        vec![Change::Environment(EnvironmentRecord { ordinals: ordinals.into_iter().collect(), ..environment() })]
    };
    store.commit(with(Some(3))).await.unwrap();
    assert_eq!(last(), Some(5));
    store.commit(with(Some(9))).await.unwrap();
    assert_eq!(last(), Some(9));
    store.commit(with(None)).await.unwrap();
    assert_eq!(last(), Some(9), "an instance of that release lives");
    store.commit(vec![Change::ForgetInstance(id(), instance(5).id)]).await.unwrap();
    store.commit(with(None)).await.unwrap();
    assert_eq!(last(), None);
}

#[test]
fn route_versions_and_settings_outlive_the_process() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    let first = (0..1000).map(|_| store.next_route_version()).max().unwrap();
    store.set_setting_blocking("token", &serde_json::json!({"a": 1})).unwrap();
    drop(store);
    let store = open(home.path());
    assert!(store.next_route_version() > first);
    assert!(store.next_route_version() < 1 << 53);
    assert_eq!(store.reader().setting("token").unwrap(), Some(serde_json::json!({"a": 1})));
    assert_eq!(store.reader().setting("other").unwrap(), None);
}

#[test]
fn of_two_writers_exactly_one_wins() {
    let home = tempfile::tempdir().unwrap();
    for _ in 0..20 {
        let barrier = Arc::new(std::sync::Barrier::new(4));
        let tries: Vec<_> = (0..4)
            .map(|_| {
                let (barrier, home) = (barrier.clone(), home.path().to_owned());
                std::thread::spawn(move || {
                    barrier.wait();
                    let opened = Store::open(&home, || NOW);
                    // Nobody leaves before all have tried.
                    barrier.wait();
                    opened
                })
            })
            .collect();
        let outcomes: Vec<_> = tries.into_iter().map(|t| t.join().unwrap()).collect();
        assert_eq!(outcomes.iter().filter(|o| o.is_ok()).count(), 1);
        for error in outcomes.into_iter().filter_map(Result::err) {
            assert!(matches!(error, OpenError::Locked { .. }), "{error}");
            assert_eq!(error.diagnostic().code.as_str(), "ORC0401");
        }
    }
}

#[test]
fn a_thousand_commits_in_flight_are_all_durable() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    store.commit_blocking(vec![Change::Environment(environment())]).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let commits: Vec<_> = (1..=1000).map(|n| store.commit(launch(n))).collect();
        for commit in commits {
            commit.await.unwrap();
        }
    });
    assert_eq!(store.reader().state(&id()).unwrap().unwrap().instances.len(), 1000);
}

#[test]
fn directory_and_files_are_for_their_user_alone() {
    use std::os::unix::fs::MetadataExt;
    let parent = tempfile::tempdir().unwrap();
    let home = parent.path().join("deep/state");
    let store = open(&home);
    store.commit_blocking(vec![Change::Environment(environment())]).unwrap();
    assert_eq!(std::fs::metadata(&home).unwrap().mode() & 0o777, 0o700);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&home).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().mode() & 0o777, 0o600, "{}", entry.path().display());
        names.push(entry.file_name().into_string().unwrap());
    }
    names.sort();
    assert_eq!(names, ["state.db", "state.db-shm", "state.db-wal", "state.lock"]);
}
