//! The provider's end of the zygote: keeps one alive, and asks it for shims.
//!
//! `shim/zygote.rs` says what it is. Without one, as just after the start or just after it was killed, shims are
//! executed.

use std::{
    ffi::OsStr,
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use orchestra_task::{TaskKind, TaskTree};
use rustix::{
    net::{
        AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, sendmsg,
        socketpair,
    },
    process::{WaitId, WaitIdOptions, waitid},
};

use super::{Options, blocking};
use crate::{folder::Folder, shim, sys};

/// Bytes that the path of a launch folder may be longer than that of the folder of all.
const ROOM: usize = 256;
/// First and longest pause before a zygote that ended is replaced.
const PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Whoever is asked for shims at present. Clones are handles to the same one.
// Its lock is held for one system call that does not wait, and never across an await.
#[derive(Clone, Debug, Default)]
pub(super) struct Zygote(Arc<Mutex<Option<Process>>>);

#[derive(Debug)]
struct Process {
    socket: OwnedFd,
    pidfd: OwnedFd,
}

impl Zygote {
    /// Keeps a zygote alive until the tree is cancelled.
    pub(super) fn keep(options: &Options, tree: &TaskTree) -> Self {
        let zygote = Self::default();
        let (kept, options) = (Arc::downgrade(&zygote.0), options.clone());
        tree.start(TaskKind::Connection, "keep zygote", async move {
            let mut pause = PAUSE;
            loop {
                let options = options.clone();
                let began = tokio::time::Instant::now();
                match blocking(move || Process::spawn(&options)).await {
                    Ok(process) => {
                        let Ok(watched) = process.pidfd.try_clone().and_then(sys::watch_readable) else { return };
                        // Nobody is left who could ask.
                        let Some(place) = kept.upgrade() else { return };
                        *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(process);
                        drop(place);
                        let _ = watched.readable().await;
                        let _ = waitid(WaitId::PidFd(watched.get_ref().as_fd()), WaitIdOptions::EXITED);
                        let Some(place) = kept.upgrade() else { return };
                        *place.lock().unwrap_or_else(PoisonError::into_inner) = None;
                    }
                    Err(error) => tracing::warn!(%error, "no zygote; shims are executed one by one"),
                }
                pause = if began.elapsed() > LONGEST_PAUSE { PAUSE } else { (pause * 2).min(LONGEST_PAUSE) };
                tokio::time::sleep(pause).await;
            }
        });
        zygote
    }

    /// Asks for a shim. `false` if there is nobody to ask; otherwise the descriptors are closed in every process once
    /// there is no shim and will be none.
    pub(super) fn fork(&self, folder: &Folder, connection: BorrowedFd<'_>, lock: BorrowedFd<'_>) -> bool {
        let place = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(process) = &*place else { return false };
        let descriptors = [connection, lock];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let path = folder.path().as_os_str().as_encoded_bytes();
        control.push(SendAncillaryMessage::ScmRights(&descriptors))
            && sendmsg(&process.socket, &[IoSlice::new(path)], &mut control, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
                .is_ok()
    }

    /// Ends a zygote that does not answer, and with it all that was asked of it; it is replaced.
    pub(super) fn kill(&self) {
        if let Some(process) = &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            sys::pidfd_signal(process.pidfd.as_fd(), libc::SIGKILL);
        }
    }
}

impl Process {
    fn spawn(options: &Options) -> io::Result<Self> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        let mut command = Command::new(&options.shim_program);
        // Nothing here may keep the standard library from posix_spawn: a fork would copy the server's page tables.
        let child = command
            .args(&options.shim_args)
            .arg(shim::ZYGOTE)
            .arg(&options.root)
            // Room for the folder's name in the command lines of the children.
            .arg(OsStr::new(&" ".repeat(ROOM)))
            .env_clear()
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self { socket: ours, pidfd: sys::pidfd_open(child.id())? })
    }
}
