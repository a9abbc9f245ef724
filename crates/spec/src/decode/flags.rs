//! Feature flags: values, rules, and who they apply to.
//!
//! The parts are read here; whether they fit together, such as names of variants and sums of shares, is for
//! [`Flag::problems`], whose paths lead back to places in the file.

use std::collections::BTreeMap;

use orchestra_model::{
    diagnostic::Code,
    flag::{
        Attribute, Condition, Flag, FlagError, FlagKind, FlagName, FlagSet, Problem, Rule, Scalar as Constant, Serve,
        Share, Split, VariantName,
    },
    id::ParseIdError,
    quantity::Percent,
};
use serde_json::{Map, Number, Value as Json};

use super::{Fields, boolean, choice, conflict, expected, invalid, named, number, quantity, text, unknown};
use crate::{
    report::{Report, help},
    source::Span,
    tables,
    yaml::{Entry, Node, Scalar, Value, cut},
};

mod condition;

use condition::condition;

/// Reads the section `flags`.
pub(crate) fn flags(report: &mut Report<'_>, node: &Node<'_>) -> FlagSet {
    let mut set = FlagSet::default();
    for entry in named(report, node, true, "give each one a name as its key: `NAME: true`, or `NAME: {variants: …}`")
    {
        let name = key::<FlagName>(report, entry, "a flag");
        if let (Some(flag), Some(name)) = (flag(report, entry), name) {
            set.flags.insert(name, flag);
        }
    }
    set
}

/// A key that is the name of a flag or variant.
fn key<T: std::str::FromStr<Err = ParseIdError>>(report: &mut Report<'_>, entry: &Entry<'_>, of: &str) -> Option<T> {
    let message = || format!("`{}` cannot be the name of {of}", cut(&entry.key));
    let rule = "a name has 1 to 100 letters, digits, `.`, `_` and `-`, and begins with a letter or digit";
    let parsed = entry.key.parse();
    if parsed.is_err() {
        report.error(Code::INVALID_NAME, entry.key_span, message, |diagnostic, _| diagnostic.note(rule));
    }
    parsed.ok()
}

fn variant_name(text: &str) -> VariantName {
    text.parse().expect("written by us, and a name")
}

fn flag(report: &mut Report<'_>, entry: &Entry<'_>) -> Option<Flag> {
    let node = entry.value.as_ref();
    match &node.value {
        Value::Mapping(_) => {}
        Value::Scalar(Scalar::Boolean | Scalar::Integer | Scalar::Float | Scalar::Text, _) => {
            return value(report, node).and_then(simple);
        }
        _ => {
            expected(report, node, "a value, or a mapping with `variants`", "write `true` for a flag that is on");
            return None;
        }
    }
    let fields = Fields::read(report, node, &tables::FLAG, entry.key_span)?;
    let written = fields.get("variants");
    let read = written.map_or_else(|| Some(switch()), |written| variants(report, written));
    // Without its variants nothing can be said about the rest but what each part says alone.
    let broken = read.is_none();
    let mut variants = read.unwrap_or_default();
    let kind = if broken {
        FlagKind::Boolean
    } else {
        match Flag::infer_kind(&mut variants) {
            Ok(kind) => kind,
            Err(problem) => {
                place(report, entry, &problem, &variants);
                return None;
            }
        }
    };
    let variant = |report: &mut Report<'_>, key: &str| {
        let entry = fields.get(key)?;
        named_variant(report, &entry.value, written.is_none())
    };
    let default = variant(report, "default").or_else(|| match (written, variants.len()) {
        _ if fields.get("default").is_some() || broken => None,
        (None, _) => Some(variant_name("off")),
        (Some(_), 1) => variants.keys().next().cloned(),
        (Some(written), _) => {
            let message = || "the key `default` is missing in a flag with several variants".to_owned();
            let remedy = help("add `default: VARIANT`: the one that is served where no rule applies");
            report.error(Code::MISSING_KEY, written.key_span, message, remedy);
            None
        }
    });
    let off = variant(report, "off");
    let read = fields.get("rules").map(|entry| rules(report, &entry.value, written.is_none())).unwrap_or_default();
    let (positions, rules): (Vec<usize>, Vec<Rule>) = read.into_iter().unzip();
    let enabled = fields.get("state").and_then(|entry| state(report, &entry.value)).unwrap_or(true);
    let metadata = fields.get("metadata").map(|entry| metadata(report, &entry.value)).unwrap_or_default();
    let default = default.filter(|_| !broken)?;
    let off = off.unwrap_or_else(|| {
        let no = (kind == FlagKind::Boolean).then(|| variants.iter().find(|(_, value)| **value == Json::Bool(false)));
        no.flatten().map_or_else(|| default.clone(), |(name, _)| name.clone())
    });
    let flag = Flag { kind, variants, default, enabled, off, rules, metadata };
    for mut problem in flag.problems() {
        // Rules that could not be read are in the file, and not in the flag.
        if let [section, index, ..] = problem.path.as_mut_slice()
            && section == "rules"
            && let Some(position) = index.parse().ok().and_then(|index: usize| positions.get(index))
        {
            *index = position.to_string();
        }
        place(report, entry, &problem, &flag.variants);
    }
    Some(flag)
}

