//! The shim's state and its poll loop.
//!
//! One turn: write down what changed, wait, then handle in this order what is there: messages of the program, its
//! output, failures to exec, ended processes, commands, requests, deadlines. A program that says `READY=1`, prints its
//! last line and exits is thereby reported in that order.

use std::{
    fs, io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
};

use orchestra_model::launch::{Exit, ProviderEvent};
use orchestra_provider::LogStream;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Mode, OFlags},
    pipe::PipeFlags,
};

use super::{
    Prepared,
    control::Control,
    exec::{self, Execs},
    launch,
    logs::LogWriter,
    notify::{Notice, NotifySocket},
    stat,
    tree::{Tree, open_group},
};
use crate::{
    cgroup, clock,
    folder::{CONTROL, FIFOS, Folder, LaunchFile, Lock, Status, Stop},
    log_format::STREAMS,
    sys::{self, Child, ChildFds, Reap},
    wire::{FromShim, ToShim},
};

/// Time between attempts to end what does not end, or to write what cannot be written.
const RETRY_MILLIS: u64 = 20;
const SLOW_RETRY_MILLIS: u64 = 1000;
/// Turns of a pipe per round of the loop: at most 1 MiB, then everybody else.
const PUMP_ROUNDS: usize = 16;
/// Children reaped per round of the loop, then everybody else: in a fork storm there is always one more.
const REAP_ROUNDS: usize = 512;
/// Longest `STATUS=` that is kept, in characters.
const MAX_STATUS: usize = 1024;

/// A shim at work.
pub(crate) struct Shim {
    folder: Folder,
    file: LaunchFile,
    status: Status,
    /// Whether `status` differs from what is on disk.
    dirty: bool,
    retry_write_at: Option<u64>,
    main: Option<Main>,
    starting: Option<(OwnedFd, Child)>,
    tree: Tree,
    logs: LogWriter,
    notify: Option<NotifySocket>,
    control: Control,
    execs: Execs,
    watchdog: Watchdog,
    /// Next kill of what is left of the tree, once the main process ended.
    kill_at: Option<u64>,
    kills: u32,
    childless: bool,
    /// The last round of reaping was cut short.
    more_to_reap: bool,
    null: OwnedFd,
    signals: OwnedFd,
    /// Held until the process ends.
    #[expect(dead_code, reason = "it is there to be dropped last")]
    lock: Lock,
}

/// The main process, while it runs.
struct Main {
    pid: u32,
    pidfd: OwnedFd,
    /// Whether it is our child; otherwise its end shows on the pidfd.
    child: bool,
    /// It ended, but how is not known yet: when that is given up.
    unresolved_until: Option<u64>,
}

