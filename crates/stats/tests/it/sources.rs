//! Sources elsewhere: conditions, measurements and their limits.

use orchestra_stats::{
    Condition, Limits, Measured, Measurements, Outcome, Policy,
    measurement::{Phase, Rule},
};

// === conditions ===

#[test]
fn conditions_hold_or_not() {
    let cases: [(&str, &[f64], Option<bool>); 19] = [
        ("result >= 0.95", &[0.95], Some(true)),
        ("result >= 95%", &[0.94], Some(false)),
        ("result[0] < 1e3", &[999.0], Some(true)),
        ("result[1] < 10", &[1.0, 11.0], Some(false)),
        ("result[1] < 10", &[1.0], None),
        ("result == 1", &[1.0], Some(true)),
        ("result != 1", &[1.0], Some(false)),
        ("result > -1.5", &[-1.0], Some(true)),
        ("0 < result", &[1.0], Some(true)),
        ("result > 1 && result < 3", &[2.0], Some(true)),
        ("result < 1 || result > 3", &[2.0], Some(false)),
        // `&&` binds more tightly.
        ("result == 1 || result == 2 && result == 3", &[1.0], Some(true)),
        ("(result == 1 || result == 2) && result == 3", &[1.0], Some(false)),
        ("!(result > 1)", &[1.0], Some(true)),
        ("! ! result > 1", &[2.0], Some(true)),
        ("result > 0", &[f64::NAN], None),
        ("result > 0", &[], None),
        ("result > 0 || result[1] > 0", &[1.0], None),
        ("result > 1", &[f64::INFINITY], Some(true)),
    ];
    for (text, results, holds) in cases {
        let condition: Condition = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!(condition.holds(results), holds, "{text} of {results:?}");
        let json = serde_json::to_string(&condition).expect("a string");
        assert_eq!(serde_json::from_str::<Condition>(&json).expect("it was valid"), condition);
    }
}

#[test]
fn wrong_conditions_say_where() {
    let long = format!("result > 1{}", " ".repeat(600));
    let deep = format!("{}result > 1", "(".repeat(100));
    let cases = [
        ("", "expected `result` or a number, found the end, at character 1"),
        ("result", "expected `<`, `<=`, `>`, `>=`, `==` or `!=`, found the end, at character 7"),
        ("result = 1", "expected `<`, `<=`, `>`, `>=`, `==` or `!=`, found `=`, at character 8"),
        ("result >= ", "expected `result` or a number, found the end, at character 11"),
        ("result > x", "expected `result` or a number, found `x`, at character 10"),
        ("results > 1", "expected `result` or a number, found `r`, at character 1"),
        ("0 < result < 1", "comparisons do not chain: write `a < b && b < c`, at character 12"),
        ("result > 1 and result < 2", "expected `&&`, `||` or the end, found `a`, at character 12"),
        ("(result > 1", "expected `)`, found the end, at character 12"),
        ("result[x] > 1", "expected the index of a result, found `x`, at character 8"),
        ("result[0 > 1", "expected `]`, found `>`, at character 10"),
        ("result > 1.2.3", "expected `result` or a number, found `1`, at character 10"),
        ("result > 1e999", "expected `result` or a number, found `1`, at character 10"),
        ("result > 1 && ü", "expected `result` or a number, found `ü`, at character 15"),
        (long.as_str(), "longer than 512 bytes, at character 513"),
        (deep.as_str(), "nested deeper than 32, at character 33"),
    ];
    for (text, message) in cases {
        assert_eq!(text.parse::<Condition>().expect_err(text).to_string(), message, "{text}");
    }
    assert!(serde_json::from_str::<Condition>("\"result >\"").is_err());
}

// === measurements ===

fn rule(success: &str, failure: &str, limits: Limits) -> Rule {
    let parse = |text: &str| (!text.is_empty()).then(|| text.parse().expect("valid"));
    Rule { success: parse(success), failure: parse(failure), limits, dry_run: false }
}

