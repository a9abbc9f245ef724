//! Whom a rule applies to: attributes with tests, and what combines them.

use orchestra_model::{
    diagnostic::Code,
    flag::{Attribute, Condition, Scalar as Constant, Test, VersionRange},
};

use super::{constant, json_number, parsed};
use crate::{
    decode::{Fields, boolean, expected, invalid, text},
    report::{Report, help},
    source::Span,
    tables,
    yaml::{Entry, Node, Scalar, Value},
};

/// All entries must hold.
pub(super) fn condition(report: &mut Report<'_>, node: &Node<'_>) -> Option<Condition> {
    let Value::Mapping(entries) = &node.value else {
        expected(report, node, "a mapping of attributes to tests", "write `when: {country: DE}`");
        return None;
    };
    if entries.is_empty() {
        invalid(report, node.span, || "the condition is empty".to_owned(), "delete `when` to mean everybody");
        return None;
    }
    let read: Vec<Option<Condition>> = entries.iter().map(|entry| part(report, entry)).collect();
    let mut parts = read.into_iter().collect::<Option<Vec<Condition>>>()?;
    if parts.len() == 1 { parts.pop() } else { Some(Condition::All(parts)) }
}

fn part(report: &mut Report<'_>, entry: &Entry<'_>) -> Option<Condition> {
    match entry.key.as_ref() {
        word @ ("all" | "any") => {
            let parts = conditions(report, &entry.value)?;
            Some(if word == "all" { Condition::All(parts) } else { Condition::Any(parts) })
        }
        "not" => Some(Condition::Not(Box::new(condition(report, &entry.value)?))),
        name => {
            let attribute = name.parse::<Attribute>().map_err(|error| {
                report.error(Code::INVALID_NAME, entry.key_span, || error.to_string(), help(""));
            });
            test(report, entry.key_span, &entry.value, &attribute.ok()?)
        }
    }
}

fn conditions(report: &mut Report<'_>, node: &Node<'_>) -> Option<Vec<Condition>> {
    let Value::List(items) = &node.value else {
        expected(report, node, "a list of conditions", "write `[{country: DE}, {plan: pro}]`");
        return None;
    };
    if items.is_empty() {
        invalid(report, node.span, || "the list of conditions is empty".to_owned(), "add a condition");
        return None;
    }
    let read: Vec<Option<Condition>> = items.iter().map(|item| condition(report, item)).collect();
    read.into_iter().collect()
}

/// A test of an attribute in any of its forms.
fn test(report: &mut Report<'_>, at: Span, node: &Node<'_>, attribute: &Attribute) -> Option<Condition> {
    let is = |test| Condition::Is { attribute: attribute.clone(), test };
    match &node.value {
        Value::Scalar(Scalar::Null, _) => {
            let remedy = "write `{present: false}` for an attribute that is absent";
            expected(report, node, "a value, a list of values, or a test", remedy);
            return None;
        }
        Value::Scalar(..) => return constant(report, node).map(|value| is(Test::Equals(value))),
        Value::List(_) => return constants(report, node).map(|values| is(Test::In(values))),
        Value::Mapping(_) => {}
    }
    let fields = Fields::read(report, node, &tables::TEST, at)?;
    let mut parts = Vec::new();
    let mut complete = true;
    for key in tables::TEST.all_keys() {
        let Some(entry) = fields.get(key.name) else { continue };
        let node = entry.value.as_ref();
        let part = match key.name {
            "not" => test(report, entry.key_span, node, attribute).map(|test| Condition::Not(Box::new(test))),
            "equals" => constant(report, node).map(|value| is(Test::Equals(value))),
            "in" => constants(report, node).map(|values| is(Test::In(values))),
            "starts_with" => texts(report, node).map(|texts| is(Test::StartsWith(texts))),
            "ends_with" => texts(report, node).map(|texts| is(Test::EndsWith(texts))),
            "contains" => {
                let several = matches!(node.value, Value::List(_));
                let values =
                    if several { constants(report, node) } else { constant(report, node).map(|value| vec![value]) };
                values.map(|values| is(Test::Contains(values)))
            }
            "above" => json_number(report, node).map(|bound| is(Test::Above(bound))),
            "at_least" => json_number(report, node).map(|bound| is(Test::AtLeast(bound))),
            "below" => json_number(report, node).map(|bound| is(Test::Below(bound))),
            "at_most" => json_number(report, node).map(|bound| is(Test::AtMost(bound))),
            "version" => {
                parsed::<VersionRange>(report, node, "a range of versions").map(|range| is(Test::Version(range)))
            }
            _ => boolean(report, node).map(|there| is(Test::Present(there))),
        };
        complete &= part.is_some();
        parts.extend(part);
    }
    if !complete {
        return None;
    }
    match parts.len() {
        // Unknown keys were reported; of none at all something must be said.
        0 if node.entries().is_some_and(<[_]>::is_empty) => {
            invalid(report, node.span, || "the test is empty".to_owned(), "write `{present: true}` for any value");
            None
        }
        1 => parts.pop(),
        _ => Some(Condition::All(parts)),
    }
}

fn constants(report: &mut Report<'_>, node: &Node<'_>) -> Option<Vec<Constant>> {
    let Value::List(items) = &node.value else {
        expected(report, node, "a list of values", "");
        return None;
    };
    if items.is_empty() {
        invalid(report, node.span, || "the list of values is empty".to_owned(), "add a value");
        return None;
    }
    let read: Vec<Option<Constant>> = items.iter().map(|item| constant(report, item)).collect();
    read.into_iter().collect()
}

/// One text, or a list of some.
fn texts(report: &mut Report<'_>, node: &Node<'_>) -> Option<Vec<String>> {
    if let Value::List(items) = &node.value {
        if items.is_empty() {
            invalid(report, node.span, || "the list of texts is empty".to_owned(), "add a text");
            return None;
        }
        let read: Vec<Option<String>> =
            items.iter().map(|item| text(report, item, "a text").map(str::to_owned)).collect();
        return read.into_iter().collect();
    }
    text(report, node, "a text, or a list of texts").map(|text| vec![text.to_owned()])
}