#[derive(Default)]
struct Watchdog {
    interval: Option<u64>,
    deadline: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Token {
    Signals,
    Output(LogStream),
    Failure,
    Main,
    Group,
    Notify,
    Listener,
    Connection(u64),
    Exec(u64),
}

/// Turns a wait status into an exit.
pub(crate) fn exit_of(wait_status: i32) -> Exit {
    if libc::WIFSIGNALED(wait_status) {
        Exit::Signal(libc::WTERMSIG(wait_status))
    } else {
        Exit::Code(libc::WEXITSTATUS(wait_status))
    }
}

impl Shim {
    /// Starts the launch's program.
    pub(crate) fn start(prepared: Prepared) -> io::Result<Self> {
        let Prepared { folder, file, lock, null, signals, connection, .. } = prepared;
        let mut status = Status::new(file.boot.clone(), std::process::id());
        status.message.clone_from(&file.shortfall);
        let owner = match &file.launch.user {
            Some(name) => sys::find_user(name).ok().flatten(),
            None => None,
        };
        let fifos = open_fifos(true)?;
        // The program's ends: open in both directions, so that its output has a reader (itself) when the shim is gone.
        let ends = FIFOS.map(|name| rustix::fs::open(name, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()));
        let [stdout, stderr] = ends;
        let (stdout, stderr) = (stdout?, stderr?);
        if let Some(owner) = owner {
            // Programs open `/dev/stderr` by name, as themselves.
            let uid = Some(rustix::fs::Uid::from_raw(owner.uid));
            for end in [&stdout, &stderr] {
                let _ = rustix::fs::fchown(end, uid, None);
            }
        }
        let (ready, expression_error) = match file.launch.ready_line.as_deref().map(regex_lite::Regex::new) {
            Some(Ok(ready)) => (Some(ready), None),
            Some(Err(error)) => (None, Some(format!("the ready line is not a regular expression: {error}"))),
            None => (None, None),
        };
        let logs = LogWriter::new(file.logs.clone(), file.launch.log_max_bytes, file.launch.log_keep, fifos, ready);

        let group = file.cgroup.clone().filter(|group| cgroup::create(group, &file.launch.resources).is_ok());
        status.in_cgroup = group.is_some();
        let mut tree = Tree::new(&file.marker(), status.session, group, false);
        let notify = if launch::notifies(&file.launch) {
            NotifySocket::open(&file.nonce)
                .map_err(|error| format!("the notify socket cannot be made: {error}"))
                .map(Some)
        } else {
            Ok(None)
        };
        let prepared = match expression_error {
            Some(message) => Err(message),
            None => launch::prepare(&file, &file.launch.command, None),
        };

        let mut main = None;
        let mut starting = None;
        let mut go = None;
        let (notify, prepared) = match (notify, prepared) {
            (Ok(notify), Ok(child)) => (notify, Ok(child)),
            (_, Err(message)) | (Err(message), _) => (None, Err(message)),
        };
        match prepared {
            Ok(child) => {
                let (failure, child_failure) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
                let (child_go, our_go) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
                let directory = tree.group().map(open_group).transpose()?;
                let forked = sys::fork_exec(
                    &child,
                    &ChildFds {
                        stdin: null.as_fd(),
                        stdout: stdout.as_fd(),
                        stderr: stderr.as_fd(),
                        go: Some((child_go.as_fd(), our_go.as_fd())),
                        failure: child_failure.as_fd(),
                        cgroup: directory.as_ref().map(|fd| fd.as_fd()),
                    },
                );
                match forked {
                    Ok(forked) => {
                        if !forked.in_cgroup {
                            tree.leave_group();
                            status.in_cgroup = false;
                        }
                        status.pid = Some(forked.pid);
                        status.start_time = stat(forked.pid).map_or(0, |stat| stat.start_time);
                        status.started_at = Some(clock::wall());
                        main = Some(Main { pid: forked.pid, pidfd: forked.pidfd, child: true, unresolved_until: None });
                        starting = Some((failure, child));
                        go = Some(our_go);
                    }
                    Err(error) => fail(&mut status, &format!("no process could be made: {error}")),
                }
            }
            Err(message) => fail(&mut status, &message),
        }
        // Without a record there must be no program: an error here ends the shim, and its child never gets its go.
        if let Err(error) = folder.write_status(&status) {
            drop(go);
            if let Some(main) = main {
                sys::pidfd_signal(main.pidfd.as_fd(), libc::SIGKILL);
                let _ = rustix::process::waitid(
                    rustix::process::WaitId::PidFd(main.pidfd.as_fd()),
                    rustix::process::WaitIdOptions::EXITED,
                );
            }
            tree.leave_group();
            return Err(error);
        }
        if let Some(go) = go {
            // Nobody reads it if the child has failed already; the failure pipe tells why.
            let _ = rustix::io::write(&go, b"g");
        }
        let interval = file.launch.watchdog.map(|interval| clock::millis(interval.duration()).max(1));
        let mut shim = Self {
            folder,
            file,
            status,
            dirty: false,
            retry_write_at: None,
            childless: main.is_none(),
            more_to_reap: false,
            main,
            starting,
            tree,
            logs,
            notify,
            control: Control::default(),
            execs: Execs::default(),
            watchdog: Watchdog { interval, deadline: None },
            kill_at: None,
            kills: 0,
            null,
            signals,
            lock,
        };
        shim.greet(connection);
        // Off the way of the program; until it is there, a second server tries again.
        shim.control.listen()?;
        Ok(shim)
    }

