//! The prober: one scheduler task that wakes when the next check is due and starts it as a task of its own.
//!
//! State is one map under a lock that is held for a bounded number of map operations and never across an await: `set`
//! and `remove` are plain calls, and what they change holds when they return. There is one timer for all targets; a
//! check that runs has one more, for its timeout. A check that waits for its place is a few words in a queue, not a task.
//!
//! Every change of a target gives it a new revision, an outcome carries the revision it was asked under, and
//! [`Outcomes::recv`] lets only current ones through. So no outcome of a target is received after [`Prober::remove`]
//! returned, nor one of its former self after [`Prober::set`] did, though checks end in their own time.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
};

use orchestra_model::Now;
use orchestra_provider::Provider;
use orchestra_task::{TaskKind, TaskTree};
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc},
    task::AbortHandle,
    time::Instant,
};

use crate::{
    check::{Check, Verdict, World},
    lateness::{Histogram, Lateness},
    schedule::Schedule,
    target::{Outcome, ProbeId, Target},
};

/// Checks that are started before the lock is released and other tasks get their turn.
const BATCH: usize = 64;

/// How many checks may run at one time. Those that are due beyond it wait in order; their timeout begins when they do,
/// and the wait counts as lateness.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Checks with a socket. Each holds one file descriptor.
    pub sockets: usize,
    /// Checks with a command: each is a process, and a storm of them would slow what they look at.
    pub commands: usize,
}

impl Default for Limits {
    /// 1,024 sockets: at 1,000 checks per second every target may take a second to answer. 16 commands.
    fn default() -> Self {
        Self { sockets: 1_024, commands: 16 }
    }
}

/// Asks targets at their rates. Dropping it ends all checks.
pub struct Prober {
    shared: Arc<Shared>,
    tree: TaskTree,
}

/// The receiving end: outcomes of targets that are still set, in the order in which the checks ended.
///
/// A reader that is slow loses nothing and floods nothing: a check counts as running until its outcome is taken up by
/// the channel, so the worst case is slots that are left out.
pub struct Outcomes {
    shared: Arc<Shared>,
    receiver: mpsc::Receiver<(u64, Outcome)>,
}

struct Shared {
    state: Mutex<State>,
    changed: Notify,
    origin: Instant,
    first: Histogram,
    repeated: Histogram,
    unasked: AtomicU64,
    /// Checks wait for a place, so whoever leaves one wakes the scheduler.
    backlog: AtomicBool,
    /// The last check with a socket could not be asked.
    starved: AtomicBool,
}

struct State {
    schedule: Schedule<Entry>,
    last_revision: u64,
}

struct Entry {
    revision: u64,
    target: Target,
    check: Arc<Check>,
    /// The check that ran last.
    task: Option<AbortHandle>,
}

struct Scheduler {
    shared: Arc<Shared>,
    tree: TaskTree,
    world: Arc<World>,
    sockets: Lane,
    commands: Lane,
    sender: mpsc::Sender<(u64, Outcome)>,
}

/// Places for checks of one sort, and those that are due and wait for one.
struct Lane {
    places: Arc<Semaphore>,
    waiting: VecDeque<Waiting>,
}

struct Waiting {
    id: ProbeId,
    revision: u64,
    due: Instant,
    first: bool,
}

// === impl Prober ===

impl Prober {
    /// Starts the scheduler in `tree`. `provider` runs the commands of exec checks.
    pub fn new(provider: Arc<dyn Provider>, tree: &TaskTree, limits: Limits) -> (Self, Outcomes) {
        let tree = tree.child();
        let shared = Arc::new(Shared {
            state: Mutex::new(State { schedule: Schedule::new(), last_revision: 0 }),
            changed: Notify::new(),
            origin: Instant::now(),
            first: Histogram::new(),
            repeated: Histogram::new(),
            unasked: AtomicU64::new(0),
            backlog: AtomicBool::new(false),
            starved: AtomicBool::new(false),
        });
        let (sender, receiver) = mpsc::channel(1_024);
        let scheduler = Scheduler {
            shared: shared.clone(),
            tree: tree.clone(),
            world: Arc::new(World { provider, tree: tree.clone() }),
            sockets: Lane::new(limits.sockets),
            commands: Lane::new(limits.commands),
            sender,
        };
        tree.start(TaskKind::Loop, "prober", scheduler.run());
        (Self { shared: shared.clone(), tree }, Outcomes { shared, receiver })
    }

