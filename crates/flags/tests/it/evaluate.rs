//! Conditions, precedence of rules, overrides and failures.

use orchestra_flags::{Compiled, Context, ErrorCode, Reason};
use orchestra_model::{
    ReleaseNumber,
    flag::{FlagKind, FlagName, FlagSet, Override, OverrideBy, OverrideServe},
};
use serde_json::{Value, json};

use crate::flags;

/// A boolean flag that is on where the condition holds.
fn conditional(condition: &Value) -> Compiled {
    let set: FlagSet = serde_json::from_value(json!({"flags": {"f": {
        "kind": "boolean", "variants": {"on": true, "off": false}, "default": "off", "enabled": true, "off": "off",
        "rules": [{"name": "1", "when": condition, "serve": {"variant": "on"}}]
    }}}))
    .unwrap();
    Compiled::new(&set)
}

fn holds(condition: &Value, context: &Value) -> bool {
    let context = Context::try_from(context.clone()).unwrap();
    conditional(condition).evaluate("f", &context).unwrap().value == Some(&Value::Bool(true))
}

fn is(attribute: &str, test: &Value) -> Value {
    json!({"is": {"attribute": attribute, "test": test}})
}

#[test]
fn tests_of_attributes() {
    let context = json!({
        "targetingKey": "user-1", "country": "DE", "age": 42, "score": 4.5, "big": 9_007_199_254_740_993_i64, "beta": true,
        "tags": ["a", 7, {"x": 1}], "version": "2.4.1", "nothing": null, "account": {"plan": "pro", "owner": {"id": 3}},
        "account.plan": "literal", "a.b": {"c": 1}, "empty": ""
    });
    for (attribute, test, expected) in [
        ("country", json!({"equals": "DE"}), true),
        ("country", json!({"equals": "de"}), false),
        ("age", json!({"equals": 42}), true),
        ("age", json!({"equals": 42.0}), true),
        ("age", json!({"equals": "42"}), false),
        ("big", json!({"equals": 9_007_199_254_740_992_i64}), false),
        ("beta", json!({"equals": true}), true),
        ("beta", json!({"equals": "true"}), false),
        ("tags", json!({"equals": "a"}), false),
        ("country", json!({"in": ["FR", "DE"]}), true),
        ("country", json!({"in": []}), false),
        ("age", json!({"in": [41, 43]}), false),
        ("country", json!({"starts_with": ["X", "D"]}), true),
        ("country", json!({"ends_with": ["D"]}), false),
        ("age", json!({"starts_with": ["4"]}), false),
        ("targetingKey", json!({"contains": ["ser"]}), true),
        ("tags", json!({"contains": ["a"]}), true),
        ("tags", json!({"contains": [7.0]}), true),
        ("tags", json!({"contains": ["b", 8]}), false),
        ("age", json!({"above": 41.5}), true),
        ("age", json!({"above": 42}), false),
        ("age", json!({"at_least": 42}), true),
        ("score", json!({"below": 5}), true),
        ("score", json!({"at_most": 4.4}), false),
        ("country", json!({"above": 0}), false),
        ("version", json!({"version": ">=2.4, <3"}), true),
        ("version", json!({"version": "^3"}), false),
        ("age", json!({"version": ">=1"}), false),
        ("country", json!({"version": ">=0"}), false),
        ("country", json!({"present": true}), true),
        ("nothing", json!({"present": true}), false),
        ("nothing", json!({"present": false}), true),
        ("nobody", json!({"present": false}), true),
        ("nobody", json!({"equals": ""}), false),
        ("empty", json!({"equals": ""}), true),
        ("account.owner.id", json!({"equals": 3}), true),
        ("account.plan", json!({"equals": "literal"}), true),
        ("account.plan.x", json!({"present": true}), false),
        ("a.b.c", json!({"present": true}), false),
        ("country.code", json!({"present": true}), false),
    ] {
        assert_eq!(holds(&is(attribute, &test), &context), expected, "{attribute} {test}");
    }
}

#[test]
fn conditions_combine() {
    let yes = is("a", &json!({"equals": 1}));
    let no = is("a", &json!({"equals": 2}));
    let context = json!({"a": 1});
    for (condition, expected) in [
        (json!({"all": []}), true),
        (json!({"any": []}), false),
        (json!({"all": [yes, yes]}), true),
        (json!({"all": [yes, no]}), false),
        (json!({"any": [no, yes]}), true),
        (json!({"any": [no, no]}), false),
        (json!({"not": yes}), false),
        (json!({"not": {"any": [no, {"not": yes}]}}), true),
        (json!({"not": is("absent", &json!({"in": ["x"]}))}), true),
    ] {
        assert_eq!(holds(&condition, &context), expected, "{condition}");
    }
}

#[test]
fn the_first_rule_that_applies_decides() {
    let flags = Compiled::new(&flags());
    let evaluate = |flag: &str, context: Context| {
        let found = flags.evaluate(flag, &context).unwrap();
        (found.variant.as_str().to_owned(), found.value.cloned(), found.reason, found.rule.map(str::to_owned))
    };
    let nobody = Context::default;
    let festive =
        ("festive".to_owned(), Some(json!("Happy holidays")), Reason::TargetingMatch, Some("staff".to_owned()));
    assert_eq!(evaluate("banner", nobody().with("email", "a@acme.example").with("plan", "trial")), festive);
    let code = ("code".to_owned(), None, Reason::TargetingMatch, Some("unsure".to_owned()));
    assert_eq!(evaluate("banner", nobody().with("plan", "trial")), code);
    assert_eq!(evaluate("banner", nobody()), ("plain".to_owned(), Some(json!("Hello")), Reason::Default, None));
    assert_eq!(evaluate("editor", nobody()), ("on".to_owned(), Some(json!(true)), Reason::Static, None));
    assert_eq!(evaluate("old-search", nobody()), ("off".to_owned(), Some(json!(false)), Reason::Disabled, None));
    let (_, _, reason, rule) = evaluate("replies", Context::of("user-1"));
    assert_eq!((reason, rule.as_deref()), (Reason::Split, Some("1")));
}