/// The variants of a flag that says nothing about them.
fn switch() -> BTreeMap<VariantName, Json> {
    [(variant_name("on"), Json::Bool(true)), (variant_name("off"), Json::Bool(false))].into()
}

/// A flag that is the same for everybody.
fn simple(value: Json) -> Option<Flag> {
    let (mut variants, default) = match value {
        Json::Bool(on) => (switch(), variant_name(if on { "on" } else { "off" })),
        other => ([(variant_name("default"), other)].into(), variant_name("default")),
    };
    let kind = Flag::infer_kind(&mut variants).ok()?;
    let off = if kind == FlagKind::Boolean { variant_name("off") } else { default.clone() };
    Some(Flag { kind, variants, default, enabled: true, off, rules: Vec::new(), metadata: BTreeMap::new() })
}

/// All variants, or none if one is broken.
fn variants(report: &mut Report<'_>, written: &Entry<'_>) -> Option<BTreeMap<VariantName, Json>> {
    let remedy = "give each value a name: `variants: {plain: Hello, festive: Happy holidays}`";
    let Value::Mapping(entries) = &written.value.value else {
        expected(report, &written.value, "a mapping of names to values", remedy);
        return None;
    };
    let read: Vec<Option<(VariantName, Json)>> = entries
        .iter()
        .map(|entry| {
            let name = key(report, entry, "a variant");
            let value = value(report, &entry.value);
            Some((name?, value?))
        })
        .collect();
    read.into_iter().collect()
}

/// Any value as JSON.
fn value(report: &mut Report<'_>, node: &Node<'_>) -> Option<Json> {
    match &node.value {
        Value::Scalar(Scalar::Null, _) => Some(Json::Null),
        Value::Scalar(..) => constant(report, node).map(|constant| match constant {
            Constant::Boolean(value) => Json::Bool(value),
            Constant::Number(value) => Json::Number(value),
            Constant::Text(value) => Json::String(value),
        }),
        Value::List(items) => {
            let read: Vec<Option<Json>> = items.iter().map(|item| value(report, item)).collect();
            read.into_iter().collect::<Option<Vec<Json>>>().map(Json::Array)
        }
        Value::Mapping(entries) => {
            let read: Vec<Option<(String, Json)>> = entries
                .iter()
                .map(|entry| Some((entry.key.clone().into_owned(), value(report, &entry.value)?)))
                .collect();
            read.into_iter().collect::<Option<Map<String, Json>>>().map(Json::Object)
        }
    }
}

/// A text, number or boolean.
fn constant(report: &mut Report<'_>, node: &Node<'_>) -> Option<Constant> {
    match &node.value {
        Value::Scalar(Scalar::Text, text) => Some(Constant::Text(text.clone().into_owned())),
        Value::Scalar(Scalar::Boolean, _) => boolean(report, node).map(Constant::Boolean),
        Value::Scalar(Scalar::Integer | Scalar::Float, _) => json_number(report, node).map(Constant::Number),
        _ => {
            expected(report, node, "a text, number or boolean", "");
            None
        }
    }
}

/// `on` or `off`, which are booleans to tools that read YAML 1.1.
fn state(report: &mut Report<'_>, node: &Node<'_>) -> Option<bool> {
    if matches!(node.value, Value::Scalar(Scalar::Boolean, _)) {
        return boolean(report, node);
    }
    choice(report, node, &[("on", true), ("off", false)])
}

