//! `orchestra server`

use std::time::Duration;

use orchestra_api::{Endpoint, EnvironmentHealth, Version};
use orchestra_model::{Code, Diagnostic};
use tokio::{sync::oneshot, time::timeout};

use crate::{
    args::{ListenArgs, ServerCommand, ServerStatusArgs},
    commands::install::install,
    deps::{ServerOptions, Serving},
    exit::Exit,
    failure::{Failure, Result},
    follow::Interrupts,
    output::Output,
    process::Process,
    session::Session,
    text::age,
};

/// How long a server may take to stop: it finishes the effects that it has begun.
const STOP: Duration = Duration::from_secs(30);

pub(crate) async fn server(
    command: &ServerCommand,
    session: &Session,
    output: &mut Output,
    interrupts: &mut Interrupts,
) -> Result<Exit> {
    match command {
        ServerCommand::Start(args) => interrupts.guard(start(args, session, output)).await,
        ServerCommand::Status(args) => interrupts.guard(status(args, session, output)).await,
        ServerCommand::Stop => interrupts.guard(stop(session, output)).await,
        ServerCommand::Run(args) => run(args, session, output, interrupts).await,
        ServerCommand::Install(args) => install(args, session, output),
    }
}

fn options(args: &ListenArgs, session: &Session) -> Result<ServerOptions> {
    if session.is_remote() {
        let message = "--server names a server that runs elsewhere; it cannot be started from here";
        return Err(Diagnostic::error(Code::CONFLICTING_KEYS, message).help("leave it out").into());
    }
    let token = session.token.clone().filter(|_| args.listen.is_some());
    if args.listen.is_some() && token.as_ref().is_none_or(|token| token.len() < 16) {
        let message =
            "--listen needs a token of at least 16 characters: whoever reaches the address could run programs here";
        return Err(Diagnostic::error(Code::MISSING_KEY, message)
            .help("make one, such as `head -c 24 /dev/urandom | base64 > token`, and add `--token-file token`")
            .into());
    }
    Ok(ServerOptions { home: session.home.clone(), listen: args.listen, token })
}

/// What whoever opens the API to a network should know.
fn warn_of_network(args: &ListenArgs, output: &mut Output) {
    if let Some(address) = args.listen.filter(|address| !address.ip().is_loopback()) {
        output.note(&format!(
            "warning: {address} can be reached from other machines, and the API is not encrypted: whoever can read the traffic reads the token, and whoever has the token can run programs here"
        ));
    }
}

async fn start(args: &ListenArgs, session: &Session, output: &mut Output) -> Result<Exit> {
    let options = options(args, session)?;
    warn_of_network(args, output);
    let running = session.running().await?;
    if let (Some((_, version)), Some(_)) = (&running, args.listen) {
        let message = format!("a server runs already (pid {}), and where it listens cannot be changed", version.pid);
        return Err(Diagnostic::error(Code::STATE_LOCKED, message)
            .help("stop it with `orchestra server stop`; instances go on")
            .into());
    }
    let (word, version) = match running {
        Some((_, version)) => ("runs already", version),
        None => ("was started", session.start(&options).await?.1),
    };
    if output.json {
        output.json(&version)?;
    } else {
        output.line(&format!(
            "the server {word} (pid {}, state in {}){}",
            version.pid,
            version.home,
            listens(&version)
        ))?;
    }
    Ok(Exit::Success)
}

/// Where a server listens beside its socket.
fn listens(version: &Version) -> String {
    version.listen.as_ref().map(|address| format!(", listens on http://{address}")).unwrap_or_default()
}

async fn status(args: &ServerStatusArgs, session: &Session, output: &mut Output) -> Result<Exit> {
    let Some((_, version)) = session.running().await? else {
        if args.pid {
            // Nothing on standard output: `kill $(…)` must not get words.
            output.note(&format!("not running: nothing listens at {}", session.endpoint()));
        } else if output.json {
            output.line("null")?;
        } else {
            output.line(&format!("not running: nothing listens at {}", session.endpoint()))?;
        }
        return Ok(Exit::NoServer);
    };
    if args.pid {
        output.line(&version.pid.to_string())?;
    } else if output.json {
        output.json(&version)?;
    } else {
        output.line(&format!(
            "running for {} (pid {}, version {}, state in {}){}",
            age((session.now)().saturating_sub(version.started_at)),
            version.pid,
            version.version,
            version.home,
            listens(&version)
        ))?;
    }
    Ok(Exit::Success)
}

