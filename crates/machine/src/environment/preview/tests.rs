//! The clock of a preview, in a world in which instances run at once and nothing is routed.

use std::sync::Arc;

use orchestra_model::{
    Desired, EnvironmentId, Name, ResourceKind,
    desired::{Resource, Target, Volume},
    flag::FlagSet,
    plan::Action,
    preview::Prices,
    quantity::Timespan,
    record::{EnvironmentRecord, EnvironmentState, RunKind},
};

use super::*;
use crate::{
    Settings,
    environment::{
        Event,
        fixture::{self, World as _, requested, step},
    },
};

/// The wall clock when a machine starts, in milliseconds.
const EPOCH: UnixMillis = 1_000_000_000_000;
const HOUR: u64 = 3_600_000;

struct World {
    machine: Environment,
    disk: EnvironmentState,
    now: Now,
    notes: Vec<(EventKind, String)>,
    /// Whether volumes are made and deleted when that is asked for.
    obliging: bool,
}

fn settings(epoch: UnixMillis) -> Arc<Settings> {
    Arc::new(fixture::settings(epoch))
}

fn preview(ttl: u64) -> Preview {
    let from: Name = "production".parse().unwrap();
    Preview { from, ttl: Timespan::millis(ttl), owner: None, shared: [].into(), prices: Prices::default() }
}

fn data() -> ResourceId {
    ResourceId::new(ResourceKind::Volume, "data".parse().unwrap())
}

impl fixture::World for World {
    fn parts(&mut self) -> fixture::Parts<'_> {
        (&mut self.machine, &mut self.disk, &mut self.notes, self.now)
    }

    fn effect(&mut self, effect: Effect) -> Vec<Event> {
        match effect {
            Effect::CreateVolume { resource, .. } | Effect::DeleteVolume { resource, .. } if self.obliging => {
                vec![Event::VolumeDone { resource, result: Ok(()) }]
            }
            _ => Vec::new(),
        }
    }
}

impl World {
    fn new() -> Self {
        let id: EnvironmentId = "shop/preview-42".parse().unwrap();
        let record = EnvironmentRecord::new(id);
        let disk = EnvironmentState::new(record.clone());
        let machine = Environment::new(record, settings(EPOCH));
        Self { machine, disk, now: Now::ZERO, notes: Vec::new(), obliging: true }
    }

    /// Another machine over what is on disk, when the wall clock shows `epoch`.
    fn recover(&mut self, epoch: UnixMillis) {
        self.now = Now::ZERO;
        let (machine, batch) = Environment::recover(self.disk.clone(), &BTreeMap::new(), settings(epoch), self.now);
        self.machine = machine;
        self.carry_out(batch);
    }

    fn run(&mut self, kind: RunKind, desired: Option<Desired>) {
        let record = self.machine.record().clone();
        let action = if desired.is_some() { Action::Create } else { Action::Delete };
        let plan = fixture::plan(&record, desired, vec![step(data(), action)]);
        self.send(requested(&record, kind, plan));
    }

    fn up(&mut self, ttl: u64) {
        let volume = Volume { path: "/volumes/data".to_owned(), managed: true };
        let desired = Desired {
            environment: self.machine.record().id.clone(),
            target: Target::Process,
            resources: [(data(), Resource::Volume(volume))].into(),
            flags: FlagSet::default(),
            preview: Some(Box::new(preview(ttl))),
            secrets: BTreeMap::new(),
        };
        self.run(RunKind::Up, Some(desired));
    }

    fn down(&mut self) {
        self.run(RunKind::Down { volumes: true }, None);
    }

    /// Lets time pass, waking the machine when it wants to be.
    fn pass(&mut self, millis: u64) {
        let end = self.now + Duration::from_millis(millis);
        while let Some(at) = self.machine.deadline().filter(|at| *at <= end && !self.machine.preview_is_over(*at)) {
            assert!(at >= self.now, "a deadline in the past is one that nobody looks at");
            self.now = at.max(self.now);
            self.send(Event::Tick);
        }
        self.now = end;
    }

    fn said(&self, kind: EventKind) -> usize {
        self.notes.iter().filter(|(said, _)| *said == kind).count()
    }

    fn record(&self) -> PreviewRecord {
        self.machine.record().preview.as_deref().unwrap().clone()
    }
}

#[test]
fn it_is_warned_then_over_then_gone() {
    let mut world = World::new();
    world.up(24 * HOUR);
    let record = world.record();
    assert_eq!((record.created_at, record.expires_at), (EPOCH, Some(EPOCH + 24 * HOUR)));
    world.pass(23 * HOUR - 1);
    assert_eq!(world.said(EventKind::PreviewExpiring), 0);
    let left = |world: &World| world.machine.status(world.now).preview_left;
    assert_eq!(left(&world), Some(Duration::from_millis(HOUR + 1)));
    world.pass(1);
    assert_eq!(world.said(EventKind::PreviewExpiring), 1, "an hour before");
    world.pass(HOUR - 1);
    assert_eq!(world.said(EventKind::PreviewExpiring), 1, "once");
    assert!(!world.machine.preview_is_over(world.now));
    world.pass(1);
    assert!(world.machine.preview_is_over(world.now));
    assert!(world.machine.deadline().is_some_and(|at| at <= world.now), "the driver would sleep");
    assert_eq!(left(&world), Some(Duration::ZERO));
    world.send(Event::PreviewOver);
    world.down();
    assert_eq!(world.record().removed_at, Some(EPOCH + 24 * HOUR));
    assert_eq!(left(&world), None);
    assert_eq!(world.machine.preview(), None);
    assert_eq!((world.machine.deadline(), world.machine.preview_is_over(world.now)), (None, false));
}

