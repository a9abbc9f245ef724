//! `orchestra explain`: pages of error codes, and the reference of the stack file out of its schema.

use std::fmt::Write as _;

use orchestra_model::{Code, Diagnostic};
use serde_json::Value;

use crate::{args::ExplainArgs, exit::Exit, failure::Result, output::Output, screen::Palette, table::Table};

pub(crate) fn explain(args: &ExplainArgs, output: &mut Output) -> Result<Exit> {
    let Some(subject) = &args.subject else {
        if output.json {
            let codes: Vec<Value> =
                Code::ALL.iter().map(|code| serde_json::json!({"code": code, "title": code.title()})).collect();
            output.json(&codes)?;
        } else {
            let mut table = Table::new(["CODE", "MEANING"]);
            for code in Code::ALL {
                table.row([code.as_str().into(), code.title().into()]);
            }
            let text = table.render(output.palette, output.columns());
            output.text(&text)?;
        }
        return Ok(Exit::Success);
    };
    if let Some(code) = Code::find(subject) {
        if output.json {
            output.json(&serde_json::json!({"code": code, "title": code.title(), "page": code.page()}))?;
        } else {
            let text = markdown(code.page(), output.palette);
            output.text(&text)?;
        }
        return Ok(Exit::Success);
    }
    if subject.len() == 7 && subject[..3].eq_ignore_ascii_case("orc") {
        return Err(unknown(format!("there is no code {subject}")).into());
    }
    let schema = orchestra_spec::json_schema();
    let found = find(&schema, subject).map(|found| (found, describe(&schema, subject, found, output.palette)));
    // With a title and nothing below it, a misspelt key was taken for a name that the user chose.
    let found = found.filter(|(_, text)| text.lines().count() > 1);
    let (found, text) = found.ok_or_else(|| unknown(format!("the stack file has no key `{subject}`")))?;
    if output.json {
        output.json(found)?;
    } else {
        output.text(&text)?;
    }
    Ok(Exit::Success)
}

fn unknown(message: String) -> Diagnostic {
    Diagnostic::error(Code::NOT_FOUND, message)
        .help("`orchestra explain` lists the codes; keys are written as `services.health.ready`")
}

/// Headings strong, everything else as it is.
fn markdown(page: &str, palette: Palette) -> String {
    let mut text = String::new();
    for line in page.lines() {
        match line.strip_prefix('#') {
            Some(heading) => text.push_str(&palette.strong(heading.trim_start_matches('#').trim())),
            None => text.push_str(line),
        }
        text.push('\n');
    }
    text
}

fn resolve<'a>(root: &'a Value, mut schema: &'a Value) -> &'a Value {
    // A bound, because a defect must not become a loop.
    for _ in 0..32 {
        let Some(reference) = schema.get("$ref").and_then(Value::as_str) else { return schema };
        let Some(target) = reference.strip_prefix('#').and_then(|pointer| root.pointer(pointer)) else { return schema };
        schema = target;
    }
    schema
}

/// The schema itself and everything that it is made of.
fn parts<'a>(root: &'a Value, schema: &'a Value, depth: usize) -> Vec<&'a Value> {
    let schema = resolve(root, schema);
    let mut all = vec![schema];
    if depth < 8 {
        for key in ["anyOf", "oneOf", "allOf"] {
            for part in schema.get(key).and_then(Value::as_array).into_iter().flatten() {
                all.extend(parts(root, part, depth + 1));
            }
        }
    }
    all
}

/// The schema at a path of keys. Names that the user chooses (of a service, a variable) may be written or left out.
fn find<'a>(root: &'a Value, path: &str) -> Option<&'a Value> {
    let mut schema = root;
    for key in path.split('.').filter(|key| !key.is_empty()) {
        schema = step(root, schema, key, 0)?;
    }
    Some(schema)
}