    /// Takes over a launch from a shim that was killed.
    pub(crate) fn adopt(prepared: Prepared, mut status: Status) -> io::Result<Self> {
        let Prepared { folder, file, lock, null, signals, connection, pidfd } = prepared;
        status.shim = std::process::id();
        status.executed |= status.exit.is_none();
        let fifos = open_fifos(false)?;
        let ready = if status.line_matched { None } else { file.launch.ready_line.as_deref() };
        let ready = ready.and_then(|ready| regex_lite::Regex::new(ready).ok());
        let mut logs = LogWriter::new(file.logs.clone(), file.launch.log_max_bytes, file.launch.log_keep, fifos, ready);
        // Logs that cannot be read back are no reason to leave a tree without a supervisor.
        if let Err(error) = logs.resume() {
            status.say(&format!("its logs could not be continued in place: {error}"));
        }
        let group = file.cgroup.clone().filter(|_| status.in_cgroup);
        let tree = Tree::new(&file.marker(), status.session, group, true);
        tree.kill_orphaned_execs();
        let mut main = None;
        if status.exit.is_none() {
            main = status.pid.and_then(|pid| find_main(pid, status.start_time, pidfd));
            if main.is_none() {
                status.exit = Some(Exit::Unknown);
                status.say("it ended while nobody watched");
            }
        }
        let notify =
            if launch::notifies(&file.launch) && main.is_some() { NotifySocket::open(&file.nonce).ok() } else { None };
        let interval = file.launch.watchdog.map(|interval| clock::millis(interval.duration()).max(1));
        let deadline = interval.filter(|_| status.notified_ready).map(|interval| clock::boot_millis() + interval);
        let ended = status.exit.is_some();
        let mut shim = Self {
            folder,
            file,
            status,
            dirty: true,
            retry_write_at: None,
            main,
            starting: None,
            tree,
            logs,
            notify,
            control: Control::default(),
            execs: Execs::default(),
            watchdog: Watchdog { interval, deadline },
            kill_at: None,
            kills: 0,
            childless: true,
            more_to_reap: false,
            null,
            signals,
            lock,
        };
        shim.drain();
        if ended {
            shim.end_tree();
        }
        shim.save();
        shim.greet(connection);
        shim.control.listen()?;
        Ok(shim)
    }

    fn greet(&mut self, connection: Option<OwnedFd>) {
        if let Some(connection) = connection {
            let id = self.control.add(connection);
            self.control.send(id, &FromShim::State(Box::new(self.status.clone())));
        }
    }

    /// Supervises until the tree is gone.
    pub(crate) fn run(mut self) -> io::Result<()> {
        if self.status.exit.is_some() && self.kill_at.is_none() {
            self.end_tree();
        }
        loop {
            self.save();
            if self.status.exit.is_some() && self.is_over() {
                self.finish();
                return Ok(());
            }
            for (token, flags) in self.wait()? {
                self.handle(token, flags);
            }
            self.tick();
            for connection in self.control.sweep() {
                self.execs.abandon(connection, &self.tree);
            }
        }
    }

