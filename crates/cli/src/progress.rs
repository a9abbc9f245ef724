//! How a run is shown while it goes on: pure text from the last [`Progress`] of each resource.

use std::collections::BTreeMap;

use orchestra_api::{Progress, ProgressState};
use orchestra_model::{
    ResourceId, ResourceKind,
    plan::Action,
    record::{RunKind, RunRecord},
};

use crate::{
    screen::Palette,
    table::Tone,
    text::{age, cut, printable, width},
};

/// What is known of every resource of a run.
pub(crate) struct Board {
    title: String,
    rows: Vec<Row>,
    places: BTreeMap<ResourceId, usize>,
    column: usize,
}

struct Row {
    progress: Progress,
    /// When it was received, in milliseconds of the caller's clock.
    at: u64,
    /// What was last said of it line by line.
    said: Option<(ProgressState, u32, String)>,
}

impl Board {
    /// A board for the steps of a run's plan, in the plan's order.
    pub(crate) fn new(run: &RunRecord) -> Self {
        let release = run.release.map(|release| format!("  release {release}")).unwrap_or_default();
        let title = format!("{}  {}  {}{release}", run.id, run.environment, verb(&run.kind));
        let rows = run
            .plan
            .steps
            .iter()
            .map(|step| Row {
                progress: Progress {
                    resource: step.resource.clone(),
                    action: step.action,
                    state: ProgressState::Waiting,
                    ready: 0,
                    desired: 0,
                    elapsed_ms: 0,
                    waits_for: Vec::new(),
                    message: None,
                },
                at: 0,
                said: None,
            })
            .collect();
        let names = run.plan.steps.iter().map(|step| step.resource.to_string().len());
        let places = run.plan.steps.iter().enumerate().map(|(at, step)| (step.resource.clone(), at)).collect();
        Self { title, rows, places, column: names.max().unwrap_or(0) }
    }

    /// Takes news. Gives the line to print where nothing is drawn in place, if there is anything new to say.
    pub(crate) fn update(&mut self, progress: Progress, now: u64, palette: Palette) -> Option<String> {
        let column = self.column;
        let row = self.rows.get_mut(*self.places.get(&progress.resource)?)?;
        // While it waits, what for is news; while it runs, a check that fails in a new way each time is not.
        let about = if progress.state == ProgressState::Waiting { remark(&progress) } else { String::new() };
        let say = (progress.state, progress.ready, about);
        let is_news = row.said.as_ref() != Some(&say);
        row.progress = progress;
        row.at = now;
        row.said = Some(say);
        is_news.then(|| line(&row.progress, row.progress.elapsed_ms, column, palette))
    }

    /// The whole as lines that fit on a screen of `columns` and `rows`.
    pub(crate) fn draw(&self, now: u64, started: u64, size: (usize, usize), palette: Palette) -> Vec<String> {
        let (columns, rows) = size;
        let title = format!("{}  {}", self.title, age(now.saturating_sub(started)));
        let mut lines = vec![palette.strong(&cut(&title, columns))];
        // One line stays free for the cursor. What is done gives way first.
        let room = rows.saturating_sub(2);
        let mut shown: Vec<&Row> = self.rows.iter().collect();
        let mut hidden = 0;
        if shown.len() > room {
            let room = room.saturating_sub(1);
            let mut excess = shown.len() - room;
            shown.retain(|row| {
                let drop = excess > 0 && row.progress.state == ProgressState::Succeeded;
                excess -= usize::from(drop);
                !drop
            });
            shown.truncate(room);
            hidden = self.rows.len() - shown.len();
        }
        let count = shown.len();
        for (at, row) in shown.into_iter().enumerate() {
            let branch = if at + 1 == count && hidden == 0 { "└─ " } else { "├─ " };
            let running = matches!(row.progress.state, ProgressState::Running | ProgressState::Reverting);
            let elapsed = row.progress.elapsed_ms + if running { now.saturating_sub(row.at) } else { 0 };
            lines.push(format!("{branch}{}", fitted(&row.progress, elapsed, self.column, columns - 3, palette)));
        }
        if hidden > 0 {
            lines.push(format!("└─ {}", palette.dim(&format!("and {hidden} more"))));
        }
        lines
    }
}

