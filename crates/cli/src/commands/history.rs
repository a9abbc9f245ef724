//! `orchestra history` and `orchestra show`

use std::fmt::Write as _;

use orchestra_api::{Client, ReleasesQuery};
use orchestra_model::{
    Code, Diagnostic, EnvironmentId, ReleaseNumber,
    record::{ReleaseRecord, ReleaseState},
    rollout::{VerdictOutcome, VerdictRecord},
    time::timestamp,
};

use crate::{
    args::{HistoryArgs, ShowArgs},
    commands::rollout::mirrored,
    diff,
    exit::Exit,
    failure::{Failure, Result},
    output::Output,
    session::Session,
    table::{Cell, Table, Tone},
    text::printable,
};

/// Largest page that is asked for.
const PAGE: u32 = 1000;

pub(crate) async fn history(args: &HistoryArgs, session: &Session, output: &mut Output) -> Result<Exit> {
    let mut releases = Vec::new();
    if let Some(client) = session.server_if_state(output).await? {
        let environment = session.environment(&client).await?;
        let wanted = args.limit.unwrap_or(u32::MAX) as usize;
        let mut after = None;
        while releases.len() < wanted {
            let limit = u32::try_from(wanted - releases.len()).unwrap_or(PAGE).min(PAGE);
            let mut page = client.releases(&environment, &ReleasesQuery { after, limit: Some(limit) }).await?;
            releases.append(&mut page.items);
            let last = releases.last().map(|release| release.number);
            if page.next.is_none() || last == after {
                break;
            }
            after = last;
        }
        releases.truncate(wanted);
    }
    if output.json {
        output.json(&releases)?;
    } else if releases.is_empty() {
        output.note("there is no release yet; `orchestra up` makes the first");
    } else {
        let mut table = Table::new(["RELEASE", "STATE", "MADE", "RUN", "REASON"]);
        for release in &releases {
            let (word, tone) = state(release.state);
            table.row([
                release.number.to_string().into(),
                Cell::new(word, tone),
                timestamp(release.created_at).into(),
                release.run.to_string().into(),
                release.reason.clone().into(),
            ]);
        }
        let text = table.render(output.palette, output.columns());
        output.text(&text)?;
    }
    Ok(Exit::Success)
}

fn state(state: ReleaseState) -> (&'static str, Tone) {
    match state {
        ReleaseState::Deploying => ("deploying", Tone::Busy),
        ReleaseState::Stable => ("stable", Tone::Good),
        ReleaseState::Retired => ("retired", Tone::Dim),
        ReleaseState::Failed => ("failed", Tone::Bad),
        ReleaseState::Superseded => ("superseded", Tone::Dim),
    }
}

pub(crate) async fn show(args: &ShowArgs, session: &Session, output: &mut Output) -> Result<Exit> {
    let Some(client) = session.server_if_state(output).await? else {
        let missing = Diagnostic::error(Code::NOT_FOUND, format!("there is no release {}", args.release));
        return Err(missing.help("`orchestra up` makes the first").into());
    };
    let environment = session.environment(&client).await?;
    let release = client.release(&environment, args.release).await?;
    if output.json {
        output.json(&release)?;
        return Ok(Exit::Success);
    }
    let base = match (args.against, release.number.0) {
        (Some(against), _) => Some(client.release(&environment, against).await?),
        (None, 0 | 1) => None,
        (None, _) => before(&client, &environment, release.number).await?,
    };
    let (word, tone) = state(release.state);
    let title = format!("release {} of {}", release.number, release.environment);
    output.line(&format!("{}  {}", output.palette.strong(&title), tone.paint(output.palette, word)))?;
    output.line(&format!(
        "made {} by {}: {}\n",
        timestamp(release.created_at),
        release.run,
        printable(&release.reason)
    ))?;
    if release.state.never_was_in_force() {
        // Runs are kept for a shorter time than releases.
        match client.run(release.run).await {
            Ok(run) => {
                // That it was superseded is no fault of its own.
                let failed = if release.state == ReleaseState::Failed { "failed: " } else { "" };
                for problem in &run.problems {
                    output.line(&format!("{failed}{}", printable(&problem.message)))?;
                    for note in &problem.notes {
                        output.line(&format!("  {}", printable(note)))?;
                    }
                }
                if let Some(reverted) = run.reverted.filter(|_| run.problems.is_empty()) {
                    output.line(&format!("failed: {}", printable(&reverted)))?;
                }
                output.line("")?;
            }
            Err(error) if error.status() == Some(404) => {}
            Err(error) => return Err(Failure::from(error)),
        }
    }
    let text = changes(base.as_ref(), &release, output);
    output.text(&text)?;
    for verdict in &release.verdicts {
        let text = self::verdict(verdict, output);
        output.text(&text)?;
    }
    Ok(Exit::Success)
}

/// The release that was in force before this one: the newest older one that ever was. `None` if there is none, or if it
/// was forgotten meanwhile; then everything is shown as new.
async fn before(client: &Client, environment: &EnvironmentId, number: ReleaseNumber) -> Result<Option<ReleaseRecord>> {
    let mut after = Some(number);
    loop {
        let page = client.releases(environment, &ReleasesQuery { after, limit: Some(PAGE) }).await?;
        if let Some(found) = page.items.iter().find(|release| !release.state.never_was_in_force()) {
            return match client.release(environment, found.number).await {
                Ok(base) => Ok(Some(base)),
                Err(error) if error.status() == Some(404) => Ok(None),
                Err(error) => Err(Failure::from(error)),
            };
        }
        let last = page.items.last().map(|release| release.number);
        if page.next.is_none() || last == after {
            return Ok(None);
        }
        after = last;
    }
}

