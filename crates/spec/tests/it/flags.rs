//! Feature flags: short forms, overlays, shares, and what is worth a warning.

use orchestra_model::flag::{Condition, Flag, FlagKind, FlagName, FlagSet, Serve};
use orchestra_spec::{Source, load};

use crate::{context, load_bytes};

const STACK: &str = "version: 1\nname: demo\njobs: {seed: {command: [./seed]}}\n";

fn flags_in(text: &str, environment: Option<&str>) -> FlagSet {
    let text = format!("{STACK}{text}");
    let loaded = load(Source { path: "orchestra.yaml", bytes: text.as_bytes() }, &context(environment));
    loaded.unwrap_or_else(|errors| panic!("{}\n{text}", orchestra_spec::render_text(&errors, false))).desired.flags
}

fn flag(text: &str) -> Flag {
    flags_in(&format!("flags:\n  f: {text}\n"), None).flags["f"].clone()
}

#[test]
fn a_single_value_is_a_flag() {
    for (text, kind, default, off, value) in [
        ("true", FlagKind::Boolean, "on", "off", "true"),
        ("false", FlagKind::Boolean, "off", "off", "false"),
        ("on", FlagKind::String, "default", "default", "\"on\""),
        ("'true'", FlagKind::String, "default", "default", "\"true\""),
        ("-7", FlagKind::Integer, "default", "default", "-7"),
        ("0x1F", FlagKind::Integer, "default", "default", "31"),
        ("18446744073709551615", FlagKind::Integer, "default", "default", "18446744073709551615"),
        ("1.0", FlagKind::Float, "default", "default", "1.0"),
        ("1e3", FlagKind::Float, "default", "default", "1000.0"),
        ("\"{{ not ours }}\"", FlagKind::String, "default", "default", "\"{{ not ours }}\""),
    ] {
        let flag = flag(text);
        let served = serde_json::to_string(&flag.variants[&flag.default]).unwrap();
        assert_eq!((flag.kind, flag.default.as_str(), flag.off.as_str(), served.as_str()), (kind, default, off, value));
        assert!(flag.enabled && flag.rules.is_empty());
    }
}

#[test]
fn what_is_left_out_follows_from_the_rest() {
    let switch = flag("{}");
    assert_eq!((switch.default.as_str(), switch.off.as_str()), ("off", "off"));
    assert_eq!(flag("{default: true}").default.as_str(), "on");
    assert!(!flag("{state: off}").enabled && !flag("{state: false}").enabled && flag("{state: on}").enabled);
    let only = flag("{variants: {one: x}}");
    assert_eq!((only.default.as_str(), only.off.as_str()), ("one", "one"));
    let named = flag("{variants: {yes: true, no: false}, default: yes}");
    assert_eq!(named.off.as_str(), "no", "the one that is false");
    assert_eq!(flag("{variants: {a: 1, b: 2}, default: b}").off.as_str(), "b");
    let rules = flag("{rules: [{serve: on}, {name: mine, serve: off}]}").rules;
    assert_eq!(rules.iter().map(|rule| rule.name.as_str()).collect::<Vec<_>>(), ["1", "mine"]);
    assert_eq!(rules[0].when, Condition::EVERYBODY);
}

#[test]
fn the_rest_is_what_the_others_leave() {
    for (split, expected) in [
        ("{on: 12.5%, off: rest}", &[("on", 12_500), ("off", 87_500)][..]),
        ("{off: rest, on: 0.001%}", &[("off", 99_999), ("on", 1)]),
        ("{on: 100%, off: rest}", &[("on", 100_000), ("off", 0)]),
        ("{off: rest}", &[("off", 100_000)]),
    ] {
        let rules = flag(&format!("{{rules: [{{split: {split}}}]}}")).rules;
        let Serve::Split(split) = &rules[0].serve else { panic!("{rules:?}") };
        let shares: Vec<(&str, u32)> =
            split.shares.iter().map(|share| (share.variant.as_str(), share.share.as_thousandths())).collect();
        assert_eq!(shares, expected, "in the order of the file");
        assert_eq!(split.by.as_str(), "targetingKey");
    }
}

