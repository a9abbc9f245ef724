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
        !self.adopted || matches!(self.find(), (found, true) if found.is_empty())
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
                // Whoever lost its parent is our child: cheap to find, and where a storm of forks can be caught.
                for _ in 0..64 {
                    let orphans: Vec<u32> = children().into_iter().filter(|pid| !stopped.contains(pid)).collect();
                    if orphans.is_empty() {
                        break;
                    }
                    for pid in orphans {
                        sys::kill(pid, libc::SIGKILL);
                        stopped.push(pid);
                    }
                }
                let (found, complete) = self.find();
                let new: Vec<u32> = found.into_iter().filter(|pid| !stopped.contains(pid)).collect();
                if new.is_empty() && complete {
                    break;
                }
                for pid in new {
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
        kill_where(
            |environ| environ.has(&self.marker) && environ.has(&mark),
            |process| process.marked || process.session == leader,
        );
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
        kill_where(|environ| environ.has(&self.marker) && environ.has_prefix(&mark), |process| process.marked);
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
        environ(pid).is_some_and(|environ| environ.has(&self.marker)) || self.find().0.contains(&pid)
    }

    /// Every living process of the tree that can be found without the group, and whether none can have been missed.
    fn find(&self) -> (Vec<u32>, bool) {
        let scan = Scan::new(|environ| self.adopted && environ.has(&self.marker));
        let mut roots = vec![scan.own];
        if self.adopted {
            let in_session = |process: &Process| process.session == self.session;
            // The session's number is still the one that we know as long as one who bears our mark is in it.
            let known = scan.others().any(|(_, process)| process.marked && in_session(process));
            let ours = scan.others().filter(|(_, process)| process.marked || (known && in_session(process)));
            roots.extend(ours.map(|(pid, _)| pid));
        }
        (scan.with_descendants(roots), scan.complete)
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
        self.events.rewind().is_ok() && self.events.read_to_string(&mut text).is_ok() && cgroup::populated(&text)
    }
}

/// Opens a group's directory to start processes in it.
pub(crate) fn open_group(path: &PathBuf) -> std::io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// Kills processes, and what descends from them, until none is left.
fn kill_where(marked: impl Fn(&Environ) -> bool, belongs: impl Fn(&Process) -> bool) {
    for _ in 0..64 {
        let scan = Scan::new(&marked);
        let found: Vec<u32> = scan.others().filter(|(_, process)| belongs(process)).map(|(pid, _)| pid).collect();
        if found.is_empty() && scan.complete {
            return;
        }
        for pid in scan.with_descendants(found) {
            sys::kill(pid, libc::SIGKILL);
        }
    }
}

/// A look at all processes. It is complete once a listing shows nobody who was not looked at before: a process that
/// forks and ends while it is looked at leaves a child, which is somebody new.
struct Scan {
    own: u32,
    complete: bool,
    processes: BTreeMap<u32, Process>,
}

struct Process {
    parent: u32,
    session: u32,
    lives: bool,
    marked: bool,
}

impl Scan {
    fn new(marked: impl Fn(&Environ) -> bool) -> Self {
        let mut processes = BTreeMap::new();
        let mut complete = false;
        // Bounded: while somebody forks without end there is always somebody new.
        for _ in 0..4 {
            let mut anybody_new = false;
            for pid in crate::folder::entries::<u32>(std::path::Path::new("/proc")).unwrap_or_default() {
                processes.entry(pid).or_insert_with(|| {
                    anybody_new = true;
                    // One that is gone already is kept as dead, so that it is not taken for somebody new again.
                    stat(pid).map_or(Process { parent: 0, session: 0, lives: false, marked: false }, |stat| Process {
                        parent: stat.parent,
                        session: stat.session,
                        lives: !matches!(stat.state, 'Z' | 'X'),
                        marked: environ(pid).is_some_and(|environ| marked(&environ)),
                    })
                });
            }
            if !anybody_new {
                complete = true;
                break;
            }
        }
        Self { own: std::process::id(), complete, processes }
    }

