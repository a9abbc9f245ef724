//! `orchestra promote`, `pause`, `abort` and `why`: move a rollout, and say what is waited for.

use orchestra_api::{EnvironmentStatus, MoveRollout, Queue, RolloutStatus, ServiceState, ServiceStatus};
use orchestra_model::{Code, Diagnostic, Name, rollout::RolloutCommand, rollout::RolloutPhase, time::UnixMillis};

use crate::{
    args::{AbortArgs, PauseArgs, PromoteArgs, WhyArgs},
    commands::status::wait,
    exit::Exit,
    failure::Result,
    output::Output,
    patience::patiently,
    session::Session,
    text::{age, left, printable},
};

pub(crate) async fn promote(args: &PromoteArgs, session: &Session, output: &mut Output) -> Result<Exit> {
    let command = if args.full { RolloutCommand::PromoteFully } else { RolloutCommand::Promote };
    ask(args.service.clone(), command, session, output).await
}

pub(crate) async fn pause(args: &PauseArgs, session: &Session, output: &mut Output) -> Result<Exit> {
    ask(args.service.clone(), RolloutCommand::Pause, session, output).await
}

pub(crate) async fn abort(_args: &AbortArgs, session: &Session, output: &mut Output) -> Result<Exit> {
    ask(None, RolloutCommand::Abort, session, output).await
}

async fn ask(service: Option<Name>, command: RolloutCommand, session: &Session, output: &mut Output) -> Result<Exit> {
    let (client, environment) = session.known(output).await?;
    let word = match command {
        RolloutCommand::Promote => "promoted",
        RolloutCommand::PromoteFully => "promoted without further steps",
        RolloutCommand::Pause => "paused; `orchestra promote` goes on, `orchestra abort` goes back",
        RolloutCommand::Abort => "being turned back",
    };
    let request = MoveRollout { service, command, by: session.user.clone() };
    let run = patiently(session, &client, output, client.move_rollout(&environment, &request)).await?;
    if output.json {
        output.json(&run)?;
        return Ok(Exit::Success);
    }
    output.line(&format!("{} of {environment} is {word}", run.id))?;
    if let Ok(status) = client.environment(&environment).await {
        // What an earlier run keeps warm was not moved by this.
        let moves = |service: &&ServiceStatus| service.rollout.as_ref().is_some_and(|r| Some(r.to) == run.release);
        for service in status.services.iter().filter(moves) {
            for line in sentences(service, status.at) {
                output.line(&format!("  {}: {line}", service.name))?;
            }
        }
    }
    Ok(Exit::Success)
}

pub(crate) async fn why(args: &WhyArgs, session: &Session, output: &mut Output) -> Result<Exit> {
    let (client, environment) = session.known(output).await?;
    let status = client.environment(&environment).await?;
    let concerned = |service: &&ServiceStatus| args.service.as_ref().is_none_or(|name| *name == service.name);
    let services: Vec<&ServiceStatus> = status.services.iter().filter(concerned).collect();
    if let (Some(name), true) = (&args.service, services.is_empty()) {
        return Err(unknown(name, &status).into());
    }
    if output.json {
        output.json(&services)?;
        return Ok(Exit::Success);
    }
    if let Some(trouble) = &status.trouble {
        output.line(&format!("{}: {}", status.id, blocked(trouble)))?;
    }
    for service in services {
        for line in reasons(service, status.at) {
            output.line(&format!("{}: {line}", service.name))?;
        }
    }
    Ok(Exit::Success)
}

fn unknown(name: &Name, status: &EnvironmentStatus) -> Diagnostic {
    let known: Vec<&str> = status.services.iter().map(|service| service.name.as_str()).collect();
    Diagnostic::error(Code::NOT_FOUND, format!("there is no service {name} in {}", status.id)).help(match &known[..] {
        [] => "`orchestra up` starts the stack of this folder".to_owned(),
        known => format!("services are: {}", known.join(", ")),
    })
}

/// That nothing is decided, with the reason.
pub(crate) fn blocked(trouble: &str) -> String {
    format!("nothing goes on: {}; make room on the disk, and it does by itself", printable(trouble))
}

