//! What launches use: CPU time and memory of whole trees.
//!
//! A control group counts for itself (`cpu.stat` is there without a controller). Where memory is not accounted for, and
//! where there is no group, the processes are added up: all of them are looked at once per sample, however many
//! launches are asked for. Without a group, what has left the session of its program after its shim was killed is
//! missed, and so is the time of ended children that their parent did not want to hear of.
//!
//! Processes are not looked at in one instant: the time of one that ends between the look at its parent and the look
//! at itself is with neither. A sample of a tree is therefore taken again when one of it has ended or reaped meanwhile,
//! or a rate that is made from two samples would fall below zero and then leap.
//!
//! Sources: <https://docs.kernel.org/admin-guide/cgroup-v2.html>, `proc_pid_stat(5)`, `proc_pid_smaps(5)`.

use std::{
    collections::HashMap,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use orchestra_model::{
    launch::{LaunchKey, Usage},
    quantity::ByteSize,
};

use crate::{
    folder,
    shim::{Stat, stat},
};

/// How often a tree is looked at until nobody ends meanwhile; what forks without pause is taken as it is then.
const LOOKS: usize = 3;

/// Where the processes of a launch are found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In this control group.
    Group(PathBuf),
    /// Below this shim, and in this session.
    Tree { shim: u32, session: u32 },
}

/// Samples launches. Those that ended meanwhile are left out.
pub(super) fn sample(places: Vec<(LaunchKey, Place)>) -> Vec<(LaunchKey, Usage)> {
    let mut table = None;
    let measure = |(key, place): (LaunchKey, Place)| {
        let usage = match place {
            Place::Group(group) => of_group(&group),
            Place::Tree { shim, session } => of_tree(&mut table, shim, session),
        };
        usage.filter(|usage| usage.processes > 0).map(|usage| (key, usage))
    };
    places.into_iter().filter_map(measure).collect()
}

fn of_group(group: &Path) -> Option<Usage> {
    let micros = field(&fs::read_to_string(group.join("cpu.stat")).ok()?, "usage_usec")?;
    let processes = processes(group);
    let charged = || -> Option<u64> {
        let charged: u64 = fs::read_to_string(group.join("memory.current")).ok()?.trim_end().parse().ok()?;
        let cache = field(&fs::read_to_string(group.join("memory.stat")).ok()?, "inactive_file")?;
        Some(charged.saturating_sub(cache))
    };
    let memory = charged().unwrap_or_else(|| memory(&processes, |pid| stat(pid).map_or(0, |stat| stat.resident)));
    Some(Usage {
        cpu: Duration::from_micros(micros),
        memory: ByteSize::bytes(memory),
        processes: u32::try_from(processes.len()).unwrap_or(u32::MAX),
    })
}

/// Processes of a group and of the groups in it.
fn processes(group: &Path) -> Vec<u32> {
    let list = |group: &Path| fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    let mut text = list(group);
    // Commands beside the program have groups of their own. A folder has a link for itself, one in the folder above, and
    // one for each folder in it; looking is cheaper than listing the kernel's many files.
    if fs::metadata(group).is_ok_and(|folder| folder.nlink() > 2) {
        for name in folder::entries::<String>(group).unwrap_or_default() {
            if name.starts_with("exec-") {
                text.push_str(&list(&group.join(name)));
            }
        }
    }
    text.lines().filter_map(|pid| pid.parse().ok()).collect()
}

/// A number of a file of `name number` lines.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

/// Memory of processes in bytes, given how to learn their resident pages.
fn memory(processes: &[u32], resident: impl Fn(u32) -> u64) -> u64 {
    let resident = |pid: u32| resident(pid) * u64::try_from(rustix::param::page_size()).unwrap_or(4096);
    match *processes {
        // Walking through its pages would cost more and say little else.
        [pid] => resident(pid),
        _ => processes.iter().map(|pid| proportional(*pid).unwrap_or_else(|| resident(*pid))).sum(),
    }
}

