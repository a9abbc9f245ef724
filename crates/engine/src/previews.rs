//! What a preview is made from: what the client asks, what is recorded, and what runs in the other environment.

use std::{collections::BTreeMap, time::Duration};

use orchestra_model::{
    Code, Diagnostic, EnvironmentId, Name, ResourceId, ResourceKind,
    launch::{LaunchKey, Usage},
    preview::{BaseResource, PreviewRecord},
    quantity::{ByteSize, Timespan},
    record::EnvironmentRecord,
};
use orchestra_spec::PreviewContext;
use orchestra_store::Reader;

use crate::{
    control_plane::{ControlPlane, RunRequest, What},
    environment_task::refused,
    error::EngineError,
    planning::{self, StackSource},
    view::View,
};

/// Over which CPU is measured.
const MOMENT: Duration = Duration::from_millis(250);

/// Longest name of an owner, in characters: lists have a column for it.
const OWNER: usize = 100;

/// What a client asks of a preview.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PreviewWish {
    /// The environment that it is made from; of a preview that is there it is known.
    pub from: Option<Name>,
    /// How long it stays.
    pub ttl: Option<Timespan>,
    /// Whose it is.
    pub owner: Option<String>,
}

/// Finds out whether the environment of `source` is a preview, and what it is made from. Reads, and changes nothing.
///
/// # Errors
/// The names do not fit: see `ORC0214`.
pub fn find_preview(
    source: &StackSource,
    wish: Option<&PreviewWish>,
    reader: Option<&Reader>,
) -> Result<Option<PreviewContext>, EngineError> {
    let asked = wish.and_then(|wish| wish.from.as_ref());
    if wish.and_then(|wish| wish.owner.as_ref()).is_some_and(|owner| owner.chars().count() > OWNER) {
        return Err(problem(format!("the owner is longer than {OWNER} characters")).because("name a person or a team"));
    }
    let Some(name) = &source.environment else {
        return match wish {
            None => Ok(None),
            Some(_) => Err(problem("a preview needs a name of its own").because("give it one: `--env NAME`")),
        };
    };
    let outline = planning::outline(source);
    let records = match reader {
        Some(reader) => reader.environments()?,
        None => Vec::new(),
    };
    let record = |environment: &Name| -> Option<&EnvironmentRecord> {
        let stack = outline.stack.as_ref()?;
        records.iter().find(|record| record.id.stack == *stack && record.id.environment == *environment)
    };
    let live =
        |environment: &Name| record(environment).and_then(|record| record.preview.as_deref()).filter(|p| p.is_live());
    let is_named = outline.defines(name);
    let there = live(name);
    let from = match (asked, there) {
        (None, None) => return no_preview(name, wish, is_named, record(name)).map(|()| None),
        (None, Some(_)) if is_named => {
            let message =
                format!("`{name}` is up as a preview, and the stack file defines an environment of this name");
            return Err(problem(message).because(format!("take the preview down first: `orchestra down --env {name}`")));
        }
        (None, Some(there)) => there.preview.from.clone(),
        (Some(from), Some(there)) if *from != there.preview.from => {
            let message = format!("the preview `{name}` was made from `{}` and not from `{from}`", there.preview.from);
            return Err(problem(message).because(format!("leave `--from` out, or `orchestra down --env {name}` first")));
        }
        (Some(from), None) if record(name).is_some_and(|record| record.stable.is_some() || record.run.is_some()) => {
            let message = format!("`{name}` is up and is not a preview of `{from}`");
            return Err(problem(message).because("choose another name with `--env`, or leave `--from` out"));
        }
        (Some(from), _) => from.clone(),
    };
    if let Some(other) = live(&from) {
        let message = format!("`{from}` is a preview itself, of `{}`", other.preview.from);
        return Err(problem(message).because(format!("write `--from {}`", other.preview.from)));
    }
    Ok(Some(PreviewContext {
        ttl: wish.and_then(|wish| wish.ttl).or_else(|| there.map(|there| there.preview.ttl)),
        owner: wish.and_then(|wish| wish.owner.clone()).or_else(|| there.and_then(|there| there.preview.owner.clone())),
        base: match (reader, record(&from)) {
            (Some(reader), Some(record)) => in_force(reader, record)?,
            _ => BTreeMap::new(),
        },
        from,
    }))
}

/// Nothing says that it is a preview: refuses what only a preview has.
fn no_preview(
    name: &Name,
    wish: Option<&PreviewWish>,
    is_named: bool,
    record: Option<&EnvironmentRecord>,
) -> Result<(), EngineError> {
    if let Some(gone) = record.and_then(|record| record.preview.as_deref()).filter(|_| !is_named) {
        return Err(removed(name, gone));
    }
    if wish.is_some() {
        let message = format!("`{name}` is not a preview, and only a preview has a time and an owner");
        return Err(problem(message).because("say what it is made from: `--from ENVIRONMENT`"));
    }
    Ok(())
}

/// A preview that is gone: only what makes one brings it back, with a time of its own.
pub(crate) fn removed(name: &Name, gone: &PreviewRecord) -> EngineError {
    let from = &gone.preview.from;
    let message = format!("the preview `{name}` of `{from}` was removed");
    problem(message).because(format!("make it again: `orchestra up --env {name} --from {from}`"))
}