/// Everything that keeps a service from rest, or that it is at rest.
fn reasons(service: &ServiceStatus, now: UnixMillis) -> Vec<String> {
    let mut lines = sentences(service, now);
    // A rollout that says itself what it waits for has said it above; one without steps, or that is over, does not.
    let said = service.rollout.as_ref().is_some_and(|rollout| rollout.paused.is_some() || rollout.waits_for.is_some());
    if !said {
        lines.extend(service.waits_for.iter().map(|waiting| format!("waits for {}", waiting.reason)));
    }
    if let Some(problem) = &service.problem {
        lines.push(problem.message.clone());
    }
    for instance in &service.instances {
        if let Some(waiting) = &instance.waits_for {
            lines.push(format!("{} {}", instance.id, wait(waiting, now)));
        }
        if let Some(in_flight) = &instance.in_flight {
            let (requests, streams) = (in_flight.requests, in_flight.streams);
            lines.push(format!(
                "{} finishes {requests} request{} and {streams} stream{}",
                instance.id,
                if requests == 1 { "" } else { "s" },
                if streams == 1 { "" } else { "s" }
            ));
        }
    }
    if service.scaling.is_empty() {
        lines.extend(switched_off(service));
    }
    lines.extend(service.scaling.iter().cloned());
    if lines.is_empty() {
        lines.push(format!("nothing is waited for: {} of {} ready", service.ready, service.desired));
    }
    lines
}

/// A rollout in sentences.
pub(crate) fn sentences(service: &ServiceStatus, now: UnixMillis) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(paused) = &service.traffic_paused {
        let left = left(paused.until, now);
        let by = printable(&paused.by);
        lines.push(format!(
            "new requests wait, by {by}: `orchestra traffic resume {}`, or in {left} by themselves",
            service.name
        ));
    }
    for Queue { port, length, limit } in &service.queues {
        let (requests, wait) = if *length == 1 { ("request", "waits") } else { ("requests", "wait") };
        lines.push(format!("{length} {requests} to {port} {wait}, of {limit} that may"));
    }
    let Some(rollout) = &service.rollout else { return lines };
    lines.push(headline(rollout, now));
    match (&rollout.paused, &rollout.waits_for) {
        (Some(paused), _) => {
            let left = left(paused.expires, now);
            let why =
                paused.reason.strip_prefix("paused ").map_or_else(|| format!("({})", paused.reason), str::to_owned);
            lines.push(format!("paused {why}: {} must promote or abort within {left}", paused.owner));
        }
        (None, Some(waits)) => {
            // Which step it is at has just been said.
            let step = waits.strip_prefix(&rollout.words[..]).and_then(|rest| rest.strip_prefix(": "));
            lines.push(format!("waits for {}", step.unwrap_or(waits)));
        }
        (None, None) => {}
    }
    if let Some(mirrored) = &rollout.mirrored {
        lines.push(self::mirrored(mirrored.agreed, mirrored.differed));
    }
    lines
}

/// What came of copied requests: `mirror: 120 responses agreed, 3 differed`.
pub(crate) fn mirrored(agreed: u64, differed: u64) -> String {
    format!("mirror: {agreed} response{} agreed, {differed} differed", if agreed == 1 { "" } else { "s" })
}

/// Why nothing of a service runs, if nobody wants anything to.
pub(crate) fn switched_off(service: &ServiceStatus) -> Option<String> {
    let off = service.state == ServiceState::Stopped && service.desired == 0;
    // What scales says itself since when it rests.
    off.then(|| match service.scaling.first() {
        Some(resting) => resting.clone(),
        None => format!("set to 0: `orchestra scale {}=1` starts one", service.name),
    })
}

fn headline(rollout: &RolloutStatus, now: UnixMillis) -> String {
    let (from, to) = (rollout.from, rollout.to);
    if rollout.phase == RolloutPhase::Warm {
        let kept = rollout
            .kept_until
            .map_or_else(|| "until the run ends".to_owned(), |until| format!("for another {}", left(until, now)));
        return format!(
            "release {to} {}; {} of release {from} {} kept ready {kept}",
            if rollout.kept_until.is_some() { "is in force" } else { "has all traffic" },
            if rollout.baseline == 1 { "1 instance".to_owned() } else { format!("{} instances", rollout.baseline) },
            if rollout.baseline == 1 { "is" } else { "are" },
        );
    }
    format!(
        "{} from release {from} to {to}: {} ({} so far); {} of traffic, {} of {} new instances available, {} old ones ready",
        rollout.strategy,
        rollout.words,
        age(now.saturating_sub(rollout.since)),
        rollout.weight,
        rollout.available,
        rollout.wanted,
        rollout.baseline
    )
}

#[cfg(test)]
mod tests;
