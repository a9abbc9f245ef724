//! How a shim comes to its launch: by starting the program, or by taking over from a shim that was killed.
//!
//! The order of a start is what makes it safe: the child is forked and waits, its number and start time are recorded,
//! and only then it may execute. A shim that is killed at any point between leaves either no program or a record of it.

use std::{
    fs, io,
    os::fd::{AsFd as _, OwnedFd},
};

use orchestra_model::launch::Exit;
use rustix::{
    fs::{Mode, OFlags},
    pipe::PipeFlags,
};

use super::{
    super::{
        Prepared,
        control::Control,
        exec::Execs,
        launch,
        logs::LogWriter,
        notify::NotifySocket,
        stat,
        tree::{Tree, open_group},
    },
    Main, Shim, Watchdog,
};
use crate::{
    cgroup, clock,
    folder::{FIFOS, Status},
    sys::{self, ChildFds},
};

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
        let unheld = FIFOS.into_iter().any(is_unheld);
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
            let ended = main.as_ref().is_none_or(|main| stat(main.pid).is_none_or(|stat| stat.state == 'Z'));
            if unheld && ended {
                // What was in its pipes went with their last holder: nothing but a process can keep a pipe.
                status
                    .say("its last output may be missing (at most 64 KiB a stream): neither server nor shim was there");
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

/// Whether no process has a FIFO open for reading, so that what was in it is gone.
fn is_unheld(name: &str) -> bool {
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    matches!(rustix::fs::open(name, flags, Mode::empty()), Err(rustix::io::Errno::NXIO))
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
