use std::cmp::Ordering;

use super::*;

fn flag(json: &str) -> Flag {
    serde_json::from_str(json).unwrap()
}

#[test]
fn names_and_attributes() {
    for good in ["new-editor", "newEditor", "chat.streaming", "2fa", &"a".repeat(100)] {
        assert!(good.parse::<FlagName>().is_ok() && good.parse::<VariantName>().is_ok(), "{good}");
    }
    for bad in ["", "-a", ".a", "a/b", "a b", "é", "a\0", &"a".repeat(101)] {
        assert!(bad.parse::<FlagName>().is_err() && bad.parse::<VariantName>().is_err(), "{bad}");
    }
    assert_eq!("account.plan".parse::<Attribute>().unwrap().parts().collect::<Vec<_>>(), ["account", "plan"]);
    for bad in ["", ".", "a.", ".a", "a..b", "a\n", &"a".repeat(201)] {
        assert!(bad.parse::<Attribute>().is_err(), "{bad}");
    }
}

/// The example of semver.org, clause 11, and what is read generously.
#[test]
fn versions_have_the_precedence_of_semver() {
    let ordered = [
        "1.0.0-alpha",
        "1.0.0-alpha.1",
        "1.0.0-alpha.beta",
        "1.0.0-beta",
        "1.0.0-beta.2",
        "1.0.0-beta.11",
        "1.0.0-rc.1",
        "1.0.0",
        "v1.0.1",
        "1.2",
        "2",
        "2.0.0.",
        "10.0.0",
    ];
    let versions: Vec<Version> = ordered.iter().filter_map(|text| text.parse().ok()).collect();
    assert_eq!(versions.len(), ordered.len() - 1, "`2.0.0.` is none");
    for pair in versions.windows(2) {
        assert_eq!(pair[0].precedence(&pair[1]), Ordering::Less, "{pair:?}");
        assert_eq!(pair[1].precedence(&pair[0]), Ordering::Greater, "{pair:?}");
    }
    let equal = |a: &str, b: &str| a.parse::<Version>().unwrap().precedence(&b.parse().unwrap()).is_eq();
    assert!(equal("1.2", "v1.2.0+build.7"));
    for bad in ["", "v", "1..2", "1.2.3.4", "a", "1.-1", "1.0.0-", "1.0.0-a..b", "99999999999999999999", "1.0.0-é"] {
        assert!(bad.parse::<Version>().is_err(), "{bad}");
    }
}

#[test]
fn ranges_of_versions() {
    for (range, inside, outside) in [
        ("2.4.1", &["2.4.1", "v2.4.1+x"][..], &["2.4.2", "2.4.1-rc.1"][..]),
        ("2.4", &["2.4.0", "2.4.9"], &["2.5.0", "2"]),
        ("!=2.4", &["2.5.0"], &["2.4.3"]),
        (">=2.4, <3", &["2.4.0", "2.99.0", "3.0.0-beta"], &["2.3.9", "3.0.0", "2.4.0-beta"]),
        (">= 2.4 < 3", &["2.4.0"], &["3.0.0"]),
        (">1.2.3", &["1.2.4"], &["1.2.3"]),
        ("<=1.2.3", &["1.2.3", "1.2.3-a"], &["1.2.4"]),
        ("^1.2.3", &["1.2.3", "1.9.0"], &["1.2.2", "2.0.0", "2.0.0-beta"]),
        ("^0.2.3", &["0.2.9"], &["0.3.0", "1.0.0"]),
        ("^0.0.3", &["0.0.3"], &["0.0.4"]),
        ("^0", &["0.7.0"], &["1.0.0"]),
        ("~1.2.3", &["1.2.9"], &["1.3.0", "1.2.2"]),
        ("~1", &["1.9.0"], &["2.0.0"]),
    ] {
        let parsed: VersionRange = range.parse().unwrap();
        for version in inside {
            assert!(parsed.contains(&version.parse().unwrap()), "{version} is in {range}");
        }
        for version in outside {
            assert!(!parsed.contains(&version.parse().unwrap()), "{version} is not in {range}");
        }
        assert_eq!(parsed.to_string().parse::<VersionRange>().unwrap(), parsed);
    }
    for bad in ["", " ", ">=", ">= <3", "=>1", "1,", ",1", "1,,2", "latest", "1 || 2", &"1 ".repeat(200)] {
        assert!(bad.parse::<VersionRange>().is_err(), "{bad:?}");
    }
}