    fn wait(&self) -> io::Result<Vec<(Token, PollFlags)>> {
        let mut wanted: Vec<(Token, PollFd<'_>)> = Vec::with_capacity(12);
        let mut add = |token, fd, flags| wanted.push((token, PollFd::from_borrowed_fd(fd, flags)));
        if let Some(notify) = &self.notify {
            add(Token::Notify, notify.as_fd(), PollFlags::IN);
        }
        for stream in STREAMS {
            if let Some(fifo) = self.logs.fifo(stream) {
                add(Token::Output(stream), fifo, PollFlags::IN);
            }
        }
        if let Some((failure, _)) = &self.starting {
            add(Token::Failure, failure.as_fd(), PollFlags::IN);
        }
        add(Token::Signals, self.signals.as_fd(), PollFlags::IN);
        if let Some(main) = self.main.as_ref().filter(|main| !main.child && main.unresolved_until.is_none()) {
            add(Token::Main, main.pidfd.as_fd(), PollFlags::IN);
        }
        if self.status.exit.is_some()
            && let Some(events) = self.tree.events()
        {
            add(Token::Group, events, PollFlags::PRI);
        }
        for (number, output) in self.execs.outputs() {
            add(Token::Exec(number), output, PollFlags::IN);
        }
        if let Some(listener) = self.control.listener() {
            add(Token::Listener, listener, PollFlags::IN);
        }
        for (id, fd, writes) in self.control.connections() {
            add(Token::Connection(id), fd, if writes { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN });
        }
        let timeout = if self.more_to_reap { Some(0) } else { self.deadline() }.map(|deadline| {
            let left = deadline.saturating_sub(clock::boot_millis());
            Timespec {
                tv_sec: i64::try_from(left / 1000).unwrap_or(i64::MAX),
                tv_nsec: (left % 1000 * 1_000_000).cast_signed(),
            }
        });
        let (tokens, mut fds): (Vec<_>, Vec<_>) = wanted.into_iter().unzip();
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        }
        let ready = fds.iter().map(PollFd::revents);
        let mut ready: Vec<(Token, PollFlags)> =
            tokens.into_iter().zip(ready).filter(|(_, flags)| !flags.is_empty()).collect();
        if self.more_to_reap && !ready.iter().any(|(token, _)| matches!(token, Token::Signals)) {
            ready.push((Token::Signals, PollFlags::IN));
        }
        Ok(ready)
    }

    fn handle(&mut self, token: Token, flags: PollFlags) {
        match token {
            Token::Notify => self.read_notices(),
            Token::Output(stream) => {
                for _ in 0..PUMP_ROUNDS {
                    if self.logs.pump(stream) != super::logs::Pumped::Some {
                        break;
                    }
                }
                self.after_output();
            }
            Token::Failure => self.executed(),
            Token::Signals => {
                let mut buffer = [0; 128];
                while rustix::io::read(&self.signals, &mut buffer).is_ok_and(|read| read > 0) {}
                self.reap();
            }
            Token::Main => self.resolve_main(),
            // Read when it is asked for; waking up was all that was wanted.
            Token::Group => {}
            Token::Exec(number) => self.execs.read(number),
            Token::Listener => {
                if let Some(id) = self.control.accept() {
                    self.control.send(id, &FromShim::State(Box::new(self.status.clone())));
                }
            }
            Token::Connection(id) => {
                if flags.contains(PollFlags::OUT) {
                    self.control.flush(id);
                }
                for request in self.control.read(id) {
                    self.request(id, request);
                }
            }
        }
    }

    // === What the program says ===

    fn read_notices(&mut self) {
        // Bounded, so that a flood cannot keep the loop from its other duties.
        for _ in 0..64 {
            let Some(notices) = self.notify.as_ref().and_then(|notify| notify.receive(&self.tree)) else { return };
            for notice in notices {
                // Whoever speaks has been executed, even if the pipe that tells so was not looked at yet.
                self.executed();
                self.notice(notice);
            }
        }
    }

    fn notice(&mut self, notice: Notice) {
        let now = clock::boot_millis();
        match notice {
            Notice::Ready => {
                self.status.notified_ready = true;
                self.dirty = true;
                self.alive(now);
                self.event(ProviderEvent::NotifiedReady);
            }
            Notice::Reloading => self.event(ProviderEvent::NotifiedReloading),
            Notice::Stopping => self.event(ProviderEvent::NotifiedStopping),
            Notice::Status(text) => {
                let text: String = text.chars().take(MAX_STATUS).collect();
                if self.status.status_text.as_deref() != Some(&text) {
                    self.status.status_text = Some(text.clone());
                    self.dirty = true;
                    self.event(ProviderEvent::NotifiedStatus(text));
                }
            }
            Notice::Watchdog => self.alive(now),
            Notice::WatchdogTrigger => self.event(ProviderEvent::WatchdogMissed),
            Notice::WatchdogInterval(micros) => {
                if self.watchdog.interval.is_some() {
                    self.watchdog.interval = Some((micros / 1000).max(1));
                    self.alive(now);
                }
            }
            Notice::Extend(micros) => {
                if let Some(deadline) = &mut self.watchdog.deadline {
                    *deadline = (*deadline).max(now.saturating_add(micros / 1000));
                }
            }
        }
    }

