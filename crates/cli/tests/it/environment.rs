//! A home, a folder with a stack file, a server with a script, and everything that the command line may touch, recorded.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use orchestra_api::{
    BoxFuture, Endpoint, SocketTransport, Transport,
    scripted::{Exchange, ScriptedServer},
};
use orchestra_cli::{Deps, Ended, Exit, ServerControl, ServerOptions, Serving, Spawned, System, Terminal};
use orchestra_model::{Code, Diagnostic};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};

pub(crate) const NOW: u64 = 1_795_232_980_123;
const DEADLINE: Duration = Duration::from_secs(30);

/// What a command left behind.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) exit: Exit,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Outcome {
    /// Everything on one page, for a snapshot.
    pub(crate) fn page(&self) -> String {
        format!("exit: {}\n--- stdout\n{}--- stderr\n{}", self.exit.code(), self.stdout, self.stderr)
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {}", self.stdout))
    }

    /// One value per line.
    pub(crate) fn ndjson(&self) -> Vec<Value> {
        self.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

#[derive(Clone, Default)]
pub(crate) struct Recorder(Arc<Mutex<Vec<u8>>>);

impl Recorder {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

impl Write for Recorder {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Output whose reader has gone after some bytes, as that of `| head`.
struct Closed(usize);

impl Write for Closed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0 < bytes.len() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.0 -= bytes.len();
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Servers that a command starts: each takes the next script.
#[derive(Default)]
struct Control {
    scripts: Mutex<Vec<Vec<Exchange>>>,
    in_process: Mutex<Option<Vec<Exchange>>>,
    running: Mutex<Vec<ScriptedServer>>,
    spawned: Mutex<Vec<(Option<String>, Option<String>)>>,
    last_words: Mutex<Option<String>>,
    kills: Mutex<u32>,
    random: Mutex<u128>,
}

struct Handle(Arc<Control>);

impl ServerControl for Handle {
    fn spawn(&self, options: &ServerOptions) -> io::Result<Spawned> {
        let spawned = (options.listen.map(|address| address.to_string()), options.token.clone());
        self.0.spawned.lock().unwrap().push(spawned);
        let log = options.home.join("server.log");
        if let Some(words) = self.0.last_words.lock().unwrap().clone() {
            std::fs::create_dir_all(&options.home)?;
            std::fs::write(&log, "starting\n\na line of the log\n")?;
            let ended = Ended { status: "exit code 1".to_owned(), killed: false, last_words: words };
            return Ok(Spawned { pid: 9, log, exited: Box::pin(std::future::ready(ended)) });
        }
        let mut kills = self.0.kills.lock().unwrap();
        if *kills > 0 {
            *kills -= 1;
            let status = "signal: 9 (SIGKILL)".to_owned();
            let ended = Ended { status, killed: true, last_words: String::new() };
            return Ok(Spawned { pid: 9, log, exited: Box::pin(std::future::ready(ended)) });
        }
        let mut scripts = self.0.scripts.lock().unwrap();
        assert!(!scripts.is_empty(), "a server was started that the test does not expect");
        std::fs::create_dir_all(&options.home)?;
        let socket = orchestra_api::socket_path(&options.home);
        let _ = std::fs::remove_file(&socket);
        self.0.running.lock().unwrap().push(ScriptedServer::start(&socket, scripts.remove(0))?);
        Ok(Spawned { pid: 4321, log, exited: Box::pin(std::future::pending()) })
    }

    fn run(&self, options: ServerOptions, _: oneshot::Sender<Serving>) -> BoxFuture<'_, Result<(), Vec<Diagnostic>>> {
        let locked = Diagnostic::error(Code::STATE_LOCKED, format!("another server owns {}", options.home.display()));
        Box::pin(async move { Err(vec![locked]) })
    }

    fn program(&self) -> io::Result<PathBuf> {
        Ok("/usr/local/bin/orchestra".into())
    }

    fn in_process(&self, home: &Path) -> BoxFuture<'_, Result<Arc<dyn Transport>, Vec<Diagnostic>>> {
        let script = self.0.in_process.lock().unwrap().take().expect("nothing is asked within the process");
        let socket = home.parent().unwrap().join("in-process.sock");
        self.0.running.lock().unwrap().push(ScriptedServer::start(&socket, script).unwrap());
        Box::pin(async move { Ok(Arc::new(SocketTransport::new(Endpoint::Unix(socket))) as Arc<dyn Transport>) })
    }
}

/// A machine whose files are in a folder of its own.
pub(crate) struct Machine {
    pub(crate) root: tempfile::TempDir,
    is_root: AtomicBool,
    programs: Mutex<Vec<&'static str>>,
    ran: Mutex<Vec<String>>,
    failure: Mutex<Option<String>>,
}

impl Default for Machine {
    fn default() -> Self {
        Self {
            root: tempfile::tempdir().unwrap(),
            is_root: AtomicBool::new(false),
            programs: Mutex::default(),
            ran: Mutex::default(),
            failure: Mutex::default(),
        }
    }
}

impl Machine {
    /// It keeps its trust store as Debian does.
    pub(crate) fn debian(&self) {
        std::fs::create_dir_all(self.root.path().join("usr/local/share/ca-certificates")).unwrap();
        self.programs.lock().unwrap().push("update-ca-certificates");
    }

    /// The certificates that it trusts.
    pub(crate) fn bundle(&self, pem: &str) {
        std::fs::create_dir_all(self.root.path().join("etc/ssl/certs")).unwrap();
        std::fs::write(self.root.path().join("etc/ssl/certs/ca-certificates.crt"), pem).unwrap();
    }

    pub(crate) fn become_root(&self) {
        self.is_root.store(true, Ordering::SeqCst);
    }

    /// Every program that is run fails and says this.
    pub(crate) fn fail(&self, says: &str) {
        *self.failure.lock().unwrap() = Some(says.to_owned());
    }

    /// Everything that was run.
    pub(crate) fn ran(&self) -> Vec<String> {
        self.ran.lock().unwrap().clone()
    }
}

impl System for Machine {
    fn root(&self) -> PathBuf {
        self.root.path().to_owned()
    }

    fn is_macos(&self) -> bool {
        false
    }

    fn is_root(&self) -> bool {
        self.is_root.load(Ordering::SeqCst)
    }

    fn has(&self, program: &str) -> bool {
        self.programs.lock().unwrap().contains(&program)
    }

    fn run(&self, command: &[String]) -> io::Result<(bool, String)> {
        self.ran.lock().unwrap().push(command.join(" "));
        let failure = self.failure.lock().unwrap().clone();
        Ok((failure.is_none(), failure.unwrap_or_default()))
    }
}

/// A hermetic place for commands.
pub(crate) struct TestEnvironment {
    folder: tempfile::TempDir,
    control: Arc<Control>,
    pub(crate) system: Arc<Machine>,
    variables: BTreeMap<String, String>,
    terminal: Option<(u16, u16)>,
    pub(crate) interrupts: mpsc::Sender<()>,
    receiver: Option<mpsc::Receiver<()>>,
    stdout_limit: Option<usize>,
    pub(crate) stdout: Recorder,
    pub(crate) stderr: Recorder,
}

impl TestEnvironment {
    /// Nothing runs, and the stack file is there.
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("work")).unwrap();
        let (interrupts, receiver) = mpsc::channel(4);
        let environment = Self {
            folder,
            control: Arc::default(),
            system: Arc::default(),
            variables: BTreeMap::new(),
            terminal: None,
            interrupts,
            receiver: Some(receiver),
            stdout_limit: None,
            stdout: Recorder::default(),
            stderr: Recorder::default(),
        };
        std::fs::write(environment.cwd().join("orchestra.yaml"), STACK).unwrap();
        environment
    }

    pub(crate) fn cwd(&self) -> PathBuf {
        self.folder.path().canonicalize().unwrap().join("work")
    }

    pub(crate) fn home(&self) -> PathBuf {
        self.folder.path().join("home")
    }

    /// A server runs already, or again: somebody else has started it.
    pub(crate) fn server(&self, script: Vec<Exchange>) {
        std::fs::create_dir_all(self.home()).unwrap();
        let socket = orchestra_api::socket_path(&self.home());
        let _ = std::fs::remove_file(&socket);
        self.control.running.lock().unwrap().push(ScriptedServer::start(&socket, script).unwrap());
    }

    /// The server that runs is gone, as after kill -9: its socket file stays.
    pub(crate) fn kill_server(&self) {
        self.control.running.lock().unwrap().clear();
    }

    /// The next server that a command starts.
    pub(crate) fn spawns(&self, script: Vec<Exchange>) {
        self.control.scripts.lock().unwrap().push(script);
    }

    /// Servers that are started end at once, with this on their standard output.
    pub(crate) fn spawn_fails(&self, last_words: &str) {
        *self.control.last_words.lock().unwrap() = Some(last_words.to_owned());
    }

    /// As many servers are killed as soon as they are started.
    pub(crate) fn spawns_are_killed(&self, times: u32) {
        *self.control.kills.lock().unwrap() = times;
    }

    /// What is answered without a server.
    pub(crate) fn in_process(&self, script: Vec<Exchange>) {
        *self.control.in_process.lock().unwrap() = Some(script);
    }

    /// Every exchange of every server that runs has happened.
    pub(crate) fn is_exhausted(&self) -> bool {
        self.control.running.lock().unwrap().iter().all(ScriptedServer::is_exhausted)
    }

    /// The idempotency keys of all requests to start runs that reached a server.
    pub(crate) fn idempotency_keys(&self) -> Vec<Option<String>> {
        self.control.running.lock().unwrap().iter().flat_map(ScriptedServer::idempotency_keys).collect()
    }

    /// Version that the running server says it has.
    pub(crate) fn server_version(&self, version: &str) {
        self.control.running.lock().unwrap()[0].version(|found| version.clone_into(&mut found.version));
    }

    pub(crate) fn variable(&mut self, name: &str, value: &str) {
        self.variables.insert(name.to_owned(), value.to_owned());
    }

    pub(crate) fn terminal(&mut self, columns: u16, rows: u16) {
        self.terminal = Some((columns, rows));
    }

    /// Whoever reads standard output leaves after so many bytes.
    pub(crate) fn closes_after(&mut self, bytes: usize) {
        self.stdout_limit = Some(bytes);
    }

    /// Listening address and token of every server that was started.
    pub(crate) fn spawned(&self) -> Vec<(Option<String>, Option<String>)> {
        self.control.spawned.lock().unwrap().clone()
    }

    fn deps(&mut self) -> Deps {
        let variables = self.variables.clone();
        let home = self.home().display().to_string();
        let size = self.terminal;
        let stdout: Box<dyn Write + Send> = match self.stdout_limit {
            Some(bytes) => Box::new(Closed(bytes)),
            None => Box::new(self.stdout.clone()),
        };
        Deps {
            version: "0.0.0-test",
            cwd: self.cwd(),
            env: Box::new(move |name| match name {
                "ORCHESTRA_HOME" => Some(variables.get(name).unwrap_or(&home).clone()),
                _ => variables.get(name).cloned(),
            }),
            stdout,
            stderr: Box::new(self.stderr.clone()),
            terminal: Terminal { stdout: size.is_some(), stderr: size.is_some(), size: Box::new(move || size) },
            now: Box::new(|| NOW),
            random: Box::new({
                let made = self.control.clone();
                move || {
                    let mut last = made.random.lock().unwrap();
                    *last += 1;
                    *last
                }
            }),
            interrupts: self.receiver.take().unwrap_or_else(|| mpsc::channel(1).1),
            server: Arc::new(Handle(self.control.clone())),
            system: self.system.clone(),
        }
    }

    /// Starts a command; the future is the command.
    pub(crate) fn start(&mut self, line: &str) -> impl Future<Output = Exit> + use<> {
        let arguments: Vec<OsString> =
            std::iter::once("orchestra").chain(line.split_whitespace()).map(Into::into).collect();
        let deps = self.deps();
        async move { tokio::time::timeout(DEADLINE, orchestra_cli::run(arguments, deps)).await.expect("the command ends") }
    }

    /// Runs a command. Paths of the test are made the same on every machine.
    pub(crate) async fn run(&mut self, line: &str) -> Outcome {
        self.stdout = Recorder::default();
        self.stderr = Recorder::default();
        let exit = self.start(line).await;
        self.outcome(exit)
    }

    pub(crate) fn outcome(&self, exit: Exit) -> Outcome {
        let real = self.folder.path().canonicalize().unwrap().display().to_string();
        let shown = self.folder.path().display().to_string();
        let clean = |text: String| text.replace(&real, "TEST").replace(&shown, "TEST");
        Outcome { exit, stdout: clean(self.stdout.text()), stderr: clean(self.stderr.text()) }
    }

    /// Every script was played to its end, and nothing else was asked.
    pub(crate) fn finish(self) {
        for server in self.control.running.lock().unwrap().drain(..) {
            server.finish();
        }
        assert!(self.control.scripts.lock().unwrap().is_empty(), "a server was expected to be started");
        assert!(self.control.in_process.lock().unwrap().is_none(), "questions within the process were expected");
    }

    /// The source as it is sent.
    pub(crate) fn source(&self) -> Value {
        let path = self.cwd().join("orchestra.yaml");
        json!({"source_path": path, "source_text": STACK, "display_path": "orchestra.yaml"})
    }
}

