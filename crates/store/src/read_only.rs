//! Reading without the lock and without leaving a trace: not a byte is written, not a file is made or touched.
//!
//! SQLite needs help for that, because readers of a write-ahead log normally share an index of it in writable memory:
//!
//! | what is there | how it is read |
//! |---|---|
//! | log with frames, and its index | `readonly_shm`: the index is mapped read-only beside a running server; after a killed one SQLite reads the log into private memory |
//! | no log, or one that was only begun | `immutable`: the file alone; the answer is thrown away and asked again if a log appeared meanwhile |
//! | log without its index (a copied folder) | a private copy of both in the folder for temporary files |
//!
//! `readonly_shm` is described in <https://www.sqlite.org/walformat.html> and <https://www.sqlite.org/wal.html#readonly>.

use std::{
    fs,
    io::{self, Read as _},
    os::unix::{ffi::OsStrExt, fs::DirBuilderExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::SystemTime,
};

use rusqlite::{Connection, ErrorCode, OpenFlags};

use crate::{
    error::OpenError,
    reader::Reader,
    schema::{self, FILE, SHM, WAL},
};

/// What a connection reads from.
#[derive(Debug)]
pub(crate) enum Source {
    /// Database, log and index; SQLite's own locks guard them.
    Guarded,
    /// The database alone, while there is no log, as large and as old as this.
    Alone(Option<(u64, SystemTime)>),
    /// A copy, of this age. Removed with the connection.
    Copy(Copied),
}

/// A private copy of a state.
#[derive(Debug)]
pub(crate) struct Copied {
    folder: PathBuf,
    log_size: u64,
}

impl Drop for Copied {
    fn drop(&mut self) {
        // Best effort: it lies in the folder for temporary files.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

impl Source {
    /// Whether it does not show any more what is there.
    pub(crate) fn is_outdated(&self, home: &Path) -> bool {
        match self {
            Self::Guarded => false,
            // A server that came and went has at least touched the file.
            Self::Alone(before) => log_counts(&home.join(WAL)) || *before != stamp(&home.join(FILE)),
            Self::Copy(copied) => size(&home.join(WAL)) != copied.log_size,
        }
    }
}

fn stamp(path: &Path) -> Option<(u64, SystemTime)> {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.len(), metadata.modified().ok()?))
}

/// Whether the log can hold a frame: it is longer than its header, and the header is whole. SQLite goes round in circles
/// until it gives up when it reads another one without the right to write: it compares the header with what it took
/// from it, and takes nothing from one that is alone or broken.
///
/// Form and checksum of the header: <https://www.sqlite.org/fileformat2.html#the_write_ahead_log>.
fn log_counts(path: &Path) -> bool {
    const HEADER: usize = 32;
    let mut bytes = [0; HEADER + 1];
    if fs::File::open(path).and_then(|mut file| file.read_exact(&mut bytes)).is_err() {
        return false;
    }
    let word = |at: usize| [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
    let summed = |at| match u32::from_be_bytes(word(0)) {
        0x377f_0682 => Some(u32::from_le_bytes(word(at))),
        0x377f_0683 => Some(u32::from_be_bytes(word(at))),
        _ => None,
    };
    let (mut one, mut two) = (0_u32, 0_u32);
    for at in (0..24).step_by(8) {
        let (Some(first), Some(second)) = (summed(at), summed(at + 4)) else { return false };
        one = one.wrapping_add(first).wrapping_add(two);
        two = two.wrapping_add(second).wrapping_add(one);
    }
    (one, two) == (u32::from_be_bytes(word(24)), u32::from_be_bytes(word(28)))
}

fn size(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

/// Opens the state in `home` for questions only: without the lock, without writing anything, beside a running server as
/// well as after a killed one. `None` if there is no state.
pub fn open_read_only(home: &Path) -> Result<Option<Reader>, OpenError> {
    match fs::metadata(home.join(FILE)) {
        Ok(metadata) if metadata.len() == 0 => return Err(schema::damaged(home, format!("{FILE} is empty"))),
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound && !schema::has_content(&home.join(WAL)) => return Ok(None),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(schema::damaged(home, format!("{FILE} is missing, but its write-ahead log {WAL} is there")));
        }
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => return Ok(None),
        Err(source) => return Err(OpenError::Write { operation: "look at", path: home.join(FILE), source }),
    }
    // The first connection shows whether the file is ours and readable at all.
    Ok(Some(Reader::read_only(home, connect(home)?)))
}

/// Connects in the way that fits what is there now.
pub(crate) fn connect(home: &Path) -> Result<(Connection, Source), OpenError> {
    // A running server may make the log and its index between two looks; the second round then sees both.
    let mut rounds = 0;
    let mut contended = false;
    loop {
        rounds += 1;
        let (source, uri) = if !log_counts(&home.join(WAL)) {
            (Source::Alone(stamp(&home.join(FILE))), uri(&home.join(FILE), "mode=ro&immutable=1"))
        } else if home.join(SHM).exists() && !contended {
            (Source::Guarded, uri(&home.join(FILE), "mode=ro&readonly_shm=1"))
        } else {
            let copied = copy(home)?;
            let uri = uri(&copied.folder.join(FILE), "mode=rw");
            (Source::Copy(copied), uri)
        };
        match try_connect(home, &uri) {
            Ok(connection) if !source.is_outdated(home) => return Ok((connection, source)),
            Err(OpenError::Database { source, .. })
                if source.sqlite_error_code() == Some(ErrorCode::FileLockingProtocolFailed) && !contended =>
            {
                contended = true;
            }
            Err(error) if rounds >= 20 || matches!(error, OpenError::Format { .. }) => return Err(error),
            Err(error @ OpenError::Damaged { .. }) if !source.is_outdated(home) => return Err(error),
            Ok(_) | Err(_) => std::thread::yield_now(),
        }
    }
}

fn try_connect(home: &Path, uri: &str) -> Result<Connection, OpenError> {
    // The address says read-only where it must be; flags are an upper bound.
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(uri, flags).map_err(|e| schema::refused(home, e))?;
    schema::configure(&connection).map_err(|e| schema::refused(home, e))?;
    connection.set_prepared_statement_cache_capacity(64);
    let found = schema::identify(home, &connection, schema::newest())?;
    if found < schema::newest() {
        return Err(OpenError::Format { home: home.to_owned(), found, supported: schema::newest() });
    }
    schema::check_tables(home, &connection, schema::MIGRATIONS)?;
    Ok(connection)
}

/// A `file:` address, see <https://www.sqlite.org/uri.html>.
fn uri(path: &Path, query: &str) -> String {
    use std::fmt::Write as _;
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut uri = String::from("file:");
    for byte in absolute.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || b"/-_.~".contains(byte) {
            uri.push(char::from(*byte));
        } else {
            let _ = write!(uri, "%{byte:02x}");
        }
    }
    uri + "?" + query
}

/// Copies database and log. Nobody writes them: whoever does makes the index first, and SQLite gets along with that.
fn copy(home: &Path) -> Result<Copied, OpenError> {
    static COPIES: AtomicU64 = AtomicU64::new(0);
    let number = COPIES.fetch_add(1, Ordering::Relaxed);
    let folder = std::env::temp_dir().join(format!("orchestra-read-{}-{number}", std::process::id()));
    let failed = |operation, path: &Path, source| OpenError::Write { operation, path: path.to_owned(), source };
    fs::DirBuilder::new().mode(0o700).create(&folder).map_err(|e| failed("make", &folder, e))?;
    let mut copied = Copied { folder, log_size: 0 };
    for name in [FILE, WAL] {
        let (from, to) = (home.join(name), copied.folder.join(name));
        let mut bytes = Vec::new();
        fs::File::open(&from).and_then(|mut f| f.read_to_end(&mut bytes)).map_err(|e| failed("read", &from, e))?;
        fs::write(&to, &bytes).map_err(|e| failed("write", &to, e))?;
        copied.log_size = bytes.len() as u64;
    }
    Ok(copied)
}
