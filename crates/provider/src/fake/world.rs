//! What the fake provider acts on.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use orchestra_model::{
    Code, EnvironmentId,
    launch::{ExecOutcome, Exit, Launch, LaunchKey, Observed, ProviderEvent, Termination, Usage},
    quantity::ByteSize,
    time::UnixMillis,
};
use regex_lite::Regex;
use tokio::{sync::Notify, time::Instant};

use super::{killed, not_gone, not_running};
use crate::{Error, LogLine, LogQuery, LogStream, Retry};

/// Folder of the volumes that may be deleted.
const VOLUMES: &str = "/fake/volumes";
/// Longest line in one piece.
const MAX_LINE: usize = 64 << 10;
/// Output of a command that is kept.
const MAX_OUTPUT: usize = 4096;

/// A world in memory. Outlives the providers on it.
// Its lock is held for a few instructions and never across an await, and tests call it from outside of tasks too.
#[derive(Debug, Default)]
pub struct FakeWorld {
    state: Mutex<State>,
    written: Notify,
}

#[derive(Debug, Default)]
struct State {
    launches: BTreeMap<LaunchKey, Running>,
    lines: Vec<(EnvironmentId, LogLine)>,
    volumes: BTreeSet<String>,
    listener: u64,
    /// Launches that the present listener knows of: it hears of these only.
    known: BTreeSet<LaunchKey>,
    queue: VecDeque<(LaunchKey, ProviderEvent)>,
    wake: Arc<Notify>,
    next_pid: u32,
    next_failure: Option<Error>,
}

#[derive(Debug)]
struct Running {
    launch: Launch,
    observed: Observed,
    stubborn: bool,
    kill_at: Option<Instant>,
    /// What it uses, if the test said so.
    usage: Option<Usage>,
    /// Since when it uses a whole CPU.
    spins_since: Option<Instant>,
}

/// What a command does.
enum Program {
    Run,
    Stubborn,
    Spin,
    Exit(i32),
    Print(String, String, i32),
    PrintAndRun(String),
    Notify(String),
    Missing,
}