fn json_number(report: &mut Report<'_>, node: &Node<'_>) -> Option<Number> {
    let parsed = match &node.value {
        Value::Scalar(Scalar::Integer, text) => {
            number(text).map(Number::from).or_else(|| text.parse::<i64>().ok().map(Number::from))
        }
        Value::Scalar(Scalar::Float, text) => text.parse().ok().and_then(Number::from_f64),
        _ => {
            expected(report, node, "a number", "");
            return None;
        }
    };
    if parsed.is_none() {
        let message = || "JSON cannot carry this number".to_owned();
        invalid(report, node.span, message, "whole numbers may have 64 bits; others must be finite");
    }
    parsed
}

/// The name of a variant. In a flag without `variants`, `true` is `on` and `false` is `off`.
fn named_variant(report: &mut Report<'_>, node: &Node<'_>, switch: bool) -> Option<VariantName> {
    if switch && let Value::Scalar(Scalar::Boolean, text) = &node.value {
        return Some(variant_name(if text.eq_ignore_ascii_case("true") { "on" } else { "off" }));
    }
    parsed(report, node, "the name of a variant")
}

/// A text that the model reads.
fn parsed<T: std::str::FromStr<Err: std::fmt::Display>>(
    report: &mut Report<'_>,
    node: &Node<'_>,
    what: &str,
) -> Option<T> {
    let text = text(report, node, what)?;
    text.parse().map_err(|error: T::Err| invalid(report, node.span, || error.to_string(), "")).ok()
}

/// The rules that could be read, with their positions: one bad rule must not hide mistakes in the next.
fn rules(report: &mut Report<'_>, node: &Node<'_>, switch: bool) -> Vec<(usize, Rule)> {
    let Value::List(items) = &node.value else {
        expected(report, node, "a list of rules", "write `[{when: {…}, serve: VARIANT}]`");
        return Vec::new();
    };
    let mut everybody: Option<Span> = None;
    let mut rules = Vec::new();
    for (index, item) in items.iter().enumerate() {
        if let Some(first) = everybody.take() {
            let message = || "this rule never applies: the one before it is for everybody".to_owned();
            report.warning(Code::INVALID_VALUE, item.span.part(0, 1), message, |diagnostic, sources| {
                diagnostic.at(sources.location(first), "for everybody").help("give it a `when`, or move it to the end")
            });
        }
        let Some(rule) = rule(report, item, index, switch) else { continue };
        if rule.when.is_everybody() {
            everybody = Some(item.span.part(0, 1));
        }
        rules.push((index, rule));
    }
    rules
}

fn rule(report: &mut Report<'_>, node: &Node<'_>, index: usize, switch: bool) -> Option<Rule> {
    let at = node.span.part(0, 1);
    let fields = Fields::read(report, node, &tables::RULE, at)?;
    let name = fields.get("name").and_then(|entry| text(report, &entry.value, "a text"));
    let when = match fields.get("when") {
        Some(entry) => condition(report, &entry.value),
        None => Some(Condition::EVERYBODY),
    };
    let by = match fields.get("by") {
        Some(entry) => parsed(report, &entry.value, "the name of an attribute"),
        None => Some(Attribute::targeting_key()),
    };
    let serve = match (fields.get("serve"), fields.get("split")) {
        (Some(serve), Some(split)) => {
            conflict(report, serve, split, "keep one; a variant with a share belongs into `split`");
            None
        }
        (Some(serve), None) => {
            if let Some(by) = fields.get("by") {
                conflict(report, serve, by, "delete `by`: it says by what a `split` divides");
            }
            named_variant(report, &serve.value, switch).map(Serve::Variant)
        }
        (None, Some(split)) => {
            let shares = shares(report, split);
            shares.zip(by).map(|(shares, by)| Serve::Split(Split { by, shares }))
        }
        (None, None) => {
            let remedy = help("add `serve: VARIANT`, or `split: {VARIANT: 10%, OTHER: rest}`");
            report.error(Code::MISSING_KEY, at, || "the rule gives nothing".to_owned(), remedy);
            None
        }
    };
    Some(Rule { name: name.map_or_else(|| (index + 1).to_string(), str::to_owned), when: when?, serve: serve? })
}

