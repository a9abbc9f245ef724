//! What a provider does to launch folders: begin one, look what became of one, spawn shims.
//!
//! These calls block (briefly). Each acts under the folder's lock and hands it on to the shim it spawns, so that two
//! providers that race find one launch.

use std::{
    fs, io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use orchestra_model::launch::{Exit, Launch};
use rustix::fs::{Mode, OFlags};

use super::Inner;
use crate::{
    cgroup,
    folder::{CONTROL, Folder, LAUNCH, LaunchFile, Lock, STATUS, Status, VERSION},
    log_format, secrets, sys,
};

/// A conversation with a shim.
pub(super) struct Connection {
    pub(super) stream: OwnedFd,
    /// Pidfd of the shim, if it is our child, which must be reaped.
    pub(super) child: Option<OwnedFd>,
}

/// What came of beginning a launch.
pub(super) enum Begun {
    /// A shim was spawned.
    Spawned(Connection),
    /// Somebody did before.
    Existed,
}

/// What there is under a key.
pub(super) enum Look {
    /// Nothing was ever run, and nothing will be.
    Never,
    /// It is gone.
    Ended(Box<Status>),
    /// A shim lives: the old one, or a new one in place of a killed one.
    Connected(Connection),
    /// A supervisor lives that does not answer: it is just starting or ending.
    Busy,
}

/// What a shim is spawned for.
enum Role {
    Start,
    /// To take over from a killed one; perhaps with a pidfd of the main process.
    Adopt(Option<OwnedFd>),
}

impl Inner {
    /// Writes a launch down and makes its shim, unless somebody did before. The shim is forked from the zygote, if there
    /// is one, or `executed`: then an error says what is wrong.
    pub(super) fn begin(&self, launch: Launch, executed: bool) -> io::Result<Begun> {
        let folder = self.folder(&launch.key);
        folder.create()?;
        let Some(lock) = folder.try_lock()? else { return Ok(Begun::Existed) };
        // With the lock in hand nobody is at work here, so a launch file is the trace of an earlier start.
        if fs::exists(folder.path().join(LAUNCH))? || fs::exists(folder.path().join(STATUS))? {
            return Ok(Begun::Existed);
        }
        let nonce = random()?;
        let cgroup = self.enforced.parent.as_ref().map(|parent| {
            parent.join(format!("{}{}-{}-{nonce}", cgroup::PREFIX, launch.key.instance, launch.key.attempt))
        });
        let file = LaunchFile {
            version: VERSION,
            nonce,
            boot: self.boot.clone(),
            logs: log_format::path_of(&self.options.logs, &launch.key),
            cgroup,
            shortfall: self.enforced.shortfall(&launch.resources),
            launch,
        };
        let secrets = self.secrets(&file.launch)?;
        folder.write_launch(&file, &lock)?;
        let forked = if executed { None } else { self.fork_shim(&folder, &lock, &secrets) };
        let shim = match forked {
            Some(connection) => Ok(connection),
            None => self.spawn_shim(&folder, lock, Role::Start, &secrets),
        };
        match shim {
            Ok(connection) => Ok(Begun::Spawned(connection)),
            Err(error) => {
                // Nothing runs; leave no trace of it, so that it can be tried again.
                let _ = fs::remove_file(folder.path().join(LAUNCH));
                Err(error)
            }
        }
    }

    /// Finds out what became of a launch. A killed shim is replaced; `pidfd` of its main process, if somebody holds
    /// one, lets the new one learn an exit that already happened.
    pub(super) fn look(&self, folder: &Folder, pidfd: Option<OwnedFd>) -> io::Result<Look> {
        let lock = match folder.try_lock() {
            Ok(Some(lock)) => lock,
            Ok(None) => {
                return Ok(match connect(folder) {
                    Ok(stream) => Look::Connected(Connection { stream, child: None }),
                    Err(_) => Look::Busy,
                });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Look::Never),
            Err(error) => return Err(error),
        };
        let status = match folder.read_status() {
            Ok(status) => status,
            Err(error) => {
                // Records are replaced atomically, so only a power loss damages one, and then every process is dead.
                match folder.read_launch() {
                    Ok(file) if file.boot == self.boot => return Err(error),
                    Ok(file) => Some(Status::new(file.boot, 0)),
                    Err(_) => {
                        let _ = fs::remove_file(folder.path().join(STATUS));
                        None
                    }
                }
            }
        };
        let Some(mut status) = status else {
            // Still under the lock: whoever wanted to run it has not and cannot any more.
            if let Some(group) = folder.read_launch().ok().and_then(|file| file.cgroup) {
                remove_abandoned(&group);
            }
            folder.void(&lock)?;
            return Ok(Look::Never);
        };
        if status.gone {
            return Ok(Look::Ended(Box::new(status)));
        }
        if status.boot != self.boot {
            status.exit.get_or_insert(Exit::Unknown);
            status.gone = true;
            status.say("the machine was restarted");
            folder.write_status(&status)?;
            return Ok(Look::Ended(Box::new(status)));
        }
        tracing::info!(folder = %folder.path().display(), "the shim was killed; another one takes over");
        // Commands beside the program get them too. Without them it goes on all the same.
        let secrets = folder.read_launch().and_then(|file| self.secrets(&file.launch)).unwrap_or_else(|error| {
            tracing::warn!(folder = %folder.path().display(), %error, "its commands are started without secrets");
            secrets::Message::default()
        });
        self.spawn_shim(folder, lock, Role::Adopt(pidfd), &secrets).map(Look::Connected)
    }

    /// The variables of a launch that secrets are a part of, with their values.
    fn secrets(&self, launch: &Launch) -> io::Result<secrets::Message> {
        secrets::Message::new(launch, &self.options.secrets)
    }

    /// Lets the zygote fork a shim with the lock, and with a connection. `None` if there is none.
    fn fork_shim(&self, folder: &Folder, lock: &Lock, secrets: &secrets::Message) -> Option<Connection> {
        let (ours, theirs) = conversation(secrets).ok()?;
        let asked = self.zygote.fork(folder, theirs.as_fd(), lock.0.as_fd());
        asked.then_some(Connection { stream: ours, child: None })
    }

    /// Executes a shim with the lock, and with a connection.
    fn spawn_shim(
        &self,
        folder: &Folder,
        lock: Lock,
        role: Role,
        secrets: &secrets::Message,
    ) -> io::Result<Connection> {
        let (ours, theirs) = conversation(secrets)?;
        let mut command = Command::new(&self.options.shim_program);
        // Nothing here may keep the standard library from posix_spawn: a fork would copy the server's page tables.
        command
            .args(&self.options.shim_args)
            .arg("--inherit")
            .args(matches!(role, Role::Adopt(_)).then_some("--adopt"))
            .arg(folder.path())
            .env_clear()
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::from(lock.0))
            .stderr(match role {
                Role::Adopt(Some(pidfd)) => Stdio::from(pidfd),
                Role::Adopt(None) | Role::Start => Stdio::null(),
            });
        // Dropping the child neither kills nor reaps it; the supervisor reaps by the descriptor.
        let child = sys::pidfd_open(command.spawn()?.id()).ok();
        Ok(Connection { stream: ours, child })
    }
}