    /// Adds a target or changes it; the first check is due at once, and a check of the former target is broken off.
    /// Setting a target again as it is changes nothing.
    pub fn set(&self, target: Target) {
        let before = {
            let mut state = self.shared.state();
            if state.schedule.get(target.id).is_some_and(|entry| entry.target == target) {
                return;
            }
            state.last_revision += 1;
            let check = Arc::new(Check::new(&target));
            let (id, every, revision) = (target.id, target.every, state.last_revision);
            state.schedule.set(self.shared.now(), id, every, Entry { revision, target, check, task: None })
        };
        if let Some(task) = before.and_then(|entry| entry.task) {
            task.abort();
        }
        self.shared.changed.notify_one();
    }

    /// Removes a target and breaks off its check. A command that an exec check began is ended by its own timeout.
    pub fn remove(&self, id: ProbeId) {
        let removed = self.shared.state().schedule.remove(id);
        if let Some(task) = removed.and_then(|entry| entry.task) {
            task.abort();
        }
    }

    /// How late checks began so far.
    pub fn lateness(&self) -> Lateness {
        let skipped = self.shared.state().schedule.skipped() + self.shared.unasked.load(Relaxed);
        Lateness { first: self.shared.first.snapshot(), repeated: self.shared.repeated.snapshot(), skipped }
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        self.tree.cancel();
    }
}

// === impl Outcomes ===

impl Outcomes {
    /// The next outcome; `None` once the prober has ended and all was taken. Cancel safe: an outcome is either returned
    /// or still there.
    pub async fn recv(&mut self) -> Option<Outcome> {
        loop {
            let (revision, outcome) = self.receiver.recv().await?;
            // No await from here on: nothing is lost when the caller drops this future.
            if self.shared.state().schedule.get(outcome.id).is_some_and(|entry| entry.revision == revision) {
                return Some(outcome);
            }
        }
    }
}

// === impl Shared ===

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no map operation panics")
    }

    fn now(&self) -> Now {
        Now::at(self.origin.elapsed())
    }
}

// === impl Lane ===

impl Lane {
    fn new(places: usize) -> Self {
        let places = Arc::new(Semaphore::new(places.clamp(1, Semaphore::MAX_PERMITS)));
        Self { places, waiting: VecDeque::new() }
    }

    /// A place, or the promise that leaving one wakes the scheduler.
    fn enter(&self, shared: &Arc<Shared>) -> Option<Place> {
        let permit = self.places.clone().try_acquire_owned().or_else(|_| {
            // The flag first, then another look: whoever left in between has either seen it or left a place to find.
            shared.backlog.store(true, SeqCst);
            self.places.clone().try_acquire_owned()
        });
        Some(Place { permit: permit.ok(), shared: shared.clone() }).filter(|place| place.permit.is_some())
    }
}

/// A place among the checks that run.
struct Place {
    permit: Option<OwnedSemaphorePermit>,
    shared: Arc<Shared>,
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.permit.take().is_some() && self.shared.backlog.load(SeqCst) {
            self.shared.changed.notify_one();
        }
    }
}

// === impl Scheduler ===

