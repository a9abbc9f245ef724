//! A disk that is full or read-only: one clear error, and what was recorded before is unharmed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use orchestra_model::record::Change;
use orchestra_store::{CommitError, OpenError, Store};

use crate::{
    crash::whole_launches,
    fixture::{NOW, environment, event, launch, open},
};

/// A small file system in memory, gone with the value.
struct Tmpfs(PathBuf, #[expect(dead_code, reason = "held until the file system is gone")] tempfile::TempDir);

impl Tmpfs {
    /// `None` where we may not mount.
    fn new(size: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_owned();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size},mode=700"), "tmpfs"])
            .arg(&path)
            .output()
            .is_ok_and(|output| output.status.success());
        if !mounted {
            eprintln!("SKIPPED: no right to mount a file system here");
        }
        mounted.then_some(Self(path, folder))
    }

    fn remount(&self, option: &str) {
        let done = Command::new("mount").args(["-o", &format!("remount,{option}")]).arg(&self.0).status().unwrap();
        assert!(done.success(), "remount {option}");
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn large(bytes: usize) -> Vec<Change> {
    vec![Change::Event(Box::new(event("x".repeat(bytes))))]
}

fn check_write_error(error: &CommitError) {
    assert!(matches!(error, CommitError::Write(_)), "{error:?}");
    assert_eq!(error.diagnostic().code.as_str(), "ORC0404");
    assert!(!error.diagnostic().notes.is_empty(), "the cause is named");
}

#[test]
fn a_full_disk_refuses_and_recovers_when_there_is_room() {
    let Some(disk) = Tmpfs::new("1m") else { return };
    let store = open(&disk.0);
    store.commit_blocking(vec![Change::Environment(environment())]).unwrap();
    let mut written = 0;
    let error = loop {
        match store.commit_blocking(launch(written + 1)) {
            Ok(_) => written += 1,
            Err(error) => break error,
        }
        assert!(written < 10_000, "the disk does not fill");
    };
    check_write_error(&error);
    assert!(written > 5);
    assert_eq!(store.reader().state(&crate::fixture::id()).unwrap().unwrap().instances.len(), written as usize);
    drop(store);
    disk.remount("size=4m");
    let store = open(&disk.0);
    assert_eq!(whole_launches(&store).len(), written as usize);
    store.commit_blocking(launch(written + 1)).unwrap();
}

#[test]
fn the_same_store_goes_on_when_there_is_room_again() {
    let Some(disk) = Tmpfs::new("2m") else { return };
    let store = open(&disk.0);
    store.commit_blocking(vec![Change::Environment(environment())]).unwrap();
    let ballast = disk.0.join("ballast");
    while fs::OpenOptions::new()
        .append(true)
        .create(true)
        .open(&ballast)
        .and_then(|mut file| std::io::Write::write_all(&mut file, &[7; 4096]))
        .is_ok()
    {}
    // A large one that does not fit, and a small one behind it: the small one need not fail with it, but may.
    check_write_error(&store.commit_blocking(large(300_000)).unwrap_err());
    fs::remove_file(&ballast).unwrap();
    let committed = store.commit_blocking(launch(1)).unwrap();
    assert_eq!(committed.events[0].sequence, 1, "the failed one took no number");
    drop(store);
    assert_eq!(whole_launches(&open(&disk.0)).len(), 1);
}

#[test]
fn a_read_only_disk_is_named() {
    let Some(disk) = Tmpfs::new("2m") else { return };
    drop(open(&disk.0));
    disk.remount("ro");
    let Err(error) = Store::open(&disk.0, || NOW) else { panic!("opened") };
    assert!(matches!(error, OpenError::Write { .. }), "{error:?}");
    assert_eq!(error.diagnostic().code.as_str(), "ORC0404");
    // Looking needs no right to write.
    assert!(orchestra_store::open_read_only(&disk.0).unwrap().is_some());
    disk.remount("rw");
}

const CHILD: &str = "ORCHESTRA_STORE_TEST_FULL";

/// Body of the child: commits until it cannot, and checks the error itself.
#[test]
fn child() {
    let Ok(home) = std::env::var(CHILD) else { return };
    let store = open(Path::new(&home));
    store.commit_blocking(vec![Change::Environment(environment())]).unwrap();
    let mut number = 1;
    let error = loop {
        match store.commit_blocking(launch(number)) {
            Ok(_) => number += 1,
            Err(error) => break error,
        }
        assert!(number < 100_000, "there is no limit");
    };
    check_write_error(&error);
    assert_eq!(whole_launches(&store).len(), number as usize - 1);
}

/// Needs no rights: the limit of the size of one file stands for the end of the disk.
#[test]
fn a_file_that_may_not_grow_refuses_and_keeps_what_is_there() {
    let home = tempfile::tempdir().unwrap();
    let output = Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 600; exec \"$0\" --exact disk::child --test-threads=1"])
        .arg(std::env::current_exe().unwrap())
        .env(CHILD, home.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let store = open(home.path());
    let there = whole_launches(&store);
    assert!(there.len() > 5, "{}", there.len());
    store.commit_blocking(launch(u32::try_from(there.len()).unwrap() + 1)).unwrap();
}
