//! The launch folder: the record of one launch in the world, shared by providers and shims.
//!
//! The lock is taken before anything else is written and handed on from the provider to the shim it spawns, as an
//! inherited descriptor, so that there is no instant at which a second supervisor could begin. Whoever gets the lock
//! therefore knows that no supervisor lives, and reads from `status.json` what the last one had come to.
//!
//! Nothing is fsynced: after a power loss every process is dead, and the boot id in the record says so.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write as _},
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

use orchestra_model::{
    EnvironmentId,
    launch::{Exit, Launch, LaunchKey, Observed},
    time::UnixMillis,
};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

/// Version of the files and of the control protocol.
pub(crate) const VERSION: u32 = 1;

pub(crate) const LOCK: &str = "lock";
pub(crate) const LAUNCH: &str = "launch.json";
pub(crate) const STATUS: &str = "status.json";
pub(crate) const STATUS_NEW: &str = "status.json.new";
pub(crate) const CONTROL: &str = "control";
pub(crate) const FIFOS: [&str; 2] = ["stdout", "stderr"];

/// What is to be run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct LaunchFile {
    pub(crate) version: u32,
    /// Random; makes the marker and the notify socket of this launch unlike any other's on the machine.
    pub(crate) nonce: String,
    /// Boot in which it was written.
    pub(crate) boot: String,
    /// Where its logs go.
    pub(crate) logs: PathBuf,
    /// Control group to make for it, if the machine allows one.
    pub(crate) cgroup: Option<PathBuf>,
    /// What of the launch's limits this machine does not enforce, in words.
    pub(crate) shortfall: Option<String>,
    pub(crate) launch: Launch,
}

impl LaunchFile {
    /// Value of `ORCHESTRA_LAUNCH` in the environment of each process of the tree.
    pub(crate) fn marker(&self) -> String {
        format!("{}@{}", self.launch.key, self.nonce)
    }
}

/// A stop that was begun, so that another shim can go on with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stop {
    /// Last signal that was sent.
    pub(crate) signal: i32,
    /// Boot time in milliseconds at which the tree is killed.
    pub(crate) kill_at: u64,
}

/// What became of a launch.
#[expect(clippy::struct_field_names, reason = "`status_text` is the text of `STATUS=`, as in `Observed`")]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Status {
    pub(crate) version: u32,
    /// Boot in which it runs.
    pub(crate) boot: String,
    /// Present shim.
    pub(crate) shim: u32,
    /// Session of the program: the process id of the first shim.
    pub(crate) session: u32,
    /// Main process, also after it ended. `None` if there never was one.
    pub(crate) pid: Option<u32>,
    /// Its start in clock ticks since boot; tells it from a later process with the same number.
    pub(crate) start_time: u64,
    pub(crate) started_at: Option<UnixMillis>,
    /// Its program runs, as far as is known.
    pub(crate) executed: bool,
    /// Whether the tree lives in the control group of the launch file.
    pub(crate) in_cgroup: bool,
    pub(crate) notified_ready: bool,
    pub(crate) line_matched: bool,
    pub(crate) status_text: Option<String>,
    pub(crate) exit: Option<Exit>,
    pub(crate) gone: bool,
    pub(crate) message: Option<String>,
    pub(crate) stop: Option<Stop>,
    /// Bytes of output that could not be written.
    pub(crate) lost_bytes: u64,
}

impl Status {
    pub(crate) fn new(boot: String, shim: u32) -> Self {
        Self {
            version: VERSION,
            boot,
            shim,
            session: shim,
            pid: None,
            start_time: 0,
            started_at: None,
            executed: false,
            in_cgroup: false,
            notified_ready: false,
            line_matched: false,
            status_text: None,
            exit: None,
            gone: false,
            message: None,
            stop: None,
            lost_bytes: 0,
        }
    }

    /// Adds a sentence to the message.
    pub(crate) fn say(&mut self, sentence: &str) {
        match &mut self.message {
            Some(message) if message.contains(sentence) => {}
            Some(message) => {
                message.push_str("; ");
                message.push_str(sentence);
            }
            None => self.message = Some(sentence.to_owned()),
        }
    }

    pub(crate) fn observed(&self, key: LaunchKey) -> Observed {
        Observed {
            key,
            pid: if self.exit.is_none() { self.pid } else { None },
            started_at: self.started_at,
            notified_ready: self.notified_ready,
            line_matched: self.line_matched,
            status_text: self.status_text.clone(),
            exit: self.exit,
            gone: self.gone,
            message: self.message.clone(),
        }
    }
}

