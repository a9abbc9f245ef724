//! Laws, on random and on mutated files. `PROPTEST_CASES=100000` looks longer.

use orchestra_model::{Desired, Resource, ResourceId, desired::Check};
use orchestra_spec::render_text;
use proptest::{prelude::*, sample::Index};

use crate::{fixtures, load_bytes};

/// What must hold whatever the bytes are.
fn check(bytes: &[u8]) {
    let first = load_bytes(bytes);
    assert_eq!(first, load_bytes(bytes), "loading is deterministic");
    let loaded = match first {
        Ok(loaded) => loaded,
        Err(errors) => {
            assert!(!errors.is_empty() && errors.len() <= 100);
            let drawn = render_text(&errors, false);
            assert!(drawn.chars().all(|c| c == '\n' || !c.is_control()), "{drawn:?}");
            for label in errors.iter().flat_map(|error| &error.labels) {
                assert!(label.location.line >= 1 && label.location.column >= 1 && label.location.length >= 1);
            }
            return;
        }
    };
    let desired = loaded.desired;
    let json = serde_json::to_string(&desired).unwrap();
    assert_eq!(serde_json::from_str::<Desired>(&json).unwrap(), desired, "desired state survives its own notation");
    for (id, resource) in &desired.resources {
        assert!(loaded.lines.contains_key(id));
        closed(&desired, id, resource);
    }
}

/// Nothing in a desired state leads outside of it.
fn closed(desired: &Desired, id: &ResourceId, resource: &Resource) {
    for other in resource.dependencies().keys() {
        assert!(desired.resources.contains_key(other) && other != id, "{id} depends on {other}");
    }
    let Some(program) = resource.program() else { return };
    assert!(!program.command.is_empty() && program.directory.starts_with('/'));
    for text in program.command.iter().chain(program.env.values()) {
        assert_eq!(desired.dangling(text).count(), 0, "{id} refers to nothing by {text}");
    }
    if let Resource::Service(service) = resource {
        assert!(service.ports.keys().eq(program.ports.iter()));
        let checks = [&service.health.ready, &service.health.live];
        for probe in checks.into_iter().flatten() {
            ports_exist(&probe.check, program);
        }
    }
}

fn ports_exist(check: &Check, program: &orchestra_model::desired::Program) {
    match check {
        Check::Http { port, .. } | Check::Tcp { port } | Check::Grpc { port, .. } => {
            assert!(program.ports.contains(port));
        }
        Check::Log => assert!(program.ready_line.is_some()),
        Check::Notify => assert!(program.notify),
        Check::All(parts) | Check::Any(parts) | Check::AtLeast { of: parts, .. } => {
            for part in parts {
                ports_exist(part, program);
            }
        }
        Check::Exec { command } => assert!(!command.is_empty()),
        Check::Dependency { .. } => {}
    }
}

/// A change to a file at a random place.
#[derive(Clone, Debug)]
enum Mutation {
    Delete(Index, u8),
    Insert(Index, String),
    Copy(Index, Index, u8),
    Swap(Index, Index),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let pieces = prop::sample::select(vec![
        "{",
        "}",
        "[",
        "]",
        ":",
        ": ",
        ", ",
        "\n",
        "\n  ",
        "- ",
        "? ",
        "&a ",
        "*a ",
        "!!str ",
        "!x ",
        "\"",
        "'",
        "|\n",
        ">\n",
        "#",
        "~",
        "null",
        "<<: ",
        "{{ ",
        " }}",
        "{{{{",
        "{{ self.url }}",
        "{{ volumes.data.path }}",
        "-1",
        "0",
        "1e9",
        "99999999999999999999",
        "true",
        "auto",
        "0.0.0.0:1",
        "services:\n",
        "x-a: ",
        "\t",
        "\u{1b}",
        "\0",
        "\u{feff}",
        "日",
        "\u{202e}",
        "---\n",
        "...\n",
        "%YAML 1.2\n",
        "api",
        "depends_on: [api]",
    ]);
    prop_oneof![
        (any::<Index>(), any::<u8>()).prop_map(|(at, length)| Mutation::Delete(at, length)),
        (any::<Index>(), pieces.prop_map(str::to_owned)).prop_map(|(at, text)| Mutation::Insert(at, text)),
        (any::<Index>(), any::<Index>(), any::<u8>()).prop_map(|(from, to, length)| Mutation::Copy(from, to, length)),
        (any::<Index>(), any::<Index>()).prop_map(|(a, b)| Mutation::Swap(a, b)),
    ]
}

fn apply(bytes: &mut Vec<u8>, mutation: &Mutation) {
    let at = |index: &Index| index.index(bytes.len() + 1);
    match mutation {
        Mutation::Delete(index, length) => {
            let start = at(index);
            let end = (start + usize::from(*length)).min(bytes.len());
            bytes.drain(start..end);
        }
        Mutation::Insert(index, text) => {
            let start = at(index);
            bytes.splice(start..start, text.bytes());
        }
        Mutation::Copy(from, to, length) => {
            let start = at(from);
            let to = at(to);
            let copy = bytes[start..(start + usize::from(*length)).min(bytes.len())].to_vec();
            bytes.splice(to..to, copy);
        }
        Mutation::Swap(a, b) => {
            let (a, b) = (at(a), at(b));
            if a < bytes.len() && b < bytes.len() {
                bytes.swap(a, b);
            }
        }
    }
}

proptest! {
    #[test]
    fn any_bytes_are_loaded_or_explained(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        check(&bytes);
    }

    #[test]
    fn any_text_of_yaml_characters_is_loaded_or_explained(text in "(version: 1\nname: a\n)?[a-c{}\\[\\]:,\\- \n\"'|>&*!#?%~<0-9$.\t]{0,200}") {
        check(text.as_bytes());
    }

    #[test]
    fn any_text_as_a_value_is_loaded_or_explained(text in any::<String>()) {
        let quoted = serde_json::to_string(&text).unwrap();
        for place in ["command: [a, VALUE]", "command: VALUE", "command: [a]\n    ports: {http: VALUE}", "command: [a]\n    health: {ready: {log: VALUE}}",
            "command: [a]\n    directory: VALUE", "command: [a]\n    env: {VALUE: VALUE}", "command: [a]\n    restart: {backoff: VALUE}"] {
            check(format!("version: 1\nname: a\nservices:\n  a:\n    {}\n", place.replace("VALUE", &quoted)).as_bytes());
        }
    }

    #[test]
    fn any_change_of_a_good_or_bad_file_is_loaded_or_explained(
        bad in any::<bool>(), which in any::<Index>(), mutations in prop::collection::vec(mutation(), 1..6),
    ) {
        let fixtures = fixtures(if bad { "bad" } else { "good" });
        let mut bytes = which.get(&fixtures).1.clone().into_bytes();
        for mutation in &mutations {
            apply(&mut bytes, mutation);
        }
        check(&bytes);
    }
}

#[test]
fn good_files_obey_the_laws() {
    for (_, text) in fixtures("good") {
        check(text.as_bytes());
    }
}
