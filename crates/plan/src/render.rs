//! A plan as a person reads it.
//!
//! One block per step, in order: what is done, the properties that differ, why, and what is waited for; then one line
//! that sums up. Strings come from stack files and programs: control characters and those that turn the direction of
//! writing are shown escaped, never sent to the terminal.

use std::fmt::Write as _;

use orchestra_model::{
    Plan, Resource, ResourceId,
    desired::Condition,
    plan::{Action, PropertyChange, Step, Wait},
};
use serde_json::Value;

use crate::diff;

/// How it is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Style {
    /// With ANSI colours.
    pub color: bool,
    /// Columns of a line; values are cut to fit.
    pub width: usize,
    /// Everything: values in full, every property of what is new, every wait.
    pub verbose: bool,
}

impl Default for Style {
    fn default() -> Self {
        Self { color: false, width: 100, verbose: false }
    }
}

/// Properties of new resources that are shown when not verbose.
const HEADLINES: [&str; 3] = ["program.command", "replicas", "path"];

/// The reason that the symbol of a creation says already.
const NEW: &str = "it is new";

/// What stands for a property that is not there.
const UNSET: &str = "(unset)";

/// Narrowest width that is honoured.
const NARROWEST: usize = 40;

/// Draws a plan. The text ends with a line break.
pub fn render(plan: &Plan, style: Style) -> String {
    let mut canvas = Canvas { text: String::new(), style: Style { width: style.width.max(NARROWEST), ..style } };
    canvas.header(plan);
    for step in &plan.steps {
        canvas.step(plan, step);
    }
    canvas.flags(plan);
    if !plan.is_empty() {
        canvas.text.push('\n');
    }
    canvas.kept(plan);
    canvas.summary(plan);
    canvas.text
}

#[derive(Clone, Copy)]
enum Paint {
    Green,
    Yellow,
    Red,
    Cyan,
    Magenta,
    Bold,
    Dim,
}

impl Paint {
    /// <https://en.wikipedia.org/wiki/ANSI_escape_code#Select_Graphic_Rendition_parameters>
    fn code(self) -> u8 {
        match self {
            Self::Bold => 1,
            Self::Dim => 2,
            Self::Red => 31,
            Self::Green => 32,
            Self::Yellow => 33,
            Self::Magenta => 35,
            Self::Cyan => 36,
        }
    }
}

/// Symbol, words and colour of an action.
fn sign(action: Action) -> (&'static str, &'static str, Paint) {
    match action {
        Action::Create => ("+", "create", Paint::Green),
        Action::Update => ("~", "update in place", Paint::Yellow),
        Action::Roll => ("↻", "roll", Paint::Cyan),
        Action::Replace => ("-/+", "replace", Paint::Red),
        Action::Run => ("▶", "run", Paint::Green),
        Action::Repair => ("!", "repair", Paint::Magenta),
        Action::Delete => ("-", "delete", Paint::Red),
    }
}

struct Canvas {
    text: String,
    style: Style,
}

impl Canvas {
    fn paint(&self, paint: Paint, text: &str) -> String {
        if self.style.color { format!("\u{1b}[{}m{text}\u{1b}[0m", paint.code()) } else { text.to_owned() }
    }

    fn line(&mut self, text: &str) {
        self.text.push_str(text.trim_end());
        self.text.push('\n');
    }

    fn header(&mut self, plan: &Plan) {
        let name = self.paint(Paint::Bold, &plan.environment.to_string());
        let base = match plan.base {
            Some(release) => format!("release {release} is in force"),
            None => "nothing is in force".to_owned(),
        };
        let base = self.paint(Paint::Dim, &base);
        self.line(&format!("{name}: {base}"));
    }

    fn step(&mut self, plan: &Plan, step: &Step) {
        let (symbol, words, paint) = sign(step.action);
        self.text.push('\n');
        let head = self.paint(paint, &format!("{symbol:>3} {}", step.resource));
        let words = self.paint(Paint::Dim, words);
        self.line(&format!("{head}  {words}"));
        let verbose = self.style.verbose;
        for reason in step.reasons.iter().filter(|reason| verbose || *reason != NEW) {
            let reason = escape(reason);
            match reason.split_once("warning: ") {
                Some((before, warning)) => {
                    let warning = self.paint(Paint::Yellow, &format!("warning: {warning}"));
                    self.line(&format!("      {before}{warning}"));
                }
                None => self.line(&format!("      {reason}")),
            }
        }
        self.properties(plan, step);
        self.waits(plan, step);
    }

    fn properties(&mut self, plan: &Plan, step: &Step) {
        if step.base.is_none() && step.changes.is_empty() {
            let of_new = self.of_new(plan, &step.resource);
            self.changes(&of_new, true);
        } else {
            self.changes(&step.changes, false);
        }
    }