/// Memory of a process in which a page that is shared by n counts an n-th: forked workers share most of theirs.
fn proportional(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

/// A tree as `table` has it, which is read again where the tree has changed since.
fn of_tree(table: &mut Option<Table>, shim: u32, session: u32) -> Option<Usage> {
    for _ in 1..LOOKS {
        let seen = table.get_or_insert_with(Table::read);
        let tree = seen.tree(shim, session);
        if seen.holds(shim, &tree) {
            return seen.usage(shim, &tree);
        }
        *table = None;
    }
    let seen = table.get_or_insert_with(Table::read);
    seen.usage(shim, &seen.tree(shim, session))
}

/// All processes of the machine.
struct Table {
    processes: HashMap<u32, Stat>,
    children: HashMap<u32, Vec<u32>>,
    sessions: HashMap<u32, Vec<u32>>,
}

impl Table {
    fn read() -> Self {
        let mut table = Self { processes: HashMap::new(), children: HashMap::new(), sessions: HashMap::new() };
        for pid in folder::entries::<u32>(Path::new("/proc")).unwrap_or_default() {
            if let Some(stat) = stat(pid) {
                table.children.entry(stat.parent).or_default().push(pid);
                table.sessions.entry(stat.session).or_default().push(pid);
                table.processes.insert(pid, stat);
            }
        }
        table
    }

    /// Who belongs to a launch, its shim left out.
    fn tree(&self, shim: u32, session: u32) -> Vec<u32> {
        let of = |map: &HashMap<u32, Vec<u32>>, key| map.get(&key).cloned().unwrap_or_default();
        let mut found = of(&self.sessions, session);
        found.extend(of(&self.children, shim));
        let mut next = 0;
        while let Some(parent) = found.get(next) {
            found.extend(of(&self.children, *parent));
            next += 1;
        }
        found.sort_unstable();
        found.dedup();
        found.retain(|pid| *pid != shim);
        found
    }

    /// Whether nobody of a tree has ended, and nobody has reaped a child, since this table was read.
    fn holds(&self, shim: u32, tree: &[u32]) -> bool {
        let same =
            |was: &Stat, is: &Stat| (was.start_time, was.used_by_children) == (is.start_time, is.used_by_children);
        tree.iter().chain([&shim]).all(|pid| match (self.processes.get(pid), stat(*pid)) {
            (Some(was), Some(is)) => same(was, &is),
            (was, is) => was.is_none() && is.is_none(),
        })
    }

    /// What a tree of this table uses. None where its shim is gone.
    fn usage(&self, shim: u32, tree: &[u32]) -> Option<Usage> {
        let stats = || tree.iter().filter_map(|pid| Some((*pid, self.processes.get(pid)?)));
        // What the shim has reaped were orphans, and commands beside the program.
        let ended = self.processes.get(&shim)?.used_by_children;
        let ticks = ended + stats().map(|(_, stat)| stat.used + stat.used_by_children).sum::<u64>();
        let living: Vec<u32> =
            stats().filter(|(_, stat)| !matches!(stat.state, 'Z' | 'X')).map(|(pid, _)| pid).collect();
        let micros = u128::from(ticks) * 1_000_000 / u128::from(rustix::param::clock_ticks_per_second().max(1));
        Some(Usage {
            cpu: Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX)),
            memory: ByteSize::bytes(memory(&living, |pid| self.processes.get(&pid).map_or(0, |stat| stat.resident))),
            processes: u32::try_from(living.len()).unwrap_or(u32::MAX),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(parent: u32, session: u32, used: u64, used_by_children: u64) -> Stat {
        Stat {
            state: 'S',
            parent,
            session,
            used,
            used_by_children,
            start_time: 0,
            resident: 3,
            arguments: 0..0,
            wait_status: 0,
        }
    }

    #[test]
    fn a_tree_is_what_descends_from_the_shim_or_shares_the_session() {
        let all = [
            // The shim, its program with a worker, and a daemon that it inherited.
            (10, process(1, 10, 1000, 7)),
            (11, process(10, 10, 20, 5)),
            (12, process(11, 10, 30, 0)),
            (13, process(10, 13, 40, 0)),
            // Its program after the shim had been replaced: process 20 is the new shim's predecessor.
            (31, process(1, 20, 1, 2)),
            (30, process(1, 30, 1000, 0)),
            // Somebody else.
            (40, process(1, 40, 5000, 5000)),
        ];
        let mut table = Table { processes: HashMap::new(), children: HashMap::new(), sessions: HashMap::new() };
        for (pid, stat) in all {
            table.children.entry(stat.parent).or_default().push(pid);
            table.sessions.entry(stat.session).or_default().push(pid);
            table.processes.insert(pid, stat);
        }
        let per_tick = Duration::from_secs(1) / u32::try_from(rustix::param::clock_ticks_per_second()).unwrap();
        let used = |shim, session| {
            let usage = table.usage(shim, &table.tree(shim, session)).unwrap();
            (usage.cpu, usage.processes)
        };
        assert_eq!(used(10, 10), (per_tick * (7 + 20 + 5 + 30 + 40), 3));
        assert_eq!(used(30, 20), (per_tick * 3, 1));
        assert_eq!(table.usage(99, &table.tree(99, 99)), None, "its shim is gone");
    }

    #[test]
    fn a_table_is_read_again_when_somebody_of_the_tree_has_ended() {
        const NOBODY: u32 = u32::MAX;
        let own = std::process::id();
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let before = Table::read();
        let tree = [child.id()];
        assert!(before.tree(own, NOBODY).contains(&child.id()));
        assert!(before.holds(own, &tree));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!before.holds(own, &tree), "it ended");
        assert!(before.holds(own, &[]) && before.usage(own, &tree).unwrap().processes == 1);
        let mut table = Some(before);
        let after = of_tree(&mut table, own, NOBODY).unwrap();
        assert!(!table.unwrap().tree(own, NOBODY).contains(&child.id()), "{after:?}");
    }

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "usage_usec_x 1\nusage_usec 22\nuser_usec 3\n";
        assert_eq!((field(text, "usage_usec"), field(text, "usage")), (Some(22), None));
    }

    #[test]
    fn memory_of_this_process_is_about_right() {
        let pid = std::process::id();
        let resident = |pid| stat(pid).unwrap().resident;
        let (alone, shared) = (memory(&[pid], resident), proportional(pid).unwrap());
        assert!(shared > 100_000 && alone > 100_000 && shared < alone * 2, "{shared} of {alone}");
        assert_eq!(memory(&[], resident), 0);
    }
}
