//! `up`, `down`, `restart`, `scale` and `rollback`: start a run and see it through.

use std::{collections::BTreeMap, time::Duration};

use orchestra_api::{
    Apply, Client, ClientError, Down, PreviewStatus, Restart, Rollback, RunEvent, Scale, StartRun, StartedRun, Up,
};
use orchestra_model::{
    Code, Diagnostic, EnvironmentId,
    quantity::Timespan,
    record::{RunKind, RunRecord, RunState},
};

use crate::{
    args::{DownArgs, RestartArgs, RollbackArgs, ScaleArgs, UpArgs},
    commands::status::{addresses, lost},
    exit::Exit,
    failure::{Failure, Result},
    follow::{ATTEMPTS, Interrupts, PAUSE, follow},
    output::Output,
    patience::patiently,
    progress::verb,
    saved_plan,
    session::Session,
    text::{age, printable, rest},
};

pub(crate) async fn up(
    args: &UpArgs,
    session: &Session,
    output: &mut Output,
    interrupts: &mut Interrupts,
) -> Result<Exit> {
    // What is wrong with the file is said before a server is started for it.
    let request = match &args.plan {
        Some(path) => {
            let (plan, source_path) = saved_plan::read(&session.cwd.join(path))?;
            StartRun::Apply(Box::new(Apply { plan, source_path }))
        }
        None => StartRun::Up(Up { source: session.source(&args.preview)? }),
    };
    let client = interrupts.guard(session.server(output)).await?;
    start(&request, args.detach.detach, client, session, output, interrupts).await
}

pub(crate) async fn down(
    args: &DownArgs,
    session: &Session,
    output: &mut Output,
    interrupts: &mut Interrupts,
) -> Result<Exit> {
    let (client, environment) = interrupts.guard(session.known(output)).await?;
    let request = StartRun::Down(Down { environment, volumes: args.volumes });
    start(&request, args.detach.detach, client, session, output, interrupts).await
}

pub(crate) async fn restart(
    args: &RestartArgs,
    session: &Session,
    output: &mut Output,
    interrupts: &mut Interrupts,
) -> Result<Exit> {
    let (client, environment) = interrupts.guard(session.known(output)).await?;
    let request = StartRun::Restart(Restart { environment, services: args.services.clone() });
    start(&request, args.detach.detach, client, session, output, interrupts).await
}

pub(crate) async fn scale(
    args: &ScaleArgs,
    session: &Session,
    output: &mut Output,
    interrupts: &mut Interrupts,
) -> Result<Exit> {
    let mut replicas = BTreeMap::new();
    for (name, count) in &args.replicas {
        if replicas.insert(name.clone(), *count).is_some_and(|before| before != *count) {
            let message = format!("two replica counts are given for {name}");
            return Err(Diagnostic::error(Code::INVALID_VALUE, message).help("give each service once").into());
        }
    }
    let (client, environment) = interrupts.guard(session.known(output)).await?;
    let request = StartRun::Scale(Scale { environment, replicas });
    start(&request, args.detach.detach, client, session, output, interrupts).await
}

pub(crate) async fn rollback(
    args: &RollbackArgs,
    session: &Session,
    output: &mut Output,
    interrupts: &mut Interrupts,
) -> Result<Exit> {
    let (client, environment) = interrupts.guard(session.known(output)).await?;
    let request = StartRun::Rollback(Rollback { environment, to: args.to });
    start(&request, args.detach.detach, client, session, output, interrupts).await
}

async fn start(
    request: &StartRun,
    detach: bool,
    client: Client,
    session: &Session,
    output: &mut Output,
    interrupts: &mut Interrupts,
) -> Result<Exit> {
    let accepted = interrupts.guard(begin(request, client, session, output)).await;
    let (client, started) = match accepted {
        Err(Failure::Silent(Exit::Interrupted)) => {
            output.note("interrupted before the server answered: whether the run was started says `orchestra status`");
            return Err(Failure::Silent(Exit::Interrupted));
        }
        accepted => accepted?,
    };
    if !output.json {
        output.diagnostics(&started.warnings);
    }
    let mut run = started.run;
    if run.state.is_final() {
        if output.json {
            output.ndjson(&RunEvent::Done(Box::new(run.clone())))?;
        }
    } else if detach {
        if output.json {
            output.ndjson(&run)?;
        } else {
            output.line(&format!("{} was started: {} {}", run.id, verb(&run.kind), run.environment))?;
        }
        return Ok(Exit::Success);
    } else {
        run = follow(session, output, interrupts, client.clone(), &run).await?;
    }
    conclude(&run, matches!(request, StartRun::Rollback(_)), &client, output).await
}

