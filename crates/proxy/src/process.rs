//! The proxy process: its start, its signals, its end.
//!
//! It is started by the server (`--control-stdin`, with the control connection as standard input) and then belongs to
//! nobody: it leads a session of its own, and the end of the server is to it only the end of a connection. It ends when
//! told to (SIGTERM, or the server's word), or when it serves nothing and nobody steers it.

use std::{
    ffi::OsString,
    io::{self, IsTerminal as _},
    os::{fd::AsFd as _, unix::net::UnixStream as StdUnixStream},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
};

use orchestra_task::{TaskKind, TaskTree};
use rustix::process::{Resource, Rlimit};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    files::{EXIT_LOCKED, Files},
    state::Proxy,
};

mod control;

use control::Control;

const USAGE: &str = "usage: orchestra proxy --home DIR [--control-stdin]\n\n\
    The data plane. `orchestra server` starts it; there is no need to start it by hand.\n\n\
    --home DIR         the state directory whose proxy this is\n\
    --control-stdin    standard input is a control connection";

struct Options {
    home: PathBuf,
    control_stdin: bool,
}

fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Option<Options>, String> {
    let mut args = args.into_iter();
    let (mut home, mut control_stdin) = (None, false);
    while let Some(arg) = args.next() {
        match arg.to_str() {
            Some("--home") => home = Some(PathBuf::from(args.next().ok_or("--home needs a directory")?)),
            Some("--control-stdin") => control_stdin = true,
            Some("--help" | "-h") => return Ok(None),
            _ => return Err(format!("unknown argument `{}`", arg.display())),
        }
    }
    Ok(Some(Options { home: home.ok_or("--home is missing")?, control_stdin }))
}

/// Runs a proxy process until it is told to end (`orchestra proxy --home DIR`), and returns its exit code: 0 after a
/// good end, 1 if it could not start, 2 for wrong arguments, 75 if another proxy serves this home.
///
/// `args` are those after the word `proxy`.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let options = match parse(args) {
        Ok(Some(options)) => options,
        Ok(None) => {
            say(USAGE);
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            say(&format!("{error}\n{USAGE}"));
            return ExitCode::from(2);
        }
    };
    // Standard error is the log. A second subscriber in one process (a test) is no reason to fail.
    let subscriber = tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_max_level(tracing::Level::INFO)
        // On a full disk the log cannot be written, and complaining about that on the same file would panic: nothing that
        // is said is worth a connection.
        .log_internal_errors(false);
    let _ = subscriber.try_init();
    match run(&options) {
        Ok(code) => code,
        Err(error) => {
            tracing::error!(%error, "the proxy cannot start");
            ExitCode::FAILURE
        }
    }
}

fn say(text: &str) {
    use std::io::Write as _;
    // Nobody is left to tell if this fails.
    let _ = writeln!(io::stderr(), "{text}");
}

fn run(options: &Options) -> io::Result<ExitCode> {
    // A Ctrl-C in the server's terminal is not meant for the proxy. Fails only for the leader of a group, who has
    // been set apart already.
    let _ = rustix::process::setsid();
    let files = Files::open(&options.home)?;
    let Some(lock) = files.lock()? else {
        tracing::info!("another proxy serves {}", files.path().display());
        return Ok(ExitCode::from(EXIT_LOCKED));
    };
    let descriptors = raise_descriptor_limit();
    let first = if options.control_stdin { Some(control_stdin()?) } else { None };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let code = runtime.block_on(async {
        let tree = TaskTree::new();
        let proxy = Arc::new(Proxy::new(tree.clone()));
        tree.start(TaskKind::Loop, "reports", Arc::clone(&proxy).report());
        tree.start(TaskKind::Loop, "certificates", crate::tls::run(Arc::clone(&proxy)));
        tree.start(TaskKind::Loop, "traffic reports", crate::reports::run(Arc::clone(&proxy)));
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let told = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        // A connection needs two descriptors; some are for everything else.
        let connections = usize::try_from(descriptors.saturating_sub(256) / 2).unwrap_or(usize::MAX);
        let control = Control::new(Arc::clone(&proxy), files, lock, connections)?;
        control.run(first, told).await;
        tree.cancel();
        Ok(ExitCode::SUCCESS)
    });
    // Whatever is still open was given up by `run` on purpose.
    runtime.shutdown_background();
    code
}

/// Takes standard input over as the control connection, and leaves `/dev/null` in its place.
fn control_stdin() -> io::Result<StdUnixStream> {
    let stdin = io::stdin();
    let socket = stdin.as_fd().try_clone_to_owned()?;
    let null = std::fs::File::open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    let stream = StdUnixStream::from(socket);
    stream.set_nonblocking(true)?;
    // Not a socket: somebody gave the option by hand.
    stream.local_addr().map_err(|e| io::Error::new(e.kind(), "--control-stdin: standard input is no socket"))?;
    Ok(stream)
}

/// As many descriptors as the system lets this process have; returns how many.
fn raise_descriptor_limit() -> u64 {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let wanted = limit.maximum.unwrap_or(1 << 20).min(1 << 20);
    if limit.current.is_none_or(|current| current >= wanted) {
        return limit.current.unwrap_or(wanted);
    }
    match rustix::process::setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum: limit.maximum }) {
        Ok(()) => wanted,
        Err(_) => limit.current.unwrap_or(1024),
    }
}
