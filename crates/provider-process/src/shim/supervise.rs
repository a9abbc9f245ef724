//! The shim's state and its poll loop.
//!
//! One turn: write down what changed, wait, then handle in this order what is there: messages of the program, its
//! output, failures to exec, ended processes, commands, requests, deadlines. A program that says `READY=1`, prints its
//! last line and exits is thereby reported in that order.

mod begin;

use std::{
    fs, io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
};

use orchestra_model::launch::{Exit, ProviderEvent};
use orchestra_provider::LogStream;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{
    control::Control,
    exec::{self, Execs},
    launch,
    logs::LogWriter,
    notify::{Notice, NotifySocket},
    stat,
    tree::Tree,
};
use crate::{
    clock,
    folder::{CONTROL, FIFOS, Folder, LaunchFile, Lock, Status, Stop},
    log_format::STREAMS,
    sys::{self, Child, Reap},
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
