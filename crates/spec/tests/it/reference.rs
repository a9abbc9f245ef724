//! The JSON Schema and the reference are what the decoder is: checked in, equal to what is generated, and of the same
//! opinion as the decoder about every fixture.
//!
//! `UPDATE_REFERENCE=1 cargo test -p orchestra-spec reference` writes both anew.

use std::path::PathBuf;

use orchestra_spec::{json_schema, reference_tables};
use serde_json::Value;

use crate::{fixtures, load_bytes};

fn repository(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

fn update() -> bool {
    std::env::var_os("UPDATE_REFERENCE").is_some()
}

/// YAML as an editor reads it, by another implementation than ours.
fn json(text: &str) -> Value {
    serde_saphyr::from_str(text).unwrap()
}

#[test]
fn the_checked_in_schema_is_the_generated_one() {
    let path = repository("schema/orchestra.schema.json");
    let generated = format!("{}\n", serde_json::to_string_pretty(&json_schema()).unwrap());
    if update() {
        std::fs::write(&path, &generated).unwrap();
    }
    let checked_in = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(checked_in == generated, "run: UPDATE_REFERENCE=1 cargo test -p orchestra-spec reference");
}

#[test]
fn the_tables_of_the_reference_are_the_generated_ones() {
    const BEGIN: &str = "<!-- generated: keys -->\n";
    const END: &str = "<!-- end -->";
    let path = repository("docs/reference/stack-file.md");
    let page = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = page.split_once(BEGIN).expect("the page says where the tables begin");
    let (_, after) = rest.split_once(END).expect("the page says where the tables end");
    let generated = format!("{before}{BEGIN}\n{}{END}{after}", reference_tables());
    if update() {
        std::fs::write(&path, &generated).unwrap();
    }
    assert!(page == generated || update(), "run: UPDATE_REFERENCE=1 cargo test -p orchestra-spec reference");
}

#[test]
fn every_part_that_the_reference_links_to_is_there() {
    let page = std::fs::read_to_string(repository("docs/reference/stack-file.md")).unwrap();
    let anchor = |heading: &str| heading.trim().to_lowercase().replace(' ', "-");
    let there: Vec<String> =
        page.lines().filter(|line| line.starts_with('#')).map(|line| anchor(line.trim_start_matches('#'))).collect();
    let links = page.split("](#").skip(1).map(|rest| rest.split(')').next().unwrap());
    let missing: std::collections::BTreeSet<&str> = links.filter(|link| !there.iter().any(|it| it == link)).collect();
    assert!(missing.is_empty(), "a table is missing in `tables::ALL`: {missing:?}");
}

#[test]
fn examples_in_the_reference_are_valid() {
    let pages = ["docs/reference/stack-file.md", "docs/guide/flags.md", "docs/guide/previews.md"];
    let page = pages.map(|page| std::fs::read_to_string(repository(page)).unwrap()).join("\n");
    let examples: Vec<&str> = page.split("```yaml\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    assert!(examples.len() >= 5, "only {} examples", examples.len());
    let schema = jsonschema::validator_for(&json_schema()).unwrap();
    for example in examples {
        let whole = if example.starts_with("version:") {
            example.to_owned()
        } else if example.starts_with("services:")
            || example.starts_with("jobs:")
            || example.starts_with("flags:")
            || example.starts_with("environments:")
            || example.starts_with("previews:")
        {
            format!("version: 1\nname: example\n{example}")
        } else {
            continue;
        };
        if let Err(errors) = load_bytes(whole.as_bytes()) {
            panic!("{}\n{whole}", orchestra_spec::render_text(&errors, false));
        }
        let value = json(&whole);
        let errors: Vec<String> =
            schema.iter_errors(&value).map(|error| format!("{}: {error}", error.instance_path())).collect();
        assert_eq!(errors, Vec::<String>::new(), "{whole}");
    }
}

/// An example in the page of an error code is a file, and below it what Orchestra says about it.
#[test]
fn examples_in_the_pages_of_errors_are_real() {
    const FILE: &str = "```yaml\n";
    const OUTPUT: &str = "```\n\n```text\n";
    let mut seen = 0;
    for code in orchestra_model::Code::ALL {
        let path = repository(&format!("docs/errors/{code}.md"));
        let page = std::fs::read_to_string(&path).unwrap();
        let Some((before, rest)) = page.split_once(FILE) else { continue };
        let (file, rest) = rest.split_once(OUTPUT).expect("a file is followed by its output");
        let (_, after) = rest.split_once("```").unwrap();
        let errors = load_bytes(file.as_bytes()).expect_err("the example is wrong");
        assert!(errors.iter().any(|error| error.code == *code), "{code}: {errors:?}");
        let drawn = orchestra_spec::render_text(&errors, false);
        let real = format!("{before}{FILE}{file}{OUTPUT}{drawn}```{after}");
        if update() {
            std::fs::write(&path, &real).unwrap();
        }
        assert!(page == real || update(), "run: UPDATE_REFERENCE=1 cargo test -p orchestra-spec reference");
        seen += 1;
    }
    assert!(seen >= 14, "only {seen} pages have a real example");
}

#[test]
fn the_schema_accepts_what_the_decoder_accepts() {
    let schema = jsonschema::validator_for(&json_schema()).unwrap();
    for (name, text) in fixtures("good") {
        let value = json(&text);
        // Another target's environment is not described yet.
        let mut value = value;
        if let Some(environments) = value.get_mut("environments").and_then(Value::as_object_mut) {
            environments.retain(|_, environment| environment.get("target").is_none_or(|target| target == "process"));
        }
        let errors: Vec<String> =
            schema.iter_errors(&value).map(|error| format!("{}: {error}", error.instance_path())).collect();
        assert_eq!(errors, Vec::<String>::new(), "{name}");
    }
}

/// Fixtures whose mistake a schema cannot see: it is in the meaning, in the text before it is YAML, or between places.
const BEYOND_A_SCHEMA: &[&str] = &[
    "checks", // only partly
    "complex-keys",
    "conditions",
    "control-character",
    "cycle",
    "cycle-through-health",
    "documents",
    "duplicate-keys",
    "expressions",
    "merge",
    "paths",
    "port-conflicts",
    "recursive-alias",
    "references",
    "resources",
    "rollout",
    "same-name",
    "scale",
    "tags",
    "two-patterns",
    "unknown-alias",
    "unquoted-expression",
    "wide-and-tabs",
];

#[test]
fn the_schema_refuses_what_is_wrong_in_shape() {
    let schema = jsonschema::validator_for(&json_schema()).unwrap();
    let mut seen = 0;
    for (name, text) in fixtures("bad") {
        let Ok(value) = serde_saphyr::from_str::<Value>(&text) else { continue };
        let accepted = schema.is_valid(&value);
        if BEYOND_A_SCHEMA.contains(&name.as_str()) {
            continue;
        }
        seen += 1;
        assert!(!accepted, "{name} is refused by the decoder and not by the schema");
    }
    assert!(seen >= 20, "only {seen} fixtures");
}

#[test]
fn every_key_of_every_table_is_used_by_a_good_fixture() {
    let all: String = fixtures("good").into_iter().map(|(_, text)| text).collect();
    for line in reference_tables().lines().filter(|line| line.starts_with("| `") || line.starts_with("| **`")) {
        let key = line.split('`').nth(1).unwrap();
        let used = all.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').any(|word| word == key);
        assert!(used, "no good fixture uses `{key}`");
    }
}