fn step<'a>(root: &'a Value, schema: &'a Value, key: &str, depth: usize) -> Option<&'a Value> {
    let parts = parts(root, schema, 0);
    if let Some(found) = parts.iter().find_map(|part| part.get("properties")?.get(key)) {
        return Some(found);
    }
    let inner = |part: &&'a Value| -> Option<&'a Value> {
        let values = part.get("additionalProperties").filter(|values| values.is_object());
        let patterns = part.get("patternProperties").and_then(Value::as_object).and_then(|map| map.values().next());
        values.or(patterns).or_else(|| part.get("items").filter(|items| items.is_object()))
    };
    let inner = parts.iter().find_map(inner)?;
    // A key of what is inside, with the name left out; else this was the name.
    if depth < 3
        && let Some(found) = step(root, inner, key, depth + 1)
    {
        return Some(found);
    }
    let is_scalar_map = parts.iter().all(|part| part.get("items").is_none());
    is_scalar_map.then_some(inner)
}

fn describe(root: &Value, path: &str, schema: &Value, palette: Palette) -> String {
    let parts = parts(root, schema, 0);
    let description = |schema: &Value| {
        let own = schema.get("description").or_else(|| resolve(root, schema).get("description"));
        own.and_then(Value::as_str).unwrap_or_default().to_owned()
    };
    let mut text = format!("{}\n", palette.strong(path));
    let own = description(schema);
    if !own.is_empty() {
        let _ = write!(text, "\n{own}\n");
    }
    for (label, key) in [("default", "default"), ("one of", "enum"), ("form", "pattern"), ("examples", "examples")] {
        let value = schema.get(key).or_else(|| parts.iter().find_map(|part| part.get(key)));
        if let Some(value) = value {
            let _ = write!(text, "\n{label}: {value}\n");
        }
    }
    let mut table = Table::new(["KEY", "MEANING"]);
    // Of a list, what each of its items may have.
    let items = parts.iter().filter_map(|part| part.get("items")).flat_map(|items| self::parts(root, items, 0));
    let items: Vec<&Value> = items.collect();
    for part in parts.iter().chain(&items) {
        for (key, value) in part.get("properties").and_then(Value::as_object).into_iter().flatten() {
            let meaning = description(value).split("\n\n").next().unwrap_or_default().replace('\n', " ");
            table.row([key.clone().into(), meaning.into()]);
        }
    }
    if !table.is_empty() {
        let _ = write!(text, "\n{}", table.render(palette, None));
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn schema() -> Value {
        json!({
            "properties": {
                "services": {"description": "Programs.", "additionalProperties": {"$ref": "#/$defs/Service"}},
                "name": {"type": "string", "description": "Name of the stack."},
            },
            "$defs": {
                "Service": {"description": "A program.", "properties": {
                    "command": {"description": "What runs.", "items": {"type": "string"}},
                    "health": {"anyOf": [{"$ref": "#/$defs/Health"}, {"type": "null"}]},
                    "env": {"additionalProperties": {"type": "string"}},
                    "steps": {"description": "In order.", "items": {"anyOf": [{"$ref": "#/$defs/Step"}]}},
                }},
                "Step": {"properties": {"weight": {"description": "Share of the traffic."}}},
                "Health": {"properties": {"ready": {"description": "Routes.", "default": "none"}}},
            },
        })
    }

    #[test]
    fn keys_are_found_with_and_without_names() {
        let schema = schema();
        for path in ["services.health.ready", "services.api.health.ready"] {
            assert_eq!(find(&schema, path).unwrap()["description"], "Routes.", "{path}");
        }
        assert_eq!(find(&schema, "services.env.LEVEL").unwrap()["type"], "string");
        assert!(find(&schema, "service").is_none());
        assert!(find(&schema, "name.x").is_none());
        assert!(find(&schema, "services.health.raedy").is_none());
    }

    #[test]
    fn descriptions_list_keys() {
        let schema = schema();
        let text = describe(&schema, "services", find(&schema, "services").unwrap(), Palette::PLAIN);
        assert_eq!(text, "services\n\nPrograms.\n");
        let text = describe(&schema, "services.steps", find(&schema, "services.steps").unwrap(), Palette::PLAIN);
        assert_eq!(text, "services.steps\n\nIn order.\n\nKEY     MEANING\nweight  Share of the traffic.\n");
        let text = describe(&schema, "services.api", find(&schema, "services.api").unwrap(), Palette::PLAIN);
        insta::assert_snapshot!(text);
    }
}
