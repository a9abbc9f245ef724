//! The zygote: a process that is ready to become a shim, from which shims are forked.
//!
//! Most of what a shim's start costs is not its work but its program: executing a binary of twenty megabytes, linking
//! and relocating it. The zygote does that once per server and waits. For each launch the provider sends it the launch
//! folder's path, with a connection and the folder's lock as descriptors; it forks, and the child is the shim. Children
//! share the relocated pages, so that a shim also needs less memory. (Android and Chrome know such a process by this
//! name.)
//!
//! It is a shortcut and nothing depends on it: a provider that finds none, or whose request comes to nothing because it
//! was killed, executes a shim as before. It ends when the provider's end of its socket is closed, whoever closes it.

use std::{
    ffi::OsString,
    fs,
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    os::{fd::OwnedFd, unix::ffi::OsStringExt as _},
    path::{Path, PathBuf},
};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::{Task, tree};
use crate::{folder::Lock, sys};

/// The argument that makes a shim a zygote.
pub(crate) const FLAG: &str = "--zygote";
/// Longest path of a launch folder that the kernel takes.
const MAX_PATH: usize = 4096;

/// Forks shims until the other end is closed. Returns what to supervise in each child, and nothing in the zygote.
pub(super) fn serve(socket: OwnedFd, root: &Path) -> io::Result<Option<Task>> {
    sys::ignore_children()?;
    // Away from whoever gets the signals of a terminal.
    let _ = rustix::process::setsid();
    rustix::process::chdir("/")?;
    sys::name_process(c"orchestra-shims");
    let title = Title::find();
    if let Some(title) = title {
        // Without what only makes room.
        title.set(FLAG, root);
    }
    loop {
        let Some(task) = receive(&socket)? else { return Ok(None) };
        // A fork that fails closes what came with the request, which tells the provider.
        if sys::fork().is_ok_and(|is_child| is_child) {
            drop(socket);
            if let Some(title) = title {
                title.set("--inherit", &task.folder);
            }
            return Ok(Some(task));
        }
    }
}

/// Waits for a request. `None` once there is nobody to ask.
fn receive(socket: &OwnedFd) -> io::Result<Option<Task>> {
    loop {
        let mut path = vec![0; MAX_PATH];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(socket, &mut [IoSliceMut::new(&mut path)], &mut control, RecvFlags::CMSG_CLOEXEC);
        let length = match received {
            Ok(message) => message.bytes,
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        };
        if length == 0 {
            return Ok(None);
        }
        path.truncate(length);
        let mut descriptors = control.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect(),
            _ => Vec::new(),
        });
        if let (Some(connection), Some(lock)) = (descriptors.next(), descriptors.next()) {
            let folder = PathBuf::from(OsString::from_vec(path));
            let (connection, lock) = (Some(connection), Some(Lock(lock)));
            return Ok(Some(Task { folder, adopt: false, connection, lock, pidfd: None }));
        }
        // Too many open files, so that they were not delivered: closed, as above.
    }
}

/// The command line in memory, from [`FLAG`] on, where `ps` reads it. A forked shim shows what it would have been
/// executed with, so that people and `orchestra doctor` see which is whose.
#[derive(Clone, Copy)]
struct Title {
    address: usize,
    room: usize,
}

impl Title {
    /// `None` where the kernel does not say where it is.
    fn find() -> Option<Self> {
        let line = fs::read("/proc/self/cmdline").ok()?;
        let stat = tree::stat(std::process::id())?;
        let flag = FLAG.as_bytes();
        let at = line.windows(flag.len()).position(|window| window == flag)?;
        let known = stat.arguments.start > 0 && stat.arguments.len() == line.len();
        known.then_some(Self { address: stat.arguments.start + at, room: line.len() - at })
    }

    fn set(self, flag: &str, folder: &Path) {
        let mut text = [flag.as_bytes(), b"\0", folder.as_os_str().as_encoded_bytes()].concat();
        // At least one zero ends it; without it the kernel would go on into the environment.
        text.resize(self.room, 0);
        if let Some(last) = text.last_mut() {
            *last = 0;
        }
        sys::overwrite_arguments(self.address, &text);
    }
}
