//! Everything the command line may touch, handed in by the binary.

use std::{
    io::{self, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use orchestra_api::{BoxFuture, Transport};
use orchestra_model::{Diagnostic, time::UnixMillis};
use tokio::sync::{mpsc, oneshot};

/// Looks up an environment variable.
pub type Variables = Box<dyn Fn(&str) -> Option<String> + Send + Sync>;

/// Tells the time.
pub type WallClock = Box<dyn Fn() -> UnixMillis + Send + Sync>;

/// Makes random numbers.
pub type Random = Box<dyn Fn() -> u128 + Send + Sync>;

/// The world outside.
pub struct Deps {
    /// Version of the program, such as `0.1.0`.
    pub version: &'static str,
    /// Absolute working directory.
    pub cwd: PathBuf,
    /// Looks up an environment variable; not UTF-8 counts as not set.
    pub env: Variables,
    /// Standard output.
    pub stdout: Box<dyn Write + Send>,
    /// Standard error.
    pub stderr: Box<dyn Write + Send>,
    /// Whether these are terminals, and how large.
    pub terminal: Terminal,
    /// The wall clock.
    pub now: WallClock,
    /// Makes numbers that nobody makes twice.
    pub random: Random,
    /// One item per Ctrl-C. A closed channel means that none will come.
    pub interrupts: mpsc::Receiver<()>,
    /// Starts servers.
    pub server: Arc<dyn ServerControl>,
    /// The machine's own programs.
    pub system: Arc<dyn System>,
}

/// What of the machine a command may change, where that is what it was given for (`orchestra tls trust`).
pub trait System: Send + Sync + 'static {
    /// Folder under which the system's files are: `/`.
    fn root(&self) -> PathBuf;

    /// Whether it is macOS.
    fn is_macos(&self) -> bool;

    /// Whether this process may change the system.
    fn is_root(&self) -> bool;

    /// Whether there is a program of this name.
    fn has(&self, program: &str) -> bool;

    /// Runs a program to its end; the answer is whether it succeeded, and what it wrote.
    fn run(&self, command: &[String]) -> io::Result<(bool, String)>;
}

/// What the output goes to.
pub struct Terminal {
    /// Standard output is a terminal.
    pub stdout: bool,
    /// Standard error is a terminal.
    pub stderr: bool,
    /// Columns and rows of the terminal, asked again whenever something is drawn; `None` if there is none.
    pub size: Box<dyn Fn() -> Option<(u16, u16)> + Send + Sync>,
}

/// How a server is run.
#[derive(Clone, PartialEq, Eq)]
pub struct ServerOptions {
    /// Absolute state directory.
    pub home: PathBuf,
    /// TCP address to listen on beside the Unix socket.
    pub listen: Option<SocketAddr>,
    /// Bearer token that clients over TCP must present; always set if `listen` is.
    pub token: Option<String>,
}

/// Starts servers: the binary knows how.
pub trait ServerControl: Send + Sync + 'static {
    /// Starts `orchestra server run --json` detached from this process and its terminal. Does not wait for it to answer.
    /// A token must reach it by another way than its arguments.
    fn spawn(&self, options: &ServerOptions) -> io::Result<Spawned>;

    /// Runs a server in this process until it is shut down. `serving` is told once it answers.
    fn run(
        &self,
        options: ServerOptions,
        serving: oneshot::Sender<Serving>,
    ) -> BoxFuture<'_, Result<(), Vec<Diagnostic>>>;

    /// The path by which this program can be started again.
    fn program(&self) -> io::Result<PathBuf>;

    /// A server within this process that answers `validate` and `plan` from the state in `home`, if there is any, and
    /// writes nothing.
    fn in_process(&self, home: &Path) -> BoxFuture<'_, Result<Arc<dyn Transport>, Vec<Diagnostic>>>;
}

/// A server that was started and may not answer yet.
pub struct Spawned {
    /// Its process id.
    pub pid: u32,
    /// Where it writes what it has to say.
    pub log: PathBuf,
    /// Completes if it ends.
    pub exited: BoxFuture<'static, Ended>,
}

/// How a server ended that was started in the background.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Exit status in words.
    pub status: String,
    /// By `SIGKILL`, which says nothing about the server itself.
    pub killed: bool,
    /// What it wrote on standard output: why it could not start, as `--json` prints errors.
    pub last_words: String,
}

/// What a server says once it answers.
#[derive(Clone, Copy, Debug)]
pub struct Serving {
    /// TCP address that it listens on, with the port that was chosen if none was asked for.
    pub listen: Option<SocketAddr>,
}
