//! What really runs: every process of a test, found by what cannot be forgotten (its command line and environment), not
//! by what the product says.

use std::{collections::BTreeMap, fs, path::Path};

use rustix::process::{Pid, Signal, kill_process};

/// What a process is to a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Role {
    /// `orchestra server run`
    Server,
    /// `orchestra shim --zygote`, which forks shims and ends with its server.
    Zygote,
    /// `orchestra proxy`
    Proxy,
    /// `orchestra shim`
    Shim,
    /// A process of an instance.
    Instance,
    /// Another command of the test.
    Other,
}

/// A process.
#[derive(Clone, Debug)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    pub(crate) parent: u32,
    pub(crate) role: Role,
    /// `demo/dev/api-r1-1#1`, of shims and instances.
    pub(crate) launch: Option<String>,
    /// For whoever reads a failure.
    #[expect(dead_code, reason = "it is read by `Debug` alone")]
    pub(crate) command: String,
    pub(crate) zombie: bool,
}

impl Process {
    /// Whether it is still there, and no zombie. A process id may be used again, but not within a test.
    pub(crate) fn is_alive(&self) -> bool {
        alive(self.pid)
    }

    /// Ends it with SIGKILL. It may have ended already.
    pub(crate) fn kill(&self) {
        kill(self.pid, Signal::KILL);
    }
}

/// Whether a process runs.
pub(crate) fn alive(pid: u32) -> bool {
    stat(pid).is_some_and(|(_, zombie)| !zombie)
}

/// Whether a process has ended and nobody has asked how.
pub(crate) fn is_zombie(pid: u32) -> bool {
    stat(pid).is_some_and(|(_, zombie)| zombie)
}

/// Sends a signal. Whoever has ended already does not mind.
pub(crate) fn kill(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

/// Parent, and whether it is a zombie.
fn stat(pid: u32) -> Option<(u32, bool)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // proc_pid_stat(5): the name may have spaces and parentheses; what follows the last one has none.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    Some((fields.next()?.parse().ok()?, matches!(state, "Z" | "X")))
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// Every process that has one of the folders in its command line, environment or working directory, and zombies that our
/// own ones should collect.
pub(crate) fn of(folders: &[&Path]) -> Vec<Process> {
    let own = std::process::id();
    let named = |bytes: &[u8]| folders.iter().any(|folder| contains(bytes, folder.as_os_str().as_encoded_bytes()));
    let mut found = Vec::new();
    let mut zombies = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        if pid == own {
            continue;
        }
        let Some((parent, zombie)) = stat(pid) else { continue };
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        let directory = fs::read_link(entry.path().join("cwd")).unwrap_or_default();
        let command_text = String::from_utf8_lossy(&command).replace('\0', " ").trim_end().to_owned();
        if zombie {
            zombies.push(Process { pid, parent, role: Role::Other, launch: None, command: command_text, zombie });
            continue;
        }
        if !named(&command) && !named(&environment) && !folders.iter().any(|folder| directory.starts_with(folder)) {
            continue;
        }
        let marker =
            environment.split(|byte| *byte == 0).find_map(|variable| variable.strip_prefix(b"ORCHESTRA_LAUNCH="));
        let marker = marker.map(|marker| String::from_utf8_lossy(marker).into_owned());
        let mut words = command.split(|byte| *byte == 0);
        let is_ours = words.next().is_some_and(|program| program.ends_with(b"/orchestra"));
        let rest: Vec<&[u8]> = words.collect();
        let role = match rest.first() {
            Some(&b"shim") if is_ours && rest.get(1) == Some(&b"--zygote".as_slice()) => Role::Zygote,
            Some(&b"shim") if is_ours => Role::Shim,
            Some(&b"proxy") if is_ours => Role::Proxy,
            Some(_) if is_ours && rest.windows(2).any(|pair| pair == [b"server".as_slice(), b"run".as_slice()]) => {
                Role::Server
            }
            _ if is_ours => Role::Other,
            _ if marker.is_some() => Role::Instance,
            _ => Role::Other,
        };
        let launch = match role {
            Role::Instance => marker.and_then(|marker| Some(marker.split_once('@')?.0.to_owned())),
            Role::Shim => rest.iter().rev().find_map(|word| of_folder(&String::from_utf8_lossy(word))),
            _ => None,
        };
        found.push(Process { pid, parent, role, launch, command: command_text, zombie });
    }
    // What a user's program does not collect is its own matter; what we do not collect is ours.
    let ours = |process: &&Process| matches!(process.role, Role::Server | Role::Zygote | Role::Proxy | Role::Shim);
    let known: Vec<u32> = found.iter().filter(ours).map(|process| process.pid).collect();
    found.extend(zombies.into_iter().filter(|zombie| known.contains(&zombie.parent)));
    found
}

/// `…/launches/demo/dev/api-r1-1/2` as `demo/dev/api-r1-1#2`.
fn of_folder(path: &str) -> Option<String> {
    let parts: Vec<&str> = path.split_once("/launches/")?.1.split('/').collect();
    let [stack, environment, instance, attempt] = parts[..] else { return None };
    Some(format!("{stack}/{environment}/{instance}#{attempt}"))
}

/// Processes by launch.
pub(crate) fn launches(processes: &[Process], role: Role) -> BTreeMap<String, Vec<u32>> {
    let mut all: BTreeMap<String, Vec<u32>> = BTreeMap::new();
    for process in processes.iter().filter(|process| process.role == role && !process.zombie) {
        all.entry(process.launch.clone().unwrap_or_default()).or_default().push(process.pid);
    }
    all
}