    fn alive(&mut self, now: u64) {
        if let Some(interval) = self.watchdog.interval {
            self.watchdog.deadline = Some(now.saturating_add(interval));
        }
    }

    fn after_output(&mut self) {
        if self.logs.take_match() {
            self.executed();
            self.status.line_matched = true;
            self.dirty = true;
            self.event(ProviderEvent::LineMatched);
        }
        if let Some(message) = self.logs.take_loss() {
            self.status.say(&message);
            self.dirty = true;
            self.control.broadcast(&FromShim::LogsLost { message });
        }
        self.status.lost_bytes = self.logs.lost();
    }

    fn drain(&mut self) {
        self.logs.pump_all(PUMP_ROUNDS);
        self.after_output();
    }

    // === Processes ===

    /// The child executed, or said why not.
    fn executed(&mut self) {
        let Some((failure, child)) = self.starting.take() else { return };
        match launch::read_failure(failure, &child, &self.file.launch) {
            None => {
                self.status.executed = true;
                let pid = self.status.pid.unwrap_or(0);
                self.event(ProviderEvent::Started { pid });
            }
            Some(message) => {
                // Its exit code means nothing then; the end is told when it is reaped.
                self.status.say(&message);
            }
        }
    }

    fn reap(&mut self) {
        self.more_to_reap = false;
        for _ in 0..REAP_ROUNDS {
            match sys::reap() {
                Reap::One(reaped) => {
                    if self.main.as_ref().is_some_and(|main| main.child && main.pid == reaped.pid) {
                        if self.starting.is_some() {
                            self.executed();
                        }
                        let exit = if self.status.executed { exit_of(reaped.wait_status) } else { Exit::NotStarted };
                        self.main_ended(exit);
                    } else {
                        self.execs.reaped(reaped, &self.file, &self.tree);
                    }
                }
                Reap::Later => {
                    self.childless = false;
                    return;
                }
                Reap::Childless => {
                    self.childless = true;
                    return;
                }
            }
        }
        self.childless = false;
        self.more_to_reap = true;
    }

    /// Finds out how a main process ended that is not our child.
    fn resolve_main(&mut self) {
        let Some(main) = &mut self.main else { return };
        let now = clock::boot_millis();
        if let Some(status) = sys::pidfd_info(main.pidfd.as_fd()).wait_status {
            self.main_ended(exit_of(status));
            return;
        }
        // A zombie: its parent has not reaped it yet. Its status can be read, by those who may; others read 0.
        let zombie = stat(main.pid).filter(|stat| stat.state == 'Z' && stat.start_time == self.status.start_time);
        // Reaped between the two looks.
        if zombie.is_none()
            && let Some(status) = sys::pidfd_info(main.pidfd.as_fd()).wait_status
        {
            self.main_ended(exit_of(status));
            return;
        }
        match zombie {
            Some(stat) if stat.wait_status != 0 || sys::effective_uid() == 0 => {
                self.main_ended(exit_of(stat.wait_status));
            }
            zombie => {
                let until = *main.unresolved_until.get_or_insert(now + SLOW_RETRY_MILLIS);
                if zombie.is_none() || until <= now {
                    self.status.say("it ended while its supervisor was being replaced");
                    self.main_ended(Exit::Unknown);
                }
            }
        }
    }

    fn main_ended(&mut self, exit: Exit) {
        self.read_notices();
        self.drain();
        self.main = None;
        self.notify = None;
        self.watchdog.deadline = None;
        self.status.exit = Some(exit);
        self.dirty = true;
        self.end_tree();
        self.save();
        let message = self.status.message.clone();
        self.event(ProviderEvent::Exited { exit, message });
    }

    /// The main process is gone: so must be the rest.
    fn end_tree(&mut self) {
        self.execs.abort(&self.tree);
        self.reap();
        if !self.childless || !self.tree.is_empty() {
            self.tree.kill(false);
            self.kill_at = Some(clock::boot_millis() + RETRY_MILLIS);
        }
        self.kill_at.get_or_insert(u64::MAX);
    }

