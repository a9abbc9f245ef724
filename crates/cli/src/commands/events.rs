//! `orchestra events`

use orchestra_api::EventsQuery;
use orchestra_model::{Event, EventKind, time::timestamp};

use crate::{
    args::EventsArgs, exit::Exit, failure::Result, output::Output, screen::Palette, session::Session, table::Tone,
    text::printable,
};

pub(crate) async fn events(args: &EventsArgs, session: &Session, output: &mut Output) -> Result<Exit> {
    let Some(client) = session.server_if_state(output).await? else {
        output.note("nothing is up");
        return Ok(Exit::Success);
    };
    let environment = session.environment(&client).await?;
    let mut query = EventsQuery {
        after: args.after,
        tail: args.tail,
        resource: args.resource.clone(),
        limit: None,
        follow: args.follow,
    };
    if args.follow {
        let mut stream = client.follow_events(&environment, &query);
        loop {
            match stream.next().await {
                Ok(event) => show(&event, output)?,
                Err(error) if error.is_lost() => stream.use_client(session.server_again(output).await?),
                Err(error) => return Err(error.into()),
            }
        }
    }
    loop {
        let page = client.events(&environment, &query).await?;
        for event in &page.items {
            show(event, output)?;
        }
        let Some(last) = page.items.last().filter(|_| page.next.is_some()) else {
            return Ok(Exit::Success);
        };
        (query.after, query.tail) = (Some(last.sequence), None);
    }
}

fn show(event: &Event, output: &mut Output) -> Result {
    if output.json {
        output.ndjson(event)?;
    } else {
        let line = line(event, output.palette);
        output.line(&line)?;
    }
    Ok(())
}

/// `2026-11-21T03:49:40.123Z  service.api  instance_ready  api-r3-1  ready check passed`
pub(crate) fn line(event: &Event, palette: Palette) -> String {
    let tone = match event.kind {
        EventKind::RunSucceeded
        | EventKind::StepSucceeded
        | EventKind::ReleaseStable
        | EventKind::InstanceReady
        | EventKind::DependencyRestored
        | EventKind::RolloutPromoted
        | EventKind::CertificateServed
        | EventKind::ProxyServing => Tone::Good,
        EventKind::RunFailed
        | EventKind::RunReverting
        | EventKind::StepFailed
        | EventKind::InstanceUnready
        | EventKind::InstanceFailed
        | EventKind::DependencyLost
        | EventKind::PreviewExpired
        | EventKind::CertificateProblem
        | EventKind::ProxyLost => Tone::Bad,
        _ => Tone::Plain,
    };
    let subject = match (&event.instance, &event.resource, event.run) {
        (Some(instance), _, _) => instance.to_string(),
        (None, Some(resource), _) => resource.to_string(),
        (None, None, Some(run)) => run.to_string(),
        (None, None, None) => event.environment.to_string(),
    };
    let kind = format!("{:19}", event.kind.as_str());
    format!(
        "{}  {}  {subject:16}  {}",
        palette.dim(&timestamp(event.at)),
        tone.paint(palette, &kind),
        printable(&event.cause)
    )
    .trim_end()
    .to_owned()
}
