//! Files made to hurt: each is a clear error, soon and within little memory.

use std::{fmt::Write as _, time::Instant};

use orchestra_model::{Code, Diagnostic};
use orchestra_spec::{MAX_BYTES, render_text};

use crate::{errors, load_bytes, loaded};

const HEAD: &str = "version: 1\nname: demo\n";

/// Far above what is needed, far below what a blow-up costs; a debug build on a busy machine included.
const SOON: std::time::Duration = std::time::Duration::from_secs(30);

fn refused(bytes: &[u8]) -> Vec<Diagnostic> {
    let start = Instant::now();
    let errors = errors(bytes);
    assert!(start.elapsed() < SOON, "took {:?}", start.elapsed());
    assert!(errors.len() <= 100);
    let drawn = render_text(&errors, false);
    assert!(drawn.len() < 1_000_000, "{} bytes of messages", drawn.len());
    assert!(drawn.chars().all(|c| c == '\n' || !c.is_control()));
    errors
}

#[track_caller]
fn code(bytes: &[u8], code: Code) -> Diagnostic {
    let errors = refused(bytes);
    assert!(errors.iter().any(|error| error.code == code), "{}", render_text(&errors, false));
    errors.into_iter().find(|error| error.code == code).unwrap()
}

#[test]
fn empty_files() {
    for text in ["", " ", "\n\n", "# comment\n", "---\n", "---\n...\n", "~", "\u{FEFF}"] {
        assert_eq!(refused(text.as_bytes())[0].message, "the stack file is empty", "{text:?}");
    }
}

#[test]
fn a_file_of_50_mb_is_not_even_parsed() {
    let error = code(&vec![b'a'; 50_000_000], Code::TOO_LARGE);
    assert!(error.message.contains("16 MiB"), "{error}");
    assert!(load_bytes(&vec![b'#'; MAX_BYTES + 1]).is_err());
}

#[test]
fn other_encodings_are_named() {
    let text = format!("{HEAD}services: {{}}\n");
    let utf16: Vec<u16> = text.encode_utf16().collect();
    let le: Vec<u8> = utf16.iter().flat_map(|unit| unit.to_le_bytes()).collect();
    let be: Vec<u8> = utf16.iter().flat_map(|unit| unit.to_be_bytes()).collect();
    let wide: Vec<u8> = text.chars().flat_map(|c| u32::from(c).to_le_bytes()).collect();
    for (bytes, name) in [
        (le.clone(), "UTF-16LE"),
        ([b"\xFF\xFE".to_vec(), le].concat(), "UTF-16LE"),
        (be.clone(), "UTF-16BE"),
        ([b"\xFE\xFF".to_vec(), be].concat(), "UTF-16BE"),
        (wide, "UTF-32LE"),
    ] {
        let error = code(&bytes, Code::ENCODING);
        assert!(error.message.contains(name), "{name}: {error}");
        assert!(error.help.unwrap().contains("iconv"));
    }
    let error = code(b"version: 1\nname: caf\xE9\n", Code::ENCODING);
    assert_eq!((error.labels[0].location.line, error.labels[0].location.column), (2, 10));
    assert!(error.help.unwrap().contains("LATIN1"));
    // A byte order mark of UTF-8 is fine.
    assert!(load_bytes(format!("\u{FEFF}{HEAD}services: {{a: {{command: [a]}}}}").as_bytes()).is_ok());
}

#[test]
fn nul_bytes() {
    let error = code(b"version: 1\nname: de\0mo\n", Code::ENCODING);
    assert_eq!((error.labels[0].location.line, error.labels[0].location.column), (2, 9));
    code(&vec![0; 100_000], Code::ENCODING);
}

