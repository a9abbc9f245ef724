//! `orchestra traffic`: new requests to a service wait, or go on.

use orchestra_api::{MoveTraffic, TrafficAction};

use crate::{
    args::{TrafficArgs, TrafficSubcommand},
    exit::Exit,
    failure::Result,
    output::Output,
    patience::patiently,
    session::Session,
    text::left,
};

pub(crate) async fn traffic(args: &TrafficArgs, session: &Session, output: &mut Output) -> Result<Exit> {
    let (client, environment) = session.known(output).await?;
    let (service, action, duration) = match &args.command {
        TrafficSubcommand::Pause { service, duration } => (service, TrafficAction::Pause, Some(*duration)),
        TrafficSubcommand::Resume { service } => (service, TrafficAction::Resume, None),
    };
    let request = MoveTraffic { action, duration, by: session.user.clone() };
    let asked = client.move_traffic(&environment, service, &request);
    let status = patiently(session, &client, output, asked).await?;
    if output.json {
        output.json(&status)?;
        return Ok(Exit::Success);
    }
    match &status.paused {
        Some(paused) => {
            let left = left(paused.until, (session.now)());
            let on = format!("orchestra traffic resume {service}");
            output
                .line(&format!("new requests to {service} of {environment} wait for {left}; `{on}` lets them go on"))?;
        }
        None => output.line(&format!("requests to {service} of {environment} go on"))?,
    }
    if !status.in_force {
        output.note("it is written down, but the proxy does not do so yet: see `orchestra status`");
    }
    Ok(Exit::Success)
}