#[test]
fn another_up_begins_its_time_anew() {
    let mut world = World::new();
    world.up(2 * HOUR);
    world.pass(2 * HOUR - 1);
    assert_eq!(world.said(EventKind::PreviewExpiring), 1, "a tenth of its time before");
    world.send(Event::PreviewRenewed(Box::new(preview(HOUR))));
    let record = world.record();
    assert_eq!((record.created_at, record.expires_at), (EPOCH, Some(EPOCH + 3 * HOUR - 1)));
    world.pass(HOUR - 1);
    assert!(!world.machine.preview_is_over(world.now));
    assert_eq!(world.said(EventKind::PreviewExpiring), 2);
    world.pass(1);
    assert!(world.machine.preview_is_over(world.now));
    // Too late, and yet in time: nobody has taken it down.
    world.up(0);
    world.pass(10_000 * HOUR);
    assert!(!world.machine.preview_is_over(world.now), "without a ttl it stays");
    assert_eq!(world.record().expires_at, None);
}

#[test]
fn a_run_that_goes_on_is_waited_for() {
    let mut world = World::new();
    world.obliging = false;
    world.up(HOUR);
    world.now = Now::at(Duration::from_millis(2 * HOUR));
    assert!(world.machine.run().is_some() && !world.machine.preview_is_over(world.now));
    world.send(Event::VolumeDone { resource: data(), result: Ok(()) });
    assert!(world.machine.preview_is_over(world.now));
    world.send(Event::Tick);
    let said = world.notes.iter().find(|(kind, _)| *kind == EventKind::PreviewExpiring).map(|(_, words)| &words[..]);
    assert!(said.is_some_and(|words| words.starts_with("it is taken down now; ")), "{said:?}");
    // Taking it down goes on: no second try beside it.
    world.send(Event::PreviewOver);
    world.down();
    world.now = world.now + AGAIN * 2;
    assert!(!world.machine.preview_is_over(world.now));
}

#[test]
fn what_could_not_be_taken_down_is_tried_again_after_a_pause() {
    let mut world = World::new();
    world.up(HOUR);
    world.pass(HOUR);
    world.send(Event::PreviewOver);
    assert!(!world.machine.preview_is_over(world.now), "it would be tried without a pause");
    assert_eq!(world.machine.deadline(), Some(world.now + AGAIN));
    world.pass(60_000);
    assert!(world.machine.preview_is_over(world.now));
}

#[test]
fn it_ends_while_no_server_runs_and_a_clock_set_back_gives_no_more_than_its_time() {
    let mut world = World::new();
    world.up(HOUR);
    world.recover(EPOCH + HOUR);
    assert!(world.machine.preview_is_over(world.now));
    world.recover(EPOCH + HOUR - 1);
    assert!(!world.machine.preview_is_over(world.now));

    world.recover(EPOCH - 1_000 * HOUR);
    assert_eq!(world.disk.environment.preview.as_ref().unwrap().expires_at, Some(EPOCH - 999 * HOUR));
    world.pass(HOUR - 1);
    assert!(!world.machine.preview_is_over(world.now));
    world.pass(1);
    assert!(world.machine.preview_is_over(world.now));
}

#[test]
fn a_removed_one_that_is_made_again_begins_anew() {
    let mut world = World::new();
    world.up(HOUR);
    world.down();
    assert_eq!(world.record().removed_at, Some(EPOCH));
    world.pass(5 * HOUR);
    world.up(HOUR);
    let record = world.record();
    assert_eq!((record.created_at, record.removed_at, record.used), (EPOCH + 5 * HOUR, None, Used::default()));
    assert_eq!(world.said(EventKind::PreviewRenewed), 0);
}

#[test]
fn use_adds_up_over_looks_restarts_and_counters_that_run_backwards() {
    let mut used = Used::default();
    let seen = |at: u64, cpu: u64, memory: u64| Seen {
        attempt: 1,
        at: Now::at(Duration::from_secs(at)),
        cpu: Duration::from_millis(cpu),
        memory: ByteSize::bytes(memory << 20),
    };
    add(&mut used, &seen(0, 0, 100), &seen(15, 500, 300));
    assert_eq!(used, Used { cpu_ms: 500, memory_mib_s: 1_500 });
    add(&mut used, &seen(15, 500, 300), &seen(30, 200, 300));
    assert_eq!(used, Used { cpu_ms: 500, memory_mib_s: 6_000 });
    // A core and a GiB for an hour.
    let hour = Used { cpu_ms: HOUR, memory_mib_s: 1_024 * 3_600 };
    assert_eq!(hour.cost(&Prices::default()), 40_480 + 4_445);
}
