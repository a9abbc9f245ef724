//! The client: gives the command line its terminal, its environment and a way to start servers.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, IsTerminal, Read, Seek},
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    sync::Arc,
};

use orchestra_api::{BoxFuture, Transport};
use orchestra_cli::{Deps, Ended, ServerControl, ServerOptions, Serving, Spawned, System, Terminal};
use orchestra_model::{Code, Diagnostic};
use orchestra_server::{Backend, InProcess};
use orchestra_task::TaskTree;
use rustix::{fs::MemfdFlags, process::Signal};
use tokio::sync::{mpsc, oneshot};

use crate::daemon;

/// Name of the variable in which a spawned server finds its token: an argument could be read by everybody.
pub(crate) const TOKEN: &str = "ORCHESTRA_SERVER_TOKEN";

/// Longest text that a server leaves about why it could not start, in bytes.
const LAST_WORDS: u64 = 1 << 20;

/// Runs one command.
pub(crate) fn main(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    // Two workers: the control plane waits more than it computes.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return refuse(&format!("cannot start: {error}")),
    };
    let cwd = match std::env::current_dir() {
        Ok(cwd) => cwd,
        Err(error) => return refuse(&format!("the working directory cannot be found: {error}")),
    };
    let exit = runtime.block_on(async {
        let deps = Deps {
            version: env!("CARGO_PKG_VERSION"),
            cwd,
            env: Box::new(|name| std::env::var(name).ok()),
            stdout: Box::new(io::stdout()),
            stderr: Box::new(io::stderr()),
            terminal: Terminal {
                stdout: io::stdout().is_terminal(),
                stderr: io::stderr().is_terminal(),
                size: Box::new(terminal_size),
            },
            now: Box::new(orchestra_engine::Clock::wall),
            random: Box::new(random),
            interrupts: interrupts(),
            server: Arc::new(Servers),
            system: Arc::new(Machine),
        };
        orchestra_cli::run(arguments, deps).await
    });
    // Whatever is still blocked (a name look-up, a read) must not hold up the exit.
    runtime.shutdown_background();
    ExitCode::from(exit.code())
}

#[expect(clippy::print_stderr, reason = "there is no command line yet that could render it")]
fn refuse(message: &str) -> ExitCode {
    eprintln!("error: {message}");
    ExitCode::FAILURE
}

fn terminal_size() -> Option<(u16, u16)> {
    let size =
        rustix::termios::tcgetwinsize(io::stderr()).or_else(|_| rustix::termios::tcgetwinsize(io::stdout())).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

fn random() -> u128 {
    let mut bytes = [0; 16];
    // getrandom(2): up to 256 bytes come whole, and only a machine that has just been switched on waits for them.
    while rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()) != Ok(bytes.len()) {}
    u128::from_ne_bytes(bytes)
}

/// One item per Ctrl-C.
fn interrupts() -> mpsc::Receiver<()> {
    let (sender, receiver) = mpsc::channel(4);
    if let Ok(mut signal) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt()) {
        TaskTree::new().start(orchestra_task::TaskKind::Connection, "interrupts", async move {
            while signal.recv().await.is_some() {
                if sender.send(()).await.is_err() {
                    return;
                }
            }
        });
    }
    receiver
}

/// This machine.
struct Machine;

impl System for Machine {
    fn root(&self) -> PathBuf {
        PathBuf::from("/")
    }

    fn is_macos(&self) -> bool {
        cfg!(target_os = "macos")
    }

    fn is_root(&self) -> bool {
        rustix::process::geteuid().is_root()
    }

    fn has(&self, program: &str) -> bool {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
    }

    fn run(&self, command: &[String]) -> io::Result<(bool, String)> {
        let output = Command::new(&command[0]).args(&command[1..]).stdin(Stdio::null()).output()?;
        let text = [output.stdout, output.stderr].concat();
        Ok((output.status.success(), String::from_utf8_lossy(&text).into_owned()))
    }
}

/// Starts servers.
struct Servers;

impl ServerControl for Servers {
    fn spawn(&self, options: &ServerOptions) -> io::Result<Spawned> {
        std::fs::create_dir_all(&options.home)?;
        let log = options.home.join("server.log");
        let output = std::fs::OpenOptions::new().create(true).append(true).open(&log)?;
        let mut command = Command::new(daemon::this_program()?);
        command.arg("--json").arg("--home").arg(&options.home).args(["server", "run"]);
        if let Some(listen) = options.listen {
            command.arg("--listen").arg(listen.to_string());
        }
        if let Some(token) = &options.token {
            command.env(TOKEN, token);
        }
        // Not a pipe: the server outlives whoever started it, and its children may inherit what it has.
        let mut words = File::from(rustix::fs::memfd_create("last words", MemfdFlags::CLOEXEC)?);
        command.current_dir("/").stdin(Stdio::null()).stdout(words.try_clone()?).stderr(output);
        #[expect(unsafe_code, reason = "the server must survive the terminal of whoever started it")]
        // SAFETY: setsid is async-signal-safe and touches no memory of the parent.
        unsafe {
            command.pre_exec(|| rustix::process::setsid().map(drop).map_err(io::Error::from));
        }
        let mut child = tokio::process::Command::from(command).spawn()?;
        let pid = child.id().unwrap_or_default();
        let exited = Box::pin(async move {
            let (status, killed) = match child.wait().await {
                Ok(status) => (status.to_string(), status.signal() == Some(Signal::KILL.as_raw())),
                Err(error) => (error.to_string(), false),
            };
            let mut last_words = Vec::new();
            // Without them the log is what there is to read.
            let _ = words.rewind().and_then(|()| words.take(LAST_WORDS).read_to_end(&mut last_words));
            Ended { status, killed, last_words: String::from_utf8_lossy(&last_words).into_owned() }
        });
        Ok(Spawned { pid, log, exited })
    }

    fn run(
        &self,
        options: ServerOptions,
        serving: oneshot::Sender<Serving>,
    ) -> BoxFuture<'_, Result<(), Vec<Diagnostic>>> {
        Box::pin(daemon::run(options, serving))
    }

    fn program(&self) -> io::Result<PathBuf> {
        daemon::this_program()
    }

    fn in_process(&self, home: &Path) -> BoxFuture<'_, Result<Arc<dyn Transport>, Vec<Diagnostic>>> {
        let home = home.to_owned();
        Box::pin(async move {
            let reader = match orchestra_store::open_read_only(&home) {
                Ok(reader) => reader,
                Err(error) => return Err(vec![error.diagnostic()]),
            };
            let home = home.to_str().ok_or_else(|| vec![daemon::not_text(&home)])?.to_owned();
            let facts = daemon::facts(home);
            let router = orchestra_server::router(Backend::Recorded(reader), facts, TaskTree::new(), Arc::default());
            Ok(Arc::new(InProcess::new(router)) as Arc<dyn Transport>)
        })
    }
}

/// A failure to start, for users.
pub(crate) fn start_failure(what: &str, error: &(dyn std::error::Error + 'static)) -> Vec<Diagnostic> {
    vec![Diagnostic::error(Code::SERVER_UNREACHABLE, format!("the server cannot start: {what}")).caused_by(error)]
}
