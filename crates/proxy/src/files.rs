//! The proxy's files in a home, known to both sides: lock, control socket and log, in `HOME/proxy/`.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::AsRawFd as _,
        unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, Mode, OFlags};

/// Exit code of a proxy that found another one alive (`EX_TEMPFAIL` of sysexits.h).
pub(crate) const EXIT_LOCKED: u8 = 75;

/// A log above this size is set aside when the next proxy starts.
const LOG_LIMIT: u64 = 4 << 20;

/// The open directory.
#[derive(Debug)]
pub(crate) struct Files {
    path: PathBuf,
    directory: File,
}

impl Files {
    /// Creates the directory (0700) if need be and opens it.
    pub(crate) fn open(home: &Path) -> io::Result<Self> {
        let path = std::path::absolute(home.join("proxy"))?;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&path)?;
        let directory = rustix::fs::open(&path, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { path, directory: directory.into() })
    }

    /// The directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The control socket through the open directory: a socket address holds 107 bytes of path, a home may be deeper.
    pub(crate) fn socket(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/control.sock", self.directory.as_raw_fd()))
    }

    /// Takes the lock that the serving proxy holds. `None` if another one holds it.
    pub(crate) fn lock(&self) -> io::Result<Option<File>> {
        let path = self.path.join("lock");
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Opens the log for appending.
    pub(crate) fn log(&self) -> io::Result<File> {
        let path = self.path.join("proxy.log");
        if fs::metadata(&path).is_ok_and(|m| m.len() > LOG_LIMIT) {
            fs::rename(&path, self.path.join("proxy.log.1"))?;
        }
        OpenOptions::new().create(true).append(true).mode(0o600).open(path)
    }

    /// The last line of the log, for messages.
    pub(crate) fn last_words(&self) -> Option<String> {
        use std::io::{Read as _, Seek as _, SeekFrom};
        let mut file = File::open(self.path.join("proxy.log")).ok()?;
        let length = file.metadata().ok()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(2048))).ok()?;
        let mut text = Vec::new();
        file.read_to_end(&mut text).ok()?;
        let text = String::from_utf8_lossy(&text).into_owned();
        text.lines().rev().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned)
    }
}
