//! `orchestra environments`

use std::time::Duration;

use orchestra_api::{EnvironmentHealth, EnvironmentSummary, PreviewStatus, UsageNow};
use orchestra_model::{preview::Used, quantity::Timespan, time::UnixMillis};

use crate::{
    args::EnvironmentsArgs,
    commands::status::{health, nothing},
    exit::Exit,
    failure::Result,
    output::Output,
    session::Session,
    table::{Cell, Table, Tone},
    text::{age, rest},
};

/// Time before its end from which a preview is shown as going.
const SOON: Duration = Duration::from_secs(3_600);

pub(crate) async fn environments(args: &EnvironmentsArgs, session: &Session, output: &mut Output) -> Result<Exit> {
    let Some(client) = session.server_if_state(output).await? else {
        return nothing(output);
    };
    let mut environments = client.all_environments_with_usage().await?;
    let all = environments.len();
    if !args.all {
        environments.retain(|environment| environment.health != EnvironmentHealth::Down);
    }
    if output.json {
        output.json(&environments)?;
    } else if environments.is_empty() {
        if all == 0 {
            return nothing(output);
        }
        output.line("nothing is up; `orchestra environments --all` lists what was")?;
    } else {
        let now = (session.now)();
        let table = list(&environments, now).render(output.palette, output.columns());
        output.text(&table)?;
        let account = account(&environments).render(output.palette, output.columns());
        if environments.iter().any(|environment| environment.preview.is_some()) {
            output.text(&format!("\n{account}"))?;
        }
    }
    Ok(Exit::Success)
}

fn list(environments: &[EnvironmentSummary], now: UnixMillis) -> Table {
    let mut table = Table::new([
        "ENVIRONMENT",
        "STATE",
        "READY",
        "RELEASE",
        "PREVIEW OF",
        "AGE",
        "EXPIRES IN",
        "OWNER",
        "INSTANCES",
        "CPU",
        "MEMORY",
    ]);
    for environment in environments {
        let preview = environment.preview.as_ref();
        let (word, tone) = match preview.and_then(|preview| preview.removed_at) {
            Some(_) => ("removed", Tone::Dim),
            None => health(environment.health),
        };
        let usage = environment.usage.unwrap_or_default();
        let measured = |text: String| if environment.usage.is_some() { text } else { String::new() };
        table.row([
            environment.id.to_string().into(),
            Cell::new(word, tone),
            format!("{}/{}", environment.ready, environment.services).into(),
            environment.release.map(|release| release.to_string()).unwrap_or_default().into(),
            preview.map(|preview| preview.from.to_string()).unwrap_or_default().into(),
            preview.map(|preview| age(now.saturating_sub(preview.created_at))).unwrap_or_default().into(),
            preview.map(expires).unwrap_or_default(),
            preview.and_then(|preview| preview.owner.clone()).unwrap_or_default().into(),
            measured(usage.instances.to_string()).into(),
            measured(cores(&usage)).into(),
            measured(format!("{} MiB", usage.memory.as_bytes() >> 20)).into(),
        ]);
    }
    table
}

/// What previews have used since they were made.
fn account(environments: &[EnvironmentSummary]) -> Table {
    let mut table = Table::new(["PREVIEW", "CPU USED", "MEMORY USED", "COST"]);
    for environment in environments {
        let Some(preview) = &environment.preview else { continue };
        let [cpu, memory] = used(&preview.used);
        table.row([environment.id.to_string().into(), cpu.into(), memory.into(), cost(preview).into()]);
    }
    table
}

/// When a preview is taken down.
pub(crate) fn expires(preview: &PreviewStatus) -> Cell {
    if preview.removed_at.is_some() {
        return Cell::default();
    }
    match preview.expires_in.map(Timespan::duration) {
        None => "never".into(),
        Some(Duration::ZERO) => Cell::new("now", Tone::Bad),
        Some(left) => Cell::new(rest(left), if left <= SOON { Tone::Busy } else { Tone::Plain }),
    }
}

fn cores(usage: &UsageNow) -> String {
    format!("{}.{:02}", usage.cpu_thousandths / 1_000, usage.cpu_thousandths % 1_000 / 10)
}

/// Core-hours and GiB-hours.
fn used(used: &Used) -> [String; 2] {
    let [cpu, memory] =
        [used.cpu_ms.saturating_mul(10) / 3_600, used.memory_mib_s.saturating_mul(10_000) / 3_600 / 1_024];
    [format!("{} core-h", ten_thousandths(cpu)), format!("{} GiB-h", ten_thousandths(memory))]
}

fn ten_thousandths(value: u64) -> String {
    format!("{}.{:04}", value / 10_000, value % 10_000)
}

fn cost(preview: &PreviewStatus) -> String {
    let cost = &preview.cost;
    let mut text = String::new();
    if cost.millionths > 0 && cost.millionths < 100 {
        text.push_str("< 0.0001");
    } else {
        text.push_str(&ten_thousandths(cost.millionths / 100));
    }
    format!("{text} {}", cost.currency)
}

#[cfg(test)]
mod tests {
    use orchestra_api::Cost;

    use super::*;
    use crate::screen::Palette;

    fn preview(expires_in: Option<Timespan>, used: Used) -> PreviewStatus {
        PreviewStatus {
            from: "production".parse().unwrap(),
            ttl: Timespan::seconds(86_400),
            owner: Some("ada".to_owned()),
            shared: [].into(),
            created_at: 1_000,
            // By this clock its time is over; that of the server counts.
            expires_at: expires_in.map(|_| 2_000),
            expires_in,
            removed_at: None,
            used,
            cost: Cost {
                millionths: used.cost(&orchestra_model::preview::Prices::default()),
                currency: "USD".to_owned(),
            },
        }
    }

    fn summary(name: &str, preview: Option<PreviewStatus>) -> EnvironmentSummary {
        EnvironmentSummary {
            id: format!("shop/{name}").parse().unwrap(),
            source: "/srv/orchestra.yaml".to_owned(),
            health: EnvironmentHealth::Ready,
            release: Some(orchestra_model::ReleaseNumber(1)),
            ready: 2,
            services: 2,
            run: None,
            preview,
            usage: Some(UsageNow { cpu_thousandths: 125, memory: "512Mi".parse().unwrap(), instances: 3 }),
        }
    }

    #[test]
    fn previews_are_listed_with_age_end_and_cost() {
        // A core and two GiB for two hours.
        let used = Used { cpu_ms: 7_200_000, memory_mib_s: 2 * 1_024 * 7_200 };
        let environments = [
            summary("production", None),
            summary("preview-42", Some(preview(Some(Timespan::seconds(79_200)), used))),
            summary("preview-43", Some(preview(None, Used::default()))),
        ];
        let palette = Palette { color: false };
        let text = list(&environments, 7_201_000).render(palette, None) + &account(&environments).render(palette, None);
        insta::assert_snapshot!(text);
    }
}
