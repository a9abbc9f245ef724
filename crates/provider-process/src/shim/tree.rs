//! The processes of a launch: who belongs to them, and how all of them are ended.
//!
//! With a control group this is exact: nothing leaves it by forking, `cgroup.kill` reaches all of it at once, and
//! `cgroup.events` proves it empty. Without one the shim is the subreaper of its descendants: whatever forks and
//! whoever loses its parent stays below it, so that "no child" proves "no process". After a shim was killed its
//! successor is nobody's parent; it then finds them by the marker in their environment, the session they share, and
//! descent.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{Read as _, Seek as _},
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::PathBuf,
};

use crate::{cgroup, sys};

/// Name of the variable that marks each process of a launch.
pub(crate) const MARKER: &str = "ORCHESTRA_LAUNCH";
/// Name of the variable that marks a command run beside the program, where there is no control group.
pub(crate) const EXEC_MARKER: &str = "ORCHESTRA_EXEC";

/// The processes of one launch, apart from the shim.
#[derive(Debug)]
pub(crate) struct Tree {
    group: Option<Group>,
    /// `ORCHESTRA_LAUNCH=…`
    marker: String,
    session: u32,
    /// Whether another shim started it, so that its processes are not our descendants.
    adopted: bool,
}

#[derive(Debug)]
struct Group {
    path: PathBuf,
    name: String,
    inode: u64,
    events: File,
}

impl Tree {
    pub(crate) fn new(marker: &str, session: u32, group: Option<PathBuf>, adopted: bool) -> Self {
        Self { group: group.and_then(Group::open), marker: format!("{MARKER}={marker}"), session, adopted }
    }

    /// Group of the tree, if it has one.
    pub(crate) fn group(&self) -> Option<&PathBuf> {
        self.group.as_ref().map(|group| &group.path)
    }

    /// Becomes readable with priority when the group becomes empty.
    pub(crate) fn events(&self) -> Option<BorrowedFd<'_>> {
        self.group.as_ref().map(|group| group.events.as_fd())
    }

    /// Gives up the group, in which nothing could be started.
    pub(crate) fn leave_group(&mut self) {
        if let Some(group) = self.group.take() {
            let _ = cgroup::remove(&group.path);
        }
    }

    /// Removes the group. The tree must be empty.
    pub(crate) fn remove_group(&mut self) -> bool {
        match &self.group {
            Some(group) if cgroup::remove(&group.path).is_err() => false,
            _ => {
                self.group = None;
                true
            }
        }
    }

    /// Whether nothing of it lives. A shim that is the parent must have reaped all its children as well.
    pub(crate) fn is_empty(&mut self) -> bool {
        if self.group.as_mut().is_some_and(Group::populated) {
            return false;
        }
        // Our own descendants are proven gone by having no child; those of a killed shim have to be looked for.
        !self.adopted || self.find().is_empty()
    }

    /// Kills all of it once. `thorough` also looks for what left the group.
    pub(crate) fn kill(&mut self, thorough: bool) {
        if let Some(group) = &self.group {
            let _ = fs::write(group.path.join("cgroup.kill"), "1");
        }
        if thorough || self.group.is_none() {
            // Stopped processes cannot fork: stop until nobody new turns up, then kill.
            let mut stopped: Vec<u32> = Vec::new();
            for _ in 0..64 {
                let found: Vec<u32> = self.find().into_iter().filter(|pid| !stopped.contains(pid)).collect();
                if found.is_empty() {
                    break;
                }
                for pid in found {
                    sys::kill(pid, libc::SIGSTOP);
                    stopped.push(pid);
                }
            }
            for pid in stopped {
                sys::kill(pid, libc::SIGKILL);
            }
        }
    }

    /// Kills what a command beside the program left.
    pub(crate) fn kill_exec(&self, group: Option<&PathBuf>, leader: u32, id: u64) {
        if let Some(group) = group {
            let _ = fs::write(group.join("cgroup.kill"), "1");
            return;
        }
        let mark = format!("{EXEC_MARKER}={id}");
        self.kill_where(|pid, process| process.session == leader || (self.marked(pid) && has_variable(pid, &mark)));
    }

    /// Kills all commands that a killed shim left beside the program; nobody waits for them any more.
    pub(crate) fn kill_orphaned_execs(&self) {
        if let Some(group) = &self.group {
            for entry in fs::read_dir(&group.path).into_iter().flatten().flatten() {
                if entry.file_name().to_string_lossy().starts_with("exec-") {
                    let _ = fs::write(entry.path().join("cgroup.kill"), "1");
                }
            }
            return;
        }
        let mark = format!("{EXEC_MARKER}=");
        self.kill_where(|pid, _| self.marked(pid) && has_prefix(pid, &mark));
    }

    fn kill_where(&self, belongs: impl Fn(u32, &Process) -> bool) {
        let own = std::process::id();
        for _ in 0..64 {
            let processes = processes();
            let found: Vec<u32> = processes
                .iter()
                .filter(|(pid, process)| **pid != own && process.lives && belongs(**pid, process))
                .map(|(pid, _)| *pid)
                .collect();
            if found.is_empty() {
                return;
            }
            for pid in with_descendants(&processes, found, own) {
                sys::kill(pid, libc::SIGKILL);
            }
        }
    }

    /// Whether the sender of a message belongs to the tree. A sender that is gone is known only where the kernel
    /// remembers its group.
    pub(crate) fn contains(&self, pid: u32, pidfd: Option<BorrowedFd<'_>>) -> bool {
        if let Some(group) = &self.group {
            if let Ok(text) = fs::read_to_string(format!("/proc/{pid}/cgroup"))
                && let Some(path) = text.lines().find_map(|line| line.strip_prefix("0::"))
            {
                // The name holds the launch's random number, so that it is nobody else's.
                return path.split('/').any(|part| part == group.name);
            }
            return pidfd.is_some_and(|pidfd| sys::pidfd_info(pidfd).cgroup == Some(group.inode));
        }
        self.marked(pid) || self.find().contains(&pid)
    }

    fn marked(&self, pid: u32) -> bool {
        has_variable(pid, &self.marker)
    }

    /// Every living process of the tree that can be found without the group.
    fn find(&self) -> Vec<u32> {
        let own = std::process::id();
        let processes = processes();
        let mut roots = vec![own];
        if self.adopted {
            let marked: Vec<u32> = processes.keys().copied().filter(|pid| *pid != own && self.marked(*pid)).collect();
            // The session's number is still the one that we know as long as one who bears our mark is in it.
            if marked.iter().any(|pid| processes[pid].session == self.session) {
                roots.extend(processes.iter().filter(|(_, p)| p.session == self.session).map(|(pid, _)| *pid));
            }
            roots.extend(marked);
        }
        let mut found = with_descendants(&processes, roots, own);
        found.retain(|pid| *pid != own && processes.get(pid).is_some_and(|process| process.lives));
        found
    }
}

