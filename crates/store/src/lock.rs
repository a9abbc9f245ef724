//! The lock of a state directory.
//!
//! `flock(2)` on a file of its own: the kernel frees it when its last owner is gone, however it went, and nothing is ever
//! written into or renamed over the file that is locked except the owner's process id, for the message. The file stays
//! when the owner leaves; removing it would open a race in which two owners lock two files of one name.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{self, Read, Seek, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
    process,
};

use crate::error::OpenError;

/// Name within the state directory.
pub(crate) const FILE: &str = "state.lock";

/// Holds the lock until dropped.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock, or says who has it. Never waits.
    pub(crate) fn take(home: &Path) -> Result<Self, OpenError> {
        let path = home.join(FILE);
        let failed = |operation, source| OpenError::Write { operation, path: path.clone(), source };
        loop {
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)
                .map_err(|e| failed("open", e))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    return Err(OpenError::Locked { home: home.to_owned(), pid: owner(&mut file) });
                }
                Err(TryLockError::Error(e)) => return Err(failed("lock", e)),
            }
            // Somebody may have removed the file between open and lock: what is locked must be what has the name.
            let locked = file.metadata().map_err(|e| failed("look at", e))?;
            match std::fs::metadata(&path) {
                Ok(named) if (named.dev(), named.ino()) == (locked.dev(), locked.ino()) => {}
                Ok(_) => continue,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(failed("look at", e)),
            }
            sign(&mut file).map_err(|e| failed("write", e))?;
            return Ok(Self { _file: file });
        }
    }
}

/// Writes our process id.
fn sign(file: &mut File) -> io::Result<()> {
    file.rewind()?;
    let text = format!("{}\n", process::id());
    file.write_all(text.as_bytes())?;
    file.set_len(text.len() as u64)
}

/// The process id in the file. A lock that was taken this instant may not be signed yet.
fn owner(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.rewind().ok()?;
    file.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_owner_at_a_time_who_is_named() {
        let home = tempfile::tempdir().unwrap();
        let first = Lock::take(home.path()).unwrap();
        let Err(OpenError::Locked { pid, .. }) = Lock::take(home.path()) else { panic!("taken twice") };
        assert_eq!(pid, Some(process::id()));
        drop(first);
        Lock::take(home.path()).unwrap();
    }

    #[test]
    fn a_stale_file_with_a_longer_pid_is_overwritten() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join(FILE), "99999999999999\n").unwrap();
        let _lock = Lock::take(home.path()).unwrap();
        assert_eq!(std::fs::read_to_string(home.path().join(FILE)).unwrap(), format!("{}\n", process::id()));
    }
}