    fn is_over(&mut self) -> bool {
        self.reap();
        if !self.childless || !self.tree.is_empty() {
            if self.kill_at == Some(u64::MAX) {
                self.kill_at = Some(clock::boot_millis());
            }
            return false;
        }
        // Nobody is left who could write: what is in the pipes now is all there will ever be. Somebody outside may
        // have been handed a copy of them and hold them open; there is nothing of ours to wait for.
        for _ in 0..1024 {
            let before = self.logs.is_eof();
            self.drain();
            if before || STREAMS.iter().all(|stream| self.logs.pump(*stream) != super::logs::Pumped::Some) {
                break;
            }
        }
        self.after_output();
        let now = clock::boot_millis();
        self.tell_finished(now);
        self.execs.is_empty()
    }

    // === Requests ===

    fn request(&mut self, connection: u64, request: ToShim) {
        match request {
            ToShim::Ping { id } => self.control.send(connection, &FromShim::Done { id }),
            ToShim::Terminate { id, signal, grace_ms } => {
                self.terminate(signal, grace_ms);
                // The answer means that the wish outlives us.
                self.save();
                self.control.send(connection, &FromShim::Done { id });
            }
            ToShim::Exec { id, command, timeout_ms } => {
                if self.status.exit.is_some() {
                    let message = "the instance does not run".to_owned();
                    self.control.send(connection, &FromShim::Refused { id, message });
                    return;
                }
                let from = (connection, id);
                let null = self.null.as_fd();
                if let Err(message) = self.execs.start(&self.file, &self.tree, null, from, &command, timeout_ms) {
                    self.tell(exec::not_started(connection, id, message));
                }
            }
        }
    }

    fn tell(&mut self, finished: exec::Finished) {
        let exec::Finished { id, connection, exit, output } = finished;
        self.control.send(connection, &FromShim::Executed { id, exit, output });
    }

    fn tell_finished(&mut self, now: u64) {
        for finished in self.execs.tick(now, &self.tree) {
            self.tell(finished);
        }
    }

    fn terminate(&mut self, signal: i32, grace_ms: u64) {
        let Some(main) = &self.main else { return };
        let now = clock::boot_millis();
        let earlier = self.status.stop;
        let wanted = if signal == libc::SIGKILL { now } else { now.saturating_add(grace_ms) };
        let kill_at = earlier.map_or(wanted, |stop| stop.kill_at.min(wanted));
        if earlier.is_none_or(|stop| stop.signal != signal) {
            sys::pidfd_signal(main.pidfd.as_fd(), signal);
            // A stopped process would not see it.
            sys::pidfd_signal(main.pidfd.as_fd(), libc::SIGCONT);
        }
        self.status.stop = Some(Stop { signal, kill_at });
        self.dirty = true;
        if kill_at <= now {
            self.kill_all();
        }
    }

    fn kill_all(&mut self) {
        if let Some(main) = &self.main {
            sys::pidfd_signal(main.pidfd.as_fd(), libc::SIGKILL);
        }
        self.tree.kill(self.kills > 0);
        self.kills += 1;
        self.kill_at = Some(clock::boot_millis() + RETRY_MILLIS);
    }

    // === Deadlines ===