    fn changes(&mut self, changes: &[PropertyChange], new: bool) {
        // One long path must not push all values to the right.
        let column = changes.iter().map(|change| change.path.chars().count()).max().unwrap_or(0).min(40);
        for change in changes {
            let path = escape(&change.path);
            let room = self.style.width.saturating_sub(6 + column.max(path.chars().count()) + 2);
            let value = self.change(change, new, room);
            self.line(&format!("      {path:column$}  {value}"));
        }
    }

    /// What a new resource will be like, as changes from nothing.
    fn of_new(&self, plan: &Plan, id: &ResourceId) -> Vec<PropertyChange> {
        let resource = plan.desired.as_ref().and_then(|desired| desired.resources.get(id));
        let properties = resource.map(diff::properties).unwrap_or_default();
        let verbose = self.style.verbose;
        let shown = |path: &str, unknown: bool| verbose || unknown || HEADLINES.contains(&path);
        let change = |path: String, value: Value| PropertyChange {
            path,
            before: None,
            after: Some(value),
            unknown: Vec::new(),
            replaces: false,
        };
        // A published port in one line instead of three.
        let ports = resource.and_then(Resource::as_service).filter(|_| !verbose).map(|service| &service.ports);
        let addresses = ports.into_iter().flatten().map(|(name, port)| {
            let address = match port.port {
                Some(number) => port.url(number),
                None => format!("{} on {}, port chosen once by the machine", port.protocol.scheme(), port.host),
            };
            change(format!("ports.{name}"), Value::String(address))
        });
        let mut changes: Vec<PropertyChange> = addresses.collect();
        changes.extend(
            properties
                .into_iter()
                .filter(|(path, property)| shown(path, !property.unknown.is_empty()))
                .map(|(path, property)| change(path, property.value)),
        );
        changes.sort_by(|a, b| a.path.cmp(&b.path));
        changes
    }

    /// The values of a property; of what is `new` only the one that it gets.
    fn change(&self, change: &PropertyChange, new: bool, room: usize) -> String {
        let verbose = self.style.verbose;
        let unset = self.paint(Paint::Dim, UNSET);
        let beside_unset = room.saturating_sub(UNSET.len() + 4);
        match (&change.before, &change.after) {
            (None, Some(after)) if new => self.paint(Paint::Green, &value(after, room, verbose)),
            (None, Some(after)) => {
                format!("{unset} -> {}", self.paint(Paint::Green, &value(after, beside_unset, verbose)))
            }
            (Some(before), None) => {
                format!("{} -> {unset}", self.paint(Paint::Red, &value(before, beside_unset, verbose)))
            }
            (Some(before), Some(after)) => {
                let room = room.saturating_sub(4);
                let (before, after) = (value(before, usize::MAX, verbose), value(after, usize::MAX, verbose));
                // The shorter one leaves its room to the other.
                let (b, a) = (before.chars().count(), after.chars().count());
                let half = room / 2;
                let (b, a) = if b + a <= room {
                    (b, a)
                } else {
                    (b.min(half.max(room.saturating_sub(a))), a.min(half.max(room.saturating_sub(b))))
                };
                let (before, after) = if verbose { (before, after) } else { (cut(&before, b), cut(&after, a)) };
                format!("{} -> {}", self.paint(Paint::Red, &before), self.paint(Paint::Green, &after))
            }
            (None, None) => String::new(),
        }
    }

    fn waits(&mut self, plan: &Plan, step: &Step) {
        // What is there already is not worth a line.
        let worth = |id: &ResourceId| self.style.verbose || plan.step(id).is_some();
        let waits: Vec<String> =
            step.after.iter().filter(|(id, _)| worth(id)).map(|(id, wait)| format!("{id} {}", until(*wait))).collect();
        if !waits.is_empty() {
            let line = self.paint(Paint::Dim, &format!("after {}", waits.join(", ")));
            self.line(&format!("      {line}"));
        }
    }

    fn flags(&mut self, plan: &Plan) {
        let defined = plan.desired.as_ref().map(|desired| &desired.flags.flags);
        for step in &plan.flags {
            let (symbol, words, paint) = sign(step.action);
            self.text.push('\n');
            let head = self.paint(paint, &format!("{symbol:>3} flag {}", step.flag));
            let words = self.paint(Paint::Dim, words);
            self.line(&format!("{head}  {words}"));
            match defined.and_then(|flags| flags.get(&step.flag)) {
                Some(flag) if step.action == Action::Create => {
                    let verbose = self.style.verbose;
                    let telling = |path: &str| {
                        path == "default" || ["variants.", "rules."].iter().any(|prefix| path.starts_with(prefix))
                    };
                    let properties =
                        diff::flag_properties(flag).into_iter().filter(|(path, _)| verbose || telling(path));
                    let changes: Vec<PropertyChange> = properties
                        .map(|(path, value)| PropertyChange {
                            path,
                            before: None,
                            after: Some(value),
                            unknown: Vec::new(),
                            replaces: false,
                        })
                        .collect();
                    self.changes(&changes, true);
                }
                _ => self.changes(&step.changes, false),
            }
        }
        // Before there were none, nobody was told where they are.
        let first =
            plan.base.is_some() && defined.is_some_and(|flags| !flags.is_empty() && flags.len() == plan.flags.len());
        if first && plan.unchanged > 0 && plan.flags.iter().all(|step| step.action == Action::Create) {
            self.text.push('\n');
            self.line("Instances that stay learn OFREP_ENDPOINT at their next start: `orchestra restart`.");
        }
    }

