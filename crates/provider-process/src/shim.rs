//! The shim: parent of one instance's program.
//!
//! `shim [--adopt] [--inherit] DIR` supervises the launch in the launch folder `DIR` until its tree is gone, then
//! records that and ends. With `--inherit`, descriptor 0 is a connection to the provider, descriptor 1 the folder's
//! lock, and, with `--adopt`, descriptor 2 may be a pidfd of the main process. With `--adopt` it takes over from a shim
//! that was killed. `shim --zygote …` supervises nothing: it forks shims when it is asked (`shim/zygote.rs`).
//!
//! ```text
//!            fork, record, go            exec          main process ends          tree empty, logs at EOF
//! prepared ───────────────────▶ starting ────▶ running ─────────────────▶ ending ─────────────────────────▶ gone
//!     │                            │ exec fails                              ▲ kills the rest of the tree
//!     └────────────────────────────┴─────────────────────────────────────────┘
//! ```
//!
//! It has one thread and one poll loop, sets no timer unless a deadline is pending, and is deaf to the signals that end
//! sessions. It decides nothing: how to stop comes with the request.

mod control;
mod exec;
mod launch;
mod logs;
mod notify;
mod supervise;
mod tree;
mod zygote;

use std::{
    ffi::OsString,
    io,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    process::ExitCode,
};

use rustix::fs::{Mode, OFlags};

use crate::{
    folder::{Folder, LaunchFile, Lock},
    secrets, sys,
};

pub(crate) use {
    tree::{Stat, stat},
    zygote::FLAG as ZYGOTE,
};

/// Runs a shim. `args` are the arguments after the word `shim`. Call it first thing in `main`, in a process with one
/// thread and nothing open: it closes every descriptor that it was not told of.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let Some(arguments) = Arguments::parse(args) else {
        return ExitCode::from(2);
    };
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        // There is nobody to tell: what could be recorded is in the status, and the provider sees the rest.
        Err(_) => ExitCode::FAILURE,
    }
}

struct Arguments {
    folder: PathBuf,
    adopt: bool,
    inherit: bool,
    zygote: bool,
}

impl Arguments {
    fn parse(args: impl IntoIterator<Item = OsString>) -> Option<Self> {
        let (mut folder, mut adopt, mut inherit, mut zygote) = (None, false, false, false);
        for arg in args {
            match arg.to_str() {
                Some("--adopt") => adopt = true,
                Some("--inherit") => inherit = true,
                Some(zygote::FLAG) => zygote = true,
                // A zygote's further arguments only make room.
                _ if folder.is_none() => folder = Some(PathBuf::from(arg)),
                _ if zygote => {}
                _ => return None,
            }
        }
        Some(Self { folder: folder?, adopt, inherit, zygote })
    }
}

/// What a shim is given by whoever starts it.
struct Task {
    folder: PathBuf,
    adopt: bool,
    connection: Option<OwnedFd>,
    /// `None`: it has to take the lock itself.
    lock: Option<Lock>,
    pidfd: Option<OwnedFd>,
}

/// What a shim has in hand before it touches the launch.
struct Prepared {
    folder: Folder,
    file: LaunchFile,
    lock: Lock,
    null: OwnedFd,
    signals: OwnedFd,
    connection: Option<OwnedFd>,
    pidfd: Option<OwnedFd>,
}

fn run(arguments: &Arguments) -> io::Result<()> {
    sys::close_from(3);
    rustix::process::umask(Mode::from_raw_mode(0o077));
    let mut inherited = Vec::new();
    for number in 0..if arguments.inherit { 3 } else { 0 } {
        inherited.push(sys::take_inherited(number)?);
    }
    let zygote_socket = if arguments.zygote { Some(sys::take_inherited(0)?) } else { None };
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    sys::null_standard(null.as_fd())?;
    if let Some(socket) = zygote_socket {
        return match zygote::serve(socket, &arguments.folder)? {
            Some(task) => supervise(task, null),
            None => Ok(()),
        };
    }
    let mut inherited = inherited.into_iter();
    let task = Task {
        folder: arguments.folder.clone(),
        adopt: arguments.adopt,
        connection: inherited.next(),
        lock: inherited.next().map(Lock),
        pidfd: inherited.next().filter(|_| arguments.adopt),
    };
    supervise(task, null)
}

fn supervise(task: Task, null: OwnedFd) -> io::Result<()> {
    let signals = sys::prepare_signals()?;
    // Fails for a process group leader (started by hand from a shell), which then stays in its session.
    let _ = rustix::process::setsid();
    rustix::process::set_child_subreaper(rustix::process::Pid::from_raw(1))?;
    sys::name_process(c"orchestra-shim");
    rustix::process::chdir(&task.folder)?;
    let folder = Folder::here();
    let lock = match task.lock {
        Some(lock) => lock,
        None => folder.try_lock()?.ok_or_else(|| io::Error::other("another supervisor lives"))?,
    };
    if let Some(fd) = &task.connection {
        rustix::io::ioctl_fionbio(fd, true)?;
    }
    let mut file = folder.read_launch()?;
    match secrets::hear(&file.launch, task.connection.as_ref().map(AsFd::as_fd)) {
        Ok(variables) => file.launch.env.extend(variables),
        // Whoever takes over watches a program that has them.
        Err(_) if task.adopt => {}
        Err(error) => return Err(error),
    }
    let status = if task.adopt { folder.read_status()? } else { None };
    let prepared = Prepared { folder, file, lock, null, signals, connection: task.connection, pidfd: task.pidfd };
    match (task.adopt, status) {
        (false, _) => supervise::Shim::start(prepared)?.run(),
        (true, Some(status)) if !status.gone => supervise::Shim::adopt(prepared, status)?.run(),
        (true, _) => Ok(()),
    }
}
