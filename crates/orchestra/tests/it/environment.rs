//! A hermetic place for one test: a home, a stack folder, the built binary; and the proof that nothing is left of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs,
    io::{BufRead, BufReader, Read},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, OnceLock, mpsc},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::processes::{self, Process, Role};

/// Longest a command may take. A hang is a failure with its output shown, not a test that never ends.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at something that sends no event.
const LOOK: Duration = Duration::from_millis(15);

/// The binary under test.
pub(crate) fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_orchestra"))
}

/// `testbed-app`, beside the binary. Built once if it is not there: Cargo builds no binaries of a dependency.
pub(crate) fn app() -> &'static Path {
    static APP: OnceLock<PathBuf> = OnceLock::new();
    APP.get_or_init(|| {
        let folder = binary().parent().expect("a binary is in a folder");
        let path = folder.join("testbed-app");
        let target = folder.parent().expect("profiles are in a target folder");
        // Several test processes at once: the first builds, the others find its result.
        let lock = fs::File::create(target.join("testbed-app.lock")).unwrap();
        lock.lock().unwrap();
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.args(["build", "-q", "-p", "orchestra-testbed", "--bins"]).env("CARGO_TARGET_DIR", target);
        if folder.file_name() == Some(OsStr::new("release")) {
            command.arg("--release");
        }
        // Also if it is there: it may be older than its source. Cargo sees in a moment that nothing changed.
        let built = command.current_dir(env!("CARGO_MANIFEST_DIR")).status();
        assert!(path.exists(), "testbed-app could not be built: {built:?}");
        path
    })
}

/// A finished command.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
    what: String,
}

impl Ran {
    pub(crate) fn code(&self) -> Option<i32> {
        self.status.code()
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Its output as one JSON value.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.stdout).unwrap_or_else(|error| panic!("no JSON ({error}) from {self}"))
    }

    /// Its output as one JSON value per line.
    #[track_caller]
    pub(crate) fn json_lines(&self) -> Vec<Value> {
        let parse = |line: &str| {
            serde_json::from_str(line).unwrap_or_else(|error| panic!("no JSON ({error}) in `{line}` from {self}"))
        };
        self.text().lines().map(parse).collect()
    }

    /// Fails unless it ended with this code.
    #[track_caller]
    pub(crate) fn expect(self, code: i32) -> Self {
        assert_eq!(self.code(), Some(code), "{self}");
        self
    }
}

