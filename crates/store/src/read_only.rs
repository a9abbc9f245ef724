//! Reading without the lock and without leaving a trace: not a byte is written, not a file is made or touched.
//!
//! SQLite needs help for that, because readers of a write-ahead log normally share an index of it in writable memory:
//!
//! | what is there | how it is read |
//! |---|---|
//! | log with content, and its index | `readonly_shm`: the index is mapped read-only beside a running server; after a killed one SQLite reads the log into private memory |
//! | no log, or an empty one | `immutable`: the file alone; the answer is thrown away and asked again if a log appeared meanwhile |
//! | log without its index (a copied folder) | a private copy of both in the folder for temporary files |
//!
//! `readonly_shm` is described in <https://www.sqlite.org/walformat.html> and <https://www.sqlite.org/wal.html#readonly>.

use std::{
    fs,
    io::{self, Read as _},
    os::unix::{ffi::OsStrExt, fs::DirBuilderExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use rusqlite::{Connection, OpenFlags};

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
    /// The database alone, while there is no log.
    Alone,
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
            Self::Alone => schema::has_content(&home.join(WAL)),
            Self::Copy(copied) => {
                home.join(SHM).exists() || size(&home.join(WAL)) != copied.log_size
            }
        }
    }
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
    connect(home)?;
    Ok(Some(Reader::read_only(home)))
}

/// Connects in the way that fits what is there now.
pub(crate) fn connect(home: &Path) -> Result<(Connection, Source), OpenError> {
    // A running server may make the log and its index between two looks; the second round then sees both.
    let mut rounds = 0;
    loop {
        rounds += 1;
        let (source, uri) = if !schema::has_content(&home.join(WAL)) {
            (Source::Alone, uri(&home.join(FILE), "mode=ro&immutable=1"))
        } else if home.join(SHM).exists() {
            (Source::Guarded, uri(&home.join(FILE), "mode=ro&readonly_shm=1"))
        } else {
            let copied = copy(home)?;
            let uri = uri(&copied.folder.join(FILE), "mode=rw");
            (Source::Copy(copied), uri)
        };
        match try_connect(home, &uri) {
            Ok(connection) if !source.is_outdated(home) => return Ok((connection, source)),
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

/// Copies database and log. Nobody writes them: whoever does makes the index first.
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
