//! `orchestra status`

use std::{fmt::Write as _, time::Duration};

use orchestra_api::{
    CheckState, Client, EnvironmentHealth, EnvironmentStatus, EnvironmentSummary, EventsQuery, InstancePhase,
    InstanceStatus, JobState, PreviewStatus, ServiceState, ServiceStatus, VolumeState, Waiting,
};
use orchestra_model::{EnvironmentId, quantity::Timespan, record::RunState, rollout::RolloutPhase, time::UnixMillis};

use crate::{
    args::StatusArgs,
    commands::rollout::{blocked, sentences, switched_off},
    exit::Exit,
    failure::Result,
    output::Output,
    progress::{InPlace, verb},
    screen::Palette,
    session::Session,
    table::{Cell, Table, Tone},
    text::{age, left, printable, rest, wrap},
};

/// How often `--watch` looks again though no event came: ages and in-flight counts go on.
const LOOK: Duration = Duration::from_secs(1);
/// Pause after the events were lost.
const PAUSE: Duration = Duration::from_millis(100);

pub(crate) async fn status(args: &StatusArgs, session: &Session, output: &mut Output) -> Result<Exit> {
    let Some(client) = session.server_if_state(output).await? else {
        return nothing(output);
    };
    if args.all || session.is_nowhere() {
        let environments = client.all_environments().await?;
        if output.json {
            output.json(&environments)?;
        } else if environments.is_empty() {
            return nothing(output);
        } else {
            let table = list(&environments).render(output.palette, output.columns());
            output.text(&table)?;
        }
        return Ok(Exit::Success);
    }
    let environment = session.environment(&client).await?;
    if args.watch {
        return watch(client, &environment, session, output).await;
    }
    let status = client.environment(&environment).await?;
    if output.json {
        output.json(&status)?;
    } else {
        let text = render(&status, status.at, output.palette, output.columns());
        output.text(&text)?;
    }
    Ok(Exit::Success)
}

pub(crate) fn nothing(output: &mut Output) -> Result<Exit> {
    if output.json {
        output.line("[]")?;
    } else {
        output.line("nothing is up; `orchestra up` starts the stack of this folder")?;
    }
    Ok(Exit::Success)
}

