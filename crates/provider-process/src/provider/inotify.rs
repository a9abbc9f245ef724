//! Waiting for changes of files, without looking at them again and again.

use std::{
    ffi::OsString,
    io,
    mem::MaybeUninit,
    os::{fd::OwnedFd, unix::ffi::OsStringExt as _},
    path::Path,
};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use tokio::io::unix::AsyncFd;

use crate::sys;

/// Something changed in a watched folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Change {
    /// Which watch; `None` if changes were missed and everything must be looked at.
    pub(super) watch: Option<i32>,
    /// A folder was made in it, with this name.
    pub(super) folder: Option<OsString>,
}

/// Watches over folders.
#[derive(Debug)]
pub(super) struct Inotify(AsyncFd<OwnedFd>);

impl Inotify {
    pub(super) fn new() -> io::Result<Self> {
        let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        Ok(Self(sys::watch_readable(fd)?))
    }

    /// Watches for entries that are made, moved or written in a folder.
    pub(super) fn watch(&self, path: &Path) -> io::Result<i32> {
        let flags = WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::MODIFY | WatchFlags::ONLYDIR;
        Ok(inotify::add_watch(self.0.get_ref(), path, flags)?)
    }

    /// Waits for changes. Cancel safe: what was not returned is returned by the next call.
    pub(super) async fn changes(&self) -> io::Result<Vec<Change>> {
        loop {
            let mut ready = self.0.readable().await?;
            let mut buffer = [MaybeUninit::uninit(); 4096];
            let mut reader = inotify::Reader::new(self.0.get_ref(), &mut buffer);
            let mut changes: Vec<Change> = Vec::new();
            let failed = loop {
                // One buffer at a time; the rest makes the descriptor readable again.
                if !changes.is_empty() && reader.is_buffer_empty() {
                    return Ok(changes);
                }
                match reader.next() {
                    Ok(event) => {
                        let flags = event.events();
                        let is_folder = flags.contains(ReadFlags::ISDIR);
                        let name = event.file_name().filter(|_| is_folder);
                        let change = Change {
                            watch: (!flags.contains(ReadFlags::QUEUE_OVERFLOW)).then(|| event.wd()),
                            folder: name.map(|name| OsString::from_vec(name.to_bytes().to_vec())),
                        };
                        if changes.last() != Some(&change) {
                            changes.push(change);
                        }
                    }
                    Err(error) => break error,
                }
            };
            match failed {
                rustix::io::Errno::AGAIN => ready.clear_ready(),
                rustix::io::Errno::INTR => {}
                error => return Err(error.into()),
            }
        }
    }
}
