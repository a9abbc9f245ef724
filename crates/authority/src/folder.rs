//! Files that are there as a whole or not at all, also after a crash and with several writers.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

/// Folder of what the authority issued, within a state directory.
pub(crate) const ISSUED: &str = "tls/issued";
/// Within the folder of the authority.
pub(crate) const CERTIFICATE: &str = "certificate.pem";
pub(crate) const KEY: &str = "key.pem";
/// Begin of the names of what is being written.
const DRAFT: &str = ".draft-";

/// Makes a folder that only its owner sees, and those above it.
pub(crate) fn make(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// A name beside `path` that nobody else uses.
fn draft(path: &Path) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    path.with_file_name(format!("{DRAFT}{}-{number}", std::process::id()))
}

/// Writes a new file and waits until it is on the disk.
pub(crate) fn write_new(path: &Path, text: &str, mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

/// Puts a file in the place of an earlier one in one step.
pub(crate) fn replace(path: &Path, text: &str, mode: u32) -> io::Result<()> {
    let draft = draft(path);
    // Of a process with the same number that died while it wrote.
    let _ = fs::remove_file(&draft);
    write_new(&draft, text, mode).and_then(|()| fs::rename(&draft, path)).inspect_err(|_| {
        let _ = fs::remove_file(&draft);
    })?;
    sync_parent(path)
}

/// Makes a folder with these files in one step. Fails if somebody else did so first.
pub(crate) fn publish(path: &Path, files: &[(&str, &str, u32)]) -> io::Result<()> {
    let draft = draft(path);
    let _ = fs::remove_dir_all(&draft);
    let written = make(&draft)
        .and_then(|()| files.iter().try_for_each(|(name, text, mode)| write_new(&draft.join(name), text, *mode)))
        .and_then(|()| File::open(&draft)?.sync_all())
        // Refused if there is a folder with something in it (rename(2)).
        .and_then(|()| fs::rename(&draft, path));
    if written.is_err() {
        let _ = fs::remove_dir_all(&draft);
    }
    written?;
    sync_parent(path)
}

/// Removes drafts of processes that died while they wrote. Those that still write fail, and find what is there.
pub(crate) fn tidy(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(DRAFT) {
            let path = entry.path();
            let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        }
    }
}

fn sync_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
}
