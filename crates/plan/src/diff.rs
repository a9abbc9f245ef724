//! Differences between two forms of one resource, property by property.
//!
//! Both are flattened into paths and values. Maps are descended into; lists are values, because what changes in them is
//! their meaning as a whole (a command line). Texts become strings in which each hole says what it waits for; a property
//! that is not set is not there.

use std::collections::BTreeMap;

use orchestra_model::{
    Resource,
    flag::Flag,
    plan::PropertyChange,
    text::{Reference, Text},
};
use serde_json::Value;

/// Prefixes of the properties that a running instance cannot take over: what `Service::launch_digest` covers.
const BORN_WITH: [&str; 2] = ["program", "restarts"];

/// A property's value in the form in which it is shown.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Property {
    pub(crate) value: Value,
    pub(crate) unknown: Vec<Reference>,
}

/// Every property that differs, in order of paths.
pub(crate) fn changes(before: &Resource, after: &Resource) -> Vec<PropertyChange> {
    let mut before = properties(before);
    let after = properties(after);
    let workload = after.contains_key("program.directory");
    let change = |path: &str, before: Option<Property>, after: Option<Property>| PropertyChange {
        path: path.to_owned(),
        before: before.map(|p| p.value),
        unknown: after.as_ref().map(|p| p.unknown.clone()).unwrap_or_default(),
        after: after.map(|p| p.value),
        replaces: if workload {
            BORN_WITH.contains(&path.split('.').next().unwrap_or_default())
        } else {
            path == "path"
        },
    };
    let mut changes: Vec<PropertyChange> = after
        .into_iter()
        .filter_map(|(path, after)| {
            let before = before.remove(&path);
            (before.as_ref() != Some(&after)).then(|| change(&path, before, Some(after)))
        })
        .collect();
    changes.extend(before.into_iter().map(|(path, before)| change(&path, Some(before), None)));
    changes.sort_by(|a, b| a.path.cmp(&b.path));
    changes
}

/// Every property of a flag that differs, in order of paths.
pub(crate) fn flag_changes(before: &Flag, after: &Flag) -> Vec<PropertyChange> {
    let (mut before, after) = (flag_properties(before), flag_properties(after));
    let change = |path: String, before: Option<Value>, after: Option<Value>| PropertyChange {
        path,
        before,
        after,
        unknown: Vec::new(),
        replaces: false,
    };
    let mut changes: Vec<PropertyChange> = after
        .into_iter()
        .filter_map(|(path, after)| {
            let before = before.remove(&path);
            (before.as_ref() != Some(&after)).then(|| change(path, before, Some(after)))
        })
        .collect();
    changes.extend(before.into_iter().map(|(path, before)| change(path, Some(before), None)));
    changes.sort_by(|a, b| a.path.cmp(&b.path));
    changes
}

/// The properties of a flag by path. A value is shown whole: what counts is what programs get.
pub(crate) fn flag_properties(flag: &Flag) -> BTreeMap<String, Value> {
    let Value::Object(fields) = serde_json::to_value(flag).expect("our types serialize to JSON") else {
        unreachable!("a flag is a mapping")
    };
    let mut properties = BTreeMap::new();
    for (key, value) in fields {
        match value {
            Value::Object(parts) if key == "variants" || key == "metadata" => {
                properties.extend(parts.into_iter().map(|(name, value)| (format!("{key}.{name}"), value)));
            }
            Value::Array(rules) if key == "rules" => {
                properties.extend(rules.into_iter().enumerate().map(|(at, rule)| (format!("rules.{}", at + 1), rule)));
            }
            value => {
                properties.insert(key, value);
            }
        }
    }
    properties
}

/// Every property that is set, by path.
pub(crate) fn properties(resource: &Resource) -> BTreeMap<String, Property> {
    let value = match resource {
        Resource::Volume(volume) => serde_json::to_value(volume),
        Resource::Job(job) => serde_json::to_value(job),
        Resource::Service(service) => serde_json::to_value(service),
    };
    let mut properties = BTreeMap::new();
    flatten(String::new(), value.expect("our types serialize to JSON"), &mut properties);
    properties
}

fn flatten(path: String, value: Value, properties: &mut BTreeMap<String, Property>) {
    match value {
        Value::Null => {}
        Value::Object(map) => {
            for (key, value) in map {
                let path = if path.is_empty() { key } else { format!("{path}.{key}") };
                flatten(path, value, properties);
            }
        }
        value => {
            let in_env = path.strip_prefix("program.env.").is_some();
            let mut unknown = Vec::new();
            let value = readable(value, in_env, &mut unknown);
            properties.insert(path, Property { value, unknown });
        }
    }
}

/// The value with every text in it as a string. `is_text` says that the value itself is one, which an empty list does
/// not show.
fn readable(value: Value, is_text: bool, unknown: &mut Vec<Reference>) -> Value {
    match value {
        Value::Array(items) => {
            if (is_text || !items.is_empty())
                && items.iter().all(is_segment)
                && let Ok(text) = serde_json::from_value::<Text>(Value::Array(items.clone()))
            {
                unknown.extend(text.references().cloned());
                return Value::String(text.to_string());
            }
            // An empty text stands between other texts, as in a command line.
            let of_texts = items.iter().any(|item| matches!(item, Value::Array(parts) if parts.iter().any(is_segment)));
            Value::Array(items.into_iter().map(|item| readable(item, of_texts, unknown)).collect())
        }
        Value::Object(map) => {
            Value::Object(map.into_iter().map(|(key, value)| (key, readable(value, false, unknown))).collect())
        }
        other => other,
    }
}

/// Whether it is what a part of a text serializes to; nothing else in a resource looks like that.
fn is_segment(value: &Value) -> bool {
    value.as_object().is_some_and(|map| {
        map.len() == 1
            && (map.get("literal").is_some_and(Value::is_string)
                || map.get("reference").is_some_and(|r| r.is_object() || r.is_string()))
    })
}