impl Group {
    fn open(path: PathBuf) -> Option<Self> {
        use std::os::unix::fs::MetadataExt as _;
        let inode = fs::metadata(&path).ok()?.ino();
        let events = File::open(path.join("cgroup.events")).ok()?;
        let name = path.file_name()?.to_str()?.to_owned();
        Some(Self { path, name, inode, events })
    }

    fn populated(&mut self) -> bool {
        let mut text = String::new();
        // A group that cannot be read was removed, and only empty ones can be.
        self.events.rewind().is_ok()
            && self.events.read_to_string(&mut text).is_ok()
            && cgroup::populated(&text)
    }
}

/// Opens a group's directory to start processes in it.
pub(crate) fn open_group(path: &PathBuf) -> std::io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

struct Process {
    parent: u32,
    session: u32,
    lives: bool,
}

/// What `/proc/PID/stat` says.
pub(crate) struct Stat {
    pub(crate) state: char,
    pub(crate) parent: u32,
    pub(crate) session: u32,
    /// Clock ticks since boot.
    pub(crate) start_time: u64,
    /// Wait status; only for those who may read it, 0 for others.
    pub(crate) wait_status: i32,
}

/// Reads `/proc/PID/stat`; see proc(5).
pub(crate) fn stat(pid: u32) -> Option<Stat> {
    let text = fs::read(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything, so fields are counted from its end.
    let end = text.iter().rposition(|byte| *byte == b')')?;
    let fields: Vec<&str> = std::str::from_utf8(text.get(end + 2..)?).ok()?.split_ascii_whitespace().collect();
    Some(Stat {
        state: fields.first()?.chars().next()?,
        parent: fields.get(1)?.parse().ok()?,
        session: fields.get(3)?.parse().ok()?,
        start_time: fields.get(19)?.parse().ok()?,
        wait_status: fields.get(49).and_then(|field| field.parse().ok()).unwrap_or(0),
    })
}

fn processes() -> BTreeMap<u32, Process> {
    crate::folder::entries::<u32>(std::path::Path::new("/proc"))
        .unwrap_or_default()
        .into_iter()
        .filter_map(|pid| {
            let stat = stat(pid)?;
            let lives = !matches!(stat.state, 'Z' | 'X');
            Some((pid, Process { parent: stat.parent, session: stat.session, lives }))
        })
        .collect()
}

fn with_descendants(processes: &BTreeMap<u32, Process>, roots: Vec<u32>, own: u32) -> Vec<u32> {
    let mut found = roots;
    let mut next = 0;
    found.sort_unstable();
    found.dedup();
    while next < found.len() {
        let parent = found[next];
        next += 1;
        for (pid, process) in processes {
            if process.parent == parent && *pid != own && !found.contains(pid) {
                found.push(*pid);
            }
        }
    }
    found
}

fn has_variable(pid: u32, variable: &str) -> bool {
    fs::read(format!("/proc/{pid}/environ"))
        .is_ok_and(|environ| environ.split(|byte| *byte == 0).any(|entry| entry == variable.as_bytes()))
}

fn has_prefix(pid: u32, prefix: &str) -> bool {
    fs::read(format!("/proc/{pid}/environ"))
        .is_ok_and(|environ| environ.split(|byte| *byte == 0).any(|entry| entry.starts_with(prefix.as_bytes())))
}