#[test]
fn measurements_are_judged_as_argo_rollouts_does() {
    let phase = |success, failure, value| rule(success, failure, Limits::default()).judge(&value);
    let value = |value: f64| Measured::Values(vec![value]);
    let cases = [
        ("result > 1", "", value(2.0), Phase::Successful),
        ("result > 1", "", value(1.0), Phase::Failed),
        ("", "result > 1", value(2.0), Phase::Failed),
        ("", "result > 1", value(1.0), Phase::Successful),
        ("result > 2", "result < 1", value(3.0), Phase::Successful),
        ("result > 2", "result < 1", value(0.0), Phase::Failed),
        ("result > 2", "result < 1", value(1.5), Phase::Inconclusive),
        ("result > 2", "result > 2", value(3.0), Phase::Failed),
        ("", "", value(3.0), Phase::Inconclusive),
        ("result > 1", "", Measured::NoData, Phase::Inconclusive),
        ("result > 1", "", Measured::Values(vec![]), Phase::Inconclusive),
        ("result > 1", "result <= 1", value(f64::NAN), Phase::Inconclusive),
        ("result > 1", "", Measured::Error("refused".into()), Phase::Error),
    ];
    for (success, failure, measured, expected) in cases {
        assert_eq!(phase(success, failure, measured.clone()), expected, "{success} / {failure} of {measured:?}");
    }
}

/// Letters: s, f, i (no data), e.
fn measure(limits: Limits, script: &str, over: bool) -> Option<Outcome> {
    let rule = rule("result > 1", "", limits);
    let mut measurements = Measurements::default();
    for letter in script.chars() {
        let measured = match letter {
            's' => Measured::Values(vec![2.0]),
            'f' => Measured::Values(vec![0.0]),
            'i' => Measured::NoData,
            _ => Measured::Error("connection refused".into()),
        };
        measurements.record(&rule, &measured);
        let json = serde_json::to_string(&measurements).expect("finite");
        measurements = serde_json::from_str(&json).expect("as written");
    }
    measurements.verdict(&rule, over, Policy::Hold).map(|it| it.outcome)
}

#[test]
fn limits_count_as_argo_rollouts_does() {
    let limits = Limits::default();
    let count = |count| Limits { count: Some(count), ..limits };
    let row = |wanted| Limits { consecutive_success: Some(wanted), ..limits };
    let cases = [
        // More than the limit, not as many as.
        (limits, "f", false, Some(Outcome::Fail)),
        (Limits { failure: Some(2), ..limits }, "ffs", false, None),
        (Limits { failure: Some(2), ..limits }, "ffsf", false, Some(Outcome::Fail)),
        (Limits { failure: None, ..limits }, "ffffffff", false, None),
        (limits, "i", false, Some(Outcome::Inconclusive)),
        (Limits { inconclusive: Some(1), ..limits }, "is", false, None),
        (limits, "eeee", false, None),
        (limits, "eeeee", false, Some(Outcome::Error)),
        (limits, "eeeeseeee", false, None),
        (count(3), "ss", false, None),
        (count(3), "sss", false, Some(Outcome::Pass)),
        // Errors are no measurements.
        (count(3), "sese", false, None),
        (count(3), "seses", false, Some(Outcome::Pass)),
        (row(3), "ss", false, None),
        (row(3), "sss", false, Some(Outcome::Pass)),
        (Limits { failure: Some(9), ..row(2) }, "sfsfss", false, Some(Outcome::Pass)),
        (Limits { failure: Some(9), count: Some(4), ..row(2) }, "sfsf", false, Some(Outcome::Inconclusive)),
        // A verdict stands, whatever comes later.
        (limits, "fsssss", false, Some(Outcome::Fail)),
        // The step ends.
        (limits, "", true, Some(Outcome::Inconclusive)),
        (limits, "e", true, Some(Outcome::Error)),
        (limits, "s", true, Some(Outcome::Pass)),
        (Limits { failure: Some(3), ..limits }, "ff", true, Some(Outcome::Inconclusive)),
        (row(3), "ss", true, Some(Outcome::Inconclusive)),
        (Limits { inconclusive: None, ..limits }, "iiii", true, Some(Outcome::Inconclusive)),
    ];
    for (limits, script, over, expected) in cases {
        assert_eq!(measure(limits, script, over), expected, "{script} with {limits:?}");
    }
}

#[test]
fn an_error_of_a_source_is_kept_short_and_never_promotes() {
    let rule = rule("result > 1", "", Limits::default());
    let mut measurements = Measurements::default();
    for _ in 0..5 {
        measurements.record(&rule, &Measured::Error("ü".repeat(10_000)));
    }
    assert!(measurements.last_error.as_ref().is_some_and(|it| it.len() <= 256 && !it.is_empty()));
    let verdict = measurements.verdict(&rule, false, Policy::PromoteAndWatch).expect("settled");
    assert_eq!((verdict.outcome, verdict.then), (Outcome::Error, Some(Policy::Hold)));
    assert!(verdict.reason.starts_with("5 errors in a row: ü"), "{}", verdict.reason);
}