async fn watch(
    mut client: Client,
    environment: &EnvironmentId,
    session: &Session,
    output: &mut Output,
) -> Result<Exit> {
    let query = EventsQuery { tail: Some(0), follow: true, ..EventsQuery::default() };
    let mut events = client.follow_events(environment, &query);
    let mut in_place = InPlace::default();
    let mut last: Option<EnvironmentStatus> = None;
    loop {
        let status = match client.environment(environment).await {
            Ok(status) => status,
            Err(error) if error.is_lost() => {
                // Nothing is drawn while others may write.
                let clear = in_place.clear();
                output.text(&clear)?;
                client = session.server_again(output).await?;
                events.use_client(client.clone());
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let comparable = |status: &EnvironmentStatus| {
            let mut status = EnvironmentStatus { at: 0, ..status.clone() };
            // When an ejection or a pause ends is reckoned from now each time.
            let jobs = status.jobs.iter_mut().flat_map(|job| &mut job.instances);
            for instance in status.services.iter_mut().flat_map(|service| &mut service.instances).chain(jobs) {
                instance.ejected.iter_mut().for_each(|ejected| ejected.until = 0);
                instance.waits_for.iter_mut().for_each(|waiting| waiting.due = None);
            }
            status
        };
        let is_new = last.as_ref().is_none_or(|last| comparable(last) != comparable(&status));
        if output.json {
            if is_new {
                output.ndjson(&status)?;
            }
        } else if output.terminal.stdout {
            let (columns, rows) = output.size();
            let text = render(&status, status.at, output.palette, Some(columns));
            let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
            lines.truncate(rows.saturating_sub(1));
            let text = in_place.redraw(&lines);
            output.text(&text)?;
        } else if is_new {
            let text = render(&status, status.at, output.palette, None);
            output.line(&text)?;
        }
        last = Some(status);
        // Both arms only say that it is time to look again; the stream keeps what it has read.
        tokio::select! {
            event = events.next() => match event {
                Ok(_) => {}
                // The next look says whether the server is gone; until then nothing more can be heard.
                Err(error) if error.is_lost() => tokio::time::sleep(PAUSE).await,
                Err(error) => return Err(error.into()),
            },
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

fn list(environments: &[EnvironmentSummary]) -> Table {
    let mut table = Table::new(["ENVIRONMENT", "STATE", "READY", "RELEASE", "STACK FILE"]);
    for environment in environments {
        let (word, tone) = health(environment.health);
        table.row([
            environment.id.to_string().into(),
            Cell::new(word, tone),
            format!("{}/{}", environment.ready, environment.services).into(),
            environment.release.map(|release| release.to_string()).unwrap_or_default().into(),
            environment.source.clone().into(),
        ]);
    }
    table
}

pub(crate) fn health(health: EnvironmentHealth) -> (&'static str, Tone) {
    match health {
        EnvironmentHealth::Down => ("down", Tone::Dim),
        EnvironmentHealth::Changing => ("changing", Tone::Busy),
        EnvironmentHealth::Ready => ("ready", Tone::Good),
        EnvironmentHealth::Degraded => ("degraded", Tone::Bad),
    }
}

/// Services that were ready and are not any more, in words: a run may have succeeded before one of them died.
pub(crate) fn lost(status: &EnvironmentStatus) -> Option<String> {
    let lost = status.services.iter().filter(|s| matches!(s.state, ServiceState::Degraded | ServiceState::Failed));
    let lost = lost.map(|service| {
        let why =
            service.problem.as_ref().map_or_else(String::new, |problem| format!(": {}", printable(&problem.message)));
        format!("{} ({} of {}{why})", service.name, service.ready, service.desired)
    });
    let lost = lost.collect::<Vec<_>>().join(", ");
    (!lost.is_empty()).then(|| format!("no longer ready: {lost}"))
}

/// Where services are reached.
pub(crate) fn addresses(status: &EnvironmentStatus) -> Table {
    let mut table = Table::new(["SERVICE", "PORT", "ADDRESS"]);
    for service in &status.services {
        for address in &service.addresses {
            table.row([service.name.to_string().into(), address.port.to_string().into(), address.url.clone().into()]);
        }
    }
    table
}

/// The whole screen.
pub(crate) fn render(status: &EnvironmentStatus, now: UnixMillis, palette: Palette, columns: Option<usize>) -> String {
    let (word, tone) = health(status.health);
    let release = status.release.map(|release| format!("  release {release}")).unwrap_or_default();
    let source = printable(&status.source);
    let mut text = format!(
        "{}  {}{release}  {}\n",
        palette.strong(&status.id.to_string()),
        tone.paint(palette, word),
        palette.dim(&source)
    );
    if let Some(preview) = &status.preview {
        text.push_str(&preview_line(preview, now));
        text.push('\n');
    }
    if let Some(run) = &status.run {
        let begun = age(now.saturating_sub(run.started_at));
        let doing = if run.state == RunState::Reverting {
            format!("is putting back what it changed, {begun} after it began")
        } else {
            format!("has been going on for {begun}")
        };
        let line = format!("{} ({}) {doing}", run.id, verb(&run.kind));
        text.push_str(&palette.busy(&line));
        text.push('\n');
    }
    if let Some(trouble) = &status.trouble {
        text.push_str(&palette.bad(&blocked(trouble)));
        text.push('\n');
    }
    for table in [services(status), others(status), instances(status, now)] {
        if !table.is_empty() {
            text.push('\n');
            text.push_str(&table.render(palette, columns));
        }
    }
    let mut rollouts = Vec::new();
    for service in &status.services {
        rollouts.extend(sentences(service, now).into_iter().map(|line| format!("{}: {line}", service.name)));
    }
    for (at, line) in rollouts.iter().enumerate() {
        if at == 0 {
            text.push('\n');
        }
        paragraph(&mut text, &printable(line), columns, |line| palette.busy(line));
    }
    let problems = status
        .services
        .iter()
        .filter_map(|service| Some((format!("service.{}", service.name), service.problem.as_ref()?)))
        .chain(status.jobs.iter().filter_map(|job| Some((format!("job.{}", job.name), job.problem.as_ref()?))));
    for (at, (name, problem)) in problems.enumerate() {
        if at == 0 {
            text.push('\n');
        }
        let line = format!("{name}: [{}] {}", problem.code, printable(&problem.message));
        paragraph(&mut text, &line, columns, |line| palette.bad(line));
    }
    text
}

/// Adds a sentence on as many lines as it takes: its end says as much as its beginning.
fn paragraph(text: &mut String, sentence: &str, columns: Option<usize>, paint: impl Fn(&str) -> String) {
    for line in columns.map_or_else(|| vec![sentence.to_owned()], |columns| wrap(sentence, columns)) {
        text.push_str(&paint(&line));
        text.push('\n');
    }
}

/// `preview of production, of ada, shares service.db; is taken down in 23h`
fn preview_line(preview: &PreviewStatus, now: UnixMillis) -> String {
    let mut line = format!("preview of {}", preview.from);
    if let Some(owner) = &preview.owner {
        let _ = write!(line, ", of {}", printable(owner));
    }
    if !preview.shared.is_empty() {
        let shared: Vec<String> = preview.shared.iter().map(ToString::to_string).collect();
        let _ = write!(line, ", shares {}", shared.join(", "));
    }
    let _ = match (preview.removed_at, preview.expires_in.map(Timespan::duration)) {
        (Some(at), _) => write!(line, "; was removed {} ago", age(now.saturating_sub(at))),
        (None, Some(Duration::ZERO)) => write!(line, "; its time is over"),
        (None, Some(left)) => write!(line, "; is taken down in {}", rest(left)),
        (None, None) => write!(line, "; stays until it is taken down"),
    };
    line
}

/// What is waited for, and how much longer if that is known: `waits 3.2s for its restart after exit code 1`.
pub(crate) fn wait(waiting: &Waiting, now: UnixMillis) -> String {
    match waiting.due.filter(|due| *due > now) {
        Some(due) => format!("waits {} for {}", left(due, now), waiting.reason),
        None => format!("waits for {}", waiting.reason),
    }
}

fn waits(waiting: &[Waiting]) -> String {
    if waiting.is_empty() {
        return String::new();
    }
    let reasons: Vec<&str> = waiting.iter().map(|waiting| &waiting.reason[..]).collect();
    format!("waits for {}", reasons.join(", "))
}

fn services(status: &EnvironmentStatus) -> Table {
    let mut table = Table::new(["SERVICE", "STATE", "READY", "NEW", "RELEASE", "ADDRESS", "NOTE"]);
    for service in &status.services {
        let (word, tone) = match service.state {
            ServiceState::Waiting => ("waiting", Tone::Dim),
            ServiceState::Starting => ("starting", Tone::Busy),
            ServiceState::Ready => ("ready", Tone::Good),
            ServiceState::Asleep => ("asleep", Tone::Dim),
            ServiceState::Degraded => ("degraded", Tone::Bad),
            ServiceState::Rolling => ("rolling", Tone::Busy),
            ServiceState::Paused => ("paused", Tone::Busy),
            ServiceState::Held => ("held", Tone::Bad),
            ServiceState::Stopping => ("stopping", Tone::Busy),
            ServiceState::Stopped => ("stopped", Tone::Dim),
            ServiceState::Failed => ("failed", Tone::Bad),
        };
        let urls: Vec<&str> = service.addresses.iter().map(|address| &address.url[..]).collect();
        let (ready, new) = readiness(service);
        table.row([
            service.name.to_string().into(),
            Cell::new(word, tone),
            format!("{ready}/{}", service.desired).into(),
            new.unwrap_or_default().into(),
            service.release.map(|release| release.to_string()).unwrap_or_default().into(),
            urls.join(" ").into(),
            if service.rollout.is_some() {
                String::new()
            } else {
                switched_off(service).unwrap_or_else(|| waits(&service.waits_for))
            }
            .into(),
        ]);
    }
    table
}

/// How many instances are ready, whatever release they are of; and of the newer release, while another one serves beside
/// it, how many are and should be: what `kubectl get deployment` calls up to date.
fn readiness(service: &ServiceStatus) -> (u32, Option<String>) {
    let of = |wanted| Some(format!("{}/{wanted}", service.ready));
    let new = match &service.rollout {
        // What is kept warm is in reserve.
        Some(rollout) if rollout.phase == RolloutPhase::Warm => None,
        Some(rollout) => of(rollout.wanted),
        None if service.state == ServiceState::Rolling => of(service.desired),
        None => None,
    };
    let ready = service.instances.iter().filter(|instance| instance.phase == InstancePhase::Ready).count();
    let ready = if new.is_some() { u32::try_from(ready).unwrap_or(u32::MAX) } else { service.ready };
    (ready, new)
}

/// Jobs and volumes.
fn others(status: &EnvironmentStatus) -> Table {
    let mut table = Table::new(["RESOURCE", "STATE", "RELEASE", "NOTE"]);
    for job in &status.jobs {
        let (word, tone) = match job.state {
            JobState::Waiting => ("waiting", Tone::Dim),
            JobState::Running => ("running", Tone::Busy),
            JobState::Completed => ("completed", Tone::Good),
            JobState::Failed => ("failed", Tone::Bad),
        };
        let mut note = waits(&job.waits_for);
        if let (true, Some(exit)) = (note.is_empty() && job.state != JobState::Completed, job.last_exit) {
            note = format!("last try: {exit}");
        }
        let release = job.release.map(|release| release.to_string()).unwrap_or_default();
        table.row([format!("job.{}", job.name).into(), Cell::new(word, tone), release.into(), note.into()]);
    }
    for volume in &status.volumes {
        let (word, tone) = match volume.state {
            VolumeState::Present => ("present", Tone::Good),
            VolumeState::Missing => ("missing", Tone::Bad),
        };
        let name = format!("volume.{}", volume.name);
        table.row([name.into(), Cell::new(word, tone), "".into(), volume.path.clone().into()]);
    }
    table
}

fn instances(status: &EnvironmentStatus, now: UnixMillis) -> Table {
    let mut table = Table::new(["INSTANCE", "PHASE", "FOR", "PID", "PORTS", "RESTARTS", "NOTE"]);
    let all = status.services.iter().flat_map(|service| &service.instances);
    // Of jobs only what has not ended: what has is a matter of `events`.
    let running = |instance: &&InstanceStatus| instance.phase != InstancePhase::Ended;
    for instance in all.chain(status.jobs.iter().flat_map(|job| &job.instances).filter(running)) {
        let tone = match instance.phase {
            InstancePhase::Ready => Tone::Good,
            InstancePhase::Unready | InstancePhase::Exited => Tone::Bad,
            InstancePhase::Ended => Tone::Dim,
            _ => Tone::Busy,
        };
        let ports: Vec<String> = instance.ports.iter().map(|(name, port)| format!("{name}={port}")).collect();
        table.row([
            instance.id.to_string().into(),
            Cell::new(instance.phase.as_str(), tone),
            age(now.saturating_sub(instance.since)).into(),
            instance.pid.map(|pid| pid.to_string()).unwrap_or_default().into(),
            ports.join(" ").into(),
            if instance.restarts == 0 { String::new() } else { instance.restarts.to_string() }.into(),
            note(instance, now).into(),
        ]);
    }
    table
}

fn note(instance: &InstanceStatus, now: UnixMillis) -> String {
    let mut parts = Vec::new();
    if let Some(waiting) = &instance.waits_for {
        parts.push(wait(waiting, now));
    }
    for (name, check) in [("ready", &instance.ready), ("live", &instance.live)] {
        if let Some(check) = check.as_ref().filter(|check| check.state == CheckState::Failing) {
            let detail = check.detail.as_deref().map(|detail| format!(" ({detail})")).unwrap_or_default();
            parts.push(format!("{name} check fails{detail}"));
        }
    }
    // What a draining instance waits for names them already.
    if let (Some(in_flight), None) = (instance.in_flight, &instance.waits_for) {
        parts.push(format!("in flight: requests {}, streams {}", in_flight.requests, in_flight.streams));
    }
    for ejected in &instance.ejected {
        parts.push(format!("ejected from {} for {}", ejected.port, left(ejected.until, now)));
    }
    if let (Some(exit), true) = (instance.last_exit, instance.restarts > 0 || instance.phase != InstancePhase::Ready) {
        parts.push(format!("last exit: {exit}"));
    }
    // What is waited for quotes it already.
    if instance.waits_for.is_none() {
        parts.extend(instance.status_text.iter().map(|text| format!("“{text}”")));
    }
    parts.join("; ")
}

#[cfg(test)]
mod tests;