/// The folder of one launch.
#[derive(Clone, Debug)]
pub(crate) struct Folder(PathBuf);

/// Proof that no other supervisor acts on a folder.
#[derive(Debug)]
pub(crate) struct Lock(pub(crate) OwnedFd);

impl Folder {
    pub(crate) fn of(root: &Path, key: &LaunchKey) -> Self {
        Self(environment_path(root, &key.environment).join(key.instance.to_string()).join(key.attempt.to_string()))
    }

    /// The folder that is the current directory.
    pub(crate) fn here() -> Self {
        Self(PathBuf::from("."))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn create(&self) -> io::Result<()> {
        match DirBuilder::new().mode(0o700).create(&self.0) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => create_private(&self.0),
            Err(error) => Err(error),
        }
    }

    /// Takes the lock if no supervisor lives. `None` if one does; an error of kind `NotFound` if there is no folder.
    pub(crate) fn try_lock(&self) -> io::Result<Option<Lock>> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(self.0.join(LOCK))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        // Between open and flock the folder may have been removed and made again; a lock on the old file proves nothing.
        let (held, named) = (rustix::fs::fstat(&file)?, fs::metadata(self.0.join(LOCK))?);
        if held.st_ino != named.ino() || held.st_dev != named.dev() {
            return Ok(None);
        }
        Ok(Some(Lock(file.into())))
    }

    /// Writes the launch file of a new launch. Needs the lock.
    pub(crate) fn write_launch(&self, file: &LaunchFile, _: &Lock) -> io::Result<()> {
        let json = serde_json::to_vec(file)?;
        let mut out =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(self.0.join(LAUNCH))?;
        out.write_all(&json)
    }

    pub(crate) fn read_launch(&self) -> io::Result<LaunchFile> {
        let file: LaunchFile = serde_json::from_slice(&fs::read(self.0.join(LAUNCH))?)?;
        if file.version != VERSION {
            return Err(io::Error::other(format!("launch file of version {}, expected {VERSION}", file.version)));
        }
        Ok(file)
    }

    /// What the last supervisor recorded; `None` if none ever did.
    pub(crate) fn read_status(&self) -> io::Result<Option<Status>> {
        match fs::read(self.0.join(STATUS)) {
            Ok(json) => {
                let status: Status = serde_json::from_slice(&json)?;
                if status.version != VERSION {
                    let text = format!("status file of version {}, expected {VERSION}", status.version);
                    return Err(io::Error::other(text));
                }
                Ok(Some(status))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Replaces the status. Only the holder of the lock may.
    pub(crate) fn write_status(&self, status: &Status) -> io::Result<()> {
        let json = serde_json::to_vec(status)?;
        let new = self.0.join(STATUS_NEW);
        File::create(&new)?.write_all(&json)?;
        fs::rename(new, self.0.join(STATUS))
    }

    /// Takes back a launch that was written but never run. Needs the lock.
    pub(crate) fn void(&self, _: &Lock) -> io::Result<()> {
        match fs::remove_file(self.0.join(LAUNCH)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Deletes the folder, and the folders above it that became empty, up to the environment's. Needs the lock.
    pub(crate) fn remove(&self, _: &Lock) -> io::Result<()> {
        fs::remove_dir_all(&self.0)?;
        if let Some(instance) = self.0.parent() {
            // Fails if other attempts are there, which is what is wanted.
            let _ = fs::remove_dir(instance);
        }
        Ok(())
    }
}

/// Folder of an environment below a root.
pub(crate) fn environment_path(root: &Path, environment: &EnvironmentId) -> PathBuf {
    root.join(environment.stack.as_str()).join(environment.environment.as_str())
}

/// Makes a folder and those above it for the owner alone.
pub(crate) fn create_private(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Entries of a folder whose names parse as `T`; none if it does not exist.
pub(crate) fn entries<T: std::str::FromStr>(path: &Path) -> io::Result<Vec<T>> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        Err(error) => return Err(error),
    };
    let mut names = Vec::new();
    for entry in entries {
        if let Some(name) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) {
            names.push(name);
        }
    }
    Ok(names)
}

/// Identity of this boot of the machine.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim_end().to_owned())
}
