//! The tables of feature flags.

use super::OURS;
use crate::table::{Key, Shape, Table};

pub(crate) static FLAG: Table = Table {
    id: "flag",
    noun: "a flag",
    doc: "A value of running programs that changes without a new instance. A single value instead of the mapping is that value for everybody.",
    keys: &[&[
        Key::new(
            "variants",
            Shape::Keys(&Shape::FlagValue),
            "Its values by name, all booleans, texts, numbers or mappings. `null` leaves the value to the program.",
        )
        .default("`on: true` and `off: false`"),
        Key::new("default", Shape::Variant, "Variant that is served where no rule applies.")
            .default("`off` without `variants`, else the only variant"),
        Key::new("state", STATES, "Whether rules and default apply; else everybody gets `off`.")
            .default("on")
            .from(OURS),
        Key::new("off", Shape::Variant, "Variant that is served while the flag is off.")
            .default("the one that is `false` of a boolean flag, else `default`"),
        Key::new("rules", Shape::List(&Shape::Table(&RULE)), "Who gets what. The first rule that applies decides.")
            .default("none"),
        Key::new("metadata", Shape::Map(&Shape::Constant), "Passed on to programs with every answer.").default("none"),
    ]],
    habits: &[
        ("value", "a flag with one value is written as the value itself: `NAME: VALUE`"),
        ("values", "write `variants`"),
        ("variations", "write `variants`"),
        ("defaultVariant", "write `default`"),
        ("enabled", "write `state: on` or `state: off`"),
        ("targeting", "write `rules`"),
        ("type", "the kind follows from the values; delete this key"),
        ("description", "write a comment, or a key under `metadata`"),
    ],
    later: &[],
    one_of: &[],
};

/// States of a flag.
const STATES: Shape = Shape::Any(&[Shape::Choice(&["on", "off"]), Shape::Boolean]);

pub(crate) static RULE: Table = Table {
    id: "rule",
    noun: "a rule",
    doc: "Whom it applies to, and what they get.",
    keys: &[&[
        Key::new("name", Shape::Text, "What answers call it.").default("its position, from 1"),
        Key::new("when", Shape::Condition, "Attributes of whoever asks, each with a test; all must pass.")
            .default("everybody"),
        Key::new("serve", Shape::Variant, "The variant that they get."),
        Key::new(
            "split",
            Shape::Keys(&Shape::Share),
            "Variants with their shares, 100 % together. Everybody gets always the same one.",
        ),
        Key::new("by", Shape::Text, "Attribute that says who it is; only with `split`.").default("targetingKey"),
    ]],
    habits: &[
        ("if", "write `when`"),
        ("condition", "write `when`"),
        ("then", "write `serve`"),
        ("variant", "write `serve`"),
        ("percentage", "write `split: {VARIANT: 10%, OTHER: rest}`"),
        ("fractional", "write `split: {VARIANT: 10%, OTHER: rest}`"),
    ],
    later: &[],
    one_of: RULES,
};

/// What a rule may give.
const RULES: &[&str] = &["serve", "split"];

pub(crate) static TEST: Table = Table {
    id: "test",
    noun: "a test",
    doc: "What is asked of an attribute; of several questions all must be answered with yes. A single value instead of the mapping is `equals`, a list is `in`. An absent attribute passes only `present: false` and `not`.",
    keys: &[&[
        Key::new("equals", Shape::Constant, "It is this value."),
        Key::new("in", Shape::List(&Shape::Constant), "It is one of these values."),
        Key::new("not", Shape::Test, "It does not pass this test."),
        Key::new("starts_with", TEXTS, "It is a text that begins with this, or one of these."),
        Key::new("ends_with", TEXTS, "It is a text that ends with this, or one of these."),
        Key::new(
            "contains",
            Shape::Any(&[Shape::Constant, Shape::List(&Shape::Constant)]),
            "It is a text that has this, or one of these, in it; or a list that has it as an item.",
        ),
        Key::new("above", Shape::Number, "It is a larger number."),
        Key::new("at_least", Shape::Number, "It is this number or a larger one."),
        Key::new("below", Shape::Number, "It is a smaller number."),
        Key::new("at_most", Shape::Number, "It is this number or a smaller one."),
        Key::new(
            "version",
            Shape::Text,
            "It is a version in this range, by the rules of SemVer: `>=2.4, <3`, `^1.2`, `~1.2.3`, `2.4`.",
        ),
        Key::new("present", Shape::Boolean, "It is there and not `null`; or it is not, for `false`."),
    ]],
    habits: &[
        ("eq", "write `equals`"),
        ("ne", "write `not`"),
        ("gt", "write `above`"),
        ("gte", "write `at_least`"),
        ("lt", "write `below`"),
        ("lte", "write `at_most`"),
        ("not_in", "write `not: [ONE, OTHER]`"),
        ("one_of", "write `in`"),
        ("semver", "write `version: \">=2.4\"`"),
        ("exists", "write `present: true`"),
        ("matches", "there are no patterns; use `starts_with`, `ends_with` or `contains`"),
        ("regex", "there are no patterns; use `starts_with`, `ends_with` or `contains`"),
    ],
    later: &[],
    one_of: &[],
};

const TEXTS: Shape = Shape::Any(&[Shape::Text, Shape::List(&Shape::Text)]);