    /// Living processes apart from the caller.
    fn others(&self) -> impl Iterator<Item = (u32, &Process)> {
        self.processes.iter().map(|(pid, process)| (*pid, process)).filter(|(pid, p)| *pid != self.own && p.lives)
    }

    /// Adds the living descendants of some processes, and takes out the caller and those that ended.
    fn with_descendants(&self, roots: Vec<u32>) -> Vec<u32> {
        let mut found = roots;
        let mut next = 0;
        found.sort_unstable();
        found.dedup();
        while next < found.len() {
            let parent = found[next];
            next += 1;
            for (pid, process) in &self.processes {
                if process.parent == parent && *pid != self.own && !found.contains(pid) {
                    found.push(*pid);
                }
            }
        }
        found.retain(|pid| *pid != self.own && self.processes.get(pid).is_some_and(|process| process.lives));
        found
    }
}

/// The environment that a process was started with.
struct Environ(Vec<u8>);

/// `None` for kernel threads, for processes that ended, and for those that we may not look into.
fn environ(pid: u32) -> Option<Environ> {
    fs::read(format!("/proc/{pid}/environ")).ok().filter(|environ| !environ.is_empty()).map(Environ)
}

impl Environ {
    fn has(&self, variable: &str) -> bool {
        self.0.split(|byte| *byte == 0).any(|entry| entry == variable.as_bytes())
    }

    fn has_prefix(&self, prefix: &str) -> bool {
        self.0.split(|byte| *byte == 0).any(|entry| entry.starts_with(prefix.as_bytes()))
    }
}

/// Our children, ended ones included. None where the kernel does not list them (`CONFIG_PROC_CHILDREN`).
fn children() -> Vec<u32> {
    let own = std::process::id();
    let text = fs::read_to_string(format!("/proc/self/task/{own}/children")).unwrap_or_default();
    text.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

/// What `/proc/PID/stat` says.
pub(crate) struct Stat {
    pub(crate) state: char,
    pub(crate) parent: u32,
    pub(crate) session: u32,
    /// Clock ticks that it used, user and system.
    pub(crate) used: u64,
    /// Clock ticks that its children had used when it reaped them, and theirs.
    pub(crate) used_by_children: u64,
    /// Clock ticks since boot.
    pub(crate) start_time: u64,
    /// Pages.
    pub(crate) resident: u64,
    /// Addresses of the arguments, in the process itself; 0 for those who may not read it.
    pub(crate) arguments: std::ops::Range<usize>,
    /// Wait status; only for those who may read it, 0 for others.
    pub(crate) wait_status: i32,
}

/// Reads `/proc/PID/stat`; see proc(5).
pub(crate) fn stat(pid: u32) -> Option<Stat> {
    // One read: the kernel makes the whole text at the first, and this is on the way of every start.
    let mut buffer = [0; 1024];
    let read = File::open(format!("/proc/{pid}/stat")).ok()?.read(&mut buffer).ok()?;
    let text = &buffer[..read];
    // The name in parentheses may hold anything, so fields are counted from its end.
    let end = text.iter().rposition(|byte| *byte == b')')?;
    let fields: Vec<&str> = std::str::from_utf8(text.get(end + 2..)?).ok()?.split_ascii_whitespace().collect();
    let number = |field: usize| fields.get(field)?.parse::<u64>().ok();
    Some(Stat {
        state: fields.first()?.chars().next()?,
        parent: fields.get(1)?.parse().ok()?,
        session: fields.get(3)?.parse().ok()?,
        used: number(11)? + number(12)?,
        used_by_children: number(13)? + number(14)?,
        start_time: number(19)?,
        resident: number(21)?,
        arguments: fields.get(45)?.parse().ok()?..fields.get(46)?.parse().ok()?,
        wait_status: fields.get(49).and_then(|field| field.parse().ok()).unwrap_or(0),
    })
}
