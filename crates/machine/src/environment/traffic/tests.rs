//! Pauses over time, restarts and changed clocks, where nothing runs.

use std::{collections::BTreeMap, sync::Arc};

use orchestra_model::{
    EnvironmentId,
    record::{Change, EnvironmentRecord, EnvironmentState},
    time::UnixMillis,
};

use super::*;
use crate::{
    Settings,
    environment::{Event, fixture},
};

/// The wall clock when a machine starts, in milliseconds.
const EPOCH: UnixMillis = 1_000_000_000;
const MINUTE: UnixMillis = 60_000;

fn settings(epoch: UnixMillis) -> Arc<Settings> {
    Arc::new(fixture::settings(epoch))
}

fn api() -> Name {
    "api".parse().unwrap()
}

/// What is on disk of an environment in which `api` was paused.
fn paused(since: UnixMillis, until: UnixMillis) -> EnvironmentState {
    let id: EnvironmentId = "shop/dev".parse().unwrap();
    let mut record = EnvironmentRecord::new(id);
    record.paused.insert(api(), PausedTraffic { since, until, by: "ada".to_owned() });
    EnvironmentState::new(record)
}

/// A machine over it when the wall clock shows `epoch`.
fn recovered(state: EnvironmentState, epoch: UnixMillis) -> Environment {
    Environment::recover(state, &BTreeMap::new(), settings(epoch), Now::ZERO).0
}

fn moved(command: TrafficCommand) -> TrafficMove {
    TrafficMove { service: api(), command, by: "ada".to_owned() }
}

#[test]
fn a_pause_survives_the_server_and_ends_on_time() {
    let mut machine = recovered(paused(EPOCH - MINUTE, EPOCH + 4 * MINUTE), EPOCH);
    let end = Now::at(Duration::from_secs(240));
    assert_eq!(machine.deadline(), Some(end));
    assert_eq!(machine.traffic_pause(&api()), Some(Timespan::seconds(300)));
    let early = machine.handle(Now::at(Duration::from_secs(239)), Event::Tick);
    assert!(early.changes.is_empty());
    let batch = machine.handle(end, Event::Tick);
    let ended = |change: &Change| matches!(change, Change::Environment(record) if record.paused.is_empty());
    assert!(batch.changes.iter().any(ended), "{:?}", batch.changes);
    let said = |change: &Change| matches!(change, Change::Event(event) if event.kind == EventKind::TrafficResumed);
    assert!(batch.changes.iter().any(said), "{:?}", batch.changes);
    assert_eq!((machine.deadline(), machine.traffic_pause(&api())), (None, None));
}

#[test]
fn a_pause_that_ended_while_no_server_ran_is_over_at_once() {
    let mut machine = recovered(paused(EPOCH - 9 * MINUTE, EPOCH - 4 * MINUTE), EPOCH);
    assert_eq!(machine.deadline(), Some(Now::ZERO));
    machine.handle(Now::ZERO, Event::Tick);
    assert!(machine.record().paused.is_empty());
}

#[test]
fn a_clock_that_was_set_back_prolongs_a_pause_by_its_time_at_most() {
    let machine = recovered(paused(EPOCH, EPOCH + 5 * MINUTE), EPOCH - 1_000 * MINUTE);
    assert_eq!(machine.deadline(), Some(Now::at(Duration::from_secs(300))));
}

#[test]
fn a_person_lets_go_on_what_is_paused_and_nothing_else() {
    let mut machine = recovered(paused(EPOCH, EPOCH + MINUTE), EPOCH);
    assert_eq!(machine.can_move_traffic(&moved(TrafficCommand::Resume)), Ok(()));
    machine.handle(Now::ZERO, Event::MoveTraffic(moved(TrafficCommand::Resume)));
    assert!(machine.record().paused.is_empty());
    assert_eq!(machine.can_move_traffic(&moved(TrafficCommand::Resume)).unwrap_err().code, Code::NOT_FOUND);
    // No such service here, and never for longer than an hour.
    let pause = |span| machine.can_move_traffic(&moved(TrafficCommand::Pause(span))).unwrap_err();
    assert_eq!(pause(Timespan::seconds(60)).code, Code::NOT_FOUND);
    assert_eq!(pause(Timespan::seconds(3601)).code, Code::BAD_REQUEST);
    assert_eq!(pause(Timespan::seconds(0)).code, Code::BAD_REQUEST);
}

#[test]
fn a_pause_prolongs_the_time_that_requests_wait() {
    assert_eq!(prolonged(Timespan::seconds(5), None), Timespan::seconds(5));
    assert_eq!(prolonged(Timespan::seconds(5), Some(Timespan::seconds(300))), Timespan::seconds(305));
}