impl Scheduler {
    async fn run(mut self) {
        loop {
            let (started, deadline) = self.start_due();
            if started == BATCH {
                tokio::task::yield_now().await;
                continue;
            }
            // Both arms only wake the loop; a notification that comes between two waits is stored.
            match deadline {
                None => self.shared.changed.notified().await,
                Some(deadline) => tokio::select! {
                    () = self.shared.changed.notified() => {}
                    () = tokio::time::sleep_until(self.shared.origin + deadline.since_origin()) => {}
                },
            }
        }
    }

    /// Starts what is due and has a place, at most a batch; returns how many and the next deadline.
    fn start_due(&mut self) -> (usize, Option<Now>) {
        let shared = self.shared.clone();
        let now = shared.now();
        let mut state = shared.state();
        let mut handled = 0;
        shared.backlog.store(false, SeqCst);
        for lane in [&mut self.sockets, &mut self.commands] {
            while handled < BATCH
                && !lane.waiting.is_empty()
                && let Some(place) = lane.enter(&shared)
            {
                let waiting = lane.waiting.pop_front().expect("not empty");
                let entry = state.schedule.get_mut(waiting.id).filter(|entry| entry.revision == waiting.revision);
                // Otherwise it was changed or removed while it waited.
                if let Some(entry) = entry {
                    let run = waiting.run(entry.check.clone(), self.world.clone(), place, self.sender.clone());
                    entry.task = Some(self.tree.start(TaskKind::Connection, "check", run).abort_handle());
                }
                handled += 1;
            }
        }
        while handled < BATCH
            && let Some(due) = state.schedule.next_due(now)
        {
            let entry = due.value;
            let waiting = Waiting {
                id: due.id,
                revision: entry.revision,
                due: shared.origin + due.at.since_origin(),
                first: due.first,
            };
            let lane = if entry.check.is_command() { &mut self.commands } else { &mut self.sockets };
            let place = if lane.waiting.is_empty() { lane.enter(&shared) } else { None };
            if let Some(place) = place {
                let run = waiting.run(entry.check.clone(), self.world.clone(), place, self.sender.clone());
                entry.task = Some(self.tree.start(TaskKind::Connection, "check", run).abort_handle());
            } else {
                lane.waiting.push_back(waiting);
            }
            handled += 1;
        }
        (handled, state.schedule.deadline())
    }
}

// === impl Waiting ===

impl Waiting {
    /// The task of one check, from the moment that it has its place.
    fn run(
        self,
        check: Arc<Check>,
        world: Arc<World>,
        place: Place,
        sender: mpsc::Sender<(u64, Outcome)>,
    ) -> impl Future<Output = ()> + Send + 'static {
        let running = Running { shared: place.shared.clone(), id: self.id, revision: self.revision };
        async move {
            let shared = running.shared.clone();
            let begun = Instant::now();
            let histogram = if self.first { &shared.first } else { &shared.repeated };
            histogram.add(begun.saturating_duration_since(self.due));
            let verdict = check.run(&world).await;
            let took = begun.elapsed();
            drop(place);
            let (passed, detail) = match verdict {
                Verdict::Passed(detail) => (true, detail),
                Verdict::Failed(detail) => (false, detail),
                Verdict::NotAsked(reason) => {
                    shared.unasked.fetch_add(1, Relaxed);
                    if !shared.starved.swap(true, Relaxed) {
                        tracing::warn!(reason, "checks cannot be asked; their targets keep the result they had");
                    }
                    return;
                }
            };
            if !check.is_command() {
                shared.starved.store(false, Relaxed);
            }
            let outcome = Outcome { id: running.id, passed, detail, took };
            // An error means that nobody listens any more; the prober is about to end.
            let _ = sender.send((running.revision, outcome)).await;
        }
    }
}

/// A check on its way. Dropping it, for whatever reason, lets the target's next slot run.
struct Running {
    shared: Arc<Shared>,
    id: ProbeId,
    revision: u64,
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        if state.schedule.get(self.id).is_some_and(|entry| entry.revision == self.revision) {
            state.schedule.finished(self.id);
        }
    }
}