    fn kept(&mut self, plan: &Plan) {
        if plan.kept.is_empty() {
            return;
        }
        let names: Vec<String> = plan.kept.iter().map(ToString::to_string).collect();
        let how = if plan.desired.is_none() { "`orchestra down --volumes` deletes them" } else { "nothing uses them" };
        self.line(&format!("Kept with their data: {} ({how}).", names.join(", ")));
    }

    fn summary(&mut self, plan: &Plan) {
        if plan.is_empty() {
            let what = match (plan.unchanged, plan.desired.is_some()) {
                (_, false) => "there is nothing to take down".to_owned(),
                (1, true) => "1 resource is as desired".to_owned(),
                (n, true) => format!("{n} resources are as desired"),
            };
            let line = format!("Nothing to do: {what}.");
            return self.line(&line);
        }
        let count = |action| plan.steps.iter().filter(|step| step.action == action).count();
        let parts: Vec<String> = [
            (Action::Create, "create", true),
            (Action::Update, "update", false),
            (Action::Roll, "roll", false),
            (Action::Replace, "replace", false),
            (Action::Run, "run", false),
            (Action::Repair, "repair", false),
            (Action::Delete, "delete", true),
        ]
        .into_iter()
        .filter(|(action, _, always)| *always || count(*action) > 0)
        .map(|(action, word, _)| format!("{} to {word}", count(action)))
        .collect();
        let plan_word = self.paint(Paint::Bold, "Plan:");
        let flags = |action| plan.flags.iter().filter(|step| step.action == action).count();
        let flags: Vec<String> = [(Action::Create, "create"), (Action::Update, "update"), (Action::Delete, "delete")]
            .into_iter()
            .filter(|(action, _)| flags(*action) > 0)
            .map(|(action, word)| format!("{} to {word}", flags(action)))
            .collect();
        let flags = flags.join(", ");
        self.line(&match (plan.steps.is_empty(), flags.is_empty()) {
            (true, _) => format!("{plan_word} flags: {flags}; nothing restarts, {} unchanged", plan.unchanged),
            (false, true) => format!("{plan_word} {}, {} unchanged", parts.join(", "), plan.unchanged),
            (false, false) => format!("{plan_word} {}, {} unchanged; flags: {flags}", parts.join(", "), plan.unchanged),
        });
    }
}

fn until(wait: Wait) -> &'static str {
    match wait {
        Wait::Until(Condition::Started) => "started",
        Wait::Until(Condition::Ready) => "ready",
        Wait::Until(Condition::Completed) => "completed",
        Wait::Gone => "gone",
    }
}

/// A value in JSON's form, escaped, cut to `room` characters unless `whole`.
fn value(value: &Value, room: usize, whole: bool) -> String {
    let mut text = String::new();
    write_value(value, &mut text);
    if whole { text } else { cut(&text, room) }
}

fn write_value(value: &Value, text: &mut String) {
    match value {
        Value::String(string) => {
            text.push('"');
            for c in string.chars() {
                match c {
                    '"' => text.push_str("\\\""),
                    '\\' => text.push_str("\\\\"),
                    '\n' => text.push_str("\\n"),
                    '\t' => text.push_str("\\t"),
                    c => push_escaped(c, text),
                }
            }
            text.push('"');
        }
        Value::Array(items) => {
            text.push('[');
            for (at, item) in items.iter().enumerate() {
                if at > 0 {
                    text.push_str(", ");
                }
                write_value(item, text);
            }
            text.push(']');
        }
        Value::Object(map) => {
            text.push('{');
            for (at, (key, item)) in map.iter().enumerate() {
                let _ = write!(text, "{}{}: ", if at > 0 { ", " } else { "" }, escape(key));
                write_value(item, text);
            }
            text.push('}');
        }
        other => {
            let _ = write!(text, "{other}");
        }
    }
}

/// Text that is safe on a terminal: one line, no control characters, nothing that hides or turns what follows.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        push_escaped(c, &mut escaped);
    }
    escaped
}

fn push_escaped(c: char, text: &mut String) {
    // Format characters of <https://www.unicode.org/reports/tr9/>, separators of lines, and what has no width.
    let hidden = matches!(c,
        '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
        | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}');
    if c.is_control() || hidden {
        let _ = write!(text, "\\u{{{:x}}}", u32::from(c));
    } else {
        text.push(c);
    }
}

/// The first `room` characters; what is missing is marked.
fn cut(text: &str, room: usize) -> String {
    if text.chars().count() <= room {
        return text.to_owned();
    }
    let mut kept: String = text.chars().take(room.saturating_sub(1)).collect();
    kept.push('…');
    kept
}
