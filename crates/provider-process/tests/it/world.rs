//! A temporary place to run processes in, and what can be seen of it from outside.

use std::{
    fs,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use orchestra_model::launch::LaunchKey;
use orchestra_provider::{
    LogLine, LogQuery, LogStream, Provider,
    conformance::{Bench, Program, World},
};
use orchestra_provider_process::{Cgroups, Options, ProcessProvider};
use orchestra_task::TaskTree;

pub(crate) const SHIM: &str = env!("CARGO_BIN_EXE_orchestra-shim");
pub(crate) const TORTURE: &str = env!("CARGO_BIN_EXE_torture");

/// Both ways to hold a tree together.
pub(crate) const BOTH: [Cgroups; 2] = [Cgroups::Auto, Cgroups::Off];

pub(crate) struct Processes {
    pub(crate) dir: Arc<tempfile::TempDir>,
    pub(crate) state: PathBuf,
    cgroups: Cgroups,
    tree: Mutex<TaskTree>,
}

impl Processes {
    pub(crate) fn new(cgroups: Cgroups) -> Self {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let state = dir.path().join("state");
        Self { dir, state, cgroups, tree: Mutex::default() }
    }

    /// Ends the server that was opened last, as a killed one ends: whatever it started goes on.
    pub(crate) async fn close(&self) {
        let tree = self.tree.lock().unwrap().clone();
        assert!(tree.shutdown(Duration::from_secs(10)).await);
    }

    pub(crate) fn options(&self) -> Options {
        let mut options = Options::below(&self.state, SHIM);
        options.shim_args.clear();
        options.cgroups = self.cgroups;
        options
    }
}

impl Drop for Processes {
    /// Leaves nothing behind, also when the test failed in the middle.
    fn drop(&mut self) {
        let marker = "ORCHESTRA_LAUNCH=";
        let mut folders = vec![self.state.join("launches")];
        let mut markers = Vec::new();
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    folders.push(entry.path());
                } else if entry.file_name() == "launch.json" {
                    let read = |name: &str| -> Option<serde_json::Value> {
                        serde_json::from_slice(&fs::read(entry.path().with_file_name(name)).ok()?).ok()
                    };
                    let gone = read("status.json").is_none_or(|status| status["gone"] == true);
                    if let (Some(launch), false) = (read("launch.json"), gone) {
                        let shim = read("status.json").and_then(|status| status["shim"].as_u64());
                        if let Some(shim) = shim {
                            kill_nine(u32::try_from(shim).unwrap());
                        }
                        markers.push(format!("@{}", launch["nonce"].as_str().unwrap_or("?")));
                    }
                }
            }
        }
        for _ in 0..if markers.is_empty() { 0 } else { 10 } {
            for pid in processes() {
                let environ = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
                let environ = String::from_utf8_lossy(&environ);
                let ours = |entry: &str| entry.starts_with(marker) && markers.iter().any(|end| entry.ends_with(end));
                if environ.split('\0').any(ours) {
                    kill_nine(pid);
                }
            }
        }
    }
}

impl World for Processes {
    fn open(&self) -> Arc<dyn Provider> {
        let mut tree = self.tree.lock().unwrap();
        tree.cancel();
        *tree = TaskTree::new();
        Arc::new(ProcessProvider::open(self.options(), tree.clone()).unwrap())
    }

    fn command(&self, program: Program) -> Vec<String> {
        match program {
            Program::Run => torture(&["run"]),
            Program::Stubborn => torture(&["stubborn"]),
            Program::Exit(code) => torture(&["exit", &code.to_string()]),
            Program::Print(stdout, stderr, code) => torture(&["print", &stdout, &stderr, &code.to_string()]),
            Program::PrintAndRun(stdout) => torture(&["print-and-run", &stdout]),
            Program::Notify(status) => torture(&["notify", &status]),
            Program::Spin => torture(&["spin"]),
            Program::Missing => vec!["no-such-program-anywhere".into()],
        }
    }

    fn directory(&self) -> String {
        self.dir.path().to_str().unwrap().to_owned()
    }