/// Both ends of a connection, in which the secrets are the first that is said; ours does not block.
fn conversation(secrets: &secrets::Message) -> io::Result<(OwnedFd, OwnedFd)> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    secrets.say(ours.as_fd())?;
    Ok((ours, theirs))
}

/// Removes the group that a shim made before it was killed. Its child, which never got its go, may still be on its way
/// out of it; a group that stays nevertheless is empty and harms nobody.
fn remove_abandoned(group: &Path) {
    for _ in 0..20 {
        if cgroup::remove(group).is_ok() {
            return;
        }
        let _ = fs::write(group.join("cgroup.kill"), "1");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Connects to a shim. The path through our own descriptor is short, however deep the folder is.
fn connect(folder: &Folder) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(folder.path(), flags, Mode::empty())?;
    let number = std::os::fd::AsRawFd::as_raw_fd(&directory.as_fd());
    let stream = UnixStream::connect(format!("/proc/self/fd/{number}/{CONTROL}"))?;
    stream.set_nonblocking(true)?;
    Ok(stream.into())
}

/// 128 random bits in hexadecimal digits.
fn random() -> io::Result<String> {
    let mut bytes = [0_u8; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(bytes.iter().fold(String::with_capacity(32), |mut text, byte| {
        use std::fmt::Write as _;
        let _ = write!(text, "{byte:02x}");
        text
    }))
}
