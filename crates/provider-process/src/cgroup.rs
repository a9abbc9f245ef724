//! Control groups (cgroup v2), where the machine allows them.
//!
//! One group per launch makes "kill the whole tree" one write that no fork can outrun, and "the tree is empty" one read
//! that nothing can hide from. The machine must let us make groups below our own: as root, or in a delegated subtree
//! (`Delegate=yes`). Where it does not, the shim falls back to walking its descendants.
//!
//! Protocol: <https://docs.kernel.org/admin-guide/cgroup-v2.html>.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use orchestra_model::desired::Resources;

/// What the names of our groups begin with.
pub(crate) const PREFIX: &str = "orchestra-";

/// Whether control groups are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cgroups {
    /// Where the machine allows them.
    #[default]
    Auto,
    /// Never.
    Off,
}

/// What this machine can enforce.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Enforced {
    /// Group below which launches get theirs; `None` if the machine does not allow any.
    pub parent: Option<PathBuf>,
    /// Whether memory limits hold.
    pub memory: bool,
    /// Whether CPU limits hold.
    pub cpu: bool,
}

impl Enforced {
    /// Finds out, by doing it once.
    pub(crate) fn detect(cgroups: Cgroups) -> Self {
        if cgroups == Cgroups::Off {
            return Self::default();
        }
        Self::find_parent().map_or_else(Self::default, |parent| {
            sweep(&parent);
            let delegated = enable_controllers(&parent);
            let has = |name: &str| delegated.split_ascii_whitespace().any(|controller| controller == name);
            Self { memory: has("memory"), cpu: has("cpu"), parent: Some(parent) }
        })
    }

    fn find_parent() -> Option<PathBuf> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
        let own = fs::read_to_string("/proc/self/cgroup").ok()?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::"))?;
        mount_points(&mounts).into_iter().find_map(|(root, mount)| {
            // The mount may show only a part of the hierarchy (a container); our own path is below its root then.
            let below = Path::new(own).strip_prefix(&root).ok()?;
            let parent = mount.join(below);
            let probe = parent.join(format!("{PREFIX}probe-{}", std::process::id()));
            fs::create_dir(&probe).ok()?;
            let usable = probe.join("cgroup.kill").exists();
            let removed = fs::remove_dir(&probe).is_ok();
            (usable && removed).then_some(parent)
        })
    }

    /// Sentences about limits that are asked for but do not hold here.
    pub(crate) fn shortfall(&self, resources: &Resources) -> Option<String> {
        let mut missing = Vec::new();
        if let (Some(limit), false) = (resources.memory_limit, self.memory) {
            missing.push(format!("memory limit {limit}"));
        }
        if let (Some(limit), false) = (resources.cpu_limit, self.cpu) {
            missing.push(format!("CPU limit {limit}"));
        }
        (!missing.is_empty()).then(|| {
            format!("{} not enforced: this machine has no control group controller for it", missing.join(" and "))
        })
    }
}

/// Root and mount point of each cgroup v2 mount.
fn mount_points(mountinfo: &str) -> Vec<(PathBuf, PathBuf)> {
    mountinfo
        .lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            (right.split(' ').next() == Some("cgroup2")).then_some(())?;
            let mut fields = left.split(' ').skip(3);
            Some((PathBuf::from(unescape(fields.next()?)), PathBuf::from(unescape(fields.next()?))))
        })
        .collect()
}

/// Mount points have blanks and backslashes in octal.
fn unescape(text: &str) -> String {
    ["\\040", "\\011", "\\012", "\\134"]
        .iter()
        .zip([" ", "\t", "\n", "\\"])
        .fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// Turns on what there is for the children of a group, and says what is on. A group that holds processes itself may
/// not (only the root may); then limits are not enforced, and said so.
fn enable_controllers(parent: &Path) -> String {
    let control = parent.join("cgroup.subtree_control");
    for controller in ["+memory", "+cpu"] {
        let _ = fs::write(&control, controller);
    }
    fs::read_to_string(control).unwrap_or_default()
}

/// Makes the group of a launch. Limits that the machine cannot hold are left out.
pub(crate) fn create(group: &Path, resources: &Resources) -> io::Result<()> {
    fs::create_dir(group)?;
    if let Some(limit) = resources.memory_limit {
        let _ = fs::write(group.join("memory.max"), limit.as_bytes().to_string());
        // Without this the limit only moves the rest to swap, and the program slows down instead of being killed.
        let _ = fs::write(group.join("memory.swap.max"), "0");
    }
    if let Some(limit) = resources.cpu_limit {
        // Microseconds of CPU per period of 100 ms: 1 millicore is 100 µs.
        let _ = fs::write(group.join("cpu.max"), format!("{} 100000", (limit.as_millis() * 100).max(1000)));
    }
    Ok(())
}

/// Age from which an empty group is nobody's: a shim fills its group at once, and removes it when it is empty.
const ABANDONED: Duration = Duration::from_mins(1);

/// Removes groups whose shim was killed and whose launch folder was deleted, so that nobody came back for them.
fn sweep(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let group = entry.path();
        let old = || {
            let created = entry.metadata().ok()?.modified().ok()?;
            Some(created.elapsed().ok()? > ABANDONED)
        };
        let empty = || fs::read_to_string(group.join("cgroup.events")).is_ok_and(|events| !populated(&events));
        if entry.file_name().to_string_lossy().starts_with(PREFIX) && old() == Some(true) && empty() {
            let _ = remove(&group);
        }
    }
}

/// Removes a group and the groups in it; they must be empty of processes.
pub(crate) fn remove(group: &Path) -> io::Result<()> {
    if let Ok(entries) = fs::read_dir(group) {
        for entry in entries.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                remove(&entry.path())?;
            }
        }
    }
    match fs::remove_dir(group) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Whether a process of the group or of one below it lives.
pub(crate) fn populated(events: &str) -> bool {
    !events.lines().any(|line| line == "populated 0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found_among_others() {
        let text = "31 24 0:27 / /sys/fs/cgroup ro shared:9 - tmpfs tmpfs ro\n\
                    41 31 0:38 / /sys/fs/cgroup/uni\\040fied rw,relatime - cgroup2 cgroup2 rw\n\
                    40 31 0:37 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n";
        assert_eq!(mount_points(text), [(PathBuf::from("/"), PathBuf::from("/sys/fs/cgroup/uni fied"))]);
    }

    #[test]
    fn only_old_empty_groups_are_swept() {
        let Some(parent) = Enforced::find_parent() else {
            eprintln!("SKIPPED: this machine lets us make no control groups");
            return;
        };
        let make = |name: &str, age: Duration| {
            let group = parent.join(format!("{PREFIX}{name}-{}", std::process::id()));
            fs::create_dir(&group).unwrap();
            let made = std::time::SystemTime::now() - age;
            fs::File::open(&group).unwrap().set_modified(made).unwrap();
            group
        };
        let (old, young) = (make("old", ABANDONED * 2), make("young", Duration::ZERO));
        sweep(&parent);
        let left = (old.exists(), young.exists());
        fs::remove_dir(&young).unwrap();
        assert_eq!(left, (false, true));
    }

    #[test]
    fn shortfalls_are_said() {
        let resources = Resources { memory_limit: "1Gi".parse().ok(), ..Resources::default() };
        assert!(Enforced::default().shortfall(&resources).unwrap().contains("memory limit 1Gi"));
        assert_eq!(Enforced { memory: true, ..Enforced::default() }.shortfall(&resources), None);
    }
}
