//! Programs that make a supervisor's life hard. Each ends by itself after a minute, so that a failed test cannot take
//! the machine down.

use std::{
    io::{self, Write},
    process::{Command, ExitCode, Stdio},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use orchestra_testbed::pattern;

use crate::{number, text};

/// Longest life of anything here.
const LIFE: Duration = Duration::from_secs(60);
/// Chains of a storm.
const CHAINS: u64 = 4;

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// A child that ignores SIGTERM; with `DAEMON` in two steps, in a session of its own.
pub(crate) fn child() -> io::Result<ExitCode> {
    if text("DAEMON").is_some() {
        rustix::process::setsid()?;
        drop(Command::new(std::env::current_exe()?).arg("child").env_remove("DAEMON").stdin(Stdio::null()).spawn()?);
        return Ok(ExitCode::SUCCESS);
    }
    wait_ignoring_term()
}

fn wait_ignoring_term() -> io::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        let end = tokio::time::sleep(LIFE);
        tokio::pin!(end);
        loop {
            // Both arms only wait.
            tokio::select! {
                _ = term.recv() => {}
                () = &mut end => return Ok(ExitCode::SUCCESS),
            }
        }
    })
}

pub(crate) fn run(arguments: &[String]) -> io::Result<ExitCode> {
    match arguments.first().map(String::as_str) {
        Some("ignore-term") => {
            writeln!(io::stdout(), "up")?;
            wait_ignoring_term()
        }
        Some("storm") => storm(),
        // A flood without end, into whatever reads it, until it is killed.
        Some("endless-flood") => {
            let end = unix_seconds() + LIFE.as_secs();
            let block = pattern::bytes(65_536);
            let mut out = io::stdout().lock();
            while unix_seconds() < end {
                out.write_all(&block)?;
            }
            Ok(ExitCode::SUCCESS)
        }
        // An exact number of bytes to each stream, the last line without an end, then exit at once.
        Some("flood") => {
            let length = usize::try_from(number("FLOOD_BYTES").unwrap_or(1 << 20)).unwrap_or(usize::MAX);
            let errors = std::thread::spawn(move || pattern::write(length / 2, &mut io::stderr()));
            let mut out = io::stdout().lock();
            pattern::write(length, &mut out)?;
            out.write_all(b"the last line has no end")?;
            out.flush()?;
            errors.join().map_err(|_| io::Error::other("the other writer panicked"))??;
            Ok(ExitCode::SUCCESS)
        }
        other => Err(io::Error::other(format!("no torture is called {other:?}"))),
    }
}

/// Chains of processes, each of which starts its successor and exits: whoever looks finds only those that are leaving.
fn storm() -> io::Result<ExitCode> {
    let end = number("STORM_END").unwrap_or_else(|| unix_seconds() + LIFE.as_secs());
    let next = || -> io::Result<()> {
        let mut command = Command::new(std::env::current_exe()?);
        drop(command.args(["torture", "storm"]).env("STORM_END", end.to_string()).stdin(Stdio::null()).spawn()?);
        Ok(())
    };
    if number("STORM_END").is_none() {
        for _ in 0..CHAINS {
            next()?;
        }
        writeln!(io::stdout(), "up")?;
        return wait_ignoring_term();
    }
    if unix_seconds() < end {
        // A fork bomb would only test the machine.
        std::thread::sleep(Duration::from_millis(3));
        next()?;
    }
    Ok(ExitCode::SUCCESS)
}
