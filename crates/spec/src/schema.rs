//! The JSON Schema for editors and the tables of the reference, both made of [`crate::tables`].
//!
//! The schema describes a whole file and is a little wider than the decoder: it cannot count what comes out of a
//! rounded share, see a cycle or follow a reference. What it refuses, the decoder refuses too.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use crate::{
    table::{Key, Shape, Table},
    tables,
};

const NAME: &str = "^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$";
const EXTENSION: &str = "^x-";
/// Names of flags and variants.
const FLAG_KEY: &str = "^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$";

/// The schema of a stack file (JSON Schema 2020-12), for editors to complete and check against.
pub fn json_schema() -> Value {
    let mut definitions = Map::new();
    let root = table_schema(&tables::ROOT, false, &mut definitions);
    let mut schema = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "orchestra.yaml",
    });
    let map = schema.as_object_mut().expect("written as an object above");
    if let Value::Object(root) = root {
        map.extend(root);
    }
    definitions.sort_keys();
    map.insert("$defs".to_owned(), Value::Object(definitions));
    schema
}

/// A reference to the definition of a table, which is made if it is not there.
fn table_ref(table: &'static Table, overlay: bool, definitions: &mut Map<String, Value>) -> Value {
    let id = if overlay { format!("{}-overlay", table.id) } else { table.id.to_owned() };
    if !definitions.contains_key(&id) {
        definitions.insert(id.clone(), Value::Null);
        let schema = table_schema(table, overlay, definitions);
        definitions.insert(id.clone(), schema);
    }
    json!({"$ref": format!("#/$defs/{id}")})
}

fn table_schema(table: &'static Table, overlay: bool, definitions: &mut Map<String, Value>) -> Value {
    let mut properties = Map::new();
    for key in table.all_keys() {
        properties.insert(key.name.to_owned(), key_schema(key, overlay, definitions));
    }
    let mut schema = json!({
        "type": "object",
        "description": table.doc,
        "properties": properties,
        "patternProperties": {EXTENSION: true},
        "additionalProperties": false,
    });
    if overlay {
        return schema;
    }
    let required: Vec<&str> = table.all_keys().filter(|key| key.required).map(|key| key.name).collect();
    if !required.is_empty() {
        schema["required"] = json!(required);
    }
    if !table.one_of.is_empty() {
        schema["oneOf"] = table.one_of.iter().map(|key| json!({"required": [key]})).collect();
    }
    schema
}

fn key_schema(key: &Key, overlay: bool, definitions: &mut Map<String, Value>) -> Value {
    let mut schema = shape_schema(&key.shape, overlay, definitions);
    if overlay {
        schema = json!({"anyOf": [schema, {"type": "null"}]});
    }
    let mut description = key.doc.to_owned();
    if !key.default.is_empty() {
        let _ = write!(description, " Default: {}.", key.default);
    }
    schema["description"] = description.into();
    schema
}