/// Variants with their shares, `rest` worked out.
fn shares(report: &mut Report<'_>, split: &Entry<'_>) -> Option<Vec<Share>> {
    const WHAT: &str = "a share such as `10%`, or `rest`";
    let Value::Mapping(entries) = &split.value.value else {
        expected(report, &split.value, "a mapping of variants to shares", "write `split: {VARIANT: 10%, OTHER: rest}`");
        return None;
    };
    let mut rest: Option<&Entry<'_>> = None;
    let mut shares = Vec::with_capacity(entries.len());
    let mut complete = true;
    for entry in entries {
        let variant = key(report, entry, "a variant");
        let share = match &entry.value.value {
            Value::Scalar(Scalar::Text, text) if text == "rest" => {
                if let Some(first) = rest {
                    let message = || "only one variant can have the rest".to_owned();
                    report.error(Code::CONFLICTING_KEYS, entry.value.span, message, |diagnostic, sources| {
                        let other = sources.location(first.value.span);
                        diagnostic.at(other, "the other one").help("give one of them a share such as `10%`")
                    });
                    complete = false;
                }
                rest = Some(entry);
                Some(Percent::default())
            }
            Value::Scalar(Scalar::Integer | Scalar::Float, text) => {
                expected(report, &entry.value, WHAT, &format!("write `{}%`", cut(text)));
                None
            }
            _ => quantity(report, &entry.value, WHAT),
        };
        match variant.zip(share) {
            Some((variant, share)) => shares.push(Share { variant, share }),
            None => complete = false,
        }
    }
    if let Some(rest) = rest.filter(|_| complete) {
        let Some(left) = Split::rest(shares.iter().map(|share| share.share)) else {
            let message = || "the shares add up to more than 100%: there is no rest".to_owned();
            invalid(report, rest.value.span, message, "lower the others");
            return None;
        };
        if let Some(share) = shares.iter_mut().find(|share| share.variant.as_str() == rest.key) {
            share.share = left;
        }
    }
    complete.then_some(shares)
}

fn metadata(report: &mut Report<'_>, node: &Node<'_>) -> BTreeMap<String, Constant> {
    let entries = named(report, node, false, "write `metadata: {owner: web}`");
    entries.iter().filter_map(|entry| Some((entry.key.clone().into_owned(), constant(report, &entry.value)?))).collect()
}

/// Reports a problem of a whole flag where it is in the file.
fn place(report: &mut Report<'_>, entry: &Entry<'_>, problem: &Problem, variants: &BTreeMap<VariantName, Json>) {
    let (mut span, mut node) = (entry.key_span, Some(entry.value.as_ref()));
    let mut value = None;
    for step in &problem.path {
        (span, node) = match node.map(|node| &node.value) {
            Some(Value::Mapping(entries)) => match entries.iter().find(|entry| entry.key == step.as_str()) {
                Some(entry) => (entry.key_span, Some(entry.value.as_ref())),
                None => break,
            },
            Some(Value::List(items)) => match step.parse::<usize>().ok().and_then(|index| items.get(index)) {
                Some(item) => (item.span.part(0, 1), Some(item.as_ref())),
                None => break,
            },
            _ => break,
        };
        value = node.filter(|node| matches!(node.value, Value::Scalar(..))).map(|node| node.span);
    }
    // A share stands beside its variant, anything else is the value itself.
    let in_split = problem.path.len() == 4;
    let at = value.filter(|_| !in_split).unwrap_or(span);
    let message = || problem.error.to_string();
    match &problem.error {
        FlagError::UnknownVariant { variant } => {
            unknown(report, at, message, variants.keys().map(VariantName::as_str), variant.as_str());
        }
        FlagError::EmptySplit => invalid(report, at, message, "write `{VARIANT: 10%, OTHER: rest}`"),
        FlagError::Sum { .. } => {
            invalid(report, at, message, "write `rest` instead of one of them: it takes what is left");
        }
        FlagError::NoVariants => invalid(report, at, message, "add some: `variants: {plain: Hello}`"),
        FlagError::OnlyNull => invalid(report, at, message, "give one of them a value, or delete the flag"),
        FlagError::List => invalid(report, at, message, "put the list into a mapping: `{items: […]}`"),
        FlagError::MixedKinds { .. } => invalid(report, at, message, "programs ask for values of one kind"),
        FlagError::TwoShares { .. } => invalid(report, at, message, "add them up"),
    }
}