/// Asks for a run until there is an answer. Its key keeps a request whose answer was lost from starting a second run.
async fn begin(
    request: &StartRun,
    mut client: Client,
    session: &Session,
    output: &mut Output,
) -> Result<(Client, StartedRun)> {
    let key = format!("{:032x}", (session.random)());
    let mut lost = 0;
    loop {
        match patiently(session, &client, output, client.start_run(request, Some(&key))).await {
            Ok(started) => return Ok((client, started)),
            Err(error) if error.is_lost() && lost < ATTEMPTS => {
                lost += 1;
                output.note("the connection to the server was lost; asking again");
                if lost > 1 || session.is_remote() {
                    tokio::time::sleep(PAUSE).await;
                }
                if !session.is_remote() {
                    client = session.server(output).await?;
                }
            }
            Err(error) => {
                let may_have = matches!(error, ClientError::Transport(_)) && !error.is_unreachable();
                let mut diagnostics = error.into_diagnostics();
                for diagnostic in diagnostics.iter_mut().filter(|_| may_have) {
                    diagnostic.notes.push("the run may have been started".to_owned());
                    diagnostic.help = Some("see with `orchestra status`, once the server answers".to_owned());
                }
                return Err(diagnostics.into());
            }
        }
    }
}

/// `preview of production, taken down in 24h; sooner: orchestra down --env preview-42`
fn words(preview: &PreviewStatus, environment: &EnvironmentId) -> String {
    let name = &environment.environment;
    let when = match preview.expires_in.map(Timespan::duration) {
        // A run may take longer than a short one stays.
        Some(Duration::ZERO) => return format!("preview of {}, taken down now: its time is over", preview.from),
        Some(left) => format!("taken down in {}; sooner", rest(left)),
        None => "it stays until it is taken down".to_owned(),
    };
    format!("preview of {}, {when}: orchestra down --env {name}", preview.from)
}

/// Says how a run ended. `back`: somebody wanted to go back, so that a run that was turned back is what they wanted.
async fn conclude(run: &RunRecord, back: bool, client: &Client, output: &mut Output) -> Result<Exit> {
    let exit = match run.state {
        RunState::Succeeded => Exit::Success,
        // The rollout that was to be taken back was still going on: it was turned back instead.
        RunState::Cancelled if back && run.reverted.is_some() => {
            if output.json {
                return Ok(Exit::Success);
            }
            let left = run.reverted.as_deref().map(printable).unwrap_or_default();
            output.line(&output.palette.good(&format!("{} was turned back: {left}", run.id)))?;
            return Ok(Exit::Success);
        }
        RunState::Cancelled => Exit::Cancelled,
        RunState::Failed | RunState::Running | RunState::Reverting => Exit::Failed,
    };
    if output.json {
        return Ok(exit);
    }
    if exit != Exit::Success {
        output.diagnostics(&run.problems);
        let how = match run.problems.first() {
            Some(problem) if problem.code == Code::SUPERSEDED => "was superseded",
            _ if exit == Exit::Cancelled => "was cancelled",
            _ => "failed",
        };
        let left = run.reverted.as_deref().map_or_else(|| "nothing had been changed".to_owned(), printable);
        let palette = output.error_palette;
        let text = format!("{} {how}: {left}", palette.bad(&run.id.to_string()));
        // Not a remark: this is the answer, so that even `--quiet` prints it.
        let _ = output.stderr.write_all(format!("{text}\n").as_bytes());
        return Ok(exit);
    }
    if output.quiet {
        return Ok(exit);
    }
    let took = run.ended_at.map(|end| age(end.saturating_sub(run.started_at))).unwrap_or_default();
    let release = run.release.map(|release| format!(" (release {release})")).unwrap_or_default();
    let environment = &run.environment;
    if matches!(run.kind, RunKind::Down { .. }) {
        let text = if run.plan.is_empty() {
            format!("{environment} is down already")
        } else {
            format!("{environment} is down after {took}")
        };
        output.line(&output.palette.good(&text))?;
        return Ok(exit);
    }
    let text = if run.plan.is_empty() {
        format!("{environment} is up to date{release}: nothing to do")
    } else {
        format!("{environment} is ready after {took}{release}")
    };
    output.line(&output.palette.good(&text))?;
    // The run is over whatever becomes of this question.
    if let Ok(status) = client.environment(environment).await {
        if let Some(lost) = lost(&status) {
            output.line(&output.palette.bad(&lost))?;
        }
        if let Some(preview) = &status.preview {
            output.line(&words(preview, environment))?;
        }
        let table = addresses(&status).render(output.palette, output.columns());
        if status.services.iter().any(|service| !service.addresses.is_empty()) {
            output.text(&table)?;
        }
    }

    Ok(exit)
}
