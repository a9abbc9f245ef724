//! `orchestra doctor`: with a server or without, and without starting one.

use std::fmt::Write as _;

use orchestra_api::{CheckOutcome, DoctorCheck, DoctorReport};

use crate::{
    exit::Exit,
    failure::Result,
    machine,
    output::Output,
    session::Session,
    table::Tone,
    text::{printable, width},
};

pub(crate) async fn doctor(session: &Session, output: &mut Output) -> Result<Exit> {
    let mut checks = Vec::new();
    let server = session.running().await;
    if !session.is_remote() {
        checks.extend(machine::checks(&session.home, (session.now)()));
    }
    match server {
        Ok(Some((client, version))) => {
            let detail = format!("version {}, pid {}, at {}", version.version, version.pid, session.endpoint());
            checks.push(if version.version == session.version {
                DoctorCheck::ok("server", detail)
            } else {
                let help = "let the next command start this version: `orchestra server stop`";
                DoctorCheck::warning("server", format!("{detail}; this is version {}", session.version), help)
            });
            match client.doctor().await {
                Ok(report) => {
                    for check in report.checks {
                        // What both look at, the one who does the work knows better.
                        checks.retain(|ours| ours.name != check.name);
                        checks.push(check);
                    }
                }
                Err(error) => checks.push(refused(error)),
            }
        }
        Ok(None) if session.is_remote() => {
            let detail = format!("nothing listens at {}", session.endpoint());
            checks.push(DoctorCheck::failed("server", detail, "check the address of `--server`"));
        }
        Ok(None) => {
            checks.push(DoctorCheck::ok("server", "not running; commands that need it start it"));
            checks.extend(machine::leftovers(&session.home));
        }
        Err(error) => checks.push(refused(error)),
    }
    let failed = checks.iter().any(|check| check.outcome == CheckOutcome::Failed);
    let report = DoctorReport { checks };
    if output.json {
        output.json(&report)?;
    } else {
        let text = render(&report, output);
        output.text(&text)?;
    }
    Ok(if failed { Exit::Failed } else { Exit::Success })
}

fn refused(error: orchestra_api::ClientError) -> DoctorCheck {
    let diagnostic = error.into_diagnostics().into_iter().next();
    let (detail, help) = diagnostic.map_or_else(Default::default, |d| (d.to_string(), d.help.unwrap_or_default()));
    DoctorCheck::failed("server", detail, help)
}

fn render(report: &DoctorReport, output: &Output) -> String {
    let column = report.checks.iter().map(|check| width(&printable(&check.name))).max().unwrap_or(0);
    let mut text = String::new();
    for check in &report.checks {
        let (word, tone) = match check.outcome {
            CheckOutcome::Ok => ("ok     ", Tone::Good),
            CheckOutcome::Warning => ("warning", Tone::Busy),
            CheckOutcome::Failed => ("failed ", Tone::Bad),
        };
        let name = printable(&check.name);
        let pad = " ".repeat(column - width(&name));
        let line = format!("{}  {name}{pad}  {}", tone.paint(output.palette, word), printable(&check.detail));
        text.push_str(line.trim_end());
        text.push('\n');
        if let Some(help) = check.help.as_deref().filter(|help| !help.is_empty()) {
            let _ = writeln!(text, "{}help: {}", " ".repeat(column + 11), printable(help));
        }
    }
    text
}