/// A verdict with the numbers that it rests on.
fn verdict(verdict: &VerdictRecord, output: &Output) -> String {
    let (word, tone) = match verdict.outcome {
        VerdictOutcome::Pass => ("pass", Tone::Good),
        VerdictOutcome::Fail => ("fail", Tone::Bad),
        VerdictOutcome::Inconclusive => ("inconclusive", Tone::Busy),
        VerdictOutcome::Error => ("error", Tone::Bad),
    };
    let step = if verdict.step == 0 { String::new() } else { format!(" at step {}", verdict.step) };
    let mut text = format!(
        "\nverdict {}{step} on {}, against release {}: {}\n",
        tone.paint(output.palette, word),
        verdict.service,
        verdict.baseline,
        printable(&verdict.reason)
    );
    if let Some(flag) = &verdict.flag {
        let _ = writeln!(text, "it turned flag {flag} off instead of turning the release back");
    }
    let mut table = Table::new(["", "REQUESTS", "BROKEN", "SERVER ERRORS", "LATE", "CLIENT FAILED"]);
    for (key, name) in [("canary", "new"), ("stable", "old")] {
        let Some(arm) = verdict.evidence.get(key) else { continue };
        let number = |value: &serde_json::Value| value.as_u64().unwrap_or(0);
        let bad = |kind: &str| number(&arm["bad"][kind]);
        table.row([
            name.into(),
            number(&arm["requests"]).to_string().into(),
            bad("broken").to_string().into(),
            bad("server_error").to_string().into(),
            (bad("slow_first_byte") + bad("slow_first_token") + bad("slow")).to_string().into(),
            number(&arm["client_failed"]).to_string().into(),
        ]);
    }
    if !table.is_empty() {
        text.push_str(&table.render(output.palette, output.columns()));
    }
    if let Some(copies) = verdict.evidence.get("mirrored") {
        let of = |key: &str| copies[key].as_u64().unwrap_or(0);
        let _ = writeln!(text, "{}", mirrored(of("agreed"), of("differed")));
    }
    let of = |key: &str| verdict.evidence.get(key).and_then(serde_json::Value::as_f64);
    if let (Some(chance), Some(alpha)) = (of("chance"), of("alpha")) {
        let words = format!("chance of such evidence if it were no worse: {chance:.4} (fails below {alpha})\n");
        text.push_str(&output.palette.dim(&words));
    }
    for table in [counters(verdict), questions(verdict)] {
        if !table.is_empty() {
            text.push_str(&table.render(output.palette, output.columns()));
        }
    }
    if let Some(why) = verdict.evidence.get("counters_unread").and_then(serde_json::Value::as_str) {
        let _ = writeln!(text, "counters were not read: {}", printable(why));
    }
    text
}

/// By how much the counters grew that the service exports.
fn counters(verdict: &VerdictRecord) -> Table {
    let mut table = Table::new(["COUNTER", "NEW", "OLD"]);
    for counter in verdict.evidence.get("counters").and_then(serde_json::Value::as_array).into_iter().flatten() {
        let of = |arm: &str| {
            let number = |at: usize| counter[arm][at].as_u64().unwrap_or(0);
            format!("{} in {}", number(0), number(1))
        };
        table.row([counter["name"].as_str().unwrap_or_default().into(), of("canary").into(), of("stable").into()]);
    }
    table
}

/// What Prometheus servers said.
fn questions(verdict: &VerdictRecord) -> Table {
    let mut table =
        Table::new(["PROMETHEUS", "SAYS", "GOOD", "BAD", "INCONCLUSIVE", "ERRORS", "LAST VALUE", "CONDITION", "QUERY"]);
    for source in verdict.evidence.get("prometheus").and_then(serde_json::Value::as_array).into_iter().flatten() {
        let words = |key: &str| source[key].as_str();
        let number = |key: &str| source[key].as_u64().unwrap_or(0).to_string();
        let dry = source["dry_run"].as_bool().unwrap_or(false);
        let settled = words("settled").unwrap_or("nothing yet");
        let (says, tone) = match settled {
            _ if dry => (format!("{settled} (dry run)"), Tone::Dim),
            "pass" => (settled.to_owned(), Tone::Good),
            "fail" | "error" => (settled.to_owned(), Tone::Bad),
            other => (other.to_owned(), Tone::Busy),
        };
        let success = words("success").map(|condition| format!("good: {condition}"));
        let failure = words("failure").map(|condition| format!("bad: {condition}"));
        let conditions: Vec<String> = success.into_iter().chain(failure).collect();
        let value = source["value"].as_f64().map_or_else(|| "none".to_owned(), |value| value.to_string());
        table.row([
            words("name").unwrap_or_default().into(),
            Cell::new(says, tone),
            number("successful").into(),
            number("failed").into(),
            number("inconclusive").into(),
            number("errors").into(),
            value.into(),
            conditions.join(", ").into(),
            words("query").unwrap_or_default().into(),
        ]);
    }
    table
}

fn changes(base: Option<&ReleaseRecord>, release: &ReleaseRecord, output: &Output) -> String {
    let against = base.map_or("nothing".to_owned(), |base| format!("release {}", base.number));
    let differences = diff::resources(base.map(|base| &base.desired), &release.desired);
    if differences.is_empty() {
        return format!("no difference to {against}\n");
    }
    format!("changes against {against}:\n{}", diff::render(&differences, output.palette, output.columns()))
}