#[test]
fn kinds_are_worked_out() {
    let infer = |json: &str| {
        let mut variants = serde_json::from_str(json).unwrap();
        let kind = Flag::infer_kind(&mut variants);
        (kind.map_err(|problem| problem.to_string()), serde_json::to_string(&variants).unwrap())
    };
    assert_eq!(infer(r#"{"a": true, "b": false}"#).0, Ok(FlagKind::Boolean));
    assert_eq!(infer(r#"{"a": "x", "b": null}"#).0, Ok(FlagKind::String));
    assert_eq!(infer(r#"{"a": 1, "b": -2}"#).0, Ok(FlagKind::Integer));
    assert_eq!(infer(r#"{"a": 1, "b": 2.5}"#), (Ok(FlagKind::Float), r#"{"a":1.0,"b":2.5}"#.to_owned()));
    assert_eq!(infer(r#"{"a": {}, "b": {"c": [1]}}"#).0, Ok(FlagKind::Object));
    let error = |json| infer(json).0.unwrap_err();
    assert_eq!(error("{}"), "variants: a flag needs at least one variant");
    assert_eq!(
        error(r#"{"a": null}"#),
        "variants: every variant is `null`: the program would always use its own default"
    );
    assert_eq!(error(r#"{"a": []}"#), "variants.a: the value of a variant cannot be a list");
    assert_eq!(
        error(r#"{"a": 1, "b": "x"}"#),
        "variants.b: the variant `b` is of kind string, others are of kind integer"
    );
}

#[test]
fn problems_say_where_they_are() {
    let flag = flag(
        r#"{"kind": "boolean", "variants": {"on": true, "off": false, "odd": 1}, "default": "yes", "enabled": true, "off": "no",
            "rules": [{"name": "1", "when": {"all": []}, "serve": {"variant": "maybe"}},
                      {"name": "2", "when": {"all": []}, "serve": {"split": {"by": "targetingKey", "shares": []}}},
                      {"name": "3", "when": {"all": []}, "serve": {"split": {"by": "targetingKey", "shares": [
                          {"variant": "on", "share": "50%"}, {"variant": "on", "share": "33.333%"}, {"variant": "x", "share": "100%"}]}}}]}"#,
    );
    let problems: Vec<String> = flag.problems().iter().map(ToString::to_string).collect();
    assert_eq!(
        problems,
        [
            "variants.odd: the variant `odd` is of kind integer, others are of kind boolean",
            "default: there is no variant `yes`",
            "off: there is no variant `no`",
            "rules.0.serve: there is no variant `maybe`",
            "rules.1.split: the split is empty",
            "rules.2.split.on: the variant `on` has two shares",
            "rules.2.split.x: there is no variant `x`",
            "rules.2.split: the shares add up to 183.333%, not to 100%",
        ]
    );
}

#[test]
fn the_digest_is_of_the_content() {
    let set = |default: &str| {
        FlagSet {
        flags: [(
            "a".parse().unwrap(),
            flag(&format!(
                r#"{{"kind": "boolean", "variants": {{"on": true, "off": false}}, "default": "{default}", "enabled": true,
                    "off": "off", "rules": []}}"#
            )),
        )]
        .into(),
        overrides: BTreeMap::new(),
    }
    };
    let again: FlagSet = serde_json::from_str(&serde_json::to_string(&set("on")).unwrap()).unwrap();
    assert_eq!(again, set("on"));
    assert_eq!(again.digest(), set("on").digest());
    assert_ne!(again.digest(), set("off").digest());
    let by = OverrideBy::Verdict { release: ReleaseNumber(7) };
    let over = Override { serve: OverrideServe::Off, by, reason: "5xx".to_owned(), since: 1 };
    let overridden = FlagSet { overrides: [("a".parse().unwrap(), over)].into(), ..set("on") };
    assert_ne!(again.digest(), overridden.digest());
}
