//! The shim: parent of one instance's program.
//!
//! `shim [--adopt] [--inherit] DIR` supervises the launch in the launch folder `DIR` until its tree is gone, then
//! records that and ends. With `--inherit`, descriptor 0 is a connection to the provider, descriptor 1 the folder's
//! lock, and, with `--adopt`, descriptor 2 may be a pidfd of the main process. With `--adopt` it takes over from a shim
//! that was killed.
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

use std::{
    ffi::OsString,
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
    process::ExitCode,
};

use rustix::fs::{Mode, OFlags};

use crate::{
    folder::{Folder, LaunchFile, Lock},
    sys,
};

pub(crate) use tree::stat;

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
}

impl Arguments {
    fn parse(args: impl IntoIterator<Item = OsString>) -> Option<Self> {
        let (mut folder, mut adopt, mut inherit) = (None, false, false);
        for arg in args {
            match arg.to_str() {
                Some("--adopt") => adopt = true,
                Some("--inherit") => inherit = true,
                _ if folder.is_none() => folder = Some(PathBuf::from(arg)),
                _ => return None,
            }
        }
        Some(Self { folder: folder?, adopt, inherit })
    }
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
    let signals = sys::prepare_signals()?;
    // Fails for a process group leader (started by hand from a shell), which then stays in its session.
    let _ = rustix::process::setsid();
    rustix::process::set_child_subreaper(rustix::process::Pid::from_raw(1))?;
    rustix::process::umask(Mode::from_raw_mode(0o077));
    sys::name_process(c"orchestra-shim");
    rustix::process::chdir(&arguments.folder)?;
    let folder = Folder::here();

    let (mut connection, mut pidfd, lock) = if arguments.inherit {
        (Some(sys::take_inherited(0)?), Some(sys::take_inherited(2)?), Lock(sys::take_inherited(1)?))
    } else {
        let lock = folder.try_lock()?.ok_or_else(|| io::Error::other("another supervisor lives"))?;
        (None, None, lock)
    };
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    sys::null_standard(null.as_fd())?;
    if !arguments.adopt {
        pidfd = None;
    }
    if let Some(fd) = &connection {
        rustix::io::ioctl_fionbio(fd, true)?;
    }
    let file = folder.read_launch()?;
    let status = if arguments.adopt { folder.read_status()? } else { None };
    let prepared = Prepared { folder, file, lock, null, signals, connection: connection.take(), pidfd };
    match (arguments.adopt, status) {
        (false, _) => supervise::Shim::start(prepared)?.run(),
        (true, Some(status)) if !status.gone => supervise::Shim::adopt(prepared, status)?.run(),
        (true, _) => Ok(()),
    }
}
