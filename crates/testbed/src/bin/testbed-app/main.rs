//! A program to orchestrate: a server or a job whose behaviour is set by its environment.
//!
//! | variable | meaning |
//! |---|---|
//! | `START_DELAY_MS` | time before it listens and says that it is ready |
//! | `NEVER_READY` | `/ready` answers 503, and neither the line nor the notification comes |
//! | `UNREADY_FILE` | while this file exists, `/ready` answers 503 |
//! | `CRASH_AFTER_MS`, `EXIT_CODE` | exits by itself after a time, with a code (1) |
//! | `IGNORE_TERM` | goes on after SIGTERM |
//! | `FORK_CHILDREN` | so many children that ignore SIGTERM, every second one in a session of its own and orphaned |
//! | `FLOOD_BYTES` | writes so many bytes of the pattern to its output first |
//! | `NOTIFY` | sends `READY=1` to `$NOTIFY_SOCKET` |
//! | `LOG_READY` | writes this line when it is ready |
//! | `VERSION` | what `/version` answers |
//! | `FAIL_PERMILLE` | so many of a thousand requests are answered 500, spread evenly |
//! | `FAIL_LOT` | requests whose header `x-lot` is a number below this are answered 500 |
//! | `FAIL_FILE` | as long as this file exists every request is answered 500: a dependency that all share has failed |
//! | `COUNT_PERMILLE` | so many of a thousand requests raise `app_errors_total` on `/metrics`, whatever they are answered |
//! | `QUEUE_FILE` | the number in this file is `app_queue_depth` on `/metrics` |
//! | `SLOW_MS` | every request takes so much longer |
//! | `HANDLED` | file to which every request is appended, when it begins and when it ends |
//! | `STARTS` | file to which the launch is appended as soon as it runs |
//! | `ALONE` | file that it locks as long as it lives; if another one has it, a line says so in that file |
//! | `JOB_FILE` | a job appends a line with its name to this file when it ends |
//!
//! Modes by the first argument: none or `serve`, `job`, `child`, `torture KIND`.

mod serve;
mod torture;

use std::{
    fs::File,
    io::{self, Write},
    process::{Command, ExitCode, Stdio},
    time::Duration,
};

use orchestra_testbed::pattern;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let mode = arguments.next().unwrap_or_else(|| "serve".to_owned());
    let result = match mode.as_str() {
        "serve" => prelude().and_then(|()| serve::run()),
        "job" => prelude().and_then(|()| job()),
        "child" => torture::child(),
        "torture" => torture::run(&arguments.collect::<Vec<_>>()),
        other => Err(io::Error::other(format!("no mode is called {other}"))),
    };
    result.unwrap_or_else(|error| {
        let _ = writeln!(io::stderr(), "fatal: {error}");
        ExitCode::from(70)
    })
}

/// A variable.
pub(crate) fn text(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// A number.
pub(crate) fn number(name: &str) -> Option<u64> {
    text(name)?.parse().ok()
}

/// The code to exit with by itself.
pub(crate) fn exit_code(default: u8) -> ExitCode {
    ExitCode::from(number("EXIT_CODE").and_then(|code| u8::try_from(code).ok()).unwrap_or(default))
}

/// Says that it runs, and whether another one does that must not.
fn declare() -> io::Result<()> {
    let launch = text("ORCHESTRA_LAUNCH").unwrap_or_default();
    let append = |path: String| File::options().create(true).append(true).open(path);
    if let Some(path) = text("STARTS") {
        append(path)?.write_all(format!("{launch}\n").as_bytes())?;
    }
    if let Some(path) = text("ALONE") {
        let mut file = append(path)?;
        if file.try_lock().is_err() {
            file.write_all(format!("{launch} is not alone\n").as_bytes())?;
        }
        // The lock goes with the process.
        std::mem::forget(file);
    }
    Ok(())
}

/// What servers and jobs do alike.
fn prelude() -> io::Result<()> {
    declare()?;
    if let Some(length) = number("FLOOD_BYTES") {
        let mut out = io::stdout().lock();
        pattern::write(usize::try_from(length).unwrap_or(usize::MAX), &mut out)?;
        out.flush()?;
    }
    for index in 0..number("FORK_CHILDREN").unwrap_or(0) {
        let program = std::env::current_exe()?;
        let mut command = Command::new(program);
        command.arg("child").env_remove("FORK_CHILDREN").stdin(Stdio::null());
        if index % 2 == 1 {
            // It starts a session of its own, leaves a grandchild there and exits.
            command.env("DAEMON", "1").status()?;
        } else {
            drop(command.spawn()?);
        }
    }
    Ok(())
}

/// Runs to completion.
fn job() -> io::Result<ExitCode> {
    let delay = number("START_DELAY_MS").unwrap_or(0);
    writeln!(io::stdout(), "job {} works for {delay} ms", text("ORCHESTRA_SERVICE").unwrap_or_default())?;
    std::thread::sleep(Duration::from_millis(delay));
    if let Some(path) = text("JOB_FILE") {
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path)?;
        file.write_all(format!("{}\n", text("ORCHESTRA_SERVICE").unwrap_or_default()).as_bytes())?;
    }
    let code = exit_code(0);
    if code != ExitCode::SUCCESS {
        writeln!(io::stderr(), "fatal: this job was told to fail")?;
    }
    Ok(code)
}