#[test]
fn a_split_takes_texts_numbers_and_booleans() {
    let flags = Compiled::new(&flags());
    let context = || Context::default().with("tenant", json!({"id": 1}));
    let variant = |context: Context| flags.evaluate("tenants", &context).map(|found| found.variant.as_str().to_owned());
    assert_eq!(variant(context().with("account", 7)).unwrap(), variant(context().with("account", "7")).unwrap());
    assert!(variant(context().with("account", true)).is_ok());
    for absent in [json!(null), json!(""), json!([1]), json!({})] {
        let failure = variant(context().with("account", absent)).unwrap_err();
        assert_eq!(failure.code, ErrorCode::InvalidContext, "{failure}");
    }
    assert_eq!(variant(Context::default()).unwrap(), "low", "the rule does not apply");
}

#[test]
fn the_order_in_which_shares_are_written_changes_nobodys_variant() {
    let mut set = serde_json::to_value(flags()).unwrap();
    let chosen = |set: &serde_json::Value| -> Vec<String> {
        let flags = Compiled::new(&serde_json::from_value(set.clone()).unwrap());
        let variant = |n| flags.evaluate("replies", &Context::of(format!("user-{n}"))).unwrap().variant.to_string();
        (0..200).map(variant).collect()
    };
    let before = chosen(&set);
    assert!(before.iter().any(|variant| *variant != before[0]));
    let shares = &mut set["flags"]["replies"]["rules"][0]["serve"]["split"]["shares"];
    shares.as_array_mut().unwrap().reverse();
    assert_eq!(chosen(&set), before);
}

#[test]
fn failures_have_the_codes_of_openfeature() {
    let flags = Compiled::new(&flags());
    let code = |flag: &str, context: Context| flags.evaluate(flag, &context).unwrap_err().code;
    assert_eq!(code("nothing", Context::default()), ErrorCode::FlagNotFound);
    assert_eq!(code(&"x".repeat(10_000), Context::default()), ErrorCode::FlagNotFound);
    assert_eq!(code("replies", Context::default()), ErrorCode::TargetingKeyMissing);
    assert_eq!(code("replies", Context::of("")), ErrorCode::TargetingKeyMissing);
    assert!(Context::try_from(json!({"targetingKey": 5})).is_err());
    assert!(Context::try_from(json!([])).is_err());
    let as_kind = |flag: &str, kind| flags.evaluate_as(flag, kind, &Context::of("u")).map_err(|failure| failure.code);
    assert_eq!(as_kind("banner", FlagKind::Boolean).unwrap_err(), ErrorCode::TypeMismatch);
    assert_eq!(as_kind("tenants", FlagKind::Integer).unwrap_err(), ErrorCode::TypeMismatch);
    assert!(as_kind("replies", FlagKind::Float).is_ok(), "a whole number is a number");
    assert!(as_kind("limits", FlagKind::Object).is_ok());
}

#[test]
fn a_broken_flag_takes_no_other_with_it() {
    let mut set = flags();
    let broken: FlagName = "banner".parse().unwrap();
    set.flags.get_mut("banner").unwrap().default = "nowhere".parse().unwrap();
    let flags = Compiled::new(&set);
    let failure = flags.evaluate("banner", &Context::default()).unwrap_err();
    assert_eq!(failure.code, ErrorCode::ParseError);
    assert_eq!(failure.details, "the flag `banner` is broken: default: there is no variant `nowhere`");
    assert!(flags.evaluate("editor", &Context::default()).is_ok());
    assert_eq!(flags.problems().map(|(name, _)| name).collect::<Vec<_>>(), [&broken]);
}

#[test]
fn overrides_win_and_say_who_made_them() {
    let over = |serve| Override {
        serve,
        by: OverrideBy::Verdict { release: ReleaseNumber(7) },
        reason: "5 % of the answers failed".to_owned(),
        since: 1_771_622_898_123,
    };
    let variant = |name: &str| OverrideServe::Variant(name.parse().unwrap());
    let mut set = flags();
    for (flag, serve) in [
        ("banner", variant("festive")),
        ("editor", OverrideServe::Off),
        ("old-search", variant("on")),
        ("replies", variant("gone")),
        ("deleted", OverrideServe::Off),
    ] {
        set.overrides.insert(flag.parse().unwrap(), over(serve));
    }
    let flags = Compiled::new(&set);
    let evaluate = |flag: &str| {
        let context = Context::of("user-1");
        let found = flags.evaluate(flag, &context).unwrap();
        (found.variant.as_str().to_owned(), found.reason, found.overridden.cloned())
    };
    assert_eq!(evaluate("banner"), ("festive".to_owned(), Reason::Static, Some(over(variant("festive")))));
    assert_eq!(evaluate("editor"), ("off".to_owned(), Reason::Disabled, Some(over(OverrideServe::Off))));
    assert_eq!(evaluate("old-search").0, "on");
    assert_eq!(evaluate("replies").1, Reason::Split, "a variant that is gone has no effect");
    let idle: Vec<&str> = flags.idle_overrides().iter().map(FlagName::as_str).collect();
    assert_eq!(idle, ["deleted", "replies"]);
}