pub(crate) const STACK: &str = "version: 1\nname: shop\nservices:\n  api: {command: [api]}\n";

/// The answer to a request, with the errors in it.
pub(crate) fn refusal(request: &str, status: u16, error: &Diagnostic) -> Exchange {
    Exchange::json(request, &json!({"errors": [error]})).status(status)
}

/// What `POST /v1/validate` answers for the stack file of the test.
pub(crate) fn valid() -> Exchange {
    Exchange::json(
        "POST /v1/validate",
        &json!({"environment": "shop/dev", "resources": [{"kind": "service", "names": ["api", "web"]}, {"kind": "job", "names": ["migrate"]}], "environments": ["dev"], "warnings": []}),
    )
}

pub(crate) fn plan() -> Value {
    let step = |resource: &str, action: &str| json!({"resource": resource, "action": action, "reasons": ["it is new"], "changes": [], "after": {}, "base": null, "target": null});
    json!({"format": 1, "environment": "shop/dev", "base": null, "desired": null,
        "steps": [step("job.migrate", "run"), step("service.api", "create")], "unchanged": 0})
}

/// A run in a state.
pub(crate) fn run(state: &str) -> Value {
    json!({"id": "run_7", "environment": "shop/dev", "kind": "up", "generation": 1, "release": 3, "plan": plan(),
        "state": state, "steps": {}, "started_at": NOW, "ended_at": if state == "running" { Value::Null } else { json!(NOW + 1_300) },
        "problems": [], "reverted": null, "culprits": []})
}

/// The status of an environment in which all is well.
pub(crate) fn status() -> Value {
    json!({"id": "shop/dev", "source": "/srv/orchestra.yaml", "target": "process", "health": "ready", "release": 3, "at": NOW,
        "services": [{"name": "api", "state": "ready", "release": 3, "desired": 2, "ready": 2,
            "addresses": [{"port": "http", "protocol": "http", "url": "http://127.0.0.1:8080"}], "instances": []}],
        "jobs": [], "volumes": []})
}