impl std::fmt::Display for Ran {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}`: {}\n--- stdout\n{}\n--- stderr\n{}", self.what, self.status, self.text(), self.stderr)
    }
}

/// A command that runs.
pub(crate) struct Background {
    child: Child,
    lines: mpsc::Receiver<String>,
    /// Everything read so far.
    pub(crate) seen: Vec<String>,
    stdout: Option<JoinHandle<()>>,
    stderr: Option<JoinHandle<String>>,
    /// What came on it so far.
    complaints: Arc<Mutex<Vec<u8>>>,
    what: String,
}

impl Background {
    fn spawn(mut command: Command, what: String) -> Self {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (sender, lines) = mpsc::channel();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut stderr = child.stderr.take().unwrap();
        let stdout = std::thread::spawn(move || {
            let mut line = Vec::new();
            while stdout.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
                let _ = sender.send(String::from_utf8_lossy(&line).trim_end_matches('\n').to_owned());
                line.clear();
            }
        });
        let complaints = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&complaints);
        let stderr = std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(read @ 1..) = stderr.read(&mut bytes) {
                heard.lock().unwrap().extend_from_slice(&bytes[..read]);
            }
            String::from_utf8_lossy(&heard.lock().unwrap()).into_owned()
        });
        Self { child, lines, seen: Vec::new(), stdout: Some(stdout), stderr: Some(stderr), complaints, what }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended already.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        processes::kill(self.pid(), signal);
    }

    /// Waits for a line of its output.
    #[track_caller]
    pub(crate) fn line(&mut self, what: &str, fits: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if fits(&line) {
                        return line;
                    }
                }
                Err(error) => {
                    let seen = self.seen.join("\n");
                    self.signal(Signal::KILL);
                    panic!("no {what} from `{}` ({error}):\n{seen}", self.what);
                }
            }
        }
    }

    /// Waits until it has said this on standard error.
    #[track_caller]
    pub(crate) fn complains(&self, what: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let said = String::from_utf8_lossy(&self.complaints.lock().unwrap()).into_owned();
            if said.contains(what) {
                return;
            }
            assert!(Instant::now() < deadline, "`{}` did not say `{what}` but:\n{said}", self.what);
            std::thread::sleep(LOOK);
        }
    }

    /// Waits for an event in `events --follow --json`.
    #[track_caller]
    pub(crate) fn event(&mut self, kind: &str, about: &str) -> Value {
        let fits = |line: &str| {
            let event: Value = serde_json::from_str(line).unwrap_or_default();
            let names = [&event["instance"], &event["resource"], &event["run"], &event["environment"]];
            event["kind"] == kind && names.iter().any(|name| name.as_str().is_some_and(|name| name.starts_with(about)))
        };
        let line = self.line(&format!("event {kind} of {about}"), fits);
        serde_json::from_str(&line).unwrap()
    }

    /// Waits for its end.
    #[track_caller]
    pub(crate) fn wait(self) -> Ran {
        self.wait_or().unwrap_or_else(|hung| panic!("{hung}"))
    }

    /// Waits for its end, or says what it had written when it should have ended long ago.
    fn wait_or(mut self) -> Result<Ran, String> {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > deadline {
                self.signal(Signal::KILL);
                let _ = self.child.wait();
                let stderr = self.stderr.take().and_then(|thread| thread.join().ok()).unwrap_or_default();
                self.seen.extend(self.lines.try_iter());
                let seen = self.seen.join("\n");
                return Err(format!(
                    "`{}` did not end within {PATIENCE:?}\n--- stdout\n{seen}\n--- stderr\n{stderr}",
                    self.what
                ));
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        self.stdout.take().map(JoinHandle::join);
        let stderr = self.stderr.take().and_then(|thread| thread.join().ok()).unwrap_or_default();
        self.seen.extend(self.lines.try_iter());
        Ok(Ran { status, stdout: self.seen.join("\n").into_bytes(), stderr, what: std::mem::take(&mut self.what) })
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// A home, a stack folder and the binary.
pub(crate) struct TestEnvironment {
    root: TempDir,
    binary: PathBuf,
    home: PathBuf,
}

impl TestEnvironment {
    pub(crate) fn new() -> Self {
        app();
        let root = tempfile::Builder::new().prefix("orc-").tempdir().unwrap();
        fs::create_dir(root.path().join("stack")).unwrap();
        let home = root.path().join("state");
        Self { root, binary: binary().to_owned(), home }
    }

    /// The same with another state directory.
    pub(crate) fn with_home(mut self, home: PathBuf) -> Self {
        self.home = home;
        self
    }

    /// Runs another copy of the binary from now on.
    pub(crate) fn use_binary(&mut self, path: PathBuf) {
        self.binary = path;
    }

    pub(crate) fn root(&self) -> &Path {
        self.root.path()
    }

    pub(crate) fn home(&self) -> &Path {
        &self.home
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.path().join("stack").join(name)
    }

    /// Writes the stack file. `APP` stands for the program, `HERE` for the folder.
    pub(crate) fn write(&self, yaml: &str) {
        let here = self.path("");
        let here = here.to_str().unwrap().trim_end_matches('/');
        let text = yaml.replace("APP", app().to_str().unwrap()).replace("HERE", here);
        fs::write(self.path("orchestra.yaml"), text).unwrap();
    }

    fn describe(arguments: &[&str]) -> String {
        format!("orchestra {}", arguments.join(" "))
    }

    /// The command, not yet started.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command
            .args(arguments)
            .current_dir(self.path(""))
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            // Found in the environment of every process that comes of it.
            .env("HOME", self.root.path())
            .env("ORCHESTRA_HOME", &self.home)
            // A test runner may set it.
            .env("RUST_BACKTRACE", "0");
        command
    }

    pub(crate) fn spawn(&self, arguments: &[&str]) -> Background {
        Background::spawn(self.command(arguments), Self::describe(arguments))
    }

    /// Follows events. Something must have happened before: its last event says that the command listens.
    pub(crate) fn follow(&self) -> Background {
        let mut events = self.spawn(&["events", "--follow", "--json", "--tail", "1"]);
        events.line("last event", |_| true);
        events
    }

    #[track_caller]
    pub(crate) fn run(&self, arguments: &[&str]) -> Ran {
        self.spawn(arguments).wait_or().unwrap_or_else(|hung| {
            let more = [&["status", "--json"][..], &["events"]].map(|look| match self.spawn(look).wait_or() {
                Ok(ran) => ran.to_string(),
                Err(hung) => hung,
            });
            panic!("{hung}\n{}", more.join("\n"))
        })
    }

    /// Output byte by byte, for `logs --raw`.
    #[track_caller]
    pub(crate) fn bytes(&self, arguments: &[&str]) -> Vec<u8> {
        let output = self.command(arguments).stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{}: {}", Self::describe(arguments), String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    #[track_caller]
    pub(crate) fn ok(&self, arguments: &[&str]) -> Ran {
        self.run(arguments).expect(0)
    }

    #[track_caller]
    pub(crate) fn status(&self) -> Value {
        self.ok(&["status", "--json"]).json()
    }

    /// Waits until the status is as wanted.
    #[track_caller]
    pub(crate) fn wait_for(&self, what: &str, fits: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.status();
            if fits(&status) {
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "waited in vain for {what}: {status:#}\n{}",
                self.ok(&["events", "--tail", "40"]).text()
            );
            std::thread::sleep(LOOK);
        }
    }

    /// The address of a published port.
    #[track_caller]
    pub(crate) fn address(&self, service: &str) -> SocketAddr {
        let status = self.status();
        let service = find(&status, service);
        let url = service["addresses"][0]["url"].as_str().unwrap_or_else(|| panic!("no address: {service:#}"));
        url.rsplit_once('/').unwrap().1.parse().unwrap()
    }

    pub(crate) fn processes(&self) -> Vec<Process> {
        processes::of(&[self.root.path(), &self.home])
    }

    pub(crate) fn all(&self, role: Role) -> Vec<Process> {
        self.processes().into_iter().filter(|process| process.role == role && !process.zombie).collect()
    }

    /// The only process of its role.
    #[track_caller]
    pub(crate) fn one(&self, role: Role) -> Process {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut found = self.all(role);
            if found.len() == 1 {
                return found.remove(0);
            }
            // One that was killed may still be leaving while its successor is there.
            assert!(Instant::now() < deadline, "not one {role:?}: {found:#?}");
            std::thread::sleep(LOOK);
        }
    }

    /// Process ids of running instances by id, as the status has them.
    pub(crate) fn pids(&self) -> BTreeMap<String, u64> {
        pids(&self.status())
    }

    /// Compares what is said with what is: nothing unknown, nothing twice, everything that should be there.
    #[track_caller]
    pub(crate) fn assert_consistent(&self, replicas: &[(&str, u64)], context: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (status, processes) = (self.status(), self.processes());
            match consistent(&status, &processes, replicas) {
                Ok(()) => return,
                Err(problem) if Instant::now() > deadline => {
                    let events = self.run(&["events", "--tail", "60"]);
                    panic!("{context}: {problem}\n{status:#}\n{processes:#?}\n{events}");
                }
                // What was killed may still be leaving, and what replaces it coming.
                Err(_) => std::thread::sleep(LOOK),
            }
        }
    }

    /// Stops the server. The command returns once its process has ended, so that its state can be copied or moved.
    #[track_caller]
    pub(crate) fn stop_server(&self) {
        self.ok(&["server", "stop"]);
        let left: Vec<_> = self.all(Role::Server);
        assert!(left.is_empty(), "left after `server stop`: {left:#?}");
    }

    /// Takes everything down and proves that nothing is left.
    #[track_caller]
    pub(crate) fn finish(self) {
        if self.run(&["status", "--json"]).json().get("id").is_some() {
            self.ok(&["down"]);
            let status = self.status();
            assert_eq!(status["health"], "down", "{status:#}");
        }
        self.assert_empty();
        self.ok(&["server", "stop"]);
        // The proxy goes on by design; a polite word must end it.
        for proxy in self.all(Role::Proxy) {
            processes::kill(proxy.pid, Signal::TERM);
        }
        // What the test itself still follows is its own matter.
        self.wait_until_gone("the end", |process| process.parent != std::process::id());
    }

    /// Proves that no instance and no shim is left.
    #[track_caller]
    pub(crate) fn assert_empty(&self) {
        self.wait_until_gone("`down`", |process| matches!(process.role, Role::Shim | Role::Instance) || process.zombie);
    }

    #[track_caller]
    pub(crate) fn wait_until_gone(&self, after: &str, counts: impl Fn(&Process) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let left: Vec<Process> = self.processes().into_iter().filter(&counts).collect();
            if left.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "left after {after}: {left:#?}");
            std::thread::sleep(LOOK);
        }
    }
}

impl Drop for TestEnvironment {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = fs::read_to_string(self.home.join("server.log")).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("--- the end of server.log\n{}", lines[lines.len().saturating_sub(30)..].join("\n"));
            if std::env::var_os("ORCHESTRA_TEST_KEEP").is_some() {
                self.root.disable_cleanup(true);
                eprintln!("kept {}", self.root.path().display());
            }
        }
        // Whatever a failed test left: first who could start others, then again until nothing is found.
        for _ in 0..50 {
            let mut left = self.processes();
            left.retain(|process| !process.zombie);
            if left.is_empty() {
                return;
            }
            left.sort_by_key(|process| process.role);
            for process in left {
                process.kill();
            }
            std::thread::sleep(LOOK);
        }
    }
}

/// A service or job in a status.
#[track_caller]
pub(crate) fn find<'a>(status: &'a Value, name: &str) -> &'a Value {
    let lists = ["services", "jobs"].map(|list| status[list].as_array().into_iter().flatten());
    let found = lists.into_iter().flatten().find(|item| item["name"] == name);
    found.unwrap_or_else(|| panic!("no {name} in {status:#}"))
}

/// Instances of a status with a process.
pub(crate) fn pids(status: &Value) -> BTreeMap<String, u64> {
    instances(status).filter_map(|(id, instance)| Some((id, instance["pid"].as_u64()?))).collect()
}

fn instances(status: &Value) -> impl Iterator<Item = (String, &Value)> {
    let lists = ["services", "jobs"].map(|list| status[list].as_array().into_iter().flatten());
    let items = lists.into_iter().flatten().flat_map(|item| item["instances"].as_array().into_iter().flatten());
    items.map(|instance| (instance["id"].as_str().unwrap_or_default().to_owned(), instance))
}

fn consistent(status: &Value, processes: &[Process], replicas: &[(&str, u64)]) -> Result<(), String> {
    if !status["run"].is_null() {
        return Err(format!("a run goes on: {}", status["run"]));
    }
    let wanted = if replicas.is_empty() { "down" } else { "ready" };
    if status["health"] != wanted {
        return Err(format!("health is {} and not {wanted}", status["health"]));
    }
    for (service, count) in replicas {
        let found = find(status, service);
        let instances = found["instances"].as_array().map_or(0, Vec::len) as u64;
        if (found["ready"].as_u64(), instances) != (Some(*count), *count) {
            return Err(format!("{service}: {} ready, {instances} instances, {count} wanted", found["ready"]));
        }
    }
    let environment = status["id"].as_str().unwrap_or_default();
    let known: BTreeMap<String, u64> = instances(status)
        .filter_map(|(id, instance)| {
            Some((format!("{environment}/{id}#{}", instance["attempt"]), instance["pid"].as_u64()?))
        })
        .collect();
    let names = |role| processes::launches(processes, role).into_keys().collect::<BTreeSet<_>>();
    for role in [Role::Instance, Role::Shim] {
        let running = names(role);
        if let Some(unknown) = running.iter().find(|launch| !known.contains_key(*launch)) {
            return Err(format!("a {role:?} of {unknown} runs, which the status does not know"));
        }
        if let Some(missing) = known.keys().find(|launch| !running.contains(*launch)) {
            return Err(format!("no {role:?} of {missing} runs"));
        }
    }
    for (launch, pid) in &known {
        if !processes.iter().any(|process| u64::from(process.pid) == *pid && process.launch.as_ref() == Some(launch)) {
            return Err(format!("process {pid} is not one of {launch}"));
        }
    }
    for role in [Role::Shim, Role::Server, Role::Proxy] {
        if let Some((launch, pids)) = processes::launches(processes, role).iter().find(|(_, pids)| pids.len() > 1) {
            return Err(format!("{} times {role:?} of {launch}", pids.len()));
        }
    }
    // Whoever forks much has zombies for a moment. One that stays is one that nobody collects.
    let zombies: Vec<&Process> = processes.iter().filter(|process| process.zombie).collect();
    if !zombies.is_empty() {
        std::thread::sleep(LOOK * 10);
        if let Some(zombie) = zombies.into_iter().find(|zombie| processes::is_zombie(zombie.pid)) {
            return Err(format!("a zombie: {zombie:?}"));
        }
    }
    Ok(())
}
