//! `orchestra flags`: what everybody gets, and laying something over it.

use orchestra_api::{FlagState, FlagStatus, SwitchFlag, SwitchTo};
use orchestra_model::{
    flag::{FlagName, Override, OverrideBy, OverrideServe},
    time::UnixMillis,
};

use crate::{
    args::{FlagsArgs, FlagsCommand},
    exit::Exit,
    failure::Result,
    output::Output,
    patience::patiently,
    session::Session,
    table::{Cell, Table, Tone},
    text::{age, printable},
};

pub(crate) async fn flags(args: &FlagsArgs, session: &Session, output: &mut Output) -> Result<Exit> {
    match &args.command {
        None => list(session, output).await,
        Some(FlagsCommand::Set { flag, variant, reason }) => {
            switch(flag, SwitchTo::Variant(variant.clone()), reason.clone(), session, output).await
        }
        Some(FlagsCommand::Off { flag, reason }) => switch(flag, SwitchTo::Off, reason.clone(), session, output).await,
        Some(FlagsCommand::Clear { flag }) => switch(flag, SwitchTo::Clear, None, session, output).await,
    }
}

async fn list(session: &Session, output: &mut Output) -> Result<Exit> {
    let (client, environment) = session.known(output).await?;
    let flags = client.flags(&environment).await?;
    if output.json {
        output.json(&flags)?;
        return Ok(Exit::Success);
    }
    if flags.flags.is_empty() {
        output.note("there are no flags; the stack file defines them under `flags`");
        return Ok(Exit::Success);
    }
    let now = (session.now)();
    let mut table = Table::new(["FLAG", "VARIANT", "VALUE", "STATE", "OVERRIDE"]);
    for flag in &flags.flags {
        let (word, tone) = state(flag.state);
        table.row([
            flag.name.as_str().into(),
            flag.variant.as_ref().map_or("", |variant| variant.as_str()).into(),
            value(flag).into(),
            Cell::new(word, tone),
            flag.overridden.as_ref().map(|over| overridden(over, now)).unwrap_or_default().into(),
        ]);
    }
    let text = table.render(output.palette, output.columns());
    output.text(&text)?;
    if let Some(problem) = &flags.problem {
        output.diagnostics(std::slice::from_ref(problem));
    } else if !flags.in_force {
        output.note("the proxy does not answer with these yet");
    }
    if let Some(endpoint) = &flags.endpoint {
        output.note(&format!("programs ask at {endpoint} (OFREP_ENDPOINT)"));
    }
    Ok(Exit::Success)
}

async fn switch(
    flag: &FlagName,
    to: SwitchTo,
    reason: Option<String>,
    session: &Session,
    output: &mut Output,
) -> Result<Exit> {
    let (client, environment) = session.known(output).await?;
    let request = SwitchFlag { to, reason, by: session.user.clone() };
    let asked = client.switch_flag(&environment, flag, &request);
    let status = patiently(session, &client, output, asked).await?;
    if output.json {
        output.json(&status)?;
        return Ok(Exit::Success);
    }
    output.line(&format!("flag {flag} of {environment}: {}", sentence(&status)))?;
    if !status.in_force {
        output.note("it is written down, but the proxy does not answer with it yet: see `orchestra flags`");
    }
    Ok(Exit::Success)
}

/// What everybody gets, in words.
fn sentence(flag: &FlagStatus) -> String {
    let variant = flag.variant.as_ref().map_or("", |variant| variant.as_str());
    let value = value(flag);
    match flag.state {
        FlagState::Fixed | FlagState::Overridden => format!("everybody gets {variant} ({value})"),
        FlagState::Rules => format!("its own rules apply; who is under none gets {variant} ({value})"),
        FlagState::Off => format!("it is off: everybody gets {variant} ({value})"),
        FlagState::Broken => "its definition cannot be served".to_owned(),
        FlagState::Undefined => "the stack does not define it".to_owned(),
    }
}

fn state(state: FlagState) -> (&'static str, Tone) {
    match state {
        FlagState::Fixed => ("fixed", Tone::Plain),
        FlagState::Rules => ("by rules", Tone::Plain),
        FlagState::Off => ("off", Tone::Dim),
        FlagState::Overridden => ("overridden", Tone::Busy),
        FlagState::Broken => ("broken", Tone::Bad),
        FlagState::Undefined => ("not defined", Tone::Dim),
    }
}

/// The value as JSON writes it, not too long for a column.
fn value(flag: &FlagStatus) -> String {
    const LONGEST: usize = 40;
    let Some(value) = &flag.value else {
        return if flag.variant.is_some() { "the program's own default".to_owned() } else { String::new() };
    };
    let text = printable(&value.to_string());
    if text.chars().count() <= LONGEST {
        return text;
    }
    text.chars().take(LONGEST - 1).chain(['…']).collect()
}

fn overridden(over: &Override, now: UnixMillis) -> String {
    let what = match &over.serve {
        OverrideServe::Off => "off".to_owned(),
        OverrideServe::Variant(variant) => variant.to_string(),
    };
    let who = match over.by {
        OverrideBy::Person => "by a person".to_owned(),
        OverrideBy::Verdict { release } => format!("by the verdict about release {release}"),
    };
    let why = if over.reason.is_empty() { String::new() } else { format!(": {}", over.reason) };
    format!("{what} for {}, {who}{why}", age(now.saturating_sub(over.since)))
}
