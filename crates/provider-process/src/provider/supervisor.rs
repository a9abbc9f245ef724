//! The task of one living launch: the server's end of the conversation with its shim.
//!
//! Besides listening it holds three descriptors on the program, so that nothing is lost if the shim is killed: the
//! reading ends of both FIFOs keep unread output alive should the program end before another shim takes over, and a
//! pidfd keeps its exit status. When the connection breaks, the folder's lock tells what happened: the launch came to
//! its end, or its shim was killed and is replaced at once.

use std::{
    cell::OnceCell,
    collections::{HashMap, VecDeque},
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use orchestra_model::{
    Code,
    launch::{Exec, ExecOutcome, LaunchKey, Observed, ProviderEvent, Termination},
};
use orchestra_provider::{Error, Retry};
use orchestra_task::TaskKind;
use rustix::{
    fs::{Mode, OFlags},
    process::{WaitId, WaitIdOptions, waitid},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::UnixStream,
    sync::{mpsc, oneshot},
};

use super::{
    Inner,
    begin::{Connection, Look},
    blocking,
    usage::Place,
};
use crate::{
    clock,
    folder::{FIFOS, Folder, Status},
    shim, sys,
    wire::{FromShim, ToShim, decode, encode},
};

/// Events that may wait for the engine before the shim is no longer listened to.
const OUTBOX: usize = 256;
/// Patience with a shim that broke the connection and still lives.
const EXIT_PATIENCE: Duration = Duration::from_secs(2);
/// First and longest pause between attempts to replace a shim that cannot be replaced.
const RETRY: Duration = Duration::from_millis(2);
const LONGEST_RETRY: Duration = Duration::from_secs(5);

/// A wish concerning a living launch.
pub(super) enum Command {
    Terminate {
        how: Termination,
        reply: oneshot::Sender<Result<(), Error>>,
    },
    Exec {
        exec: Exec,
        reply: oneshot::Sender<Result<ExecOutcome, Error>>,
    },
    Report {
        replay: bool,
        reply: oneshot::Sender<Observed>,
    },
    /// Where its processes are, if its main process runs.
    Locate {
        reply: oneshot::Sender<Option<Place>>,
    },
}

/// A request that the shim has not answered yet.
enum Pending {
    Terminate { request: ToShim, reply: oneshot::Sender<Result<(), Error>> },
    Exec { reply: oneshot::Sender<Result<ExecOutcome, Error>> },
}

pub(super) struct Supervisor {
    inner: Arc<Inner>,
    key: LaunchKey,
    folder: Folder,
    stream: UnixStream,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    outbox: VecDeque<ProviderEvent>,
    commands: mpsc::Receiver<Command>,
    recorded: Option<oneshot::Sender<()>>,
    status: Option<Box<Status>>,
    /// Control group that the launch was to get, once somebody wanted to know.
    group: OnceCell<Option<PathBuf>>,
    held: Held,
    pending: HashMap<u64, Pending>,
    next_id: u64,
}

/// What the server holds on a launch's processes.
#[derive(Default)]
struct Held {
    shim: Option<AsyncFd<OwnedFd>>,
    main: Option<OwnedFd>,
    fifos: Vec<OwnedFd>,
}

/// The events that tell a state to somebody who knows nothing.
pub(super) fn replay(status: &Status) -> Vec<ProviderEvent> {
    let mut events = Vec::new();
    if let (true, Some(pid)) = (status.executed, status.pid) {
        events.push(ProviderEvent::Started { pid });
    }
    if status.notified_ready {
        events.push(ProviderEvent::NotifiedReady);
    }
    if status.line_matched {
        events.push(ProviderEvent::LineMatched);
    }
    if let Some(text) = &status.status_text {
        events.push(ProviderEvent::NotifiedStatus(text.clone()));
    }
    if let Some(exit) = status.exit {
        events.push(ProviderEvent::Exited { exit, message: status.message.clone() });
    }
    if status.gone {
        events.push(ProviderEvent::Gone);
    }
    events
}

impl Supervisor {
    /// Starts the task on a connection. The second result completes once the shim has said that the launch is
    /// recorded, and fails if it never will.
    pub(super) fn start(
        inner: &Arc<Inner>,
        key: &LaunchKey,
        connection: Connection,
    ) -> io::Result<(mpsc::Sender<Command>, oneshot::Receiver<()>)> {
        let (sender, commands) = mpsc::channel(64);
        let (recorded, is_recorded) = oneshot::channel();
        let supervisor = Self {
            inner: Arc::clone(inner),
            key: key.clone(),
            folder: inner.folder(key),
            stream: UnixStream::from_std(connection.stream.into())?,
            incoming: Vec::new(),
            outgoing: Vec::new(),
            outbox: VecDeque::new(),
            commands,
            recorded: Some(recorded),
            status: None,
            group: OnceCell::new(),
            held: Held { shim: connection.child.and_then(|fd| sys::watch_readable(fd).ok()), ..Held::default() },
            pending: HashMap::new(),
            next_id: 0,
        };
        inner.tree.start(TaskKind::Connection, "supervise launch", supervisor.run());
        Ok((sender, is_recorded))
    }

    async fn run(mut self) {
        loop {
            self.listen().await;
            if !self.reconnect().await {
                break;
            }
        }
        // Refuse new wishes first, so that none is accepted and then forgotten.
        self.commands.close();
        while let Ok(command) = self.commands.try_recv() {
            self.command(command);
        }
        for (_, pending) in self.pending.drain() {
            match pending {
                Pending::Terminate { reply, .. } => _ = reply.send(Ok(())),
                Pending::Exec { reply } => _ = reply.send(Err(interrupted(&self.key))),
            }
        }
        for event in self.outbox {
            if self.inner.events.send((self.key.clone(), event)).await.is_err() {
                return;
            }
        }
    }

    /// Talks with the shim until the connection breaks.
    async fn listen(&mut self) {
        let events = self.inner.events.clone();
        loop {
            if events.is_closed() {
                // Nobody will ever take them; the launch itself is still looked after.
                self.outbox.clear();
            }
            let interest = match (self.outbox.len() < OUTBOX, self.outgoing.is_empty()) {
                (true, true) => Some(Interest::READABLE),
                (true, false) => Some(Interest::READABLE | Interest::WRITABLE),
                (false, false) => Some(Interest::WRITABLE),
                (false, true) => None,
            };
            // Every arm is cancel safe: readiness and permits are taken again, and a command is not lost by `recv`.
            tokio::select! {
                permit = events.reserve(), if !self.outbox.is_empty() => {
                    if let (Ok(permit), Some(event)) = (permit, self.outbox.pop_front()) {
                        permit.send((self.key.clone(), event));
                    }
                }
                Some(command) = self.commands.recv() => self.command(command),
                ready = self.stream.ready(interest.unwrap_or(Interest::READABLE)), if interest.is_some() => {
                    let Ok(ready) = ready else { return };
                    if ready.is_writable() && !self.outgoing.is_empty() && self.write().is_err() {
                        return;
                    }
                    if ready.is_readable() && !self.read() {
                        return;
                    }
                }
            }
        }
    }

    fn write(&mut self) -> io::Result<()> {
        match self.stream.try_write(&self.outgoing) {
            Ok(written) => {
                self.outgoing.drain(..written);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Reads and handles what is there. `false` at the end of the conversation.
    fn read(&mut self) -> bool {
        let mut buffer = [0; 4096];
        let open = loop {
            match self.stream.try_read(&mut buffer) {
                Ok(0) => break false,
                Ok(read) => self.incoming.extend_from_slice(&buffer[..read]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break true,
                Err(_) => break false,
            }
        };
        loop {
            match decode(&mut self.incoming) {
                Ok(Some(message)) => self.message(message),
                Ok(None) => return open,
                Err(error) => {
                    tracing::warn!(launch = %self.key, %error, "the shim says something that is not understood");
                    return false;
                }
            }
        }
    }

    fn message(&mut self, message: FromShim) {
        match message {
            FromShim::State(status) => {
                self.hold(&status);
                self.outbox.extend(replay(&status));
                self.status = Some(status);
                if let Some(recorded) = self.recorded.take() {
                    let _ = recorded.send(());
                }
            }
            FromShim::Event(event) => {
                self.note(&event);
                self.outbox.push_back(event);
            }
            FromShim::LogsLost { message } => {
                tracing::warn!(launch = %self.key, "{message}");
                if let Some(status) = &mut self.status {
                    status.say(&message);
                }
            }
            FromShim::Done { id } => {
                if let Some(Pending::Terminate { reply, .. }) = self.pending.remove(&id) {
                    let _ = reply.send(Ok(()));
                }
            }
            FromShim::Executed { id, exit, output } => {
                if let Some(Pending::Exec { reply }) = self.pending.remove(&id) {
                    let _ = reply.send(Ok(ExecOutcome { exit, output }));
                }
            }
            FromShim::Refused { id, message } => match self.pending.remove(&id) {
                Some(Pending::Exec { reply }) => {
                    let message = format!("nothing can run beside {}: {message}", self.key);
                    let _ = reply.send(Err(Error::new(Code::NOT_FOUND, Retry::OnChange, message)));
                }
                Some(Pending::Terminate { reply, .. }) => {
                    let message = format!("{} cannot be stopped: {message}", self.key);
                    let retry = Retry::After(Duration::from_secs(1));
                    let _ = reply.send(Err(Error::new(Code::STOP_FAILED, retry, message)));
                }
                None => {}
            },
        }
    }

    /// Keeps the known state up with the events.
    fn note(&mut self, event: &ProviderEvent) {
        let Some(status) = &mut self.status else { return };
        match event {
            ProviderEvent::Started { .. } => status.executed = true,
            ProviderEvent::NotifiedReady => status.notified_ready = true,
            ProviderEvent::NotifiedStatus(text) => status.status_text = Some(text.clone()),
            ProviderEvent::LineMatched => status.line_matched = true,
            ProviderEvent::Exited { exit, message } => {
                status.exit = Some(*exit);
                status.message.clone_from(message);
                self.held.main = None;
            }
            ProviderEvent::Gone => status.gone = true,
            ProviderEvent::NotifiedReloading | ProviderEvent::NotifiedStopping | ProviderEvent::WatchdogMissed => {}
        }
    }

    /// Takes hold of the launch's processes. What cannot be held is done without.
    fn hold(&mut self, status: &Status) {
        if self.held.shim.is_none() {
            self.held.shim = sys::pidfd_open(status.shim).and_then(sys::watch_readable).ok();
        }
        if status.exit.is_some() {
            self.held.main = None;
        } else if self.held.main.is_none() {
            self.held.main = status.pid.and_then(|pid| {
                let pidfd = sys::pidfd_open(pid).ok()?;
                shim::stat(pid).filter(|stat| stat.start_time == status.start_time)?;
                Some(pidfd)
            });
        }
        if self.held.fifos.is_empty() && !status.gone {
            let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let open = |name: &&str| rustix::fs::open(self.folder.path().join(name), flags, Mode::empty()).ok();
            self.held.fifos = FIFOS.iter().filter_map(open).collect();
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Report { replay: again, reply } => {
                if let Some(status) = &self.status {
                    if again {
                        self.outbox.extend(replay(status));
                    }
                    let _ = reply.send(status.observed(self.key.clone()));
                }
            }
            Command::Locate { reply } => _ = reply.send(self.place()),
            Command::Terminate { how, reply } => {
                if let Some(status) = self.status.as_ref().filter(|status| status.gone) {
                    self.outbox.extend(replay(status));
                    let _ = reply.send(Ok(()));
                    return;
                }
                let id = self.id();
                let grace_ms = clock::millis(how.grace.duration());
                let request = ToShim::Terminate { id, signal: how.signal.number(), grace_ms };
                encode(&request, &mut self.outgoing);
                self.pending.insert(id, Pending::Terminate { request, reply });
            }
            Command::Exec { exec, reply } => {
                let id = self.id();
                let request = ToShim::Exec { id, command: exec.command, timeout_ms: clock::millis(exec.timeout) };
                encode(&request, &mut self.outgoing);
                self.pending.insert(id, Pending::Exec { reply });
            }
        }
    }

    fn place(&self) -> Option<Place> {
        let status = self.status.as_ref().filter(|status| status.executed && status.exit.is_none())?;
        if status.in_cgroup {
            let group = || self.folder.read_launch().ok().and_then(|file| file.cgroup);
            if let Some(group) = self.group.get_or_init(group) {
                return Some(Place::Group(group.clone()));
            }
        }
        Some(Place::Tree { shim: status.shim, session: status.session })
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// After the connection broke: waits for the shim's end and finds out what it means. `false` if the launch is over.
    async fn reconnect(&mut self) -> bool {
        let mut pause = RETRY;
        let mut shim = self.held.shim.take();
        loop {
            if let Some(pidfd) = &shim {
                // A shim that lives has cut off a slow listener; it is connected to again.
                if tokio::time::timeout(EXIT_PATIENCE, pidfd.readable()).await.is_ok() {
                    // Fails if it is not our child but an earlier server's; then somebody else reaps it.
                    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
                    let _ = waitid(WaitId::PidFd(pidfd.get_ref().as_fd()), options);
                    shim = None;
                }
            }
            let pidfd = self.held.main.as_ref().and_then(|pidfd| pidfd.try_clone().ok());
            let (inner, folder) = (Arc::clone(&self.inner), self.folder.clone());
            match blocking(move || inner.look(&folder, pidfd)).await {
                Ok(Look::Never) => return false,
                Ok(Look::Ended(status)) => {
                    // Say only what was not said before: the usual end has been told event by event.
                    let known = self.status.as_ref().is_some_and(|known| known.gone);
                    if !known {
                        self.outbox.extend(replay(&status));
                        self.status = Some(status);
                    }
                    return false;
                }
                Ok(Look::Connected(connection)) => {
                    self.held.shim = connection.child.and_then(|fd| sys::watch_readable(fd).ok());
                    if let Ok(stream) = UnixStream::from_std(connection.stream.into()) {
                        self.stream = stream;
                        self.incoming.clear();
                        self.ask_again();
                        return true;
                    }
                }
                Ok(Look::Busy) => {}
                Err(error) => {
                    tracing::error!(launch = %self.key, %error, "its shim is gone and cannot be replaced yet");
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_RETRY);
        }
    }

    /// Repeats to a new shim what the old one may not have heard. Commands are not repeated: they may have run.
    fn ask_again(&mut self) {
        self.outgoing.clear();
        let pending = std::mem::take(&mut self.pending);
        for (id, pending) in pending {
            match pending {
                Pending::Terminate { request, reply } => {
                    encode(&request, &mut self.outgoing);
                    self.pending.insert(id, Pending::Terminate { request, reply });
                }
                Pending::Exec { reply } => _ = reply.send(Err(interrupted(&self.key))),
            }
        }
    }
}

fn interrupted(key: &LaunchKey) -> Error {
    let message = format!("the command beside {key} was interrupted");
    Error::new(Code::NOT_FOUND, Retry::After(Duration::ZERO), message)
}