fn shape_schema(shape: &Shape, overlay: bool, definitions: &mut Map<String, Value>) -> Value {
    let nullable = |schema: Value| if overlay { json!({"anyOf": [schema, {"type": "null"}]}) } else { schema };
    match shape {
        Shape::Text | Shape::Template | Shape::Variant | Shape::Constant => {
            json!({"type": ["string", "number", "boolean"]})
        }
        Shape::Duration => json!({"anyOf": [
            {"type": "string", "pattern": r"^(0|([0-9]+(\.[0-9]+)?(us|ms|s|m|h|d))+)$"},
            {"const": 0},
        ]}),
        Shape::Size => size_schema(),
        Shape::SizeLimit => json!({"anyOf": [size_schema(), {"const": "unlimited"}]}),
        Shape::Cpu => {
            json!({"anyOf": [{"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?m?$"}, {"type": "number", "minimum": 0}]})
        }
        Shape::Amount => json!({"anyOf": [
            {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)? ?%$|^[0-9]+$"},
            {"type": "integer", "minimum": 0},
        ]}),
        Shape::Percentage => json!({"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)? ?%$"}),
        Shape::Utilization => json!({"type": "string", "pattern": "^[0-9]+ ?%$"}),
        Shape::Measure => json!({"anyOf": [
            {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?$"},
            {"type": "number", "minimum": 0},
        ]}),
        Shape::Integer(from, to) => json!({"type": "integer", "minimum": from, "maximum": to}),
        Shape::CountLimit(from, to) => {
            json!({"anyOf": [{"type": "integer", "minimum": from, "maximum": to}, {"const": "unlimited"}]})
        }
        Shape::Umask => json!({"anyOf": [
            {"type": "string", "pattern": "^0o?[0-7]{0,3}$"},
            {"type": "integer", "minimum": 0, "maximum": 777},
        ]}),
        Shape::Name | Shape::Reference => json!({"type": "string", "pattern": NAME}),
        Shape::Choice(words) => json!({"enum": words}),
        Shape::True => json!({"const": true}),
        Shape::VersionOne => json!({"enum": [1, "1"]}),
        Shape::Address => json!({"type": "string", "pattern": r"^([0-9.]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}$"}),
        Shape::Host => json!({"type": "string", "pattern": "^[0-9A-Fa-f:.]+$"}),
        Shape::Network => json!({"type": "string", "pattern": "^[0-9A-Fa-f:.]+(/[0-9]{1,3})?$"}),
        Shape::Table(table) => table_ref(table, overlay, definitions),
        Shape::Names(shape) => {
            let value = nullable(shape_schema(shape, overlay, definitions));
            json!({"type": "object", "patternProperties": {NAME: value}, "additionalProperties": false})
        }
        Shape::Keys(shape) => {
            let value = nullable(shape_schema(shape, overlay, definitions));
            json!({"type": "object", "patternProperties": {FLAG_KEY: value}, "additionalProperties": false})
        }
        Shape::FlagValue => json!({"not": {"type": "array"}}),
        Shape::Number => json!({"type": "number"}),
        Shape::Boolean => json!({"type": "boolean"}),
        Shape::Weight => json!({"anyOf": [
            {"type": "string", "pattern": r"^[0-9]+(\.[0-9])? ?%?$"},
            {"type": "number", "minimum": 0, "maximum": 100},
        ]}),
        Shape::Share => json!({"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)? ?%$|^rest$"}),
        Shape::Test => test_schema(definitions),
        Shape::Condition => condition_schema(definitions),
        Shape::Map(shape) => {
            let value = nullable(shape_schema(shape, overlay, definitions));
            json!({"type": "object", "additionalProperties": value})
        }
        Shape::Items(shape) => json!({"type": "array", "items": shape_schema(shape, false, definitions)}),
        Shape::List(shape) => {
            json!({"type": "array", "items": shape_schema(shape, false, definitions), "minItems": minimum(shape)})
        }
        Shape::Any(shapes) => {
            let schemas: Vec<Value> = shapes.iter().map(|shape| shape_schema(shape, overlay, definitions)).collect();
            json!({"anyOf": schemas})
        }
        Shape::Overlay(shape) => shape_schema(shape, true, definitions),
        Shape::Maybe(shape) => json!({"anyOf": [shape_schema(shape, overlay, definitions), {"type": "null"}]}),
    }
}

/// A test in any of its forms.
fn test_schema(definitions: &mut Map<String, Value>) -> Value {
    let constant = json!({"type": ["string", "number", "boolean"]});
    let test = table_ref(&tables::TEST, false, definitions);
    json!({"anyOf": [constant, {"type": "array", "items": constant}, test]})
}

/// A mapping of attributes to tests, in which three words combine conditions.
fn condition_schema(definitions: &mut Map<String, Value>) -> Value {
    const ID: &str = "condition";
    let reference = json!({"$ref": "#/$defs/condition"});
    if !definitions.contains_key(ID) {
        let several = json!({"type": "array", "items": reference, "minItems": 1});
        let schema = json!({
            "type": "object",
            "description": "Attributes of whoever asks, each with a test; all must pass.",
            "properties": {"all": several, "any": several, "not": reference},
            "additionalProperties": test_schema(definitions),
            "minProperties": 1,
        });
        definitions.insert(ID.to_owned(), schema);
    }
    reference
}

/// Lists of names may be empty, lists of arguments and checks may not.
fn minimum(item: &Shape) -> u64 {
    u64::from(matches!(item, Shape::Template | Shape::Table(_)))
}

fn size_schema() -> Value {
    json!({"anyOf": [
        {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?((k|K|M|G|T)i?B?|B)?$"},
        {"type": "integer", "minimum": 0},
    ]})
}

/// The tables of the reference in Markdown: every key with what it means, its default and where that comes from.
pub fn reference_tables() -> String {
    let mut text = String::new();
    for table in tables::ALL {
        let _ = write!(text, "### {}\n\n{}\n\n", table.id, table.doc);
        if !table.one_of.is_empty() {
            let keys: Vec<String> = table.one_of.iter().map(|key| format!("`{key}`")).collect();
            let _ = write!(text, "Exactly one of {} must be there.\n\n", keys.join(", "));
        }
        text.push_str("| key | value | default | default from | meaning |\n|---|---|---|---|---|\n");
        for key in table.all_keys() {
            let default = match (key.required, key.default) {
                (true, _) => "required".to_owned(),
                (false, "") if has_table(&key.shape) => "see there".to_owned(),
                (false, "") => "none".to_owned(),
                (false, default) if literal(&key.shape, default) => format!("`{default}`"),
                (false, default) => default.to_owned(),
            };
            let name = if key.required { format!("**`{}`**", key.name) } else { format!("`{}`", key.name) };
            let value = words(&key.shape).replace('|', "\\|");
            let _ = writeln!(text, "| {name} | {value} | {default} | {} | {} |", key.origin, key.doc);
        }
        text.push('\n');
    }
    text
}

/// Whether a default is written as it stands in a file, and not in words.
fn literal(shape: &Shape, default: &str) -> bool {
    let value = matches!(
        shape,
        Shape::Duration
            | Shape::Amount
            | Shape::Percentage
            | Shape::Integer(..)
            | Shape::CountLimit(..)
            | Shape::Umask
            | Shape::Host
            | Shape::Choice(_)
            | Shape::Any(_)
    );
    value && !default.contains(' ') && !matches!(default, "none" | "nothing")
}

/// Whether the value has defaults of its own.
fn has_table(shape: &Shape) -> bool {
    match shape {
        Shape::Table(_) => true,
        Shape::Any(shapes) => shapes.iter().any(has_table),
        _ => false,
    }
}

/// A shape in words.
fn words(shape: &Shape) -> String {
    match shape {
        Shape::Text => "text".to_owned(),
        Shape::Template => "text with `{{ … }}`".to_owned(),
        Shape::Duration => "duration".to_owned(),
        Shape::Size => "size".to_owned(),
        Shape::SizeLimit => "size or `unlimited`".to_owned(),
        Shape::Cpu => "CPU".to_owned(),
        Shape::Amount => "count or share".to_owned(),
        Shape::Percentage => "share".to_owned(),
        Shape::Utilization => "share in whole percent".to_owned(),
        Shape::Measure => "number above 0".to_owned(),
        Shape::Integer(from, to) => format!("{from} to {to}"),
        Shape::CountLimit(from, to) => format!("{from} to {to}, or `unlimited`"),
        Shape::Umask => "octal mask".to_owned(),
        Shape::Name | Shape::Reference => "name".to_owned(),
        Shape::Choice(words) => words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", "),
        Shape::True => "`true`".to_owned(),
        Shape::VersionOne => "`1`".to_owned(),
        Shape::Address => "`IP:PORT`".to_owned(),
        Shape::Host => "IP address".to_owned(),
        Shape::Network => "IP address or network".to_owned(),
        Shape::Table(table) => format!("[{0}](#{0})", table.id),
        Shape::Names(shape) | Shape::Keys(shape) => format!("names to {}", words(shape)),
        Shape::Variant => "variant".to_owned(),
        Shape::FlagValue => "text, number, boolean, mapping or `null`".to_owned(),
        Shape::Constant => "text, number or boolean".to_owned(),
        Shape::Number => "number".to_owned(),
        Shape::Boolean => "`true`, `false`".to_owned(),
        Shape::Weight => "percentage".to_owned(),
        Shape::Share => "share or `rest`".to_owned(),
        Shape::Test => "[test](#test), value or list".to_owned(),
        Shape::Condition => "[condition](#flags)".to_owned(),
        Shape::Map(shape) => format!("mapping to {}", words(shape)),
        Shape::List(shape) | Shape::Items(shape) => format!("list of {}", words(shape)),
        Shape::Any(shapes) => shapes.iter().map(words).collect::<Vec<_>>().join(", or "),
        Shape::Overlay(shape) | Shape::Maybe(shape) => words(shape),
    }
}
