//! Flags in plans: shown, saved, refused when they moved on, and on their own worth a release.

use orchestra_model::{
    Desired, Plan,
    flag::{Flag, FlagName, FlagSet},
    plan::Action,
};
use orchestra_plan::{Current, Options, Style, check_saved_flags, load, plan, rebase, render, save};
use serde_json::json;

use crate::fixture::{applied, environment, stack};

fn flag(default: &str, rules: &serde_json::Value) -> Flag {
    let flag = json!({
        "kind": "string",
        "variants": {"small": "gemma-3-270m", "large": "qwen-2.5-7b"},
        "default": default,
        "enabled": true,
        "off": "small",
        "rules": rules,
    });
    serde_json::from_value(flag).unwrap()
}

fn with(flags: &[(&str, Flag)]) -> Desired {
    let flags = flags.iter().map(|(name, flag)| (name.parse().unwrap(), flag.clone())).collect();
    Desired { flags: FlagSet { flags, ..FlagSet::default() }, ..stack() }
}

fn rules() -> serde_json::Value {
    json!([{"name": "staff", "when": {"all": []}, "serve": {"variant": "large"}}])
}

fn before() -> Desired {
    with(&[("gone", flag("small", &json!([]))), ("model", flag("small", &json!([])))])
}

fn after() -> Desired {
    with(&[("model", flag("large", &rules())), ("new", flag("small", &rules()))])
}

fn plan_of(current: &Current, desired: &Desired) -> Plan {
    plan(&environment(), current, Some(desired), Options::default()).unwrap()
}

#[test]
fn a_change_of_flags_alone_is_something_to_do() {
    let plan = plan_of(&applied(&before()), &after());
    assert!(plan.steps.is_empty() && !plan.is_empty());
    let steps: Vec<(&str, Action)> = plan.flags.iter().map(|step| (step.flag.as_str(), step.action)).collect();
    assert_eq!(steps, [("gone", Action::Delete), ("model", Action::Update), ("new", Action::Create)]);
    let changed: Vec<&str> = plan.flags[1].changes.iter().map(|change| change.path.as_str()).collect();
    assert_eq!(changed, ["default", "rules.1"]);
    assert!(plan_of(&applied(&after()), &after()).is_empty());
    // Flags go with the rest, without a word.
    let down = orchestra_plan::plan(&environment(), &applied(&before()), None, Options::default()).unwrap();
    assert!(down.flags.is_empty());
}

#[test]
fn a_person_reads_what_changes() {
    let mut drawn = render(&plan_of(&applied(&before()), &after()), Style::default());
    drawn.push_str("\n--- the first flags of a stack that is up\n");
    drawn.push_str(&render(&plan_of(&applied(&stack()), &after()), Style::default()));
    insta::assert_snapshot!(drawn);
}

#[test]
fn a_saved_plan_is_bound_to_its_flags_and_to_no_others() {
    let plan = plan_of(&applied(&with(&[("model", flag("small", &json!([])))])), &after());
    assert_eq!(load(&save(&plan)).unwrap(), plan);
    let refused = |current: &Current| {
        let refused = check_saved_flags(&plan, current).into_iter();
        refused.map(|(name, diagnostic)| format!("{name}: {}", diagnostic.notes[0])).collect::<Vec<String>>()
    };
    let other = flag("large", &json!([]));
    assert_eq!(refused(&applied(&with(&[("model", flag("small", &json!([])))]))), [""; 0]);
    assert_eq!(
        refused(&applied(&with(&[("model", other.clone()), ("new", other.clone())]))),
        ["model: its definition was changed since", "new: it was defined since"]
    );
    assert_eq!(refused(&applied(&stack())), ["model: it was deleted since"]);

    // What happened to another flag meanwhile stays.
    let now = applied(&with(&[("model", flag("small", &json!([]))), ("third", other.clone())]));
    assert_eq!(refused(&now), [""; 0]);
    let flags = rebase(&plan, &now).unwrap().desired.unwrap().flags.flags;
    let names: Vec<&str> = flags.keys().map(FlagName::as_str).collect();
    assert_eq!(names, ["model", "new", "third"]);
    assert_eq!(flags["model"].default.as_str(), "large");
    assert_eq!(flags["third"], other);
}