impl FakeWorld {
    /// An empty world.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Commands with a meaning: `["exit", CODE]`, `["print", STDOUT, STDERR, CODE]`, `["print-and-run", STDOUT]`,
    /// `["notify", STATUS]` (ready at once), `["stubborn"]` (prints `armed`, ends by SIGKILL only), `["spin"]` (uses one
    /// CPU), `["missing"]` (cannot be started). Every other command runs until a signal or [`FakeWorld::exit`] ends it.
    pub fn command(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    /// Path of a volume that may be deleted.
    pub fn volume(name: &str) -> String {
        format!("{VOLUMES}/{name}")
    }

    /// Ends a launch's main process, and with it its tree.
    pub fn exit(&self, key: &LaunchKey, exit: Exit) {
        self.lock().end(key, exit, None);
        self.written.notify_waiters();
    }

    /// Lets a program say something of itself: any of the `Notified…` events, or `WatchdogMissed`.
    pub fn notify(&self, key: &LaunchKey, event: ProviderEvent) {
        let mut state = self.lock();
        let Some(running) = state.launches.get_mut(key).filter(|running| running.observed.exit.is_none()) else {
            return;
        };
        match &event {
            ProviderEvent::NotifiedReady => running.observed.notified_ready = true,
            ProviderEvent::NotifiedStatus(text) => running.observed.status_text = Some(text.clone()),
            ProviderEvent::NotifiedReloading | ProviderEvent::NotifiedStopping | ProviderEvent::WatchdogMissed => {}
            other => panic!("a program cannot say {other:?}"),
        }
        state.tell(key, event);
    }

    /// Lets a program print.
    pub fn print(&self, key: &LaunchKey, stream: LogStream, text: &str) {
        self.lock().print(key, stream, text);
        self.written.notify_waiters();
    }

    /// Lets the next start fail.
    pub fn fail_next_start(&self, error: Error) {
        self.lock().next_failure = Some(error);
    }

    /// Says what a launch uses from now on. Until then it is one process with 1 MiB that has used no CPU time, or, of
    /// `["spin"]`, as much as has passed.
    pub fn set_usage(&self, key: &LaunchKey, usage: Usage) {
        if let Some(running) = self.lock().launches.get_mut(key) {
            running.usage = Some(usage);
        }
    }

    /// What was started under a key.
    pub fn launch(&self, key: &LaunchKey) -> Option<Launch> {
        self.lock().launches.get(key).map(|running| running.launch.clone())
    }

    /// Launches whose main process runs.
    pub fn running(&self) -> Vec<LaunchKey> {
        let state = self.lock();
        state.launches.iter().filter(|(_, r)| r.observed.exit.is_none()).map(|(key, _)| key.clone()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A test that panicked while it held the lock has failed anyway.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn listen(&self) -> (u64, Arc<Notify>) {
        let mut state = self.lock();
        state.listener += 1;
        state.known.clear();
        state.queue.clear();
        state.wake = Arc::new(Notify::new());
        (state.listener, Arc::clone(&state.wake))
    }

    pub(super) fn take_queue(&self, listener: u64) -> Vec<(LaunchKey, ProviderEvent)> {
        let mut state = self.lock();
        if state.listener == listener { state.queue.drain(..).collect() } else { Vec::new() }
    }

    pub(super) fn start(&self, listener: u64, launch: Launch) -> Result<(), Error> {
        let mut state = self.lock();
        if let Some(error) = state.next_failure.take() {
            return Err(error);
        }
        let key = launch.key.clone();
        if state.launches.contains_key(&key) {
            state.attach(listener, &key);
            return Ok(());
        }
        if state.listener == listener {
            state.known.insert(key.clone());
        }
        let program = parse(&launch.command);
        state.next_pid += 1;
        let pid = 100_000 + state.next_pid;
        let missing = matches!(program, Program::Missing);
        let observed =
            Observed { pid: (!missing).then_some(pid), started_at: (!missing).then(now), ..Observed::new(key.clone()) };
        let stubborn = matches!(program, Program::Stubborn);
        let spins_since = matches!(program, Program::Spin).then(Instant::now);
        let running = Running { launch, observed, stubborn, kill_at: None, usage: None, spins_since };
        state.launches.insert(key.clone(), running);
        if missing {
            state.end(&key, Exit::NotStarted, Some("`missing` was not found".to_owned()));
        } else {
            state.tell(&key, ProviderEvent::Started { pid });
        }
        match program {
            Program::Run | Program::Spin | Program::Missing => {}
            Program::Stubborn => state.print(&key, LogStream::Stdout, "armed\n"),
            Program::Exit(code) => state.end(&key, Exit::Code(code), None),
            Program::Print(stdout, stderr, code) => {
                state.print(&key, LogStream::Stdout, &stdout);
                state.print(&key, LogStream::Stderr, &stderr);
                state.end(&key, Exit::Code(code), None);
            }
            Program::PrintAndRun(stdout) => state.print(&key, LogStream::Stdout, &stdout),
            Program::Notify(text) => {
                if let Some(running) = state.launches.get_mut(&key) {
                    running.observed.notified_ready = true;
                    running.observed.status_text = Some(text.clone());
                }
                state.tell(&key, ProviderEvent::NotifiedReady);
                state.tell(&key, ProviderEvent::NotifiedStatus(text));
            }
        }
        drop(state);
        self.written.notify_waiters();
        Ok(())
    }

    /// Begins to end a launch; returns when its grace ends, if that is now what it waits for.
    pub(super) fn terminate(&self, listener: u64, key: &LaunchKey, how: Termination) -> Option<Instant> {
        let mut state = self.lock();
        let Some(running) = state.launches.get_mut(key) else {
            if state.listener == listener {
                state.queue.push_back((key.clone(), ProviderEvent::Gone));
                state.wake.notify_one();
            }
            return None;
        };
        if running.observed.exit.is_some() {
            state.attach(listener, key);
            return None;
        }
        if !running.stubborn || how.signal.number() == 9 {
            state.attach_quietly(listener, key);
            state.end(key, Exit::Signal(how.signal.number()), None);
            return None;
        }
        let wanted = Instant::now() + how.grace.duration();
        let sooner = running.kill_at.is_none_or(|at| wanted < at);
        if sooner {
            running.kill_at = Some(wanted);
        }
        state.attach_quietly(listener, key);
        sooner.then_some(wanted)
    }

    pub(super) fn end_grace(&self, key: &LaunchKey) {
        let mut state = self.lock();
        let over = |running: &Running| running.kill_at.is_some_and(|at| at <= Instant::now());
        if state.launches.get(key).is_some_and(over) {
            state.end(key, killed(), None);
        }
    }

    pub(super) fn find(&self, listener: u64, key: &LaunchKey) -> Option<Observed> {
        let mut state = self.lock();
        let observed = state.launches.get(key)?.observed.clone();
        if !observed.gone {
            state.attach(listener, key);
        }
        Some(observed)
    }

    pub(super) fn observe(&self, listener: u64, environment: &EnvironmentId) -> Vec<Observed> {
        let mut state = self.lock();
        let keys: Vec<LaunchKey> =
            state.launches.keys().filter(|key| key.environment == *environment).cloned().collect();
        for key in &keys {
            if state.listener == listener && !state.known.contains(key) && !state.launches[key].observed.gone {
                state.attach(listener, key);
            }
        }
        keys.iter().map(|key| state.launches[key].observed.clone()).collect()
    }

    pub(super) fn forget(&self, key: &LaunchKey) -> Result<(), Error> {
        let mut state = self.lock();
        match state.launches.get(key) {
            Some(running) if !running.observed.gone => Err(not_gone(key)),
            _ => {
                state.launches.remove(key);
                Ok(())
            }
        }
    }

    pub(super) fn exec(&self, key: &LaunchKey, command: &[String]) -> Result<ExecOutcome, Error> {
        let state = self.lock();
        if state.launches.get(key).is_none_or(|running| running.observed.exit.is_some()) {
            return Err(not_running(key));
        }
        let (exit, mut output) = match parse(command) {
            Program::Exit(code) => (Some(Exit::Code(code)), String::new()),
            Program::Print(stdout, stderr, code) => (Some(Exit::Code(code)), stdout + &stderr),
            Program::Missing => (Some(Exit::NotStarted), "`missing` was not found".to_owned()),
            Program::Run | Program::Spin | Program::Stubborn | Program::PrintAndRun(_) | Program::Notify(_) => {
                (None, String::new())
            }
        };
        output.truncate(output.floor_char_boundary(MAX_OUTPUT));
        Ok(ExecOutcome { exit, output })
    }

    pub(super) fn usage(&self, listener: u64, keys: Vec<LaunchKey>) -> Vec<(LaunchKey, Usage)> {
        let state = self.lock();
        let measure = |key: LaunchKey| {
            let known = state.listener == listener && state.known.contains(&key);
            let running = state.launches.get(&key).filter(|running| known && running.observed.exit.is_none())?;
            let usage = running.usage.unwrap_or_else(|| Usage {
                cpu: running.spins_since.map_or(Duration::ZERO, |since| since.elapsed()),
                memory: ByteSize::bytes(1 << 20),
                processes: 1,
            });
            Some((key, usage))
        };
        keys.into_iter().filter_map(measure).collect()
    }

    pub(super) fn create_volume(&self, path: String) {
        self.lock().volumes.insert(path);
    }

    pub(super) fn volume_exists(&self, path: &str) -> bool {
        self.lock().volumes.contains(path)
    }

    pub(super) fn delete_volume(&self, path: &str) -> Result<(), Error> {
        let inside = path.strip_prefix(VOLUMES).and_then(|rest| rest.strip_prefix('/'));
        if inside.is_none_or(|rest| rest.is_empty() || rest.split('/').any(|part| part == ".." || part.is_empty())) {
            let message = format!("`{path}` is not a volume that Orchestra made");
            return Err(Error::new(Code::INVALID_VALUE, Retry::Never, message));
        }
        self.lock().volumes.remove(path);
        Ok(())
    }

    /// Lines that were written until now, and the position after them.
    pub(super) fn history(&self, query: &LogQuery) -> (Vec<LogLine>, usize) {
        let state = self.lock();
        let mut lines: Vec<LogLine> = state.lines.iter().filter_map(|line| asked(query, line)).collect();
        if let Some(tail) = query.tail {
            let mut left = BTreeMap::new();
            let mut kept: Vec<LogLine> = Vec::new();
            for line in lines.into_iter().rev() {
                let left = left.entry(line.instance.clone()).or_insert(tail);
                if *left > 0 {
                    *left -= 1;
                    kept.push(line);
                }
            }
            kept.reverse();
            lines = kept;
        }
        (lines, state.lines.len())
    }

    /// Waits for lines after a position. Cancel safe.
    pub(super) async fn more(&self, query: &LogQuery, position: usize) -> (Vec<LogLine>, usize) {
        loop {
            let mut written = std::pin::pin!(self.written.notified());
            // Before looking, so that nothing that is written after the look is missed.
            written.as_mut().enable();
            {
                let state = self.lock();
                if state.lines.len() > position {
                    let new = state.lines[position..].iter().filter_map(|line| asked(query, line)).collect();
                    return (new, state.lines.len());
                }
            }
            written.await;
        }
    }
}

impl State {
    fn tell(&mut self, key: &LaunchKey, event: ProviderEvent) {
        if self.known.contains(key) {
            self.queue.push_back((key.clone(), event));
            self.wake.notify_one();
        }
    }

    fn attach_quietly(&mut self, listener: u64, key: &LaunchKey) {
        if self.listener == listener && !self.known.contains(key) {
            self.attach(listener, key);
        }
    }

    /// Makes a launch known to a listener, which is told its state.
    fn attach(&mut self, listener: u64, key: &LaunchKey) {
        if self.listener != listener {
            return;
        }
        self.known.insert(key.clone());
        let Some(running) = self.launches.get(key) else { return };
        let observed = running.observed.clone();
        if let (Exit::NotStarted, _) | (_, None) = (observed.exit.unwrap_or(Exit::Unknown), observed.started_at) {
        } else {
            let pid = observed.pid.unwrap_or(0);
            self.tell(key, ProviderEvent::Started { pid });
        }
        if observed.notified_ready {
            self.tell(key, ProviderEvent::NotifiedReady);
        }
        if observed.line_matched {
            self.tell(key, ProviderEvent::LineMatched);
        }
        if let Some(text) = observed.status_text {
            self.tell(key, ProviderEvent::NotifiedStatus(text));
        }
        if let Some(exit) = observed.exit {
            self.tell(key, ProviderEvent::Exited { exit, message: observed.message });
        }
        if observed.gone {
            self.tell(key, ProviderEvent::Gone);
        }
    }

    fn end(&mut self, key: &LaunchKey, exit: Exit, message: Option<String>) {
        let Some(running) = self.launches.get_mut(key).filter(|running| running.observed.exit.is_none()) else {
            return;
        };
        running.observed.pid = None;
        running.observed.exit = Some(exit);
        running.observed.gone = true;
        running.observed.message.clone_from(&message);
        self.tell(key, ProviderEvent::Exited { exit, message });
        self.tell(key, ProviderEvent::Gone);
    }

    fn print(&mut self, key: &LaunchKey, stream: LogStream, text: &str) {
        let Some(running) = self.launches.get_mut(key).filter(|running| running.observed.exit.is_none()) else {
            return;
        };
        let ready = running.launch.ready_line.as_deref().and_then(|ready| Regex::new(ready).ok());
        let mut matched = false;
        for line in text.as_bytes().split_inclusive(|byte| *byte == b'\n') {
            let shown = String::from_utf8_lossy(line.strip_suffix(b"\n").unwrap_or(line));
            matched |= line.ends_with(b"\n") && ready.as_ref().is_some_and(|ready| ready.is_match(&shown));
            for bytes in line.chunks(MAX_LINE) {
                let line = LogLine {
                    instance: key.instance.clone(),
                    attempt: key.attempt,
                    stream,
                    at: now(),
                    bytes: bytes.to_vec(),
                };
                self.lines.push((key.environment.clone(), line));
            }
        }
        if matched && !running.observed.line_matched {
            running.observed.line_matched = true;
            self.tell(key, ProviderEvent::LineMatched);
        }
    }
}

fn asked(query: &LogQuery, (environment, line): &(EnvironmentId, LogLine)) -> Option<LogLine> {
    (*environment == query.environment
        && (query.workloads.is_empty() || query.workloads.contains(&line.instance.workload))
        && query.instance.as_ref().is_none_or(|instance| *instance == line.instance)
        && query.stream.is_none_or(|stream| stream == line.stream)
        && query.since.is_none_or(|since| line.at >= since))
    .then(|| line.clone())
}

fn parse(command: &[String]) -> Program {
    let words: Vec<&str> = command.iter().map(String::as_str).collect();
    let code = |text: &str| text.parse().unwrap_or(1);
    match words[..] {
        ["exit", exit] => Program::Exit(code(exit)),
        ["print", stdout, stderr, exit] => Program::Print(stdout.to_owned(), stderr.to_owned(), code(exit)),
        ["print-and-run", stdout] => Program::PrintAndRun(stdout.to_owned()),
        ["notify", status] => Program::Notify(status.to_owned()),
        ["stubborn"] => Program::Stubborn,
        ["spin"] => Program::Spin,
        ["missing", ..] => Program::Missing,
        _ => Program::Run,
    }
}

fn now() -> UnixMillis {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