/// The word for why a run exists.
pub(crate) fn verb(kind: &RunKind) -> String {
    match kind {
        RunKind::Up => "up".to_owned(),
        RunKind::Down { volumes: false } => "down".to_owned(),
        RunKind::Down { volumes: true } => "down with volumes".to_owned(),
        RunKind::Restart { services } if services.is_empty() => "restart".to_owned(),
        RunKind::Restart { services } => {
            format!("restart {}", services.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
        }
        RunKind::Scale { replicas } => {
            let counts = replicas.iter().map(|(name, count)| format!("{name}={count}"));
            format!("scale {}", counts.collect::<Vec<_>>().join(" "))
        }
        RunKind::Rollback { to } => format!("rollback to release {to}"),
    }
}

fn word(progress: &Progress) -> (&'static str, Tone) {
    let kind = progress.resource.kind;
    match (progress.state, progress.action) {
        (ProgressState::Waiting, _) => ("waiting", Tone::Dim),
        (ProgressState::Failed, _) => ("failed", Tone::Bad),
        (ProgressState::Reverting, _) => ("reverting", Tone::Busy),
        (ProgressState::Reverted, _) => ("reverted", Tone::Busy),
        (ProgressState::Running, Action::Delete) if kind == ResourceKind::Service => ("stopping", Tone::Busy),
        (ProgressState::Running, Action::Delete) => ("deleting", Tone::Busy),
        (ProgressState::Running, Action::Roll) => ("rolling", Tone::Busy),
        (ProgressState::Running, Action::Update) => ("updating", Tone::Busy),
        (ProgressState::Running, _) => match kind {
            ResourceKind::Volume => ("creating", Tone::Busy),
            ResourceKind::Job => ("running", Tone::Busy),
            ResourceKind::Service => ("starting", Tone::Busy),
        },
        (ProgressState::Succeeded, Action::Delete) => ("gone", Tone::Good),
        (ProgressState::Succeeded, _) => match kind {
            ResourceKind::Volume => ("present", Tone::Good),
            ResourceKind::Job => ("completed", Tone::Good),
            ResourceKind::Service => ("ready", Tone::Good),
        },
    }
}

fn remark(progress: &Progress) -> String {
    let waits = progress.waits_for.iter().map(|waiting| printable(&waiting.reason)).collect::<Vec<_>>().join(", ");
    let message = progress.message.as_deref().map(printable).unwrap_or_default();
    match (waits.is_empty() || progress.state.is_final(), message.is_empty()) {
        (true, _) => message,
        (false, true) => format!("waits for {waits}"),
        (false, false) => format!("waits for {waits}; {message}"),
    }
}

/// Resource, word, count and time, without a remark.
fn fields(progress: &Progress, elapsed: u64, column: usize) -> (String, String, Tone, String) {
    let (word, tone) = word(progress);
    let name = format!("{:column$}", progress.resource);
    let count = if progress.desired == 0 || progress.action == Action::Delete {
        String::new()
    } else {
        format!("{}/{}", progress.ready, progress.desired)
    };
    let time = if progress.state == ProgressState::Waiting { String::new() } else { age(elapsed) };
    (name, format!("{word:9}"), tone, format!("{count:>5}  {time:>6}"))
}

fn line(progress: &Progress, elapsed: u64, column: usize, palette: Palette) -> String {
    let (name, word, tone, numbers) = fields(progress, elapsed, column);
    let remark = remark(progress);
    let text = format!("{name}  {}  {numbers}  {remark}", tone.paint(palette, &word));
    text.trim_end().to_owned()
}

fn fitted(progress: &Progress, elapsed: u64, column: usize, columns: usize, palette: Palette) -> String {
    let (name, word, tone, numbers) = fields(progress, elapsed, column);
    let used = width(&name) + width(&word) + width(&numbers) + 6;
    if used > columns {
        return cut(format!("{name}  {word}  {numbers}").trim_end(), columns);
    }
    let remark = cut(&remark(progress), columns - used);
    let text = format!("{name}  {}  {numbers}  {}", tone.paint(palette, &word), palette.dim(&remark));
    text.trim_end().to_owned()
}

/// Lines that are drawn again in the same place.
#[derive(Default)]
pub(crate) struct InPlace {
    drawn: usize,
}

impl InPlace {
    /// What to write so that `lines` stand where the last ones stood.
    pub(crate) fn redraw(&mut self, lines: &[String]) -> String {
        let mut text = self.clear();
        for line in lines {
            text.push_str(line);
            text.push('\n');
        }
        self.drawn = lines.len();
        text
    }

    /// What to write so that nothing stands there, and something else may be written.
    pub(crate) fn clear(&mut self) -> String {
        let up = std::mem::take(&mut self.drawn);
        // Cursor to the beginning of the first line, then erase to the end of the screen.
        if up == 0 { String::new() } else { format!("\x1b[{up}F\x1b[J") }
    }

    /// Leaves what stands there.
    pub(crate) fn leave(&mut self) {
        self.drawn = 0;
    }
}

#[cfg(test)]
mod tests;