#[test]
fn environments_overlay_flags() {
    let text = "\
flags:
  simple: true
  gone: true
  model: {variants: {small: {name: a, temperature: 1}, large: {name: b}}, default: small, rules: [{serve: large}]}
environments:
  dev: {}
  prod:
    flags:
      simple: false
      gone: null
      model: {default: large, state: off, variants: {small: {temperature: 2}}, rules: null}
      more: {variants: {x: 1}}
";
    let dev = flags_in(text, Some("dev"));
    assert_eq!(dev.flags.len(), 3);
    let prod = flags_in(text, Some("prod"));
    assert_eq!(prod.flags.keys().map(FlagName::as_str).collect::<Vec<_>>(), ["model", "more", "simple"]);
    assert_eq!(prod.flags["simple"].default.as_str(), "off");
    let model = &prod.flags["model"];
    assert_eq!(serde_json::to_string(&model.variants["small"]).unwrap(), r#"{"name":"a","temperature":2}"#);
    assert!(!model.enabled && model.rules.is_empty() && model.default.as_str() == "large");
    assert_ne!(dev.digest(), prod.digest());
}

/// Where keys stand in the file is no content: the digest, and with it every client's cache, stays.
#[test]
fn the_order_of_keys_does_not_matter() {
    let one = flags_in("flags: {a: {variants: {x: {p: 1, q: {r: 2, s: 3}}}}, b: true}\n", None);
    let two = flags_in("flags: {b: true, a: {variants: {x: {q: {s: 3, r: 2}, p: 1}}}}\n", None);
    assert_eq!(one.digest(), two.digest());
}

#[test]
fn a_rule_behind_everybody_is_worth_a_warning() {
    let text = format!("{STACK}flags: {{f: {{rules: [{{serve: on}}, {{when: {{a: 1}}, serve: off}}]}}}}\n");
    let warnings = load_bytes(text.as_bytes()).unwrap().warnings;
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].message.contains("never applies"), "{}", warnings[0]);
}

#[test]
fn a_guard_with_a_flag_that_gives_the_same_while_it_is_off_is_worth_a_warning() {
    let warnings = |flag: &str| {
        let text = format!(
            "{STACK}services: {{a: {{command: [a], ports: {{http: auto}}, rollout: {{canary: true, guard: {{flag: f}}}}}}}}\n\
             flags: {{f: {flag}}}\n"
        );
        load_bytes(text.as_bytes()).unwrap().warnings.into_iter().map(|warning| warning.message).collect::<Vec<_>>()
    };
    for idle in [
        "false",
        "one",
        "{state: off, default: on}",
        "{variants: {x: 1, y: 1, z: 2}, default: x, off: y}",
        "{rules: [{when: {a: 1}, serve: off}, {split: {on: 0%, off: rest}}]}",
    ] {
        assert_eq!(warnings(idle), ["turning the flag `f` off changes nothing"], "{idle}");
    }
    for useful in
        ["true", "{default: on}", "{rules: [{when: {a: 1}, serve: on}]}", "{rules: [{split: {on: 1%, off: rest}}]}"]
    {
        assert_eq!(warnings(useful), Vec::<String>::new(), "{useful}");
    }
}

/// The place of a mistake is right behind rules that could not be read.
#[test]
fn mistakes_are_found_behind_other_mistakes() {
    let text = format!(
        "{STACK}flags:\n  f:\n    rules:\n      - serve: [1]\n      - when: {{a: {{}}}}\n        serve: on\n      - serve: nowhere\n"
    );
    let errors = load_bytes(text.as_bytes()).unwrap_err();
    let places: Vec<(u32, &str)> =
        errors.iter().map(|error| (error.labels[0].location.line, error.code.as_str())).collect();
    assert_eq!(places, [(7, "ORC0202"), (8, "ORC0204"), (10, "ORC0207")], "{errors:?}");
}

#[test]
fn a_guard_names_a_flag_of_the_stack() {
    let stack = |flags: &str| {
        format!(
            "version: 1\nname: demo\n{flags}services:\n  api:\n    command: [./api]\n    ports: {{http: auto}}\n    rollout:\n      canary: true\n      guard: {{flag: new-editr}}\n"
        )
    };
    let found = |flags: &str| {
        let text = stack(flags);
        load(Source { path: "orchestra.yaml", bytes: text.as_bytes() }, &context(None))
    };
    found("flags: {new-editr: true}\n").unwrap();
    for (flags, help) in [
        ("flags: {new-editor: true}\n", Some("did you mean `new-editor`?")),
        ("flags: {something-else: true}\n", Some("known are: something-else")),
        ("", Some("define it at the top of the file: `flags: {new-editr: true}`")),
    ] {
        let errors = found(flags).unwrap_err();
        assert_eq!(errors.len(), 1, "{errors:#?}");
        assert_eq!((errors[0].code.as_str(), errors[0].message.as_str()), ("ORC0207", "there is no flag `new-editr`"));
        assert_eq!(errors[0].help.as_deref(), help);
        let line = stack(flags).lines().position(|line| line.contains("guard")).unwrap() + 1;
        assert_eq!((errors[0].labels[0].location.line as usize, errors[0].labels[0].location.column), (line, 21));
    }
    // A flag with a mistake of its own is there all the same.
    let errors = found("flags: {new-editr: [1]}\n").unwrap_err();
    assert!(errors.iter().all(|error| !error.message.contains("there is no flag")), "{errors:#?}");
}

#[test]
fn no_service_has_the_name_of_the_flags() {
    let text = "version: 1\nname: demo\nservices: {orchestra-flags: {command: [./a]}}\n";
    let errors = load(Source { path: "orchestra.yaml", bytes: text.as_bytes() }, &context(None)).unwrap_err();
    assert_eq!((errors.len(), errors[0].code.as_str()), (1, "ORC0205"), "{errors:#?}");
}