fn in_force(reader: &Reader, record: &EnvironmentRecord) -> Result<BTreeMap<ResourceId, BaseResource>, EngineError> {
    let resources = reader.resources(&record.id)?;
    let resources = resources.into_iter().map(|(id, resource)| {
        let chosen_ports = record.chosen_ports.get(&id.name).filter(|_| id.kind == ResourceKind::Service).cloned();
        (id, BaseResource { applied: resource.applied, chosen_ports: chosen_ports.unwrap_or_default() })
    });
    Ok(resources.collect())
}

/// An error that waits for its remedy.
struct Problem(String);

fn problem(message: impl Into<String>) -> Problem {
    Problem(message.into())
}

impl Problem {
    fn because(self, help: impl Into<String>) -> EngineError {
        refused(Diagnostic::error(Code::PREVIEW, self.0).help(help))
    }
}

/// What the instances of an environment use at the moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UsageNow {
    /// CPU, in thousandths of a core.
    pub cpu_thousandths: u64,
    /// Memory.
    pub memory: ByteSize,
    /// Instances that were looked at.
    pub instances: u32,
}

impl ControlPlane {
    /// What environments use: CPU over a moment, and memory at its end. Those of which nothing runs are missing.
    pub async fn usage(&self, views: &[View]) -> BTreeMap<EnvironmentId, UsageNow> {
        let mut keys = Vec::new();
        for view in views {
            let instances = view.status.resources.iter().flat_map(|resource| &resource.instances);
            let running = instances.filter(|instance| instance.pid.is_some());
            keys.extend(running.map(|instance| LaunchKey {
                environment: view.record.id.clone(),
                instance: instance.id.clone(),
                attempt: instance.attempt,
            }));
        }
        let mut used = BTreeMap::new();
        if keys.is_empty() {
            return used;
        }
        let begin = tokio::time::Instant::now();
        let before: BTreeMap<LaunchKey, Usage> = self.provider().usage(keys.clone()).await.into_iter().collect();
        tokio::time::sleep(MOMENT).await;
        let after = self.provider().usage(keys).await;
        let over = begin.elapsed().as_micros().max(1);
        for (key, usage) in after {
            let spent = before.get(&key).map_or(Duration::ZERO, |before| usage.cpu.saturating_sub(before.cpu));
            let total: &mut UsageNow = used.entry(key.environment).or_default();
            total.cpu_thousandths += u64::try_from(spent.as_micros() * 1_000 / over).unwrap_or(u64::MAX);
            total.memory = ByteSize::bytes(total.memory.as_bytes().saturating_add(usage.memory.as_bytes()));
            total.instances += 1;
        }
        used
    }

    /// Refuses one preview more than the stack file allows.
    pub(crate) async fn check_previews(
        &self,
        environment: &EnvironmentId,
        request: &RunRequest,
    ) -> Result<(), EngineError> {
        let What::Up(stack) = &request.what else { return Ok(()) };
        if stack.desired.preview.is_none() {
            return Ok(());
        }
        let records = self.store().read(Reader::environments).await?;
        let live = |record: &EnvironmentRecord| record.preview.as_deref().is_some_and(PreviewRecord::is_live);
        let others: Vec<String> = records
            .iter()
            .filter(|record| record.id.stack == environment.stack && record.id != *environment && live(record))
            .map(|record| record.id.environment.to_string())
            .collect();
        if others.len() < stack.preview_limit as usize {
            return Ok(());
        }
        let message =
            format!("{} previews of `{}` are up, and `previews.limit` allows no more", others.len(), environment.stack);
        let help = format!("take one down, such as `orchestra down --env {}`, or raise the limit", others[0]);
        Err(problem(message).because(help))
    }

    /// Says so if previews use what is taken down.
    pub(crate) async fn previews_that_lose(
        &self,
        environment: &EnvironmentId,
        request: &RunRequest,
    ) -> Result<Option<Diagnostic>, EngineError> {
        if !matches!(request.what, What::Down { .. }) {
            return Ok(None);
        }
        let records = self.store().read(Reader::environments).await?;
        let uses = |record: &EnvironmentRecord| {
            let preview = record.preview.as_deref().filter(|preview| preview.is_live()).map(|preview| &preview.preview);
            preview.is_some_and(|p| p.from == environment.environment && !p.shared.is_empty())
        };
        let losers: Vec<String> = records
            .iter()
            .filter(|record| record.id.stack == environment.stack && uses(record))
            .map(|record| record.id.environment.to_string())
            .collect();
        if losers.is_empty() {
            return Ok(None);
        }
        let message =
            format!("previews use what is taken down of `{}`: {}", environment.environment, losers.join(", "));
        let help = format!("take them down as well, such as `orchestra down --env {}`", losers[0]);
        Ok(Some(Diagnostic::warning(Code::PREVIEW, message).help(help)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_fits_a_column() {
        let source = StackSource {
            path: "/srv/orchestra.yaml".to_owned(),
            shown: "orchestra.yaml".to_owned(),
            text: "version: 1\nname: shop\n".to_owned(),
            environment: Some("pr-7".parse().unwrap()),
            preview: None,
        };
        let wish = |length| PreviewWish {
            from: Some("production".parse().unwrap()),
            ttl: None,
            owner: Some("ü".repeat(length)),
        };
        assert!(find_preview(&source, Some(&wish(OWNER)), None).unwrap().is_some());
        let refused = find_preview(&source, Some(&wish(OWNER + 1)), None).unwrap_err();
        assert!(refused.to_string().contains("longer than 100 characters"), "{refused}");
    }
}