    fn deadline(&self) -> Option<u64> {
        [
            self.status.stop.filter(|_| self.main.is_some() && self.kill_at.is_none()).map(|stop| stop.kill_at),
            self.watchdog.deadline,
            self.kill_at.filter(|at| *at != u64::MAX),
            self.execs.deadline(),
            self.retry_write_at,
            self.main.as_ref().and_then(|main| main.unresolved_until).map(|_| clock::boot_millis() + RETRY_MILLIS),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn tick(&mut self) {
        let now = clock::boot_millis();
        if self.main.as_ref().is_some_and(|main| main.unresolved_until.is_some()) {
            self.resolve_main();
        }
        if self.watchdog.deadline.is_some_and(|deadline| deadline <= now) {
            // Said once; the next sign of life arms it again.
            self.watchdog.deadline = None;
            self.event(ProviderEvent::WatchdogMissed);
        }
        let over = self.main.is_some() && self.status.stop.is_some_and(|stop| stop.kill_at <= now);
        if self.kill_at.is_some_and(|at| at <= now) || (over && self.kill_at.is_none()) {
            self.kill_all();
            if self.kills > 50 {
                // Something that cannot be killed (a process in the kernel's hands): wait for it without haste.
                self.kill_at = Some(now + SLOW_RETRY_MILLIS);
            }
        }
        self.tell_finished(now);
    }

    // === Records ===

    fn event(&mut self, event: ProviderEvent) {
        self.control.broadcast(&FromShim::Event(event));
    }

    /// Writes the status if it changed. A disk that is full is tried again; until then it lives in memory.
    fn save(&mut self) {
        let now = clock::boot_millis();
        if !self.dirty || self.retry_write_at.is_some_and(|at| at > now) {
            return;
        }
        match self.folder.write_status(&self.status) {
            Ok(()) => {
                self.dirty = false;
                self.retry_write_at = None;
            }
            Err(_) => self.retry_write_at = Some(now + SLOW_RETRY_MILLIS),
        }
    }

    /// The tree is proven empty and the logs are complete.
    fn finish(mut self) {
        self.logs.finish();
        for _ in 0..50 {
            if self.tree.remove_group() {
                break;
            }
            // The last process has left the group's list but not yet the group; there is no event for that.
            rest(RETRY_MILLIS);
        }
        for name in FIFOS {
            let _ = fs::remove_file(name);
        }
        self.status.gone = true;
        self.dirty = true;
        loop {
            self.save();
            // Nobody can read the record of a folder that was deleted under us.
            if !self.dirty || fs::metadata(".").is_ok_and(|folder| folder.nlink() == 0) {
                break;
            }
            // The end must not be lost for want of disk space. Nothing else is left to do, so waiting is all right.
            rest(SLOW_RETRY_MILLIS);
        }
        self.event(ProviderEvent::Gone);
        let _ = fs::remove_file(CONTROL);
        for _ in 0..50 {
            if self.control.is_flushed() {
                break;
            }
            rest(RETRY_MILLIS);
            let ids: Vec<u64> = self.control.connections().map(|(id, ..)| id).collect();
            for id in ids {
                self.control.flush(id);
            }
        }
    }
}

fn rest(millis: u64) {
    std::thread::sleep(std::time::Duration::from_millis(millis));
}

fn fail(status: &mut Status, message: &str) {
    status.exit = Some(Exit::NotStarted);
    status.say(message);
}

/// Opens our ends of the FIFOs, after making them if they are new.
fn open_fifos(make: bool) -> io::Result<[OwnedFd; 2]> {
    let open = |name: &str| -> io::Result<OwnedFd> {
        match rustix::fs::mkfifoat(rustix::fs::CWD, name, Mode::RUSR | Mode::WUSR) {
            Err(rustix::io::Errno::EXIST) => {}
            Ok(()) if make => {}
            // A killed shim had finished with them already: an empty one stands for "nothing more".
            made => made?,
        }
        Ok(rustix::fs::open(name, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?)
    };
    Ok([open(FIFOS[0])?, open(FIFOS[1])?])
}

/// Finds the main process that another shim started.
fn find_main(pid: u32, start_time: u64, inherited: Option<OwnedFd>) -> Option<Main> {
    let by_number = || {
        let pidfd = sys::pidfd_open(pid).ok()?;
        // After opening: a number that was given to somebody else since shows another start.
        stat(pid).filter(|stat| stat.start_time == start_time)?;
        Some(pidfd)
    };
    // A descriptor that a server held since before keeps what the number forgets when the process is reaped.
    let is_pidfd = |fd: &OwnedFd| {
        fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(fd)))
            .is_ok_and(|target| target.to_string_lossy().contains("pidfd"))
    };
    let pidfd = by_number().or_else(|| inherited.filter(is_pidfd))?;
    Some(Main { pid, pidfd, child: false, unresolved_until: None })
}