#[test]
fn deep_nesting_overflows_no_stack() {
    for open in ["[", "{a: ", "- ", "? ", "a:\n ", "[{a: ", "!!seq [", "&a ["] {
        let deep = format!("{HEAD}services: {}", open.repeat(100_000));
        assert!(
            refused(deep.as_bytes()).iter().any(|e| matches!(e.code, Code::TOO_COMPLEX | Code::YAML_SYNTAX)),
            "{open}"
        );
    }
    let mut block = String::from(HEAD);
    for depth in 0..3_000 {
        let _ = writeln!(block, "{}a:", " ".repeat(depth));
    }
    code(block.as_bytes(), Code::TOO_COMPLEX);
    let lists = format!("{HEAD}services: {}{}\n", "[".repeat(100_000), "]".repeat(100_000));
    code(lists.as_bytes(), Code::TOO_COMPLEX);
    // 64 levels of flow inside 64 levels of block are too deep together.
    let mut mixed = String::from(HEAD);
    for depth in 0..50 {
        let _ = writeln!(mixed, "{}a:", " ".repeat(depth));
    }
    let _ = writeln!(mixed, "{} {}{}", " ".repeat(50), "[".repeat(50), "]".repeat(50));
    code(mixed.as_bytes(), Code::TOO_COMPLEX);
}

#[test]
fn billion_laughs() {
    let mut lists = format!("{HEAD}x-a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]\n");
    let mut mappings = format!("{HEAD}x-a0: &a0 {{lol: lol}}\n");
    let mut merges = format!("{HEAD}x-a0: &a0 {{a: 1}}\n");
    for level in 1..40 {
        let below = level - 1;
        let _ = writeln!(lists, "x-a{level}: &a{level} [{}]", vec![format!("*a{below}"); 10].join(", "));
        let _ = writeln!(mappings, "x-a{level}: &a{level} {{a: *a{below}, b: *a{below}, c: *a{below}}}");
        let _ = writeln!(merges, "x-a{level}: &a{level} {{<<: [*a{below}, *a{below}], k{level}: *a{below}}}");
    }
    for text in [lists, mappings, merges] {
        code(text.as_bytes(), Code::TOO_COMPLEX);
    }
}

#[test]
fn repeated_long_texts() {
    let mut text = format!("{HEAD}x-long: &long {}\nx-list: [", "a".repeat(1_000_000));
    text.push_str(&["*long"; 12].join(", "));
    text.push_str("]\n");
    code(text.as_bytes(), Code::TOO_COMPLEX);
}

#[test]
fn long_expansions() {
    let long = "a".repeat(3_000);
    let path = format!("/{long}");
    let text = format!(
        "{HEAD}volumes: {{v: {{path: {path}}}}}\nservices: {{a: {{command: [a, \"{}\"]}}}}\n",
        "{{volumes.v.path}}".repeat(5_000)
    );
    code(text.as_bytes(), Code::TOO_COMPLEX);
    let names = format!("{HEAD}services: {{a: {{command: [a, \"{}\"]}}}}\n", "{{stack.name}}".repeat(100_000));
    assert!(load_bytes(names.as_bytes()).is_ok(), "half a megabyte is fine");
}

#[test]
fn too_many_values() {
    code(format!("{HEAD}x-a: [{}]", "1,".repeat(2_000_000)).as_bytes(), Code::TOO_COMPLEX);
}

#[test]
fn a_million_errors_are_a_hundred_messages() {
    let mut text = format!("{HEAD}services:\n");
    for n in 0..20_000 {
        let _ = writeln!(text, "  a{n}: {{command: [a], b: 1, c: 2, depends_on: [zz{n}]}}");
    }
    let errors = refused(text.as_bytes());
    assert_eq!(errors.len(), 100);
    assert!(errors[99].notes.iter().any(|note| note.contains("more errors are not shown")), "{:?}", errors[99]);
    // The same on a single line of a megabyte.
    let line = text.replace('\n', " ").replace("version: 1 name: demo services:", "").replace("}   a", "}, a");
    let flow = format!("{{version: 1, name: demo, services: {{{}}}}}", line.trim());
    assert_eq!(refused(flow.as_bytes()).len(), 100);
}