    fn volume(&self, name: &str) -> String {
        self.state.join("volumes").join(name).to_str().unwrap().to_owned()
    }
}

/// A command line of the torture program.
pub(crate) fn torture(args: &[&str]) -> Vec<String> {
    std::iter::once(TORTURE).chain(args.iter().copied()).map(str::to_owned).collect()
}

/// A world with a bench on it.
pub(crate) fn bench(case: &str, cgroups: Cgroups) -> (Arc<Processes>, Bench) {
    let world = Arc::new(Processes::new(cgroups));
    (Arc::clone(&world), Bench::new(case, Box::new(Shared(world))))
}

struct Shared(Arc<Processes>);

impl World for Shared {
    fn open(&self) -> Arc<dyn Provider> {
        self.0.open()
    }
    fn command(&self, program: Program) -> Vec<String> {
        self.0.command(program)
    }
    fn directory(&self) -> String {
        self.0.directory()
    }
    fn volume(&self, name: &str) -> String {
        self.0.volume(name)
    }
}

/// Launch folder of a key.
pub(crate) fn folder(world: &Processes, key: &LaunchKey) -> PathBuf {
    world
        .state
        .join("launches")
        .join(key.environment.to_string())
        .join(key.instance.to_string())
        .join(key.attempt.to_string())
}

/// What the shim last recorded.
pub(crate) fn status(world: &Processes, key: &LaunchKey) -> serde_json::Value {
    serde_json::from_slice(&fs::read(folder(world, key).join("status.json")).unwrap()).unwrap()
}

pub(crate) fn shim_of(world: &Processes, key: &LaunchKey) -> u32 {
    u32::try_from(status(world, key)["shim"].as_u64().unwrap()).unwrap()
}

pub(crate) fn in_cgroup(world: &Processes, key: &LaunchKey) -> bool {
    status(world, key)["in_cgroup"] == true
}

/// The marker of a launch, as it stands in the environment of its processes.
pub(crate) fn marker(world: &Processes, key: &LaunchKey) -> String {
    let launch: serde_json::Value =
        serde_json::from_slice(&fs::read(folder(world, key).join("launch.json")).unwrap()).unwrap();
    format!("ORCHESTRA_LAUNCH={key}@{}", launch["nonce"].as_str().unwrap())
}

fn processes() -> Vec<u32> {
    fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
}

/// Living processes that bear a marker.
pub(crate) fn survivors(marker: &str) -> Vec<u32> {
    processes()
        .into_iter()
        .filter(|pid| {
            fs::read(format!("/proc/{pid}/environ"))
                .is_ok_and(|environ| environ.split(|byte| *byte == 0).any(|entry| entry == marker.as_bytes()))
        })
        .collect()
}

/// Children of a process that ended and were not reaped.
pub(crate) fn zombies_of(parent: u32) -> Vec<u32> {
    processes()
        .into_iter()
        .filter(|pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let rest: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
            rest.first() == Some(&"Z") && rest.get(1) == Some(&parent.to_string().as_str())
        })
        .collect()
}

pub(crate) fn kill_nine(pid: u32) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    // It may have ended by itself.
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

pub(crate) fn lives(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or("").trim_start().starts_with('Z'))
}

/// Waits for something that the kernel does without telling us.
pub(crate) async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not come true");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Everything that was written.
pub(crate) async fn lines(provider: &dyn Provider, key: &LaunchKey, stream: Option<LogStream>) -> Vec<LogLine> {
    let query = LogQuery {
        environment: key.environment.clone(),
        workloads: Vec::new(),
        instance: Some(key.instance.clone()),
        stream,
        tail: None,
        since: None,
        follow: false,
    };
    let mut receiver = provider.logs(query).await.unwrap();
    let mut lines = Vec::new();
    while let Some(line) = receiver.recv().await {
        if line.attempt == key.attempt {
            lines.push(line);
        }
    }
    lines
}

pub(crate) fn joined(lines: &[LogLine]) -> Vec<u8> {
    lines.iter().flat_map(|line| line.bytes.iter().copied()).collect()
}