async fn stop(session: &Session, output: &mut Output) -> Result<Exit> {
    let Some((client, version)) = session.running().await? else {
        output.note("the server is not running");
        return Ok(Exit::Success);
    };
    // Held before it is asked to stop: afterwards its number may belong to another process.
    let process = match session.endpoint() {
        Endpoint::Unix(socket) => Process::listening(&socket, version.pid).await.ok().flatten(),
        Endpoint::Tcp { .. } => None,
    };
    let all = client.all_environments().await;
    let nothing = all.is_ok_and(|all| all.iter().all(|environment| environment.health == EnvironmentHealth::Down));
    match client.shutdown().await {
        // It may be gone before its answer has left; whether it stopped is seen below.
        Err(error) if !error.is_lost() => return Err(error.into()),
        Ok(_) | Err(_) => {}
    }
    let ended = async {
        match process {
            Some(process) => process.ended().await.map_err(Failure::from),
            None => silence(session, version.pid).await,
        }
    };
    let Ok(ended) = timeout(STOP, ended).await else {
        let message = format!("the server (pid {}) did not stop within {} s", version.pid, STOP.as_secs());
        return Err(Diagnostic::error(Code::SERVER_UNREACHABLE, message)
            .note("it finishes the effects that it has begun, so that nothing is left half done")
            .help(format!("its log, server.log in {}, says what it waits for; `kill -9 {}` ends it, and the next one continues where it was", version.home, version.pid))
            .into());
    };
    ended?;
    let left = if nothing { "nothing was up" } else { "instances and proxy go on" };
    output.note(&format!("the server (pid {}) was stopped; {left}", version.pid));
    Ok(Exit::Success)
}

/// Completes once a server whose process cannot be seen from here does not answer any more, or another one does.
async fn silence(session: &Session, pid: u32) -> Result {
    loop {
        match session.running().await {
            Ok(None) => return Ok(()),
            Ok(Some((_, other))) if other.pid != pid => return Ok(()),
            Err(error) if !error.is_lost() => return Err(error.into()),
            Ok(Some(_)) | Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

async fn run(args: &ListenArgs, session: &Session, output: &mut Output, interrupts: &mut Interrupts) -> Result<Exit> {
    let options = options(args, session)?;
    warn_of_network(args, output);
    let home = options.home.display().to_string();
    let (serving, mut served) = oneshot::channel();
    let mut server = session.control.run(options, serving);
    let mut waiting = true;
    let mut asked = false;
    loop {
        // The server's future is not dropped while it runs, unless the user insists.
        tokio::select! {
            ended = &mut server => return concluded(ended, output),
            news = &mut served, if waiting => {
                waiting = false;
                if let Ok(Serving { listen }) = news {
                    let listen = listen.map(|address| format!(" and http://{address}")).unwrap_or_default();
                    output.note(&format!("serving {home}{listen}; Ctrl-C stops the server, instances and proxy go on"));
                }
                continue;
            }
            () = interrupts.pressed() => {}
        }
        if asked {
            return Err(Failure::Silent(Exit::Interrupted));
        }
        asked = true;
        output.note("stopping the server; Ctrl-C again ends it at once");
        let request = async {
            if let Ok(Some((client, _))) = session.running().await {
                let _ = client.shutdown().await;
            }
        };
        tokio::select! {
            ended = &mut server => return concluded(ended, output),
            () = interrupts.pressed() => return Err(Failure::Silent(Exit::Interrupted)),
            () = request => {}
        }
    }
}

/// How a server ended that ran in this process.
fn concluded(ended: Result<(), Vec<Diagnostic>>, output: &mut Output) -> Result<Exit> {
    if let Err(diagnostics) = &ended
        && output.json
    {
        // Standard output has them for whoever started it; standard error is its log, which is for people.
        output.diagnostics(diagnostics);
    }
    ended?;
    Ok(Exit::Success)
}