#[test]
fn keys_and_values_of_any_length() {
    let long = "k".repeat(2_000_000);
    refused(format!("{HEAD}services: {{\"{long}\": {{command: [a]}}}}\n").as_bytes());
    refused(format!("{HEAD}\"{long}\": 1\n").as_bytes());
    refused(
        format!("{HEAD}services: {{a: {{command: [a], depends_on: [\"{long}\"], ports: {{http: \"{long}\"}}}}}}")
            .as_bytes(),
    );
    refused(
        format!("{HEAD}services: {{a: {{command: [\"{{{{ {long} }}}}\"], replicas: {}}}}}", "9".repeat(1_000_000))
            .as_bytes(),
    );
    refused(
        format!(
            "{HEAD}services: {{a: {{command: [a], health: {{ready: {{log: \"{}\"}}}}}}}}",
            "(a{1000}){1000}".repeat(1000)
        )
        .as_bytes(),
    );
    refused(format!("{HEAD}services: {{a: {{command: [a], directory: \"{long}\"}}}}").as_bytes());
}

#[test]
fn braces_without_end() {
    for text in ["{{", "{{{{", "{{}}", "{{ a ", "}}{{"] {
        let long = text.repeat(1_000_000);
        let _ = load_bytes(format!("{HEAD}services: {{a: {{command: [a, '{long}']}}}}").as_bytes());
        let _ = load_bytes(format!("{HEAD}services: {{a: {{command: [a, \"\\x61{long}\"]}}}}").as_bytes());
    }
}

#[test]
fn pathological_scans() {
    for text in [
        "&a ", "!a ", "*a ", "? ", "- - ", "a: ", ": ", "\"", "'", "| ", "> ", "%a ", "--- ", "a\n", " \n", "#\n",
        "\t", "!<", "&", "{}", "[],",
    ] {
        let start = Instant::now();
        let _ = load_bytes(text.repeat(1_000_000 / text.len()).as_bytes());
        let _ = load_bytes(format!("{HEAD}services: {}", text.repeat(1_000_000 / text.len())).as_bytes());
        assert!(start.elapsed() < SOON, "{text:?} took {:?}", start.elapsed());
    }
}

#[test]
fn a_ring_of_ten_thousand_services() {
    let mut text = format!("{HEAD}services:\n");
    for n in 0..10_000 {
        let _ = writeln!(text, "  a{n}: {{command: [a], depends_on: [a{}]}}", (n + 1) % 10_000);
    }
    let error = code(text.as_bytes(), Code::DEPENDENCY_CYCLE);
    assert!(error.labels.len() <= 40 && error.notes[0].contains("more lines"), "{error}");
    // Everybody waits for everybody: the shortest cycle has two members.
    let names: Vec<String> = (0..300).map(|n| format!("a{n}")).collect();
    let mut text = format!("{HEAD}services:\n");
    for name in &names {
        let others: Vec<&str> = names.iter().filter(|other| *other != name).map(String::as_str).collect();
        let _ = writeln!(text, "  {name}: {{command: [a], depends_on: [{}]}}", others.join(", "));
    }
    assert_eq!(code(text.as_bytes(), Code::DEPENDENCY_CYCLE).labels.len(), 2);
}

#[test]
fn ten_thousand_services_are_fine() {
    let mut text = format!("{HEAD}services:\n");
    for n in 0..10_000 {
        let _ = writeln!(
            text,
            "  service-{n}:\n    command: [./bin/service, --number, '{n}']\n    env: {{LEVEL: info, URL: '{{{{ self.url }}}}'}}\n    ports: {{http: auto}}\n    health: {{ready: {{http: /ready}}}}"
        );
    }
    let loaded = loaded(&text);
    assert_eq!(loaded.desired.resources.len(), 10_000);
    assert_eq!(loaded.lines.values().min(), Some(&4));
}
