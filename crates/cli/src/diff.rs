//! What two desired states differ in, property by property, for looking back at releases. Plans have their own diff with
//! reasons; this one only compares what was written down.

use std::collections::BTreeMap;

use orchestra_model::{Desired, Resource, Text, flag::Flag};
use serde_json::Value;

use crate::{
    screen::Palette,
    text::{cut, printable},
};

/// One resource or flag that differs.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Difference {
    /// Its name, as it is shown.
    name: String,
    /// Path, before, after; without paths the whole resource came or went.
    change: Change,
}

#[derive(Clone, Debug, PartialEq)]
enum Change {
    Added(BTreeMap<String, Value>),
    Removed,
    Changed(Vec<(String, Option<Value>, Option<Value>)>),
}

/// Everything that differs: resources, then flags.
pub(crate) fn resources(before: Option<&Desired>, after: &Desired) -> Vec<Difference> {
    let none = BTreeMap::new();
    let no_flags = BTreeMap::new();
    let flags = before.map_or(&no_flags, |desired| &desired.flags.flags);
    let mut differences = of(before.map_or(&none, |desired| &desired.resources), &after.resources, flat, "");
    differences.extend(of(flags, &after.flags.flags, flat_flag, "flag "));
    differences
}

fn of<K: Ord + std::fmt::Display, V: PartialEq>(
    before: &BTreeMap<K, V>,
    after: &BTreeMap<K, V>,
    flat: fn(&V) -> BTreeMap<String, Value>,
    noun: &str,
) -> Vec<Difference> {
    let names: std::collections::BTreeSet<&K> = before.keys().chain(after.keys()).collect();
    names
        .into_iter()
        .filter_map(|name| {
            let change = match (before.get(name), after.get(name)) {
                (Some(before), Some(after)) if before == after => return None,
                (Some(before), Some(after)) => Change::Changed(properties(&flat(before), &flat(after))),
                (None, Some(after)) => Change::Added(flat(after)),
                (Some(_), None) => Change::Removed,
                (None, None) => return None,
            };
            Some(Difference { name: format!("{noun}{name}"), change })
        })
        .collect()
}

fn properties(
    before: &BTreeMap<String, Value>,
    after: &BTreeMap<String, Value>,
) -> Vec<(String, Option<Value>, Option<Value>)> {
    let paths: std::collections::BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    paths
        .into_iter()
        .filter(|path| before.get(*path) != after.get(*path))
        .map(|path| (path.clone(), before.get(path).cloned(), after.get(path).cloned()))
        .collect()
}

/// Leaves of a resource by path. A text with holes is one leaf, in the form in which people read it.
fn flat(resource: &Resource) -> BTreeMap<String, Value> {
    let value = serde_json::to_value(resource).expect("resources serialize to JSON");
    let mut leaves = BTreeMap::new();
    // Externally tagged: the kind is the only key, and the id says it already.
    for value in value.as_object().into_iter().flat_map(|tagged| tagged.values()) {
        walk(String::new(), value, &mut leaves);
    }
    leaves
}

fn flat_flag(flag: &Flag) -> BTreeMap<String, Value> {
    let mut leaves = BTreeMap::new();
    walk(String::new(), &serde_json::to_value(flag).expect("flags serialize to JSON"), &mut leaves);
    leaves
}

fn walk(path: String, value: &Value, leaves: &mut BTreeMap<String, Value>) {
    match value {
        Value::Null => {}
        Value::Object(map) => {
            for (key, value) in map {
                walk(if path.is_empty() { key.clone() } else { format!("{path}.{key}") }, value, leaves);
            }
        }
        Value::Array(items) if items.is_empty() => {}
        Value::Array(items) => {
            let text = |value: &Value| serde_json::from_value::<Text>(value.clone()).ok().map(|text| text.to_string());
            let shown = text(value).map_or_else(
                || items.iter().map(|item| text(item).map_or(item.clone(), Value::String)).collect(),
                Value::String,
            );
            leaves.insert(path, shown);
        }
        leaf => {
            leaves.insert(path, leaf.clone());
        }
    }
}

/// Differences as lines.
pub(crate) fn render(differences: &[Difference], palette: Palette, columns: Option<usize>) -> String {
    let mut text = String::new();
    let mut line = |paint: fn(Palette, &str) -> String, line: String| {
        let line = columns.map_or(line.clone(), |columns| cut(&line, columns));
        text.push_str(&paint(palette, &line));
        text.push('\n');
    };
    for difference in differences {
        let id = &difference.name;
        match &difference.change {
            Change::Removed => line(Palette::bad, format!("- {id}")),
            Change::Added(leaves) => {
                line(Palette::good, format!("+ {id}"));
                for path in ["command", "program.command", "replicas", "path", "kind", "default"] {
                    if let Some(value) = leaves.get(path) {
                        line(Palette::dim, format!("    {path}: {}", show(value)));
                    }
                }
            }
            Change::Changed(properties) => {
                line(Palette::busy, format!("~ {id}"));
                for (path, before, after) in properties {
                    let path = printable(path);
                    match (before, after) {
                        (Some(before), Some(after)) => {
                            line(Palette::busy, format!("    {path}: {} → {}", show(before), show(after)));
                        }
                        (None, Some(after)) => line(Palette::good, format!("  + {path}: {}", show(after))),
                        (Some(before), None) => line(Palette::bad, format!("  - {path}: {}", show(before))),
                        (None, None) => {}
                    }
                }
            }
        }
    }
    text
}

fn show(value: &Value) -> String {
    match value {
        Value::String(text) => printable(text),
        other => printable(&other.to_string()),
    }
}
